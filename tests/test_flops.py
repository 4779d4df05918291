"""FLOPs: the formulas against torch's counter on real diffusers models, exactly."""

from functools import cache

import pytest
import torch
from diffusers import SD3Transformer2DModel
from torch.utils.flop_counter import FlopCounterMode

from shiva_dit.core.flops import JointBlockShape
from shiva_dit.models.families import MODELS
from shiva_dit.modules.router import ShivaRouter
from shiva_dit.modules.updates import RejectedUpdates

# On the meta device attention is decomposed and counted; on the CPU its kernel counts as 0.
META = torch.device("meta")


@cache
def sd3(dual_layers: tuple[int, ...] = (), **values) -> SD3Transformer2DModel:
    config = {
        "sample_size": 16,
        "patch_size": 2,
        "in_channels": 4,
        "out_channels": 4,
        "num_layers": 4,
        "attention_head_dim": 8,
        "num_attention_heads": 3,
        "joint_attention_dim": 40,
        "caption_projection_dim": 24,
        "pooled_projection_dim": 56,
        "pos_embed_max_size": 96,
        "qk_norm": "rms_norm",
        **values,
    }
    with META:
        return SD3Transformer2DModel(**config, dual_attention_layers=dual_layers)


def counted(function) -> int:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        function()
    return counter.get_total_flops()


def forward(model: SD3Transformer2DModel, height: int, width: int, text_tokens: int):
    config = model.config
    model(
        hidden_states=torch.empty(1, config.in_channels, height, width, device=META),
        encoder_hidden_states=torch.empty(1, text_tokens, config.joint_attention_dim, device=META),
        pooled_projections=torch.empty(1, config.pooled_projection_dim, device=META),
        timestep=torch.empty(1, device=META),
    )


DUAL = [(), (0, 1), (0, 1, 2, 3)]
SPEC = MODELS["SD3Transformer2DModel"]


@pytest.mark.parametrize("dual_layers", DUAL, ids=str)
@pytest.mark.parametrize(("height", "width", "text_tokens"), [(16, 16, 5), (8, 24, 77), (4, 4, 1)])
def test_a_dense_model_costs_what_the_counter_counts(dual_layers, height, width, text_tokens):
    model = sd3(dual_layers)
    flops = SPEC.flops(model, height * width // 4, text_tokens)
    assert flops.dense() == counted(lambda: forward(model, height, width, text_tokens))


@pytest.mark.parametrize("qk_norm", [None, "rms_norm"])
@pytest.mark.parametrize("channels", [(16, 16), (4, 8)])
def test_norms_and_channels_are_counted_as_the_counter_does(qk_norm, channels):
    model = sd3((0,), qk_norm=qk_norm, in_channels=channels[0], out_channels=channels[1])
    assert SPEC.flops(model, 64, 9).dense() == counted(lambda: forward(model, 16, 16, 9))


@pytest.mark.parametrize("dual_layers", DUAL, ids=str)
@pytest.mark.parametrize("num_tokens", [1, 26, 64])
def test_a_block_costs_what_the_counter_counts_at_any_number_of_tokens(dual_layers, num_tokens):
    model, text_tokens = sd3(dual_layers), 7
    shapes = SPEC.flops(model, 64, text_tokens).blocks
    assert [shape.context_pre_only for shape in shapes] == [False, False, False, True]
    assert [shape.dual_attention for shape in shapes] == [i in dual_layers for i in range(4)]
    for block, shape in zip(model.transformer_blocks, shapes, strict=True):

        def run(block=block):
            block(
                hidden_states=torch.empty(1, num_tokens, 24, device=META),
                encoder_hidden_states=torch.empty(1, text_tokens, 24, device=META),
                temb=torch.empty(1, 24, device=META),
            )

        assert shape.flops(num_tokens) == counted(run)


def test_sd35_medium_at_1024_pixels_takes_11_250_teraflops():
    """4,096 image tokens, 77 + 256 text tokens: the value measured with the counter."""
    model = sd3(
        tuple(range(13)),
        sample_size=128,
        in_channels=16,
        out_channels=16,
        num_layers=24,
        attention_head_dim=64,
        num_attention_heads=24,
        joint_attention_dim=4096,
        caption_projection_dim=1536,
        pooled_projection_dim=2048,
        pos_embed_max_size=384,
    )
    flops = SPEC.flops(model, 4096, 333).dense()
    assert f"{flops / 1e12:.3f}" == "11.250"
    assert flops == counted(lambda: forward(model, 128, 128, 333))


def test_the_router_costs_what_the_counter_counts():
    width, time_dim, context_dim, hidden, num_tokens = 24, 40, 56, 16, 64
    for inputs in (("time", "context", "layer"), ("context",), ()):
        with META:
            router = ShivaRouter(width, time_dim, context_dim, 4, 2, hidden, True, inputs)
        router.requires_grad_(False)
        # The score is a weighted sum over d', not a matrix product: the counter passes it by.
        weighted_sum = 2 * num_tokens * hidden
        counts = counted_for_tokens(router, num_tokens, (width, time_dim, context_dim))
        assert router.flops(num_tokens) == weighted_sum + counts


def test_the_rejected_update_costs_what_the_counter_counts():
    width, time_dim, context_dim, num_tokens = 24, 40, 56, 64
    with META:
        updates = RejectedUpdates(width, time_dim, context_dim, 4, 2, 5).requires_grad_(False)
    counts = counted_for_tokens(updates, num_tokens, (width, time_dim, context_dim))
    assert updates.flops(num_tokens) == counts == 4 * num_tokens * width * 5


def test_a_rejected_update_is_below_two_percent_of_the_block_that_it_stands_for():
    """SD3-Medium at 1024x1024 and SD3.5-Medium's dual blocks, at the largest rank promised."""
    with META:
        updates = RejectedUpdates(1536, 1536, 2048, 24, 12, 1536 // 9)
    for dual in (False, True):
        block = JointBlockShape(width=1536, text_tokens=333, dual_attention=dual)
        assert updates.flops(4096) < 0.02 * block.flops(4096)


def counted_for_tokens(module, num_tokens: int, dims: tuple[int, int, int]) -> int:
    """FLOPs of all tokens in block 1; the context terms' are held to the counter in passing."""
    x, time, context = (torch.empty(1, dim, device=META) for dim in dims)
    x = x.expand(num_tokens, -1)[None]
    size = module.group(1).size
    assert counted(lambda: module.condition(time, context)) == module.condition_flops()
    return counted(lambda: module.group(1)(x, torch.empty(1, size, device=META)))


def test_a_pruned_model_adds_up():
    """Blocks at their k, extras where something is pruned, all else as in the dense model."""
    flops = SPEC.flops(sd3((0, 1)), 64, 7)
    assert flops.pruned((64,) * 4, 1000) == flops.dense()
    counts = (64, 26, 64, 25)
    saved = sum(
        shape.flops(64) - shape.flops(k) for shape, k in zip(flops.blocks, counts, strict=True)
    )
    assert flops.pruned(counts) == flops.dense() - saved
    assert flops.pruned(counts, 1000) == flops.dense() - saved + 2 * 1000  # blocks 1 and 3


def test_as_many_counts_as_blocks():
    with pytest.raises(ValueError, match="zip"):
        SPEC.flops(sd3(), 64, 7).pruned((64, 64))


def test_batches_scale_the_count():
    """Formulas are per sample: the counter of a batch of 3 says 3 times as much."""
    shape = JointBlockShape(width=24, text_tokens=7)

    def run():
        sd3().transformer_blocks[0](
            hidden_states=torch.empty(3, 26, 24, device=META),
            encoder_hidden_states=torch.empty(3, 7, 24, device=META),
            temb=torch.empty(3, 24, device=META),
        )

    assert counted(run) == 3 * shape.flops(26)
