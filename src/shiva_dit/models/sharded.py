"""Weights that several processes share (FSDP2), and tensors of theirs as wholes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed._composable_state import _module_state_mapping
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils._pytree import tree_map

from shiva_dit.models.families import model_spec


def shard(model: nn.Module, device: torch.device) -> Callable[[], None]:
    """Leave each process of the group its share of a model's weights, on a device.

    A block's are gathered when it runs, and let go. Gradients are averaged over processes in
    float64 and left so, that their order changes nothing that float32 shows.

    Returns:
        What all processes call together to have a plain model again, with all weights where they
        were; torch itself has no way back.
    """
    named = [*model.named_parameters(), *model.named_buffers()]
    where = {name: tensor.device for name, tensor in named}
    before = [(module, type(module), _contents(module)) for module in model.modules()]
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    how: dict[str, Any] = {
        "mesh": mesh,
        "reshard_after_forward": True,
        "mp_policy": MixedPrecisionPolicy(reduce_dtype=torch.float64, cast_forward_inputs=False),
    }
    for block in model_spec(model).blocks(model):
        fully_shard(block, **how)
    fully_shard(model, **how)
    flags = [parameter.requires_grad for parameter in model.parameters()]
    model.requires_grad_(True)  # it looks for dtypes at those that learn, and once
    whole_model: Any = model
    whole_model._get_fsdp_state()._lazy_init()
    for module in model.modules():
        if isinstance(module, FSDPModule):
            for group in _groups(module):
                group._orig_dtype = None  # no gradient is cast back
    for parameter, flag in zip(model.parameters(), flags, strict=True):
        parameter.grad_dtype = None
        parameter.requires_grad_(flag)
    put_on = [(module, kind, *_more(module, had)) for module, kind, had in before]

    def undo() -> None:
        for module, kind, names, hooks in put_on:
            module.__class__ = kind
            for name in names:
                module.__dict__.pop(name, None)
            for held, key in hooks:
                module.__dict__[held].pop(key, None)
            _module_state_mapping.pop(module, None)
        _make_whole(model, where)

    return undo


def _contents(module: nn.Module) -> dict[str, set[Any]]:
    """The names of what a module holds, and the keys of its hooks."""
    return {
        name: set(value) if "_hooks" in name and isinstance(value, dict) else set()
        for name, value in module.__dict__.items()
    }


def _more(module: nn.Module, had: Mapping[str, set[Any]]) -> tuple[list[str], list[Any]]:
    """What a module holds by now beside what it had: names, and hooks by holder and key."""
    has = _contents(module)
    hooks = [(name, key) for name in had for key in has[name] - had[name]]
    return [name for name in has if name not in had], hooks


@torch.no_grad()
def _make_whole(model: nn.Module, where: Mapping[str, torch.device]) -> None:
    """Plain parameters for shared ones, one after the other; those that are one stay one."""
    made: dict[int, nn.Parameter] = {}
    for name, parameter in list(model.named_parameters(remove_duplicate=False)):
        if id(parameter) not in made:
            value = whole(parameter.detach()).to(where[name])
            made[id(parameter)] = nn.Parameter(value, requires_grad=parameter.requires_grad)
        owner, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(owner), leaf, made[id(parameter)])
    for name, buffer in list(model.named_buffers()):
        owner, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(owner), leaf, buffer.to(where[name]))


def _groups(module: Any) -> list[Any]:
    state = module._get_fsdp_state()
    found = getattr(state, "_fsdp_param_groups", None) or [state._fsdp_param_group]
    return [group for group in found if group is not None]


def sum_by_block(blocks: Iterable[nn.Module]) -> Callable[[], None]:
    """Have each block sum the gradients of what enters it before those of other blocks are added.

    FSDP2 sums them so. What enters several, as the embedding of the time does, then gets the same
    bits with and without it.

    Returns:
        What takes this back.
    """
    handles = [
        block.register_forward_pre_hook(_by_itself, prepend=True, with_kwargs=True)
        for block in blocks
    ]

    def undo() -> None:
        for handle in handles:
            handle.remove()

    return undo


def _by_itself(_: nn.Module, args: Any, kwargs: Any) -> Any:
    return tree_map(_view, (args, kwargs)) if torch.is_grad_enabled() else None


def _view(value: Any) -> Any:
    learns = isinstance(value, Tensor) and value.requires_grad
    return value.view_as(value) if learns else value


def is_shared(tensor: Tensor) -> bool:
    """Whether each process holds a share of it."""
    return isinstance(tensor, DTensor)


def is_sharded(model: nn.Module) -> bool:
    """Whether processes share a model's weights: then they all run its forward, or none."""
    return any(is_shared(parameter) for parameter in model.parameters())


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor; all processes must ask for it where they share it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def gathered(tensors: Mapping[str, Tensor], *, keep: bool) -> dict[str, Tensor]:
    """Tensors as wholes, those that are shared on the host, one after the other.

    Args:
        tensors: By name, the same in all processes.
        keep: Whether this process wants those that are shared.
    """
    found: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if not is_shared(tensor):
            found[name] = tensor
            continue
        value = whole(tensor)
        if keep:
            found[name] = value.to("cpu")
    return found


def norm_of(tensors: Sequence[Tensor]) -> Tensor:
    """Of tensors, all shared or all whole; in float64, so that who sums what changes nothing."""
    own = [tensor.to_local() if isinstance(tensor, DTensor) else tensor for tensor in tensors]
    wide = torch.float32 if own[0].device.type == "mps" else torch.float64  # Apple's have none
    norms = [torch.linalg.vector_norm(each, dtype=wide) for each in own]
    total = torch.stack(norms).square().sum()
    if any(map(is_shared, tensors)):
        dist.all_reduce(total)
    return total.sqrt().float()


def shared_as(value: Tensor, like: Tensor) -> Tensor:
    """This process's share of a whole tensor, where another is shared; or the tensor itself."""
    if not isinstance(like, DTensor):
        return value
    there = value.to(like.device, like.dtype if value.is_floating_point() else value.dtype)
    return distribute_tensor(there, like.device_mesh, like.placements, src_data_rank=None)


def own_share(tensor: Tensor) -> Tensor:
    """What this process has of a shared tensor."""
    assert isinstance(tensor, DTensor)
    return tensor.to_local()


def as_share(own: Tensor, like: Tensor) -> Tensor:
    """A shared tensor, of which this process has the rows that it has of another."""
    assert isinstance(like, DTensor)
    shape = torch.Size([like.shape[0], *own.shape[1:]])
    stride = torch.empty(shape, device="meta").stride()
    how = like.device_mesh, like.placements
    return DTensor.from_local(own, *how, run_check=False, shape=shape, stride=stride)


def refuse_shared(model: nn.Module) -> None:
    """Raise where a model's weights are shared already.

    Raises:
        ValueError: Says what to do.
    """
    if is_sharded(model):
        raise ValueError(
            "the model is sharded already: give it whole, on the host if need be, and set shard = "
            "true in the recipe."
        )
