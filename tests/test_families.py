"""What holds for every family: on real classes, built small."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop

import shiva_dit
from shiva_dit.core.estimators import EstimatorConfig
from shiva_dit.core.schedule import Schedule
from shiva_dit.methods.gates import SelectionGates
from shiva_dit.methods.norm import NormSelector
from shiva_dit.models.attach import attach, attachment_of
from shiva_dit.models.attachment import Attachment
from shiva_dit.models.backbone import add_lora, backbone_weights
from shiva_dit.models.cost import pruned_flops
from shiva_dit.models.counted import model_flops
from shiva_dit.models.families import MODELS, block_spec, model_spec
from shiva_dit.models.gating import GatedForward
from shiva_dit.models.spec import mean_text
from shiva_dit.report.layout import markdown_rows
from tests import families, tiny
from tests.matrix import sampled

DOCUMENT = Path(__file__).parents[1] / "docs" / "models.md"
NAMES = tuple(families.FAMILIES)
every = pytest.mark.parametrize("name", NAMES)
ROWS = [name for name in NAMES if families.FAMILIES[name].rows]
TIMES = (1 / 6, 0.5, 5 / 6)
COUNTS = [[64, 5, 30, 17], [64, 33, 1, 48], [64, 63, 20, 9]]


def attached(model: Any, counts: list[list[int]] = COUNTS) -> Attachment:
    return attach(model, tiny.adapter(model).selector(), families.schedule(model, counts))


def test_every_supported_class_is_here() -> None:
    assert {model_spec(families.made(name)).model_class for name in NAMES} == set(MODELS)


@every
def test_ratio_one_is_the_bare_model_to_the_bit(name: str) -> None:
    model, given = families.made(name), families.arguments(name)
    with torch.no_grad():
        bare = families.run(model, given)
        attached(model, [[64] * 4])
        assert torch.equal(families.run(model, given), bare)
        attached(model)
        pruned = families.run(model, given)
    assert torch.isfinite(pruned).all()
    assert not torch.equal(pruned, bare)


@every
@pytest.mark.parametrize("batch", [1, 2])
def test_gathering_all_tokens_in_any_order_changes_nothing(
    name: str, batch: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, given = families.made(name), families.arguments(name, batch)
    with torch.no_grad():
        bare = families.run(model, given)
        families.force_permutation(model, monkeypatch)
        permuted = families.run(model, given)
    # Sums over tokens run in another order: measured 5.4e-7 at most (SSE, AVX2 and AVX-512).
    assert (permuted - bare).norm() <= 2e-6 * bare.norm()


@pytest.mark.parametrize("name", ROWS)
@pytest.mark.parametrize("batch", [1, 2])
def test_rows_that_stay_behind_are_noticed(
    name: str, batch: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The negative control of the test above: without the gather of its rows it fails."""
    model, given = families.made(name), families.arguments(name, batch)
    with torch.no_grad():
        bare = families.run(model, given)
        families.force_permutation(model, monkeypatch)
        for block in model_spec(model).blocks(model):
            block._diffusers_hook.get_hook("shiva_dit").rows = []
        permuted = families.run(model, given)
    assert (permuted - bare).norm() > 1e-3 * bare.norm()


@every
def test_exactly_k_tokens_run_in_every_block(name: str) -> None:
    model = families.made(name)
    attachment = attached(model)
    seen: list[int] = []
    for block in attachment.blocks[:4]:
        spec = block_spec(block)
        module = block.get_submodule(spec.value_modules[0])
        text_inside = spec.block_class in families.FAMILIES[name].text_inside

        def count(module: nn.Module, args: Any, output: Tensor, inside: bool = text_inside) -> None:
            text = families.TEXT + families.FAMILIES[name].own_tokens
            seen.append(output.shape[1] - (text if inside else 0))

        module.register_forward_hook(count)
    least = model_spec(model).least_tokens
    for t, counts in zip(TIMES, families.at_least(COUNTS, least), strict=True):
        seen.clear()
        with torch.no_grad():
            families.run(model, families.arguments(name, t=t))
        assert seen == counts


@every
def test_a_batch_equals_its_samples_alone(name: str) -> None:
    """Samples choose different tokens, and none sees another's."""
    model, given = families.made(name), families.arguments(name)
    attachment = attached(model)
    chosen: list[Tensor] = []
    attachment.forwards.observer = lambda block, tokens: chosen.append(tokens)
    with torch.no_grad():
        both = families.run(model, given)
        assert any(not torch.equal(*tokens.sort(-1).values) for tokens in chosen)
        for index in range(2):
            alone = families.run(model, families.sample_of(given, index))
            # Matrix products of other sizes: measured 3.8e-7 at most (SSE, AVX2 and AVX-512). The
            # tokens are the same: at the borders scores differ by 1e-4 of the largest at least.
            assert (alone[0] - both[index]).norm() <= 2e-6 * both[index].norm()


def router_gradients(name: str, *, kv_gate: bool, checkpointing: bool) -> dict[str, Tensor]:
    """Of a router on a frozen backbone."""
    model = families.made(name)
    adapter = tiny.adapter(model)
    model.requires_grad_(False)
    if checkpointing:
        model.enable_gradient_checkpointing()
    attachment = attach(
        model, adapter.selector(), families.schedule(model, COUNTS), gate_values=kv_gate
    )
    config = EstimatorConfig(rejected="ridge", kv_gate=kv_gate)

    def gates(block: int) -> SelectionGates:
        return SelectionGates(config=config, tau_rank=0.2, tau_select=0.1, soft_k=20.0)

    counts = (64, 20, 20, 20, *[64] * (len(attachment.blocks) - 4))
    with attachment.forwards.gated(GatedForward(counts=counts, gates=gates)):
        loss = families.run(model, families.arguments(name)).square().mean()
        loss.backward()
    return {n: p.grad for n, p in adapter.router.named_parameters() if p.grad is not None}


@sampled("name")
@pytest.mark.parametrize("kv_gate", [False, True])
def test_gradients_reach_the_router_with_checkpointing_and_without(
    name: str, kv_gate: bool
) -> None:
    plain = router_gradients(name, kv_gate=kv_gate, checkpointing=False)
    names = dict(tiny.adapter(families.made(name)).router.named_parameters())
    # The first router serves blocks 0 and 1, the first of which keeps all and is not judged; a
    # third one has blocks alone that can't be pruned.
    # The norm's bias moves all scores alike, and they are standardised: rounding, if anything.
    moved = {key for key, gradient in plain.items() if gradient.any()}
    judged = {key for key in names if not key.startswith("groups.2.")}
    without = {key for key in judged if not key.endswith("score_norm.bias")}
    assert without <= moved <= judged
    if not families.FAMILIES[name].recomputes:
        return
    again = router_gradients(name, kv_gate=kv_gate, checkpointing=True)
    for key, gradient in plain.items():
        assert torch.equal(gradient, again[key]), key


def test_what_a_model_hands_on_by_name_is_there_when_it_is_recomputed() -> None:
    """HunyuanImage does, which diffusers' own checkpointing refuses."""
    for name in ("hunyuan-image", "hunyuan-image-glyphs"):
        plain, again = (
            router_gradients(name, kv_gate=True, checkpointing=on) for on in (False, True)
        )
        assert plain.keys() == again.keys()
        for key, gradient in plain.items():
            assert torch.equal(gradient, again[key]), key


@every
def test_detaching_leaves_nothing_behind(name: str) -> None:
    model, given = families.made(name), families.arguments(name)
    before = tiny.footprint(model)
    with torch.no_grad():
        bare = families.run(model, given)
        attached(model).detach()
        assert tiny.footprint(model) == before
        first = attached(model)
        pruned = families.run(model, given)
        first.detach()
        attached(model)
        assert torch.equal(families.run(model, given), pruned)
        shiva_dit.remove(model)
        assert torch.equal(families.run(model, given), bare)
    assert tiny.footprint(model) == before


def attention_flops(
    q: Any, k: Any, v: Any, *args: Any, out_shape: Any = None, **options: Any
) -> int:
    return sdpa_flop(q, k, v)


def executed(model: nn.Module, given: dict[str, Any]) -> int:
    """By torch's counter, with attention, which it passes by on a CPU unless it is told."""
    if "encoder_attention_mask" in given:  # Mochi drops padding; all text tokens are billed
        given["encoder_attention_mask"] = torch.ones_like(given["encoder_attention_mask"])
    attention = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    counter = FlopCounterMode(display=False, custom_mapping={attention: attention_flops})
    with torch.no_grad(), counter:
        families.run(model, given)
    return counter.get_total_flops()


@sampled("name")
def test_flops_are_what_the_counter_counts(name: str) -> None:
    """Dense and pruned, at 64 tokens and at half of them: none is a size that was counted at."""
    if not families.FAMILIES[name].counted:
        return
    model, text = families.made(name), families.FAMILIES[name].text
    given = families.arguments(name, 1, 0.9)
    flops = model_flops(model, families.TOKENS, text)
    assert flops.dense() == executed(model, given)
    schedule = families.schedule(model, COUNTS)
    attachment = attach(model, NormSelector(), schedule)
    counts = attachment.counts.row(families.TOKENS, given[attachment.spec.timestep])
    assert len(set(counts)) >= 4
    assert flops.pruned(counts) == executed(model, given)
    attachment.detach()
    narrow = families.FAMILIES[name].narrow
    if narrow is not None:
        half = {**given, **narrow(given)}
        if name.startswith("qwen"):
            half["img_shapes"] = half["img_shapes"][:1]
        assert model_flops(model, families.TOKENS // 2, text).dense() == executed(model, half)


def test_flops_of_a_segment_of_wan_animate() -> None:
    """Its face encoder's cost goes by frames: it is counted at as many as the pipeline makes."""
    model, given = families.made("wan-animate"), families.arguments("wan-animate", 1)
    longer = {"hidden_states": 21, "pose_hidden_states": 20, "face_pixel_values": 80}
    for name, frames in longer.items():
        given[name] = given[name][:, :, :1].repeat(1, 1, frames, 1, 1)
    assert model_flops(model, 21 * 16, families.TEXT).dense() == executed(model, given)


@sampled("name")
def test_what_a_lora_beside_the_layers_costs_is_counted(name: str) -> None:
    """Beyond the same one merged, at different k of each block."""
    model, given = families.made(name), families.arguments(name, 1, 0.9)
    if not hasattr(model, "add_adapter") or not families.FAMILIES[name].counted:
        return  # diffusers gives its class no LoRA
    made = tiny.adapter(model, families.schedule(model, COUNTS), backbone="lora", lora_rank=3)
    trained = families.made(name)
    add_lora(trained, {"r": 3, "lora_alpha": 3, "use_dora": False})
    made.backbone_weights = backbone_weights(trained, "lora")
    found, stated = [], []
    for merge in (False, True):
        shiva_dit.apply(model, made, merge=merge)
        attachment = attachment_of(model)
        assert attachment is not None
        counts = attachment.counts.row(families.TOKENS, given[attachment.spec.timestep])
        found.append(executed(model, given))
        stated.append(
            pruned_flops(attachment, families.TOKENS, families.FAMILIES[name].text, counts)
        )
    assert found[0] > found[1]
    assert stated[0] - stated[1] == found[0] - found[1]


@pytest.mark.parametrize("name", [n for n in NAMES if families.FAMILIES[n].narrow])
def test_another_resolution_runs_too(name: str) -> None:
    """Half of the grid or of the rows: 32 tokens, of which half are kept."""
    model, given = families.made(name), families.arguments(name)
    narrow = families.FAMILIES[name].narrow
    assert narrow is not None
    full = model_spec(model).full_blocks(model)
    schedule = Schedule.uniform(0.5, num_blocks=4 + len(full), full_blocks=(0, *full))
    attachment = attach(model, tiny.adapter(model).selector(), schedule)
    chosen: list[Tensor] = []
    attachment.forwards.observer = lambda block, found: chosen.append(found)
    with torch.no_grad():
        assert torch.isfinite(families.run(model, {**given, **narrow(given)})).all()
    assert [found.shape[1] for found in chosen] == [16] * 3


@pytest.mark.parametrize(
    "name", [n for n in NAMES if families.FAMILIES[n].narrow is families.narrow_latents]
)
def test_odd_grids_run_too(name: str) -> None:
    """Sides of 7 and 5 patches, in videos 3 frames of 3 by 3: all tokens as bare, and a third."""
    model, given = families.made(name), families.arguments(name)
    latents = given["hidden_states"]
    odd = latents[..., :14, :10] if latents.ndim == 4 else latents[..., :6, :6]
    frames = 2 if name == "skyreels-causal" else 3  # that one takes frames by twos
    if latents.ndim > 4:
        odd = odd.narrow(2 if latents.ndim == 5 else 1, 0, frames)
    given["hidden_states"] = odd
    full = model_spec(model).full_blocks(model)
    num_tokens = 35 if latents.ndim == 4 else frames * 9
    with torch.no_grad():
        bare = families.run(model, given)
        for ratio in (1.0, 1 / 3):
            schedule = Schedule.uniform(ratio, num_blocks=4 + len(full), full_blocks=(0, *full))
            attachment = attach(model, tiny.adapter(model).selector(), schedule)
            chosen: list[Tensor] = []
            attachment.forwards.observer = lambda block, found, seen=chosen: seen.append(found)
            found = families.run(model, given)
            assert torch.isfinite(found).all()
            assert torch.equal(found, bare) == (ratio == 1.0)
    assert sum(tokens.shape[1] for tokens in chosen) == num_tokens  # a third in three blocks


def test_blocks_that_take_a_skip_keep_all_their_tokens() -> None:
    """They change every token: what they reject would miss the skip."""
    model = families.made("hunyuan-dit")
    assert model_spec(model).full_blocks(model) == (4, 5)
    assert tiny.adapter(model).config.full_blocks == (0, 4, 5)
    with pytest.raises(ValueError, match=r"blocks \[4, 5\] of HunyuanDiT2DModel .* full_blocks"):
        attach(model, tiny.adapter(model).selector(), Schedule.uniform(0.5, num_blocks=6))


def test_fewer_tokens_than_a_block_takes_are_refused() -> None:
    model = families.made("allegro")
    attach(model, tiny.adapter(model).selector(), tiny.from_counts([[64, 33, 1, 48]]))
    with pytest.raises(ValueError, match=r"run on 2 tokens at least, .* keeps 1: .* multiple=2"):
        families.run(model, families.arguments("allegro"))


def test_prompts_of_two_lengths_are_refused_where_the_image_would_lie_elsewhere() -> None:
    model, given = families.made("lumina2"), families.arguments("lumina2")
    attached(model)
    given["encoder_attention_mask"][0, 4:] = 0
    with pytest.raises(ValueError, match="must be of one length"):
        families.run(model, given)


@pytest.mark.parametrize(
    ("images", "message"),
    [
        ([torch.zeros(4, 1, 16, 16), torch.zeros(4, 1, 8, 16)], "must be of one size"),
        ([[torch.zeros(4, 1, 16, 16)]] * 2, "omni mode"),
    ],
)
def test_z_image_says_what_it_cannot_serve(images: Any, message: str) -> None:
    model, given = families.made("z-image"), families.arguments("z-image")
    attached(model)
    with pytest.raises(ValueError, match=message):
        families.run(model, {**given, "x": images})


def test_flux2_with_cached_keys_is_refused() -> None:
    model, given = families.made("flux2-klein"), families.arguments("flux2-klein")
    attached(model)
    with pytest.raises(ValueError, match="kv_cache_mode"):
        families.run(model, {**given, "kv_cache_mode": "extract", "num_ref_tokens": 8})


def test_the_mean_of_a_text_leaves_padding_out() -> None:
    text = torch.tensor([[[1.0], [3.0], [100.0]], [[1.0], [3.0], [5.0]]])
    mask = torch.tensor([[1, 1, 0], [1, 1, 1]])
    bias = (1.0 - mask[:, None].float()) * -10_000.0
    for padding in (mask, mask.bool(), bias):
        assert mean_text(text, padding).tolist() == [[2.0], [3.0]]
    assert mean_text(text, torch.zeros(2, 3)).tolist() == [[0.0], [0.0]]
    assert mean_text(text, None)[1].tolist() == [3.0]


# --- the document -------------------------------------------------------------------------------


def tested() -> str:
    """A row for every class: what was built of it, and which of the tests above it had."""
    rows: dict[str, list[str]] = {}
    for name in NAMES:
        family, model = families.FAMILIES[name], families.FAMILIES[name].build()
        spec = model_spec(model)
        row = rows.setdefault(spec.model_class, [f"`{spec.model_class}`", "", "no", "no", "no"])
        row[1] += f", {name}" if row[1] else name
        row[2] = "yes" if family.rows else row[2]
        row[3] = "yes" if family.recomputes else row[3]
        row[4] = "yes" if hasattr(model, "add_adapter") else row[4]
    head = ["class", "built small as", "rows to gather", "gradient checkpointing", "LoRA trained"]
    return markdown_rows([head, *rows.values()])


def document() -> str:
    """docs/models.md with the table of what is tested."""
    text = DOCUMENT.read_text(encoding="utf-8")
    start, end = "<!-- tested -->\n", "<!-- end tested -->"
    return f"{text.split(start)[0]}{start}{tested()}\n{end}{text.split(end)[1]}"


def test_the_document_says_what_is_tested() -> None:
    assert DOCUMENT.read_text(encoding="utf-8") == document(), "run `python -m tests.test_families`"


if __name__ == "__main__":
    DOCUMENT.write_text(document(), encoding="utf-8")
