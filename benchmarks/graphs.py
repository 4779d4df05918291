"""Replays CUDA graphs of pruned forwards and compares them with the same forwards, bit by bit.

Models of several families with random weights, in bfloat16: rows of different token counts, one
pass of guidance, both in a batch, and two in turn, each three times. A record is written after each
model, so that what is known stays known if the next one breaks off.

    python benchmarks/graphs.py --out results            on a GPU
    python benchmarks/graphs.py --out /tmp/try --tiny    forwards alone, on a CPU: no graph there
"""

from __future__ import annotations

import argparse
import datetime
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

import shiva_dit
from shiva_dit.benchmark.workloads import workload
from shiva_dit.core.schedule import Schedule
from shiva_dit.models.attach import attachment_of
from shiva_dit.models.families import model_spec
from shiva_dit.provenance import hardware_name, provenance, write_json

MODELS = ("sd3-small", "sd35-small", "pixart-sigma", "flux-dev")
TIMES = (0.9, 0.5, 0.1)
ROUNDS = 3
Passes = Literal["one", "both", "cond", "uncond"]


def main() -> None:
    """Compare on each model, and write a record of each."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder for the records")
    parser.add_argument("--tiny", action="store_true", help="a small model on a CPU")
    options = parser.parse_args()
    if not options.tiny and not torch.cuda.is_available():
        raise SystemExit("there is no GPU here: pass --tiny to try the script on a CPU.")
    device = torch.device("cpu" if options.tiny else "cuda")
    for name in ("sd3-tiny",) if options.tiny else MODELS:
        record = {"what": f"graphs-{name}", **compare(name, device), "provenance": provenance()}
        hardware, stamp = hardware_name(record["provenance"]), datetime.date.today().isoformat()
        write_json(options.out / f"graphs-{name}--{hardware}--{stamp}.json", record)
        print(name, record["forwards"], record["replays"], record["unequal"], flush=True)


@torch.inference_mode()
def compare(name: str, device: torch.device) -> dict[str, Any]:
    """How many forwards there were, how many were replays, and which gave other bits."""
    load = workload(name)
    grid = load.grid(None)
    model = load.build(grid, torch.bfloat16, device)
    config = shiva_dit.ShivaConfig.for_model(model)
    full = set(config.full_blocks)
    blocks = range(config.num_blocks)
    ratios = [[1.0 if b in full else ratio for b in blocks] for ratio in (0.5, 0.6, 0.8)]
    schedule = Schedule.from_ratios(ratios, config.full_blocks)
    shiva_dit.apply(model, shiva_dit.ShivaAdapter(config, schedule))
    expected = [output for _, output in _forwards(load, model, grid)]
    if device.type == "cuda":
        shiva_dit.cuda_graphs(model)
    unequal = [
        case
        for (case, found), right in zip(_forwards(load, model, grid), expected, strict=True)
        if not torch.equal(found, right)
    ]
    attachment = attachment_of(model)
    assert attachment is not None
    graphs = attachment.forwards.graphs
    replays = 0 if graphs is None else graphs.replays
    shiva_dit.remove(model)
    return {"forwards": len(expected), "replays": replays, "unequal": unequal}


def _forwards(load: Any, model: Any, grid: Any) -> Iterator[tuple[str, Tensor]]:
    """What each forward is, and its output; the same ones whenever they are asked for."""
    passes: tuple[Passes, ...] = ("one", "both", "cond", "uncond")
    spec, device = model_spec(model), next(model.parameters()).device
    for round_ in range(ROUNDS):
        for t in TIMES:
            for each in passes:
                torch.manual_seed(round_)
                batch = 2 if each == "both" else 1
                given = load.inputs(model, batch, grid, load.text_tokens, torch.bfloat16)
                timestep = spec.timestep_at(torch.full((batch,), t, device=device))
                guided = nullcontext() if each == "one" else shiva_dit.guided(model, passes=each)
                with guided:
                    output = model(**given, **{spec.timestep: timestep}, return_dict=False)
                yield f"round {round_}, t = {t}, {each}", tree_leaves(output)[0].clone()


if __name__ == "__main__":
    main()
