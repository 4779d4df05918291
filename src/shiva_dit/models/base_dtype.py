"""The weights that a training leaves alone, in fewer bits: what takes most of its memory."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from shiva_dit.models.families import model_spec

BaseDtype = Literal["as_given", "float32", "bfloat16", "int8", "nf4"]
QUANTISED: dict[str, str] = {"int8": "torchao", "nf4": "bitsandbytes"}
"""Dtypes of linear layers in blocks alone, all else being bfloat16, and the library of each."""


def check_library(dtype: str) -> None:
    """Raise unless what a dtype needs is installed.

    Raises:
        ValueError: Says what to install.
    """
    library = QUANTISED.get(dtype)
    if library is not None and find_spec(library) is None:
        raise ValueError(
            f'base_dtype = "{dtype}" needs {library}: pip install {library}, or set base_dtype = '
            '"bfloat16".'
        )


class Narrowed:
    """A model's own weights in another dtype, until they are given back.

    Those that it came with stay where they were, on the host where it was loaded there.

    Args:
        model: The transformer, without a LoRA.
        dtype: Of its weights. "int8" (torchao) and "nf4" (bitsandbytes) are for linear layers in
            blocks; all else is then bfloat16, save what the class keeps in float32.

    Raises:
        ValueError: If the library isn't installed, or the model is quantised already.
    """

    def __init__(self, model: Any, dtype: str) -> None:
        assert dtype in get_args(BaseDtype)
        self._undo: list[Callable[[], object]] = []
        if dtype == "as_given":
            return
        check_library(dtype)
        for name, parameter in model.named_parameters():
            if type(parameter.data) is not torch.Tensor and not _is_fake(parameter):
                raise ValueError(
                    f'the model\'s {name} is quantised already: leave base_dtype = "as_given".'
                )
        try:
            self._cast(model, torch.float32 if dtype == "float32" else torch.bfloat16)
            if dtype in QUANTISED:
                for block in model_spec(model).blocks(model):
                    self._quantise(block, dtype)
        except BaseException:
            self.give_back()
            raise

    def give_back(self) -> None:
        """Put the weights that the model came with back in their places."""
        while self._undo:
            self._undo.pop()()

    def _cast(self, model: Any, dtype: torch.dtype) -> None:
        kept = set(getattr(model, "_keep_in_fp32_modules", None) or ())
        for path, module in model.named_modules():
            for held in (module._parameters, module._buffers):
                for name, tensor in held.items():
                    if tensor is None or not tensor.is_floating_point():
                        continue
                    wide = kept.intersection((*path.split("."), name))
                    cast = tensor.detach().to(torch.float32 if wide else dtype)
                    self._exchange(held, name, cast)

    def _exchange(self, held: dict[str, Any], name: str, value: Tensor) -> None:
        was = held[name]
        self._undo.append(partial(held.__setitem__, name, was))
        is_parameter = isinstance(was, nn.Parameter)
        held[name] = nn.Parameter(value, was.requires_grad) if is_parameter else value

    def _quantise(self, block: nn.Module, dtype: str) -> None:
        layers: list[tuple[nn.Module, str, Any]] = [
            (parent, name, child)
            for parent in block.modules()
            for name, child in parent.named_children()
            if type(child) is nn.Linear
        ]
        for parent, name, layer in layers:
            if dtype == "int8":
                self._exchange(layer._parameters, "weight", layer.weight.detach())
                layer.weight.requires_grad_(False)
                self._undo.append(partial(layer.__dict__.pop, "extra_repr", None))
                _quantise_int8(layer)
            else:
                made = _as_nf4(layer)
                self._undo.append(partial(setattr, parent, name, layer))
                setattr(parent, name, made)


def _quantise_int8(layer: nn.Linear) -> None:
    library = import_module("torchao.quantization")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        library.quantize_(layer, library.Int8WeightOnlyConfig())


def _as_nf4(layer: nn.Linear) -> nn.Module:
    if _is_fake(layer.weight):
        return _ShapesOfNf4(layer)
    library = import_module("bitsandbytes")
    has_bias = layer.bias is not None
    made = library.nn.Linear4bit(
        layer.in_features,
        layer.out_features,
        has_bias,
        compute_dtype=layer.weight.dtype,
        quant_type="nf4",
        device="meta",
    )
    made.weight = library.nn.Params4bit(
        layer.weight.detach().clone(), requires_grad=False, quant_type="nf4", module=made
    )
    made.support_avx512bf16_for_cpu = False  # its layout for a CPU is for inference
    if has_bias:
        made.bias = layer.bias
    made.weight = made.weight.to(layer.weight.device)  # which is when it is quantised
    return made.train(layer.training)


class _ShapesOfNf4(nn.Linear):
    """What `Linear4bit` holds and makes, for counting: its own class takes no shapes alone."""

    def __init__(self, layer: nn.Linear) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.bias, self.dtype = layer.bias, layer.weight.dtype
        count = layer.weight.numel()
        values = torch.empty(-(-count // 2), 1, dtype=torch.uint8)
        self.weight = nn.Parameter(values, requires_grad=False)
        self.__dict__["W_q"] = values  # by which PEFT knows to ask for `dequantize`
        blocks = -(-count // 64)  # whose scales are of 8 bits, with scales and a code of their own
        self.register_buffer("scales", torch.empty(blocks, dtype=torch.uint8))
        self.register_buffer("scales_of_scales", torch.empty(-(-blocks // 256)))
        self.register_buffer("code", torch.empty(256 + 16 + 1))

    def forward(self, input: Tensor) -> Tensor:
        out: Any = _MadeWhole.apply(input.to(self.dtype), self)
        out = out if self.bias is None else out + self.bias
        return out.to(input.dtype)

    def dequantize(self) -> Tensor:
        """The weight, as it is made anew for each product."""
        return self.weight.new_empty(self.out_features, self.in_features, dtype=self.dtype)


class _MadeWhole(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, layer: _ShapesOfNf4) -> Tensor:
        ctx.layer = layer
        return value @ layer.dequantize().T

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return grad @ ctx.layer.dequantize(), None


def _is_fake(tensor: Tensor) -> bool:
    return isinstance(tensor, FakeTensor)
