"""FLOPs: what is read off a few small runs, against torch's counter at any size, exactly."""

import json
import warnings
from functools import cache
from typing import Any

import diffusers
import pytest
import torch
from diffusers import SD3ControlNetModel, SD3Transformer2DModel
from diffusers.models.attention import JointTransformerBlock
from diffusers.models.attention_dispatch import attention_backend
from torch.utils.flop_counter import FlopCounterMode

from shiva_dit.core.flops import Polynomial
from shiva_dit.models import counted as counted_module
from shiva_dit.models.counted import counted, model_flops, model_widths, recipe
from shiva_dit.models.examples import Size
from shiva_dit.models.families import model_spec
from shiva_dit.models.skeleton import Skeleton
from shiva_dit.modules.router import ShivaRouter
from shiva_dit.modules.updates import RejectedUpdates
from tests import families, tiny
from tests.matrix import sampled

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


def executed(function) -> int:
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


@pytest.mark.slow
@pytest.mark.parametrize("dual_layers", DUAL, ids=str)
@pytest.mark.parametrize(("height", "width", "text_tokens"), [(16, 16, 5), (8, 24, 77), (4, 4, 1)])
def test_a_dense_model_costs_what_the_counter_counts(dual_layers, height, width, text_tokens):
    model = sd3(dual_layers)
    flops = model_flops(model, height * width // 4, text_tokens)
    assert flops.dense() == executed(lambda: forward(model, height, width, text_tokens))


@pytest.mark.parametrize("qk_norm", [None, "rms_norm"])
@pytest.mark.parametrize("channels", [(16, 16), (4, 8)])
def test_norms_and_channels_are_counted_as_the_counter_does(qk_norm, channels):
    model = sd3((0,), qk_norm=qk_norm, in_channels=channels[0], out_channels=channels[1])
    assert model_flops(model, 64, 9).dense() == executed(lambda: forward(model, 16, 16, 9))


@pytest.mark.parametrize("dual_layers", DUAL, ids=str)
@pytest.mark.parametrize("num_tokens", [1, 26, 64])
def test_a_block_costs_what_the_counter_counts_at_any_number_of_tokens(dual_layers, num_tokens):
    model, text_tokens = sd3(dual_layers), 7
    costs = model_flops(model, 64, text_tokens).blocks
    for block, cost in zip(model.transformer_blocks, costs, strict=True):

        def run(block=block):
            block(
                hidden_states=torch.empty(1, num_tokens, 24, device=META),
                encoder_hidden_states=torch.empty(1, text_tokens, 24, device=META),
                temb=torch.empty(1, 24, device=META),
            )

        assert cost.at(num_tokens) == executed(run)


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
    flops = model_flops(model, 4096, 333).dense()
    assert f"{flops / 1e12:.3f}" == "11.250"
    assert flops == executed(lambda: forward(model, 128, 128, 333))


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
    """SD3-Medium at 1024x1024 and SD3.5-Medium's dual blocks, at the largest rank promised.

    Two blocks cost each what two of 24 do.
    """
    with META:
        updates = RejectedUpdates(1536, 1536, 2048, 24, 12, 1536 // 9)
    for layers in ((), (0,)):
        wide = {"attention_head_dim": 64, "num_attention_heads": 24, "num_layers": 2}
        model = sd3(layers, caption_projection_dim=1536, **wide)
        block = model_flops(model, 4096, 333).blocks[0]
        assert updates.flops(4096) < 0.02 * block.at(4096)


def counted_for_tokens(module, num_tokens: int, dims: tuple[int, int, int]) -> int:
    """FLOPs of all tokens in block 1; the context terms' are held to the counter in passing."""
    x, time, context = (torch.empty(1, dim, device=META) for dim in dims)
    x = x.expand(num_tokens, -1)[None]
    size = module.group(1).size
    assert executed(lambda: module.condition(time, context)) == module.condition_flops()
    return executed(lambda: module.group(1)(x, torch.empty(1, size, device=META)))


def test_a_pruned_model_adds_up():
    """Blocks at their k, extras where something is pruned, all else as in the dense model."""
    flops = model_flops(sd3((0, 1)), 64, 7)
    assert flops.pruned((64,) * 4, 1000) == flops.dense()
    counts = (64, 26, 64, 25)
    saved = sum(cost.at(64) - cost.at(k) for cost, k in zip(flops.blocks, counts, strict=True))
    assert flops.pruned(counts) == flops.dense() - saved
    assert flops.pruned(counts, 1000) == flops.dense() - saved + 2 * 1000  # blocks 1 and 3


def test_as_many_counts_as_blocks():
    with pytest.raises(ValueError, match="zip"):
        model_flops(sd3(), 64, 7).pruned((64, 64))


def test_batches_scale_the_count():
    """Costs are per sample: the counter of a batch of 3 says 3 times as much."""
    cost = model_flops(sd3(), 64, 7).blocks[0]

    def run():
        sd3().transformer_blocks[0](
            hidden_states=torch.empty(3, 26, 24, device=META),
            encoder_hidden_states=torch.empty(3, 7, 24, device=META),
            temb=torch.empty(3, 24, device=META),
        )

    assert executed(run) == 3 * cost.at(26)


# --- how it is counted ----------------------------------------------------------------------------


def test_a_quadratic_is_found_from_three_values_and_a_third_is_rounded():
    cost = Polynomial.through({4: 3 * 16 + 5 * 4 + 7, 12: 3 * 144 + 60 + 7, 8: 3 * 64 + 40 + 7})
    assert [cost.at(n) for n in (0, 1, 2, 10**6)] == [7, 15, 29, 3 * 10**12 + 5 * 10**6 + 7]
    assert [Polynomial.through({0: 0, 3: 1}).at(n) for n in (1, 2, 300)] == [0, 1, 100]


@sampled("name")
def test_three_sizes_say_what_a_fourth_costs(name: str) -> None:
    """Blocks, all else, and the rows of every linear layer."""
    model, text_tokens = families.FAMILIES[name].build(), families.FAMILIES[name].text
    found = counted(model, text_tokens)
    cls, config = recipe(model, model_spec(model), text_tokens)
    run = Skeleton(cls, json.loads(config)).run(4, text_tokens)
    counts = [run.num_tokens] * len(run.blocks)
    assert tuple(cost.at(run.num_tokens) for cost in found.blocks) == run.blocks
    assert found.outside.at(run.num_tokens) == run.outside
    for path, rows in run.rows.items():
        assert found.linear_rows(path, run.num_tokens, counts) == rows, path


ODD: dict[str, tuple[type[Any], dict[str, Any], int]] = {
    "a picture beside the text": (
        diffusers.WanTransformer3DModel,
        {"num_layers": 2, "image_dim": 12, "added_kv_proj_dim": 32, "ffn_dim": 40, "text_dim": 24},
        512,
    ),
    "two pictures": (
        diffusers.WanTransformer3DModel,
        {"num_layers": 2, "image_dim": 12, "added_kv_proj_dim": 32, "pos_embed_seq_len": 514},
        512,
    ),
    "one stream, two texts, a mask": (
        diffusers.EasyAnimateTransformer3DModel,
        {
            **{"num_layers": 3, "mmdit_layers": 2, "patch_size": 2, "text_embed_dim": 24},
            **{"text_embed_dim_t5": 20, "in_channels": 9, "out_channels": 4},
        },
        7,
    ),
    "learned positions": (
        diffusers.CogVideoXTransformer3DModel,
        {
            **{"num_layers": 2, "use_rotary_positional_embeddings": True, "in_channels": 4},
            **{"use_learned_positional_embeddings": True, "sample_height": 8, "sample_width": 8},
            **{"ofs_embed_dim": 20, "time_embed_dim": 20, "sample_frames": 9},
        },
        226,
    ),
}


@pytest.mark.parametrize("what", ODD)
def test_models_with_more_than_text_are_counted_too(what: str) -> None:
    """Three frames of 4 by 4: as the example makes their arguments, run on the meta device."""
    cls, config, text_tokens = ODD[what]
    with META:
        model: Any = cls(num_attention_heads=2, attention_head_dim=16, **config)
        spec = model_spec(model)
        size = Size(frames=3, height=4, width=4, text=text_tokens)
        given = {**spec.example(model, size), spec.timestep: torch.zeros(1)}
    assert model_flops(model, 48, text_tokens).dense() == executed(lambda: model(**given))


@pytest.mark.parametrize("name", ["mochi", "flux"])
def test_counting_disturbs_nothing_and_nothing_disturbs_it(name: str) -> None:
    """The random numbers, the model, its warnings; inference mode, dtypes, devices, backends."""
    model = families.made(name)
    before, random = tiny.footprint(model), torch.get_rng_state()
    found = model_flops(model, 64, 7)
    try:
        for cached in (
            counted_module._counted,
            counted_module._widths,
            counted_module._skeleton,
        ):
            cached.cache_clear()
        torch.set_default_dtype(torch.bfloat16)
        torch.set_default_device("meta")
        with warnings.catch_warnings(), torch.inference_mode(), attention_backend("_native_cudnn"):
            warnings.simplefilter("error")
            assert model_flops(model, 64, 7) == found
            assert model_widths(model).width == 32
    finally:
        torch.set_default_dtype(torch.float32)
        torch.set_default_device(None)
    assert torch.equal(torch.get_rng_state(), random)
    assert tiny.footprint(model) == before


def test_blocks_that_are_alike_run_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 24 blocks with two kinds of attention and a last one without text: three."""
    ran = []
    forward = JointTransformerBlock.forward

    def watched(self: Any, *args: Any, **kwargs: Any) -> Any:
        ran.append(self)
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(JointTransformerBlock, "forward", watched)
    model = sd3(tuple(range(13)), num_layers=24)
    cls, config = recipe(model, model_spec(model), 7)
    skeleton = Skeleton(cls, json.loads(config))
    costs = skeleton.run(1, 7).blocks
    assert len(ran) == len(set(costs)) == 3


def test_blocks_are_counted_in_the_model_and_their_kinds_in_the_config() -> None:
    """A ControlNet that is made from a transformer writes its own depth into that one's config."""
    model = tiny.sd3("dual")
    found = model_flops(model, 64, 7)
    SD3ControlNetModel.from_transformer(model, num_layers=2, num_extra_conditioning_channels=0)
    assert model.config["num_layers"] == 2
    assert model_flops(model, 64, 7) == found
    del model.transformer_blocks[2]  # of one attention: the two of two stay in their places
    shallow = model_flops(model, 64, 7)
    assert shallow.blocks == (*found.blocks[:2], found.blocks[3])
    assert model_widths(model).num_blocks == 3
    del model.transformer_blocks[0]
    with pytest.raises(ValueError, match="block 1 of the model isn't the one that its config says"):
        model_flops(model, 64, 7)
    model.register_to_config(dual_attention_layers=(0,))
    assert model_flops(model, 64, 7).blocks == shallow.blocks[1:]


def test_layers_that_came_by_fusing_have_no_count() -> None:
    with pytest.raises(ValueError, match=r"attn\.to_qkv is no linear layer"):
        counted(tiny.sd3(), 7).linear_rows("transformer_blocks.0.attn.to_qkv", 64, [64] * 4)


@pytest.mark.parametrize(
    ("name", "text_tokens", "message"),
    [
        ("sd3", 0, "SD3Transformer2DModel reads text: text_tokens must be 1 at least"),
        ("hunyuan-dit", 3, "3 of Hunyuan-DiT's text tokens are CLIP's .* more than 3, got 3"),
        ("hunyuan-image-glyphs", 100, "must be 128 at least, got 100"),
    ],
)
def test_texts_that_a_model_does_not_take_are_refused(
    name: str, text_tokens: int, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        model_flops(families.FAMILIES[name].build(), 64, text_tokens)


def test_wan_with_a_picture_takes_the_text_that_its_attention_has_written_in() -> None:
    cls, config, _ = ODD["a picture beside the text"]
    with META:
        model = cls(num_attention_heads=2, attention_head_dim=16, **config)
    with pytest.raises(ValueError, match="take 512 text tokens, got 7"):
        model_flops(model, 64, 7)
