"""Models that two processes run as one (diffusers' `enable_parallelism`), with an adapter on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusers import TensorParallelConfig

import shiva_dit
from tests import running
from tests.test_composition import Case, in_two_processes, near, selected, split

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
