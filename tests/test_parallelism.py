"""Models that two processes run as one (diffusers' `enable_parallelism`), with an adapter on."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import diffusers
import pytest
import torch
from diffusers import ContextParallelConfig, TensorParallelConfig
from torch import Tensor

import shiva_dit
from shiva_dit import attach_reducer
from shiva_dit.core.schedule import Schedule
from shiva_dit.methods.norm import NormSelector
from shiva_dit.methods.random_tokens import RandomSelector
from shiva_dit.methods.tomesd import ToMeSD
from shiva_dit.models.attach import attach, attachment_of
from shiva_dit.models.context_parallel import CLASSES
from tests import families, running
from tests.test_composition import Case, even_text, in_two_processes, near, selected, split

TENSOR = ["flux2-klein", "qwen-image", "qwen-image-2.1"]
"""With Flux.1 (`test_composition`), one family of each class that diffusers has a plan for."""


def started(rank: int, folder: str, threads: int) -> None:
    torch.set_num_threads(threads)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2
    )


def _tensor(rank: int, folder: str, threads: int) -> None:
    started(rank, folder, threads)
    found: dict[str, Any] = {}
    for family in TENSOR:
        case = Case(family=family)
        split(case.model, TensorParallelConfig(tp_degree=2))
        case.apply()
        chosen = selected(case.model, lambda: found.update({f"{family} pruned": case.run()}))  # noqa: B023
        found[f"{family} chosen"] = chosen
    case = Case("lora", "flux")
    case.apply(merge=False)
    split(case.model, TensorParallelConfig(tp_degree=2))
    with pytest.raises(RuntimeError) as raised:
        case.run()
    found["beside"] = str(raised.value)
    shiva_dit.remove(case.model)
    found["bare"] = case.run()
    torch.save(found, f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


def test_tensor_parallelism_by_class(tmp_path: Path) -> None:
    """The same tokens in both processes as in one, for every class that has a plan."""
    planned = {
        family
        for name, family in running.FAMILY.items()
        if getattr(getattr(diffusers, name), "_tp_plan", None)
    }
    assert planned == {"flux", *TENSOR}
    in_two_processes(_tensor, str(tmp_path), torch.get_num_threads())
    results = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    for family in TENSOR:
        case = Case(family=family)
        case.apply()
        chosen = selected(case.model, case.run)
        for found in results:
            assert all(map(torch.equal, found[f"{family} chosen"], chosen))
            # Layers sum the halves of their inputs' channels apart: 3e-7 at most was measured.
            assert near(found[f"{family} pruned"], case.pruned, 1e-6)
    bare = Case(family="flux").bare
    for found in results:
        assert "can't lie beside" in found["beside"]
        assert near(found["bare"], bare, 1e-6)


uniform = Schedule.uniform(0.5, num_blocks=4)
CONTEXT = ["flux", "flux2-klein", "qwen-image", "qwen-image-edit", "wan", "chronoedit"]
"""Of each class whose tokens may be split: one family, and the one that modulates by token."""


def _guided(case: Case) -> tuple[Tensor, list[Tensor]]:
    """A guided pass whose halves share their tokens, and these."""
    found: list[Tensor] = []
    with shiva_dit.guided(case.model, "both"):
        chosen = selected(case.model, lambda: found.append(case.run(**_shared(case.family))))
    return found[0], chosen


def _shared(family: str) -> dict[str, Tensor]:
    """Of arguments those that two processes can't share as they are in other tests."""
    text = even_text(family)
    if family == "flux2-klein":  # its plan splits tables with a dimension for the batch
        text["txt_ids"] = text["txt_ids"][None]
        text["img_ids"] = families.arguments(family)["img_ids"][None]
    return text


def _split_case(family: str) -> Case:
    return Case(family=family, rejected="low_rank", rejected_rank=2)


def _context(rank: int, folder: str, threads: int) -> None:
    started(rank, folder, threads)
    found: dict[str, Any] = {}
    for family in CONTEXT:
        case = _split_case(family)
        split(case.model, ContextParallelConfig(ulysses_degree=2))
        case.apply(multiple=2)
        found[family] = _guided(case)
    torch.save(found, f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_context_parallelism_by_class(tmp_path: Path) -> None:
    """The same tokens as in one process and as many of them in each, guidance halves alike."""
    assert {type(families.made(family)).__name__ for family in CONTEXT} == CLASSES
    in_two_processes(_context, str(tmp_path), torch.get_num_threads())
    results = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    for family in CONTEXT:
        case = _split_case(family)
        case.apply(multiple=2)
        output, chosen = _guided(case)
        for tokens in chosen:
            assert tokens.shape[1] % 2 == 0
            assert torch.equal(tokens[0], tokens[1])
        for found in results:
            assert all(map(torch.equal, found[family][1], chosen)), family
            # Products of half as many rows round otherwise: 9.7e-7 at most was measured (3.5e-7
            # of the bare models), and 0.1 with one process's rotary rows for all.
            assert near(found[family][0], output, 1e-5), family


def _refused(rank: int, folder: str, threads: int) -> None:
    started(rank, folder, threads)
    said: dict[str, str] = {}

    def note(name: str, call: Callable[[], object]) -> None:
        with pytest.raises(ValueError, match=" ") as raised:
            call()
        said[name] = str(raised.value)

    text = even_text("flux")
    ring = families.made("flux")
    split(ring, ContextParallelConfig(ring_degree=2))
    note("diffusers' ring", lambda: families.run(ring, {**families.arguments("flux"), **text}))
    note("ring", lambda: attach(ring, NormSelector(), uniform))
    case = Case(family="flux")
    split(case.model, ContextParallelConfig(ulysses_degree=2))
    chance = RandomSelector(torch.Generator())
    note("chance", lambda: attach(case.model, chance, uniform))
    assert attachment_of(case.model) is None
    case.apply(multiple=1)
    note("odd", lambda: case.run(**text))
    case.apply(multiple=2)
    note("gradients", lambda: families.run(case.model, {**families.arguments("flux"), **text}))
    note("compile", lambda: shiva_dit.compile(case.model))
    note("whole steps", lambda: shiva_dit.correct(case.model, whole_steps=1))
    found = {"said": said, "chosen": selected(case.model, lambda: case.run(**text))}
    torch.save(found, f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_what_context_parallelism_refuses(tmp_path: Path) -> None:
    in_two_processes(_refused, str(tmp_path), torch.get_num_threads())
    case = Case(family="flux")
    case.apply(multiple=2)
    chosen = selected(case.model, lambda: case.run(**even_text("flux")))
    for rank in range(2):
        found = torch.load(tmp_path / f"{rank}.pt")
        for name, words in {
            "diffusers' ring": "Native attention does not support return_lse",
            "ring": "Ulysses in equal parts alone",
            "chance": "RandomSelector looks at all tokens",
            "odd": "apply with multiple=2",
            "gradients": "within torch.no_grad()",
            "compile": "shiva_dit.compile can't be had",
            "whole steps": "shiva_dit.correct can't be had",
        }.items():
            assert words in found["said"][name], found["said"][name]
        assert all(map(torch.equal, found["chosen"], chosen))


ULYSSES = SimpleNamespace(
    context_parallel_config=SimpleNamespace(ring_degree=1, ulysses_anything=False)
)
"""What diffusers records on a model, where the processes themselves are not needed."""


@pytest.mark.parametrize(
    ("family", "name"), [("sd3", "SD3Transformer2DModel"), ("ltx", "LTXVideoTransformer3DModel")]
)
def test_context_parallelism_of_other_classes_is_refused(family: str, name: str) -> None:
    case = Case(family=family)
    case.model._parallel_config = ULYSSES
    with pytest.raises(ValueError, match=f"{name} can't be had"):
        case.apply()
    assert attachment_of(case.model) is None
    case.model._parallel_config = None
    case.apply()
    case.model._parallel_config = ULYSSES
    with pytest.raises(ValueError, match=f"{name} can't be had"):
        case.run()
    case.model._parallel_config = None
    with shiva_dit.disabled(case.model):
        assert torch.equal(case.run(), case.bare)


def test_whole_steps_that_were_on_before_can_be_taken_off() -> None:
    case = Case(family="flux")
    case.apply()
    shiva_dit.correct(case.model, whole_steps=1)
    case.model._parallel_config = ULYSSES
    with pytest.raises(ValueError, match="can't be had with context parallelism"):
        case.run()
    shiva_dit.correct(case.model, whole_steps=0)
    case.model._parallel_config = None
    assert torch.equal(case.run(), case.pruned)


def test_reducers_are_refused() -> None:
    model = families.made("sd3")
    model._parallel_config = object()
    with pytest.raises(ValueError, match="run it in one process"):
        attach_reducer(model, ToMeSD(keep_ratio=0.5))
    model._parallel_config = None
    attach_reducer(model, ToMeSD(keep_ratio=0.5)).detach()
