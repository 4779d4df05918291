"""Models that several processes run as one, by diffusers' `enable_parallelism`."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.distributed.tensor import DTensor


def _config(model: Any, name: str) -> Any:
    """What a model was told of one kind of parallelism; None: nothing."""
    return getattr(getattr(model, "_parallel_config", None), name, None)


def context_parallel(model: Any) -> Any:
    """The config of a model whose tokens are split among processes; None if they aren't."""
    return _config(model, "context_parallel_config")


def is_tensor_parallel(model: Any) -> bool:
    """Whether each process has some of the heads and channels of a model's layers."""
    return _config(model, "tensor_parallel_config") is not None


def refuse_parallel(model: Any) -> None:
    """Raise where several processes run one model, and a reducer shall go on.

    Raises:
        ValueError: Says what to do.
    """
    if getattr(model, "_parallel_config", None) is not None:
        raise ValueError(
            "the model is run by several processes (enable_parallelism), and a reducer can't go "
            "along with that: run it in one process."
        )


def is_part(model: nn.Module, layer: nn.Module) -> bool:
    """Whether a layer is but this process's part of one (tensor parallelism), in its forward too.

    (FSDP2 shares weights as well, and gathers them before a forward.)
    """
    weight = layer._parameters.get("weight")
    return isinstance(weight, DTensor) and is_tensor_parallel(model)


def why_not_beside(path: str) -> str:
    """Of a LoRA or DoRA beside such a layer: why not, and what to do."""
    return (
        f"each process has a part of {path} (tensor parallelism), and a LoRA or DoRA can't lie "
        "beside that: apply to the whole model without merge=False, then enable_parallelism."
    )
