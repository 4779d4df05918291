"""The example server: many at once get what each gets alone; faults stay with who made them."""

from __future__ import annotations

import json
import sys
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch

import shiva_dit
from examples import server as server_module
from examples.batching import UNPRUNED, Batcher, BusyError, Request
from shiva_dit.models.backbone import backbone_weights
from tests import load, tiny

COUNT = 24


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A batcher with three adapters, requests, and their pictures made alone."""
    pipe = load.build(tmp_path_factory.mktemp("words"))
    named = load.adapters(pipe.transformer)
    requests = load.wanted(COUNT, [*named, UNPRUNED])
    alone = load.Alone(pipe, named)
    expected = [alone.picture(request) for request in requests]
    nearest = load.nearest_wrong(alone, requests, expected, sample=3)
    shiva_dit.remove(pipe.transformer)
    batcher = Batcher(pipe, segments=load.SEGMENTS, text_tokens=load.TEXT_TOKENS)
    for name, adapter in named.items():
        batcher.add(name, adapter)
    yield batcher, requests, expected, nearest
    batcher.close()


@pytest.fixture(scope="module")
def address(served: Any) -> Iterator[tuple[str, int]]:
    with load.serving(served[0]) as found:
        yield found


def wish(**changes: Any) -> Request:
    given = {"prompt": "a", "adapter": "flat", "height": 32, "width": 32}
    return Request(**{**given, "steps": 4, "guidance": 1.0, "seed": 0, **changes})


def test_many_at_once_get_what_each_gets_alone(served: Any, address: tuple[str, int]) -> None:
    batcher, requests, expected, nearest = served
    assert nearest > load.NOISE  # or nothing could be told from this
    before = batcher.state()
    outcome = load.load(address, requests, expected, clients=12, leaving=6)
    assert outcome.wrong == []
    assert outcome.statuses == {200: COUNT - COUNT // 6}
    with batcher.alone():
        pass  # the last turn is over
    after = batcher.state()
    assert after["moved"] - before["moved"] > 1.2 * (after["turns"] - before["turns"])
    assert after["failed"] == before["failed"]


def test_whoever_leaves_is_no_longer_worked_for(served: Any, address: tuple[str, int]) -> None:
    batcher, requests, _, _ = served
    before = batcher.state()
    with batcher.alone():
        threads = [
            threading.Thread(target=load.leave, args=(address, requests[0], 0.01)) for _ in "ab"
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for _ in range(100):  # until the server has seen it
            with batcher._changed:
                waiting = [*batcher._waiting]
            if len(waiting) == 2 and all(each.dropped for each in waiting):
                break
            threading.Event().wait(0.1)
    for request in waiting:
        assert request.done.wait(60)
        assert request.picture is None
    after = batcher.state()
    assert after["dropped"] == before["dropped"] + 2
    assert after["made"] == before["made"]


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ("{", "the body isn't JSON"),
        ("[1]", "the body must be a JSON object"),
        ("{}", "prompt is missing"),
        ('{"prompt": "a", "promt": 1, "size": 2}', "unknown: promt, size; known are prompt, "),
        ('{"prompt": 3}', "prompt must be a text of 1 to 4000, got 3"),
        ('{"prompt": "a", "adapter": "fox"}', "no adapter 'fox'; served are: none, flat, rising"),
        ('{"prompt": "a", "height": 33}', "height must be a multiple of 4 up to 128, got 33"),
        (
            '{"prompt": "a", "height": 8, "width": 4096}',
            "width must be a multiple of 4 up to 128, got 4096",
        ),
        ('{"prompt": "a", "steps": true}', "steps must be int of 1 to 200, got True"),
        ('{"prompt": "a", "steps": 0}', "steps must be int of 1 to 200, got 0"),
        ('{"prompt": "a", "guidance": NaN}', "guidance must be float of 0.0 to 50.0, got nan"),
    ],
)
def test_what_cant_be_made_is_one_line(address: tuple[str, int], body: str, said: str) -> None:
    status, answer = load.ask(address, "POST", "/generate", body)
    assert status == 400
    assert list(answer) == ["error"]
    assert answer["error"].startswith(said)
    assert "\n" not in answer["error"]


def test_other_places_and_large_bodies(address: tuple[str, int]) -> None:
    assert load.ask(address, "GET", "/adapters")[1] == {
        "adapters": ["none", "flat", "rising", "lora"]
    }
    assert load.ask(address, "GET", "/nothing")[0] == 404
    assert load.ask(address, "POST", "/nothing", "{}")[0] == 404
    assert load.ask(address, "POST", "/generate", " " * (server_module.MAX_BODY + 1))[0] == 413


def test_a_fault_ends_its_group_alone(
    served: Any, address: tuple[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    batcher, requests, expected, _ = served
    right = batcher.predict

    def predict(group: list[Request]) -> None:
        if group[0].prompt == "broken":
            raise RuntimeError("out of memory\nat a line of its own")
        right(group)

    monkeypatch.setattr(batcher, "predict", predict)
    status, answer = load.ask(address, "POST", "/generate", '{"prompt": "broken", "height": 32}')
    assert (status, answer) == (400, {"error": "width must be a multiple of 4 up to 128, got 512."})
    broken = json.dumps({**requests[0], "prompt": "broken"})
    status, answer = load.ask(address, "POST", "/generate", broken)
    assert (status, answer) == (500, {"error": "RuntimeError: out of memory at a line of its own"})
    outcome = load.load(address, requests[:1], expected[:1], clients=1, leaving=99)
    assert (outcome.wrong, outcome.statuses) == ([], {200: 1})


def test_too_many_are_asked_to_come_again(
    served: Any, address: tuple[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    batcher, requests, _, _ = served
    monkeypatch.setattr(batcher, "max_waiting", 0)
    status, answer = load.ask(address, "POST", "/generate", json.dumps(requests[0]))
    assert (status, answer) == (503, {"error": "0 requests wait already: try again later."})


def begun(batcher: Batcher, *requests: Request) -> None:
    """Requests of the loop, each at its own `step`."""
    for request in requests:
        batcher.start(request)
        request.turn = batcher.counts["turns"]
        batcher._running.append(request)


@pytest.fixture
def still(served: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[Batcher]:
    """The batcher, between two turns."""
    with served[0].alone(), torch.no_grad():
        monkeypatch.setattr(served[0], "_running", [])
        yield served[0]
        served[0]._running.clear()


def test_a_group_shares_adapter_size_guidance_and_row(still: Batcher) -> None:
    flat = [wish(step=step) for step in (0, 1, 3)]
    other = [wish(adapter="lora"), wish(width=48), wish(guidance=3.0)]
    begun(still, *flat, *other)
    assert still._pick() == flat  # at different steps
    still._running.clear()
    rising = [wish(adapter="rising", steps=8, step=step) for step in range(8)]
    begun(still, *rising)
    rows = {still.group_of(request)[3] for request in rising}
    assert len(rows) == 4
    table = still.served["rising"].adapter.schedule.for_tokens(64, multiple=1, segments=4)
    times = [float(request.timestep) / 1000 for request in rising]
    assert rows == {table.row(t) for t in times}
    group = still._pick()
    assert len({still.group_of(request) for request in group}) == 1
    assert len(group) == max(sum(table.row(t) == row for t in times) for row in rows)


def test_the_largest_group_goes_first_but_nobody_waits_for_ever(
    still: Batcher, monkeypatch: pytest.MonkeyPatch
) -> None:
    lone = wish(adapter="lora")
    many = [wish() for _ in range(3)]
    begun(still, lone, *many)
    assert still._pick() == many
    monkeypatch.setattr(still, "max_batch", 2)
    assert still._pick() == many[:2]
    turn = still.counts["turns"]
    lone.turn = turn - still.patience
    assert still._pick() == many[:2]
    lone.turn -= 1
    assert still._pick() == [lone]


def test_adapters_come_between_turns_and_leave_the_others_alone(served: Any) -> None:
    batcher, _, _, _ = served
    model = batcher.pipe.transformer
    before = {name: value.clone() for name, value in model.state_dict().items()}
    full = tiny.adapter(model, backbone="full")
    full.backbone_weights = {
        name: value + 1.0 for name, value in backbone_weights(model, "full").items()
    }
    with pytest.raises(ValueError, match="'flat' is served already"):
        batcher.add("flat", full)
    with pytest.raises(ValueError, match="trained on another backbone"):
        batcher.add("foreign", tiny.adapter(tiny.sd3(num_layers=2)))
    assert "foreign" not in batcher.served
    batcher.add("full", full)
    try:
        changed = batcher.served["full"].model
        weights: Any = dict(changed.named_parameters())
        assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
        assert not any(torch.equal(before[name], value) for name, value in weights.items())
        shared = batcher.served["flat"].model
        assert shared.proj_out.weight is model.proj_out.weight
    finally:
        del batcher.served["full"]


def test_a_closed_server_ends_what_waits(tmp_path: Any) -> None:
    batcher = Batcher(load.build(tmp_path), text_tokens=load.TEXT_TOKENS)
    with batcher.alone():
        request = batcher.submit(wish(adapter=UNPRUNED))
        closing = threading.Thread(target=batcher.close)
        closing.start()
        assert request.done.wait(60)
    closing.join()
    assert isinstance(request.error, BusyError)
    with pytest.raises(BusyError, match="stopping"):
        batcher.submit(wish(adapter=UNPRUNED))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--adapter", "fox"], "server: --adapter takes NAME=FOLDER, got 'fox'.\n"),
        (["--adapter", "fox=/nowhere/at/all"], "/nowhere/at/all"),
        ([], "/no/pipeline"),
    ],
)
def test_what_cant_be_served_is_said_at_the_start(
    arguments: list[str],
    said: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(sys, "argv", ["server", "/no/pipeline", *arguments])
    assert server_module.main() == 2
    assert said in capsys.readouterr().err
