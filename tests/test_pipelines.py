"""Real pipelines of every family around tiny models: who chooses the tokens of a guided call."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DiTPipeline,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxImg2ImgPipeline,
    FluxInpaintPipeline,
    FluxPipeline,
    LTXPipeline,
    MochiPipeline,
    PixArtSigmaPipeline,
    WanPipeline,
)
from torch import Tensor

import shiva_dit
from shiva_dit.core.schedule import Schedule
from shiva_dit.models.attach import attachment_of
from tests import families, tiny

ABSENT: Any = None
COUNTS = [[64, 5, 30, 17], [64, 33, 2, 48], [64, 63, 20, 9]]
STEPS = 4


def text(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class Flux:
    """True guidance runs the two passes one after the other."""

    def __init__(self) -> None:
        self.pipe = FluxPipeline(
            scheduler=FlowMatchEulerDiscreteScheduler(),
            vae=ABSENT,
            text_encoder=ABSENT,
            tokenizer=ABSENT,
            text_encoder_2=ABSENT,
            tokenizer_2=ABSENT,
            transformer=families.made("flux"),
        )

    def __call__(self, guided: bool, steps: int = STEPS, **options: Any) -> Tensor:
        call: Any = self.pipe
        if guided:
            options["negative_prompt_embeds"] = text(2, families.TEXT, 24, seed=3)
            options["negative_pooled_prompt_embeds"] = text(2, 20, seed=4)
        return call(
            prompt_embeds=text(2, families.TEXT, 24, seed=1),
            pooled_prompt_embeds=text(2, 20, seed=2),
            true_cfg_scale=4.0 if guided else 1.0,
            height=128,
            width=128,
            num_inference_steps=steps,
            generator=torch.Generator().manual_seed(0),
            output_type="latent",
            **options,
        ).images


class PixArt:
    """Both halves in one call."""

    def __init__(self) -> None:
        self.pipe = PixArtSigmaPipeline(
            tokenizer=ABSENT,
            text_encoder=ABSENT,
            vae=ABSENT,
            transformer=families.made("pixart-sigma"),
            scheduler=DPMSolverMultistepScheduler(),
        )

    def __call__(self, guided: bool, steps: int = STEPS, **options: Any) -> Tensor:
        call: Any = self.pipe
        mask = torch.ones(2, families.TEXT)
        return call(
            negative_prompt=None,
            prompt_embeds=text(2, families.TEXT, 24, seed=1),
            prompt_attention_mask=mask,
            negative_prompt_embeds=text(2, families.TEXT, 24, seed=3),
            negative_prompt_attention_mask=mask,
            guidance_scale=4.0 if guided else 1.0,
            height=128,
            width=128,
            use_resolution_binning=False,
            num_inference_steps=steps,
            generator=torch.Generator().manual_seed(0),
            output_type="latent",
            **options,
        ).images


class DiT:
    """Both halves in one call, the unconditional one last."""

    def __init__(self) -> None:
        vae = AutoencoderKL(latent_channels=4, block_out_channels=(4,), norm_num_groups=2)
        tiny.randomize(vae, seed=5)
        self.pipe = DiTPipeline(
            transformer=families.made("dit"), vae=vae.eval(), scheduler=DDIMScheduler()
        )

    def __call__(self, guided: bool, steps: int = STEPS, **options: Any) -> Tensor:
        call: Any = self.pipe
        return call(
            class_labels=[3, 7],
            guidance_scale=4.0 if guided else 1.0,
            num_inference_steps=steps,
            generator=torch.Generator().manual_seed(0),
            output_type="pt",
            **options,
        ).images


class Wan:
    """Video, the two passes one after the other."""

    def __init__(self) -> None:
        self.pipe = WanPipeline(
            tokenizer=ABSENT,
            text_encoder=ABSENT,
            vae=ABSENT,
            scheduler=FlowMatchEulerDiscreteScheduler(),
            transformer=families.made("wan"),
        )

    def __call__(self, guided: bool, steps: int = STEPS, **options: Any) -> Tensor:
        call: Any = self.pipe
        return call(
            prompt_embeds=text(2, families.TEXT, 24, seed=1),
            negative_prompt_embeds=text(2, families.TEXT, 24, seed=3),
            guidance_scale=4.0 if guided else 1.0,
            height=64,
            width=64,
            num_frames=13,
            num_inference_steps=steps,
            generator=torch.Generator().manual_seed(0),
            output_type="latent",
            **options,
        ).frames


class Mochi:
    """Video, both halves in one call, and time that counts up."""

    def __init__(self) -> None:
        self.pipe = MochiPipeline(
            scheduler=FlowMatchEulerDiscreteScheduler(invert_sigmas=True),
            vae=ABSENT,
            text_encoder=ABSENT,
            tokenizer=ABSENT,
            transformer=families.made("mochi"),
        )

    def __call__(self, guided: bool, steps: int = STEPS, **options: Any) -> Tensor:
        call: Any = self.pipe
        mask = torch.ones(2, families.TEXT, dtype=torch.bool)
        return call(
            prompt_embeds=text(2, families.TEXT, 24, seed=1),
            prompt_attention_mask=mask,
            negative_prompt_embeds=text(2, families.TEXT, 24, seed=3),
            negative_prompt_attention_mask=mask,
            guidance_scale=4.0 if guided else 1.0,
            height=64,
            width=64,
            num_frames=19,
            num_inference_steps=steps,
            generator=torch.Generator().manual_seed(0),
            output_type="latent",
            **options,
        ).frames


class LTX:
    """Video, both halves in one call."""

    def __init__(self) -> None:
        self.pipe = LTXPipeline(
            scheduler=FlowMatchEulerDiscreteScheduler(),
            vae=ABSENT,
            text_encoder=ABSENT,
            tokenizer=ABSENT,
            transformer=families.made("ltx"),
        )

    def __call__(self, guided: bool, steps: int = STEPS, **options: Any) -> Tensor:
        call: Any = self.pipe
        mask = torch.ones(2, families.TEXT)
        return call(
            prompt_embeds=text(2, families.TEXT, 24, seed=1),
            prompt_attention_mask=mask,
            negative_prompt_embeds=text(2, families.TEXT, 24, seed=3),
            negative_prompt_attention_mask=mask,
            guidance_scale=4.0 if guided else 1.0,
            height=128,
            width=128,
            num_frames=25,
            num_inference_steps=steps,
            generator=torch.Generator().manual_seed(0),
            output_type="latent",
            **options,
        ).frames


IN_TURN = (Flux, Wan)
PIPELINES: dict[str, Callable[[], Any]] = {
    "flux": Flux,
    "pixart-sigma": PixArt,
    "dit": DiT,
    "wan": Wan,
    "ltx": LTX,
    "mochi": Mochi,
}


@pytest.fixture(params=PIPELINES)
def made(request: pytest.FixtureRequest) -> Any:
    made = PIPELINES[request.param]()
    made.pipe.set_progress_bar_config(disable=True)
    return made


def applied(made: Any) -> Any:
    model = made.pipe.transformer
    shiva_dit.apply(made.pipe, tiny.adapter(model, tiny.from_counts(COUNTS)))
    return model


@contextmanager
def calls_of(model: Any) -> Iterator[list[dict[int, Tensor]]]:
    """Within: of every call of the model, the tokens chosen by block."""
    attachment = attachment_of(model)
    assert attachment is not None
    calls: list[dict[int, Tensor]] = []
    handle = model.register_forward_pre_hook(lambda module, args: calls.append({}))
    attachment.forwards.observer = lambda block, chosen: calls[-1].update({block: chosen})
    try:
        yield calls
    finally:
        handle.remove()
        attachment.forwards.observer = None


def test_ratio_one_gives_the_same_images(made: Any) -> None:
    bare = {guided: made(guided) for guided in (False, True)}
    model = made.pipe.transformer
    full = Schedule.uniform(1.0, num_blocks=4, full_blocks=())
    shiva_dit.apply(made.pipe, tiny.adapter(model), schedule=full)
    for guided, images in bare.items():
        assert torch.equal(made(guided), images)
    shiva_dit.apply(made.pipe, tiny.adapter(model), keep_ratio=0.5)
    assert not torch.equal(made(True), bare[True])
    shiva_dit.remove(made.pipe)
    for guided, images in bare.items():
        assert torch.equal(made(guided), images)


def test_both_passes_of_guidance_keep_the_same_tokens(made: Any) -> None:
    with calls_of(applied(made)) as calls:
        made(True)
    if isinstance(made, IN_TURN):
        assert len(calls) == 2 * STEPS
        pairs = [(a[b], c[b]) for a, c in zip(calls[::2], calls[1::2], strict=True) for b in a]
    else:
        assert len(calls) == STEPS
        pairs = [tuple(chosen.chunk(2)) for call in calls for chosen in call.values()]
    assert len(pairs) == 3 * STEPS
    assert all(torch.equal(first, second) for first, second in pairs)
    # Two images choose for themselves, and so does every step.
    assert any(not torch.equal(first[0], first[1]) for first, _ in pairs)


@pytest.mark.parametrize("order", ["guided first", "unguided first"])
def test_without_guidance_two_images_choose_for_themselves(made: Any, order: str) -> None:
    model = applied(made)
    if order == "guided first":
        made(True)
    with calls_of(model) as calls:
        made(False)
    assert len(calls) == STEPS
    for call in calls:
        assert any(not torch.equal(chosen[0], chosen[1]) for chosen in call.values())


# Mochi's pipeline divides by half of the steps, rounded down.
STEPS_OF_EACH = [
    pytest.param(n, s, marks=pytest.mark.slow if s == 50 and n != "flux" else ())
    for n in PIPELINES
    for s in (1, 4, 8, 28, 50)
    if (n, s) != ("mochi", 1)
]


@pytest.mark.parametrize(("made", "steps"), STEPS_OF_EACH, indirect=["made"])
def test_one_adapter_serves_any_number_of_steps(made: Any, steps: int) -> None:
    """Every step keeps what the schedule says at its own time, moved to the mean of all steps."""
    model = applied(made)
    attachment = attachment_of(model)
    assert attachment is not None
    rows: list[tuple[int, ...]] = []
    times: list[float] = []

    def read(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        times.append(attachment.spec.time(float(kwargs["timestep"].flatten()[0])))

    handle = model.register_forward_pre_hook(read, with_kwargs=True)
    with calls_of(model) as calls:
        assert torch.isfinite(made(False, steps=steps)).all()
    handle.remove()
    for call in calls:
        rows.append((64, *(call[block].shape[1] for block in (1, 2, 3))))
    table = attachment.schedule.for_steps(times, families.TOKENS)
    assert len(rows) == steps
    assert rows == [table.row(t) for t in times]
    assert times == sorted(times, reverse=True)


def test_an_unconditional_pass_alone_chooses_for_itself() -> None:
    """A lead serves one pass, of as many samples; it is gone after the pipeline has ended."""
    made = Flux()
    model = applied(made)
    attachment = attachment_of(model)
    assert attachment is not None
    made(True)
    assert attachment.passes.lead is None
    two = families.arguments("flux")
    one = families.sample_of(two, 0)
    with torch.no_grad(), calls_of(model) as calls:
        with model.cache_context("cond"):
            families.run(model, two)
        with model.cache_context("uncond"):
            families.run(model, {**two, "hidden_states": -two["hidden_states"]})
            families.run(model, {**two, "hidden_states": -two["hidden_states"]})
        with model.cache_context("cond"):
            families.run(model, two)
        with model.cache_context("uncond"):
            families.run(model, {**one, "hidden_states": -one["hidden_states"]})
    lead, led, alone, _, single = calls
    assert all(torch.equal(lead[b], led[b]) for b in lead)
    assert any(not torch.equal(alone[b], led[b]) for b in led)
    # Tokens, not numbers: at the borders two scores differ by 1e-4 of the largest at least.
    assert all(torch.equal(alone[b][:1], single[b]) for b in alone)


def test_a_lead_is_gone_after_an_error_and_after_the_pipeline() -> None:
    made = Flux()
    model = applied(made)
    attachment = attachment_of(model)
    assert attachment is not None
    given = families.arguments("flux")
    made(False)  # conditional passes alone: nobody takes their lead
    assert attachment.passes.lead is None
    with model.cache_context("cond"), pytest.raises(RuntimeError):
        families.run(model, {**given, "txt_ids": given["txt_ids"][:3]})
    assert attachment.passes.lead is None


def flux_with_pictures(kind: Any) -> tuple[Any, Tensor]:
    """A Flux pipeline that starts from pictures, and two of them."""
    made = Flux()
    vae = AutoencoderKL(
        latent_channels=1,
        block_out_channels=(4,) * 4,
        norm_num_groups=2,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        shift_factor=0.0,
    )
    tiny.randomize(vae, seed=5)
    made.pipe = kind(**{**made.pipe.components, "vae": vae.eval()})
    made.pipe.set_progress_bar_config(disable=True)
    return made, text(2, 3, 128, 128, seed=6).clamp(-1, 1)


def test_images_can_be_changed_too() -> None:
    """Image to image: the pipeline names no passes, and both keep the same tokens all the same."""
    made, image = flux_with_pictures(FluxImg2ImgPipeline)
    bare = made(True, image=image, strength=0.5)
    shiva_dit.apply(made.pipe, tiny.adapter(made.pipe.transformer), keep_ratio=1.0)
    assert torch.equal(made(True, image=image, strength=0.5), bare)
    with calls_of(applied(made)) as calls:
        pruned = made(True, image=image, strength=0.5)
    assert len(calls) == 2 * STEPS // 2
    assert torch.isfinite(pruned).all()
    assert not torch.equal(pruned, bare)
    assert all(torch.equal(calls[0][b], calls[1][b]) for b in calls[0])


def test_a_part_of_an_image_can_be_painted_anew() -> None:
    """Inpainting: at ratio 1 to the bit; what the mask leaves alone stays, pruned or not."""
    made, image = flux_with_pictures(FluxInpaintPipeline)
    mask = torch.zeros(2, 1, 128, 128)
    mask[..., 64:] = 1.0

    def paint() -> Tensor:
        return made(False, image=image, mask_image=mask, strength=0.75)

    bare = paint()
    model = made.pipe.transformer
    shiva_dit.apply(made.pipe, tiny.adapter(model), keep_ratio=1.0)
    assert torch.equal(paint(), bare)
    applied(made)
    pruned = paint()
    kept = (torch.arange(64) % 8 < 4).expand(2, -1)  # packed latents, left half of each row
    assert torch.equal(pruned[kept], bare[kept])
    assert not torch.equal(pruned, bare)
