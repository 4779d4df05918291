"""The example server under load on the loopback address, each picture held to the one made alone.

`python -m tests.load` sends 1,000 requests and writes a record into results/.
"""

from __future__ import annotations

import copy
import datetime
import http.client
import io
import json
import random
import socket
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

import shiva_dit
from examples.batching import UNPRUNED, Batcher
from examples.server import Server
from shiva_dit.core.schedule import Schedule
from shiva_dit.models.backbone import PEFT_NAME, add_lora, backbone_weights
from shiva_dit.provenance import hardware_name, provenance, write_json
from tests import tiny, whole

RESULTS = Path(__file__).parents[1] / "results"
SIZES = ((32, 32), (32, 48))
TEXT_TOKENS = 8
SEGMENTS = 4
NOISE = 1
"""Levels of 256 that a picture may be off from the one made alone: other parts of a batch sum
otherwise, which moves a value by some 1e-6 of its range, and so a level where it was about to be
rounded the other way."""


def build(folder: Path) -> Any:
    """A pipeline with all its parts, whose pictures have every value from 0 to 255."""
    pipe = whole.WHOLE["sd3"].build(folder)
    with torch.no_grad():  # else another adapter's picture is off by a level or two
        pipe.vae.decoder.conv_out.weight.mul_(20.0)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def adapters(model: Any) -> dict[str, shiva_dit.ShivaAdapter]:
    """One with equal rows for all times, one with four different ones, one with a LoRA."""
    blocks = len(model.transformer_blocks)
    rising = [[0.3 + 0.2 * row] * blocks for row in range(4)]
    made = {
        "flat": tiny.adapter(model),
        "rising": tiny.adapter(model, Schedule.from_ratios(rising, [])),
        "lora": tiny.adapter(model, backbone="lora", lora_rank=2),
    }
    tiny.randomize(made["rising"].router, seed=11, std=1.0)
    tuned = copy.deepcopy(model)
    add_lora(tuned, {"r": 2, "lora_alpha": 2})
    tiny.fill_lora(tuned, PEFT_NAME, seed=12)
    made["lora"].backbone_weights = backbone_weights(tuned, "lora")
    return made


def wanted(count: int, names: Sequence[str], seed: int = 0) -> list[dict[str, Any]]:
    """Requests for pictures, no two alike."""
    draw = random.Random(seed)
    return [
        {
            "prompt": "".join(draw.choices("abcdefghij", k=6)),
            "adapter": draw.choice(names),
            **dict(zip(("height", "width"), draw.choice(SIZES), strict=True)),
            "steps": draw.randint(2, 5),
            "guidance": draw.choice([1.0, 3.0, 6.0]),
            "seed": place,
        }
        for place in range(count)
    ]


class Alone:
    """Pictures by diffusers' own pipeline, one at a time."""

    def __init__(self, pipe: Any, made: dict[str, shiva_dit.ShivaAdapter]) -> None:
        self.pipe, self.made, self.on = pipe, made, UNPRUNED

    def picture(self, request: dict[str, Any]) -> np.ndarray:
        """Of values from 0 to 255."""
        model = self.pipe.transformer  # not the pipeline, lest rows go by the run's own steps
        if request["adapter"] != self.on:
            self.on = request["adapter"]
            shiva_dit.remove(model)
            if self.on != UNPRUNED:
                shiva_dit.apply(model, self.made[self.on], segments=SEGMENTS)
        given = {name: request[name] for name in ("prompt", "height", "width")}
        images = self.pipe(
            **given,
            num_inference_steps=request["steps"],
            guidance_scale=request["guidance"],
            generator=torch.Generator().manual_seed(request["seed"]),
            max_sequence_length=TEXT_TOKENS,
        ).images
        return np.asarray(images[0]).astype(int)


@contextmanager
def serving(batcher: Batcher) -> Iterator[tuple[str, int]]:
    """A server in this process."""
    server = Server(("127.0.0.1", 0), batcher)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield server.server_address[:2]  # type: ignore[misc]
    finally:
        server.shutdown()
        thread.join()
        batcher.close()
        server.server_close()


def ask(address: tuple[str, int], method: str, path: str, body: str | None = None) -> Any:
    """Status and body of an answer; read as JSON where it is."""
    connection = http.client.HTTPConnection(*address, timeout=600)
    try:
        connection.request(method, path, body)
        answer = connection.getresponse()
        read = answer.read()
    finally:
        connection.close()
    is_json = answer.headers["Content-Type"] == "application/json"
    return answer.status, json.loads(read) if is_json else read


def leave(address: tuple[str, int], request: dict[str, Any], after_s: float) -> None:
    """Ask for a picture, and go away before it is there."""
    body = json.dumps(request)
    with socket.create_connection(address) as connection:
        head = f"POST /generate HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n"
        connection.sendall((head + body).encode())
        time.sleep(after_s)


@dataclass
class Outcome:
    """What came back."""

    statuses: Counter[int] = field(default_factory=Counter)
    levels: Counter[int] = field(default_factory=Counter)
    """Pictures by how many levels their worst value is off from the one made alone."""
    wrong: list[dict[str, Any]] = field(default_factory=list)
    left: int = 0
    """Clients that went away."""
    latencies_s: list[float] = field(default_factory=list)


def load(
    address: tuple[str, int],
    requests: Sequence[dict[str, Any]],
    expected: Sequence[np.ndarray],
    *,
    clients: int,
    leaving: int,
) -> Outcome:
    """Send all requests from several clients at once; one of every `leaving` goes away."""
    outcome, guard = Outcome(), threading.Lock()

    def one(place: int) -> None:
        if place % leaving == leaving - 1:
            leave(address, requests[place], 0.02 * (place % 7))
            with guard:
                outcome.left += 1
            return
        begun = time.monotonic()
        while True:
            status, body = ask(address, "POST", "/generate", json.dumps(requests[place]))
            with guard:
                outcome.statuses[status] += 1
            if status != 503:
                break
            time.sleep(0.2)
        with guard:
            outcome.latencies_s.append(time.monotonic() - begun)
            if status != 200:
                outcome.wrong.append({**requests[place], "answer": body})
                return
            off = distance(np.asarray(Image.open(io.BytesIO(body))), expected[place])
            outcome.levels[off] += 1
            if off > NOISE:
                outcome.wrong.append({**requests[place], "levels": off})

    with ThreadPoolExecutor(clients) as pool:
        list(pool.map(one, range(len(requests))))
    return outcome


def distance(one: np.ndarray, other: np.ndarray) -> int:
    """The largest difference of two pictures' values, 256 for other sizes."""
    return 256 if one.shape != other.shape else int(np.abs(one.astype(int) - other).max())


def nearest_wrong(
    alone: Alone, requests: Sequence[dict[str, Any]], expected: Sequence[np.ndarray], sample: int
) -> int:
    """What a wrong picture is off by at least: another request's, or by another adapter."""
    pairs = ((a, b) for place, a in enumerate(expected) for b in expected[:place])
    nearest = min(distance(a, b) for a, b in pairs)
    for adapter in (*alone.made, UNPRUNED):
        for place in range(0, len(requests), max(1, len(requests) // sample)):
            if requests[place]["adapter"] != adapter:
                other = alone.picture({**requests[place], "adapter": adapter})
                nearest = min(nearest, distance(other, expected[place]))
    return nearest


def main(count: int = 1000) -> int:
    """Run by hand, and write the record if no picture was wrong."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as made:
        pipe = build(Path(made))
        named = adapters(pipe.transformer)
        requests = wanted(count, [*named, UNPRUNED])
        begun = time.monotonic()
        alone = Alone(pipe, named)
        order = sorted(range(count), key=lambda place: requests[place]["adapter"])
        found = {place: alone.picture(requests[place]) for place in order}
        alone_s = time.monotonic() - begun
        expected = [found[place] for place in range(count)]
        nearest = nearest_wrong(alone, requests, expected, sample=50)
        shiva_dit.remove(pipe.transformer)
        batcher = Batcher(pipe, segments=SEGMENTS, text_tokens=TEXT_TOKENS)
        for name, adapter in named.items():
            batcher.add(name, adapter)
        begun = time.monotonic()
        with serving(batcher) as address:
            outcome = load(address, requests, expected, clients=48, leaving=10)
            served_s = time.monotonic() - begun
            state = batcher.state()
    latencies = sorted(outcome.latencies_s)
    record = {
        "what": "serving",
        "requests": count,
        "adapters": list(named),
        "sizes": SIZES,
        "clients": 48,
        "left": outcome.left,
        "statuses": dict(outcome.statuses),
        "levels": dict(sorted(outcome.levels.items())),
        "tolerance_levels": NOISE,
        "nearest_wrong_levels": nearest,
        "wrong": outcome.wrong,
        "state": state,
        "requests_per_forward": state["moved"] / state["turns"],
        "served_s": served_s,
        "alone_s": alone_s,
        "latency_s": {q: latencies[int(q * (len(latencies) - 1))] for q in (0.5, 0.95, 1.0)},
        "provenance": provenance(),
    }
    stamp = datetime.date.today().isoformat()
    path = RESULTS / f"serving--{hardware_name(record['provenance'])}--{stamp}.json"
    sys.stdout.write(json.dumps({k: v for k, v in record.items() if k != "provenance"}) + "\n")
    if not outcome.wrong and count >= 1000:
        write_json(path, record)
        sys.stdout.write(f"{path}\n")
    return bool(outcome.wrong)


if __name__ == "__main__":
    sys.exit(main(*map(int, sys.argv[1:])))
