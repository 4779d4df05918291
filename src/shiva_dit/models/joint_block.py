"""A block of joint attention (SD3), run as a `BlockRun` says: other tokens, keys, widths."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shiva_dit.methods.blocks import BlockReducer, BlockRun, Width
from shiva_dit.methods.plans import RaggedPlan
from shiva_dit.models.families import model_spec
from shiva_dit.models.site_hook import Forward, ReducerHook
from shiva_dit.models.spec import bind

BLOCK, PROCESSOR = "JointTransformerBlock", "JointAttnProcessor2_0"


def refuse_other_blocks(model: nn.Module, reducer: BlockReducer) -> None:
    """Raise unless all blocks of a model can run as a `BlockRun` says."""
    for block in model_spec(model).blocks(model):
        if type(block).__name__ != BLOCK:
            raise ValueError(
                f"{type(reducer).__name__} changes what happens inside of blocks, and is here for "
                f"Stable Diffusion 3 and 3.5 alone: {type(model).__name__} has blocks of "
                f"{type(block).__name__}."
            )


class JointHook(ReducerHook):
    """Runs one block as the reducer says."""

    def reduced(
        self,
        module: nn.Module,
        forward: Forward,
        run: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        """The block as the reducer says; the block itself where it says nothing."""
        given = bind(module, args, kwargs)
        how = self.owner.reducer.around(given["hidden_states"], self.where(forward))
        if how is None:
            return run(*args, **kwargs)
        text, x = self._ran(module, how, given, partial(run, *args, **kwargs))
        return text, x if how.finish is None else how.finish(x)

    def _ran(
        self, module: Any, how: BlockRun, given: dict[str, Any], run: Callable[[], Any]
    ) -> tuple[Tensor | None, Tensor]:
        """Text and image as the block gives them."""
        if how.is_inside_alike:
            return run()
        if given.get("joint_attention_kwargs") or module._chunk_size is not None:
            raise ValueError(
                f"{type(self.owner.reducer).__name__} can't go along with arguments of attention "
                "(joint_attention_kwargs) or a chunked feed-forward: call the model without."
            )
        return run_joint(
            module, how, given["hidden_states"], given["encoder_hidden_states"], given["temb"]
        )


def run_joint(
    block: Any, how: BlockRun, x: Tensor, text: Tensor, temb: Tensor
) -> tuple[Tensor | None, Tensor]:
    """What the block gives: text (None after the last block) and image.

    Args:
        block: A `JointTransformerBlock` of diffusers.
        how: Everything that is otherwise.
        x: The image's tokens, (B, N, D).
        text: The text's, (B, T, D).
        temb: Embedding of time and pooled text, (B, D).
    """
    x = x if how.tokens is None else how.tokens
    norms = block.norm1(x, emb=temb)
    normed, gate, shift, scale, gate_mlp = norms[:5]
    others = norms if how.keys is None else block.norm1(how.keys, emb=temb)
    if block.context_pre_only:
        of_text = [block.norm1_context(text, temb)]
    else:
        of_text = block.norm1_context(text, emb=temb)
    update, text_update = _attention(block.attn, normed, of_text[0], others[0], how)
    x = x + gate.unsqueeze(1) * update
    if block.use_dual_attention:
        second, _ = _attention(block.attn2, norms[5], None, others[5], how)
        x = x + norms[6].unsqueeze(1) * second
    normed = block.norm2(x) * (1 + scale[:, None]) + shift[:, None]
    kept = None if how.kept is None else how.kept(x)
    heads = block.attn.heads
    x = x + gate_mlp.unsqueeze(1) * _feed_forward(block.ff, normed, kept, how.hidden, heads)
    if block.context_pre_only:
        return None, x
    _, c_gate, c_shift, c_scale, c_gate_mlp = of_text
    text = text + c_gate.unsqueeze(1) * text_update
    normed = block.norm2_context(text) * (1 + c_scale[:, None]) + c_shift[:, None]
    return text + c_gate_mlp.unsqueeze(1) * block.ff_context(normed), x


def _attention(
    attn: Any, x: Tensor, text: Tensor | None, keys: Tensor, how: BlockRun
) -> tuple[Tensor, Tensor | None]:
    """Updates of image and text by attention of `x` and text to `keys` and text."""
    if type(attn.processor).__name__ != PROCESSOR:
        raise ValueError(
            f"attention runs by {type(attn.processor).__name__}, and heads, keys and values are "
            f"told apart for {PROCESSOR} alone: put that on (attn.set_processor)."
        )
    if keys is x and how.heads is None and not how.is_pooled:
        return attn(x, text) if text is not None else (attn(x), None)
    part = _Part.of(how.heads, attn.heads, _projections(attn, text is not None))
    wants_text = text is not None and not attn.context_pre_only
    value = part.split(part.rows(attn.to_v, keys))  # (B, h, m, d)
    query = key = None
    if not how.is_pooled:
        query = _normed(attn.norm_q, part.split(part.rows(attn.to_q, x)))
    if not how.is_pooled or wants_text:
        key = _normed(attn.norm_k, part.split(part.rows(attn.to_k, keys)))
    if text is not None:
        added = part.split(part.rows(attn.add_v_proj, text))
        value = torch.cat([value, added], dim=2)
        if key is not None:
            added = _normed(attn.norm_added_k, part.split(part.rows(attn.add_k_proj, text)))
            key = torch.cat([key, added], dim=2)
            added = _normed(attn.norm_added_q, part.split(part.rows(attn.add_q_proj, text)))
            query = added if query is None else torch.cat([query, added], dim=2)
    image, of_text = value.mean(dim=2, keepdim=True), None
    if query is not None and key is not None:
        out = F.scaled_dot_product_attention(query, key, value, dropout_p=0.0, is_causal=False)
        of_image = 0 if how.is_pooled else x.shape[1]
        image, of_text = (image if how.is_pooled else out[:, :, :of_image]), out[:, :, of_image:]
    update = attn.to_out[1](part.columns(attn.to_out[0], part.join(image)))
    if how.is_pooled:
        update = update.expand(-1, x.shape[1], -1)
    if not wants_text:
        return update, None
    assert of_text is not None
    return update, part.columns(attn.to_add_out, part.join(of_text))


def _projections(attn: Any, has_text: bool) -> list[nn.Module]:
    """The linear layers that hold a part for each head."""
    names = ["to_q", "to_k", "to_v"]
    if has_text:
        names += ["add_q_proj", "add_k_proj", "add_v_proj"]
    if has_text and not attn.context_pre_only:
        names.append("to_add_out")
    return [attn.to_out[0], *(getattr(attn, name) for name in names)]


def _normed(norm: nn.Module | None, x: Tensor) -> Tensor:
    return x if norm is None else norm(x)


@dataclass(frozen=True, slots=True)
class _Part:
    """Which of H equal parts of some layers run."""

    on: tuple[int, ...] | None
    """Those that are cut out of the weights; None: the layers run whole."""
    mask: Tensor | None
    """What multiplies them, (b, H)."""
    count: int
    """H, or how many are cut out."""
    whole: int
    """H."""

    @classmethod
    def of(cls, width: Width | None, count: int, layers: list[nn.Module]) -> _Part:
        """The parts that a width says; by a mask where a layer's weights can't be cut."""
        if width is None or (isinstance(width, tuple) and len(width) == count):
            return cls(None, None, count, count)
        if isinstance(width, Tensor):
            return cls(None, width, count, count)
        if all(map(_is_plain, layers)):
            return cls(width, None, len(width), count)
        mask = torch.zeros(1, count, device=next(layers[0].parameters()).device)
        mask[:, list(width)] = 1.0
        return cls(None, mask, count, count)

    def _indices(self, size: int, device: torch.device) -> Tensor:
        assert self.on is not None
        starts = torch.tensor(self.on, device=device)[:, None] * size
        return (starts + torch.arange(size, device=device)).flatten()

    def rows(self, layer: Any, x: Tensor) -> Tensor:
        """A layer's outputs that run."""
        if self.on is None:
            return layer(x)
        weight, bias = layer.weight, layer.bias
        at = self._indices(len(weight) // self.whole, x.device)
        return F.linear(x, weight[at], None if bias is None else bias[at])

    def columns(self, layer: Any, x: Tensor) -> Tensor:
        """A layer of the inputs that run."""
        if self.on is None:
            return layer(x)
        at = self._indices(layer.weight.shape[1] // self.whole, x.device)
        return F.linear(x, layer.weight[:, at], layer.bias)

    def split(self, x: Tensor) -> Tensor:
        """Heads apart, (B, h, n, d)."""
        return x.unflatten(2, (self.count, -1)).transpose(1, 2)

    def join(self, x: Tensor) -> Tensor:
        """Heads beside each other, (B, n, h * d), masked."""
        joined = x.transpose(1, 2).flatten(2)
        return joined if self.mask is None else joined * self.wide(self.mask, joined)[:, None]

    def wide(self, mask: Tensor, x: Tensor) -> Tensor:
        """A mask by channel, (..., C)."""
        return mask.repeat_interleave(x.shape[-1] // self.whole, dim=-1).to(x.dtype)


def _is_plain(layer: nn.Module) -> bool:
    """Whether a layer does nothing but multiply by its weight."""
    weight = layer._parameters.get("weight")
    return (
        type(layer) is nn.Linear
        and type(weight) is nn.Parameter
        and "forward" not in layer.__dict__
        and not layer._forward_hooks
        and not layer._forward_pre_hooks
    )


def _feed_forward(
    ff: Any, x: Tensor, kept: Tensor | None, hidden: Width | None, groups: int
) -> Tensor:
    """The image's feed-forward, on some tokens and hidden channels."""
    if kept is None or (kept.dtype == torch.bool and bool(kept.all())):
        return _hidden(ff, x, hidden, groups)
    if kept.dtype != torch.bool:
        return kept[..., None].to(x.dtype) * _hidden(ff, x, hidden, groups)
    plan = RaggedPlan(kept)
    if isinstance(hidden, Tensor):  # of each row its sample's
        hidden = hidden[:, None].expand(*kept.shape, -1)[kept][None]  # (1, rows, H)
    rows = _hidden(ff, plan.reduce(x), hidden, groups)
    return plan.restore(rows, rows.new_zeros(()).expand(x.shape))


def _hidden(ff: Any, x: Tensor, width: Width | None, groups: int) -> Tensor:
    up, dropout, down = ff.net
    part = _Part.of(width, groups, [up.proj, down])
    if part.mask is not None:
        inner = dropout(up(x))
        mask = part.wide(part.mask, inner)
        return down(inner * (mask if mask.ndim == 3 else mask[:, None]))
    if part.on is None:
        return ff(x)
    return part.columns(down, dropout(up.gelu(part.rows(up.proj, x))))
