"""Caches of diffusers and of cache-dit beside an adapter, class by class."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from importlib import import_module
from typing import Any

import pytest
import torch
from diffusers import (
    FirstBlockCacheConfig,
    MagCacheConfig,
    PyramidAttentionBroadcastConfig,
    SeaCacheConfig,
    TaylorSeerCacheConfig,
)
from diffusers.hooks import (
    FasterCacheConfig,
    apply_faster_cache,
    apply_pyramid_attention_broadcast,
    apply_taylorseer_cache,
)
from diffusers.hooks._helpers import TransformerBlockRegistry
from torch import Tensor

import shiva_dit
from shiva_dit.models.attach import attachment_of
from shiva_dit.models.families import model_spec
from tests import families
from tests.beside import STEPS, Note, Plain, blocks_run, equal, tell, times
from tests.matrix import sampled
from tests.test_composition import adapter, both

EVEN = torch.ones(STEPS)


def latents(module: Any, args: Any, kwargs: dict[str, Any]) -> list[Tensor]:
    """What SeaCache goes by: each sample as channels and a picture."""
    del module, args
    value = kwargs["hidden_states"]
    value = value[0] if isinstance(value, list) else value
    return [each.reshape(each.shape[0], 1, 1, -1) for each in value]


def mag(**options: Any) -> MagCacheConfig:
    return MagCacheConfig(num_inference_steps=STEPS, mag_ratios=EVEN, **options)


OF_BLOCKS: dict[str, Callable[[bool], Any]] = {
    "FirstBlockCache": lambda hit: FirstBlockCacheConfig(threshold=10.0 if hit else 0.0),
    "MagCache": lambda hit: (
        mag(threshold=0.5, retention_ratio=0.1) if hit else mag(threshold=0.0, retention_ratio=1.0)
    ),
    "SeaCache": lambda hit: SeaCacheConfig(
        threshold=10.0 if hit else 0.0, raw_vision_callback=latents
    ),
}
"""By whether they hit."""
INSIDE: dict[str, tuple[Callable[..., None], Any]] = {
    "TaylorSeer": (
        apply_taylorseer_cache,
        TaylorSeerCacheConfig(cache_interval=2, disable_cache_before_step=1),
    ),
    "Pyramid Attention Broadcast": (
        apply_pyramid_attention_broadcast,
        PyramidAttentionBroadcastConfig(
            spatial_attention_block_skip_range=2,
            spatial_attention_timestep_skip_range=(0, 1001),
            current_timestep_callback=lambda: 500,
        ),
    ),
    "FasterCache": (
        apply_faster_cache,
        FasterCacheConfig(
            spatial_attention_block_skip_range=2,
            spatial_attention_timestep_skip_range=(-1, 1001),
            current_timestep_callback=lambda: 500,
            attention_weight_callback=lambda _: 0.5,
            tensor_format="BCHW",
        ),
    ),
}
FAILS_BARE = {
    ("FirstBlockCache", "flux2-klein"),
    ("FirstBlockCache", "flux2-dev"),
    ("FirstBlockCache", "motif-video-decoder"),
}
"""Whose first and last blocks return unlike things, from which the cache takes a difference."""
NEVER_HITS = {
    ("SeaCache", "flux2-klein"),
    ("SeaCache", "flux2-dev"),
    ("SeaCache", "motif-video-decoder"),
}
"""Likewise: it sees that, and always runs all blocks."""


def cells(caches: Any) -> list[tuple[str, str]]:
    return [(cache, family) for cache in caches for family in families.FAMILIES]


def offered(model: Any) -> bool:
    """Whether diffusers has a switch for caches on a class, and knows what its blocks return."""
    if not hasattr(model, "enable_cache"):
        return False
    known = TransformerBlockRegistry
    known._register()
    return all(type(block) in known._registry for block in model_spec(model).blocks(model))


@sampled("cache, family", cells(OF_BLOCKS))
def test_a_cache_of_blocks(cache: str, family: str, record_property: Note) -> None:
    """It sees all tokens, whichever came first, and what it skips selects nothing."""
    plain, config = Plain(family), OF_BLOCKS[cache]

    def cached(hit: bool, first: bool) -> Any:
        model = families.made(family)
        both(
            first,
            lambda: model.enable_cache(config(hit)),
            lambda: shiva_dit.apply(model, plain.adapter),
        )
        return model

    if not offered(plain.model):
        with pytest.raises((AttributeError, ValueError), match=r"enable_cache|not registered"):
            plain.model.enable_cache(config(True))
        tell(record_property, cache, family, "not offered")
        return
    if (cache, family) in FAILS_BARE:
        bare = families.made(family)
        bare.enable_cache(config(True))
        for model in (bare, cached(hit=True, first=True)):
            with pytest.raises((TypeError, RuntimeError), match=r"operand|size of tensor"):
                times(model, family)
        tell(record_property, cache, family, "fails bare")
        return
    for first in (True, False):
        assert equal(times(cached(hit=False, first=first), family), plain.pruned)
        model = cached(hit=True, first=first)
        ran, outputs = blocks_run(model, partial(times, model, family))
        if (cache, family) in NEVER_HITS:
            assert ran == plain.blocks
            assert equal(outputs, plain.pruned)
            continue
        assert 0 < ran < plain.blocks
        assert torch.equal(outputs[0], plain.pruned[0])
        assert not torch.equal(outputs[2], plain.pruned[2])
        shiva_dit.remove(model)
        assert not equal(times(model, family), plain.bare)  # the cache is still on
        model.disable_cache()
        assert equal(times(model, family), plain.bare)
    status = "no effect" if (cache, family) in NEVER_HITS else "works"
    tell(record_property, cache, family, status)


def hooked(model: Any) -> bool:
    """Whether a cache has put anything on a model."""
    registries = [module.__dict__.get("_diffusers_hook") for module in model.modules()]
    return any(each is not None and each.hooks for each in registries)


@sampled("cache, family", cells(INSIDE))
def test_a_cache_inside_blocks(cache: str, family: str, record_property: Note) -> None:
    """What it keeps row by row would be laid on other tokens: a line says so, in either order.

    The functions that put it on take classes too that have no switch for caches.
    """
    put, config = INSIDE[cache]
    model: Any = families.made(family)
    made = adapter(model, "frozen", family)
    put(model, config)
    if not hooked(model):
        expected = Plain(family).pruned
        shiva_dit.apply(model, made)
        assert equal(times(model, family), expected)
        tell(record_property, cache, family, "no effect")
        return
    with pytest.raises(ValueError, match=rf"^{cache} .*disable_cache\(\) first"):
        shiva_dit.apply(model, made)
    assert attachment_of(model) is None
    model = families.made(family)
    shiva_dit.apply(model, made)
    (expected,) = times(model, family, steps=1)
    put(model, config)
    with pytest.raises(ValueError, match=rf"^{cache} .*disable_cache\(\) first"):
        times(model, family, steps=1)
    for module in model.modules():
        registry = module.__dict__.get("_diffusers_hook")
        for name in [] if registry is None else [n for n in registry.hooks if names(cache, n)]:
            registry.remove_hook(name, recurse=False)
    assert torch.equal(times(model, family, steps=1)[0], expected)
    tell(record_property, cache, family, "refused")


def names(cache: str, hook: str) -> bool:
    """Whether a hook is a cache's, by diffusers' name of it."""
    return hook.replace("_", "").startswith(cache.replace(" ", "").lower()[:10])


# --- cache-dit ----------------------------------------------------------------------------------

NOT_OF_CACHE_DIT = (
    *("joyimage-plus", "ideogram4", "kandinsky6", "flux3", "flux3-pictures", "wan-animate"),
    *("qwen-image-2.1", "motif-video", "motif-video-decoder", "minimax-music3", "stable-audio-3"),
    *("stable-audio-3-painting", "ace-step", "longcat-audio"),
)
"""Which its registry doesn't know."""
FAILS_UNDER_CACHE_DIT = "bria", "ltx2", "ltx2.3", "consisid-face"
"""Which it takes, and with which it fails, or leaves something out, with or without an adapter:
its own forwards for these classes lack what diffusers 0.42.1 hands on."""

PATCHED_BY_CACHE_DIT = (
    *("chroma", "chroma-padded", "hunyuan-dit", "hunyuan-dit-1.2", "wan-vace", "glm-image"),
    "bria-fibo",
)
"""On whose blocks it puts forwards of its own, which take other arguments: refused."""


def put_cache_dit(model: Any, family: str, hit: bool) -> None:
    """Its DBCache, by the first block's change."""
    cache_dit = import_module("cache_dit")
    config = cache_dit.DBCacheConfig(
        Fn_compute_blocks=1,
        Bn_compute_blocks=0,
        residual_diff_threshold=10.0 if hit else 0.0,
        max_warmup_steps=1,
        num_inference_steps=STEPS,
        enable_separate_cfg=False,
    )
    target = model
    if family in ("sd3", "sd35"):  # which it knows by their pipeline alone
        target = cache_dit.BlockAdapter(
            transformer=model,
            blocks=model.transformer_blocks,
            forward_pattern=cache_dit.ForwardPattern.Pattern_1,
        )
    cache_dit.enable_cache(target, cache_config=config)


@pytest.mark.bits
@sampled("family")
def test_cache_dit(family: str, record_property: Note) -> None:
    """As diffusers' own caches of blocks."""
    plain = Plain(family)
    model: Any = families.made(family)
    if family in NOT_OF_CACHE_DIT:
        with pytest.raises((AssertionError, ValueError), match=r"not in allowed|not officially"):
            put_cache_dit(model, family, hit=False)
        tell(record_property, "cache-dit", family, "not offered")
        return
    if family in FAILS_UNDER_CACHE_DIT:
        put_cache_dit(model, family, hit=False)
        try:
            assert not equal(times(model, family), plain.bare)
        except (RuntimeError, TypeError) as error:
            assert re.search("size of tensor|unexpected keyword", str(error))  # noqa: PT017
        tell(record_property, "cache-dit", family, "fails bare")
        return
    if family in PATCHED_BY_CACHE_DIT:
        put_cache_dit(model, family, hit=True)
        with pytest.raises(ValueError, match=r"^cache-dit has put forwards of its own on"):
            shiva_dit.apply(model, plain.adapter)
        put_cache_dit(plain.model, family, hit=True)
        with pytest.raises(RuntimeError, match="runs past the adapter"):
            times(plain.model, family)
        tell(record_property, "cache-dit", family, "refused")
        return
    for first in (True, False):
        for hit in (False, True):
            model = families.made(family)
            both(
                first,
                partial(put_cache_dit, model, family, hit),
                partial(shiva_dit.apply, model, plain.adapter),
            )
            ran, outputs = blocks_run(model, partial(times, model, family))
            if hit:
                assert 0 < ran < plain.blocks
                assert torch.equal(outputs[0], plain.pruned[0])
                assert not torch.equal(outputs[2], plain.pruned[2])
            else:
                assert equal(outputs, plain.pruned)
            shiva_dit.remove(model)
            assert equal(times(model, family), plain.bare) != hit  # it is still on
            import_module("cache_dit").disable_cache(model)
            assert equal(times(model, family), plain.bare)
    tell(record_property, "cache-dit", family, "works")
