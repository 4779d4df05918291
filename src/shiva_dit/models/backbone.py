"""Tuned backbone weights on a model, switched on and off: LoRA, DoRA, or the whole state."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from peft import LoraConfig, get_peft_model_state_dict, set_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

PEFT_NAME = "shiva_dit"
LORA_PREFIX = "transformer."
# All linear layers of attention and feed-forward, in diffusers' names.
LORA_TARGETS = re.compile(
    r".*\.\d+\.("
    r"(attn\d?|attention)\.(to_[qkv]|to_gate|to_out(\.0)?|add_[qkv]_proj|to_add_out|to_qkv_mlp_proj)"
    r"|(ff|ff_context|ffn|feed_forward)\.(net\.(0\.proj|2)|w[123]|gate|up|down|out_projection"
    r"|linear_([123]|in|out))"
    r"|proj_(mlp|out))$"
)


def add_lora(model: Any, settings: Mapping[str, Any]) -> None:
    """Add an untrained LoRA or DoRA on all linear layers of attention and feed-forward.

    Args:
        model: A diffusers transformer.
        settings: PEFT's `r`, `lora_alpha` and `use_dora`.

    Raises:
        ValueError: If the model has none of these layers, or diffusers gives its class no LoRA.
    """
    active = _active(model)
    targets = [
        name
        for name, module in model.named_modules()
        if LORA_TARGETS.match(name)
        and (isinstance(module, nn.Linear) or hasattr(module, "base_layer"))
    ]
    if not targets:
        raise ValueError(
            f"{type(model).__name__} has no linear layers in attention to put a LoRA on."
        )
    if not hasattr(model, "add_adapter"):
        raise ValueError(
            f"{type(model).__name__} takes no LoRA in this version of diffusers: train with "
            'backbone="full" or "frozen".'
        )
    with _same_flags(model):
        model.add_adapter(LoraConfig(target_modules=targets, **settings), adapter_name=PEFT_NAME)
        model.enable_adapters()
        model.set_adapter([*active, PEFT_NAME])


def lora_weights(model: nn.Module) -> dict[str, Tensor]:
    """Our LoRA's weights, under the names that diffusers' pipelines load."""
    state = get_peft_model_state_dict(model, adapter_name=PEFT_NAME)
    return {LORA_PREFIX + name: value for name, value in state.items()}


def set_lora_weights(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Fill our LoRA.

    Raises:
        ValueError: If the weights are not those of this model's LoRA.
    """
    own = lora_weights(model)
    if own.keys() != weights.keys():
        odd = sorted(own.keys() ^ weights.keys())
        raise ValueError(f"the LoRA weights don't fit this model: {odd[:3]} differ.")
    for name, value in weights.items():
        if value.shape != own[name].shape:
            raise ValueError(
                f"the LoRA weights don't fit this model: {name} has shape {tuple(value.shape)}, "
                f"the model's is {tuple(own[name].shape)}."
            )
    state = {name.removeprefix(LORA_PREFIX): value for name, value in weights.items()}
    set_peft_model_state_dict(model, state, adapter_name=PEFT_NAME)


def refuse_fused(model: nn.Module) -> None:
    """Raise where our LoRA was fused into the weights: undoing that would not be exact.

    Raises:
        RuntimeError: Says what to do.
    """
    if any(PEFT_NAME in layer.merged_adapters for _, layer in _lora_layers(model)):
        raise RuntimeError(
            "the adapter's LoRA was fused into the model's weights, so it can't be taken off or "
            "switched: call unfuse_lora() first."
        )


def enable_lora(model: Any, enabled: bool) -> None:
    """Switch our LoRA on or off, leaving the user's own as they are."""
    refuse_fused(model)
    others = [name for name in _active(model) if name != PEFT_NAME]
    wanted = [*others, PEFT_NAME] if enabled else others
    with _same_flags(model):
        if wanted:
            model.enable_adapters()
            model.set_adapter(wanted)
        else:
            model.disable_adapters()


def remove_lora(model: Any, switched_off: Sequence[str] = ()) -> None:
    """Take our LoRA off; layers that no other LoRA is on are the model's own again.

    Args:
        model: The transformer.
        switched_off: LoRAs of the user that were disabled as ours came.
    """
    if PEFT_NAME not in getattr(model, "peft_config", {}):
        return  # the user unloaded all LoRAs
    others = [name for name in _active(model) if name != PEFT_NAME]
    with _same_flags(model):
        if set(model.peft_config) == {PEFT_NAME}:
            model.unload_lora()
            model.__dict__.pop("_hf_peft_config_loaded", None)
            return
        model.set_adapter(others or list(switched_off))
        model.delete_adapters(PEFT_NAME)
        for name, layer in _lora_layers(model):
            if not any(len(getattr(layer, part)) for part in layer.adapter_layer_names):
                parent, _, leaf = name.rpartition(".")
                setattr(model.get_submodule(parent), leaf, layer.get_base_layer())
        if not others:
            model.disable_adapters()


def _lora_layers(model: nn.Module) -> list[tuple[str, BaseTunerLayer]]:
    return [(n, m) for n, m in model.named_modules() if isinstance(m, BaseTunerLayer)]


def _active(model: nn.Module) -> list[str]:
    layers = _lora_layers(model)
    return [] if not layers or layers[0][1].disable_adapters else list(layers[0][1].active_adapters)


def _switched_off(model: nn.Module) -> list[str]:
    layers = _lora_layers(model)
    return list(layers[0][1].active_adapters) if layers and layers[0][1].disable_adapters else []


@contextmanager
def _same_flags(model: nn.Module) -> Iterator[None]:
    """PEFT opens and freezes parameters when it switches; what trains is the caller's choice."""
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        yield
    finally:
        for parameter, flag in flags:
            parameter.requires_grad_(flag)


class TunedBackbone:
    """The backbone weights that belong to an adapter, on a model.

    Args:
        model: The transformer.
        weights: Weights of the LoRA or of the whole state; empty for a frozen backbone.
        lora: PEFT's settings if the weights are a LoRA's or DoRA's.

    Raises:
        ValueError: If the weights don't fit the model.
    """

    def __init__(
        self, model: Any, weights: Mapping[str, Tensor], lora: Mapping[str, Any] | None
    ) -> None:
        self.model, self.lora = model, lora
        self.enabled = True
        # The parameters themselves: a LoRA of the user changes names, not parameters.
        self._other: list[tuple[nn.Parameter, Tensor]] = []
        self._restored = False
        self._switched_off: list[str] = []
        if lora is not None:
            self._switched_off = _switched_off(model)
            with torch.random.fork_rng(devices=[]):  # PEFT's initial values, replaced at once
                add_lora(model, lora)
            try:
                set_lora_weights(model, weights)
            except BaseException:
                self.restore()
                raise
            # One layer stands for all in `keep_on`, which runs before every forward.
            self._layer = next(m for _, m in _lora_layers(model) if PEFT_NAME in m.active_adapters)
        elif weights:
            self._other = self._checked(weights)
            self._swap()

    def _checked(self, weights: Mapping[str, Tensor]) -> list[tuple[nn.Parameter, Tensor]]:
        own = dict(self.model.named_parameters())
        if own.keys() != weights.keys():
            odd = sorted(own.keys() ^ weights.keys())
            raise ValueError(
                f"the tuned backbone doesn't fit this model: {odd[:3]} differ. Unload LoRA "
                "adapters first, and apply to the model that it was trained on."
            )
        for name, value in weights.items():
            if value.shape != own[name].shape:
                raise ValueError(
                    f"the tuned backbone doesn't fit this model: {name} has shape "
                    f"{tuple(value.shape)}, the model's is {tuple(own[name].shape)}."
                )
        return [(parameter, weights[name].to(parameter)) for name, parameter in own.items()]

    def _swap(self) -> None:
        """Exchange the model's tensors and the kept ones; no copy is made."""
        present = {id(parameter) for parameter in self.model.parameters()}
        if any(id(parameter) not in present for parameter, _ in self._other):
            raise RuntimeError(
                "parameters of the model were replaced while a tuned backbone was on it "
                "(sequential offload does that): its own weights can't be put back. Load the "
                "model again, and apply before anything that replaces parameters."
            )
        for index, (parameter, kept) in enumerate(self._other):
            # The model may have moved or changed its dtype since.
            self._other[index] = (parameter, parameter.data)
            parameter.data = kept.to(parameter)

    def keep_on(self) -> None:
        """Before a forward: the adapter's LoRA runs, whatever LoRAs the user chose meanwhile.

        Raises:
            RuntimeError: If it was unloaded.
        """
        if self.lora is None or not self.enabled:
            return
        if PEFT_NAME not in getattr(self.model, "peft_config", {}):
            raise RuntimeError(
                "the adapter's LoRA was unloaded with others: call shiva_dit.apply again."
            )
        layer = self._layer
        if layer.disable_adapters or PEFT_NAME not in layer.active_adapters:
            enable_lora(self.model, True)

    def enable(self, enabled: bool) -> None:
        """Put the tuned weights on, or the model's own back.

        Raises:
            RuntimeError: If the adapter's LoRA was fused, or parameters were replaced.
        """
        if enabled == self.enabled or self._restored:
            return
        if self.lora is not None:
            enable_lora(self.model, enabled)
        else:
            self._swap()
        self.enabled = enabled

    def restore(self) -> None:
        """Give the model its own weights back, to the bit, for good.

        Raises:
            RuntimeError: If the adapter's LoRA was fused, or parameters were replaced. Nothing
                has changed then.
        """
        if self._restored:
            return
        if self.lora is not None:
            refuse_fused(self.model)
            remove_lora(self.model, self._switched_off)
        elif self._other and self.enabled:
            self._swap()
        self._restored = True
        self._other = []


def trainable_parameters(model: nn.Module, kind: str) -> dict[str, nn.Parameter]:
    """The backbone's parameters that joint tuning trains, by name ("frozen": none).

    All parameters are frozen on return; `set_trainable` opens these.
    """
    model.requires_grad_(False)
    return {
        name: parameter
        for name, parameter in model.named_parameters()
        if kind == "full" or (kind in ("lora", "dora") and f".{PEFT_NAME}" in name)
    }


def set_trainable(parameters: Iterable[nn.Parameter], trainable: bool) -> None:
    """Open or freeze parameters."""
    for parameter in parameters:
        parameter.requires_grad_(trainable)


def backbone_weights(model: nn.Module, kind: str) -> dict[str, Tensor]:
    """What an adapter must hold of a tuned backbone ("frozen": nothing)."""
    if kind == "full":
        return {name: p.detach().clone() for name, p in model.named_parameters()}
    if kind in ("lora", "dora"):
        return {name: value.detach().clone() for name, value in lora_weights(model).items()}
    return {}


def first_not_finite(tensors: Mapping[str, Tensor]) -> str | None:
    """The name of a tensor with a value that is not finite, or None."""
    for name, value in tensors.items():
        if not torch.isfinite(value).all():
            return name
    return None
