"""The mean keep ratio that is asked for is what samplers execute, whatever steps they take."""

from __future__ import annotations

import copy
import inspect
import json
import logging
import math
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    AuraFlowPipeline,
    AutoencoderKL,
    ChromaPipeline,
    CogVideoXDDIMScheduler,
    CogVideoXPipeline,
    CogView4Pipeline,
    DDIMScheduler,
    DDPMScheduler,
    DEISMultistepScheduler,
    DPMSolverMultistepScheduler,
    DPMSolverSinglestepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    FluxImg2ImgPipeline,
    HeunDiscreteScheduler,
    LCMScheduler,
    PNDMScheduler,
    QwenImagePipeline,
    StableDiffusion3Img2ImgPipeline,
    UniPCMultistepScheduler,
    WanPipeline,
)
from hypothesis import given
from hypothesis import strategies as st

import shiva_dit
from shiva_dit.adapter import ShivaAdapter
from shiva_dit.core.budget import BudgetController
from shiva_dit.core.hand_made import hand_made
from shiva_dit.core.schedule import Schedule
from shiva_dit.core.time_law import UNIFORM, TimeLaw
from shiva_dit.models.attach import attachment_of
from shiva_dit.models.attachment import Attachment
from shiva_dit.models.cost import pruned_flops
from shiva_dit.models.families import MODELS, model_spec
from shiva_dit.models.sampling import Sampler
from shiva_dit.modules.policy import AdaptiveRatioPolicy
from shiva_dit.training.paths import Diffusion, FlowMatching, path_of
from shiva_dit.training.plan import Planner
from shiva_dit.training.trainer import Trainer
from tests import families, running, tiny
from tests.matrix import sampled
from tests.test_guidance import COUNTS, RUN
from tests.test_pipelines import LTX, DiT, Flux, Mochi, PixArt, Wan, flux_with_pictures
from tests.test_training import TinyData, recipe

ASKED, EXECUTED = 0.6, 0.005
"""Mean keep ratio, and how far what is executed may lie from it, as a share."""
STEPS, OTHERS = (4, 8, 28, 50), (4, 11)
FLOW = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}


class SD3:
    """Guidance in one batch."""

    def __init__(self) -> None:
        self.pipe: Any = tiny.pipeline(tiny.sd3())

    def __call__(self, guided: bool, steps: int, **options: Any) -> Any:
        guidance = 4.0 if guided else 1.0
        return tiny.generate(self.pipe, guidance, num_inference_steps=steps, **options)


def law_of(scheduler: Any, spec: Any, num_tokens: int) -> TimeLaw:
    return Sampler(scheduler=scheduler).law(spec, num_tokens)


def line(num_blocks: int, law: TimeLaw = UNIFORM) -> Schedule:
    """0.4 in noise and 0.8 at clean data: the shape that the paper reports, mean 0.6."""
    rows = [[1.0] + [0.8 - 0.4 * (b + 0.5) / 64] * (num_blocks - 1) for b in range(64)]
    return Schedule.from_ratios(rows, (0,), law)


def applied(target: Any, schedule: Schedule | None = None, **options: Any) -> Attachment:
    model = getattr(target, "transformer", target)
    blocks = len(model_spec(model).blocks(model))
    shiva_dit.apply(target, tiny.adapter(model, schedule or line(blocks)), **options)
    attachment = attachment_of(model)
    assert attachment is not None
    return attachment


@contextmanager
def kept(attachment: Attachment, num_tokens: int = tiny.NUM_TOKENS) -> Iterator[list[list[int]]]:
    """Within: of every forward, the tokens that run in each block that may be pruned."""
    prunable = attachment.schedule.prunable_blocks
    rows: list[list[int]] = []

    def begin(module: Any, args: Any) -> None:
        rows.append([num_tokens] * len(prunable))

    def seen(block: int, chosen: torch.Tensor) -> None:
        rows[-1][prunable.index(block)] = chosen.shape[1]

    handle = attachment.model.register_forward_pre_hook(begin)
    attachment.forwards.observer = seen
    try:
        yield rows
    finally:
        handle.remove()
        attachment.forwards.observer = None


def mean_of(rows: list[list[int]], num_tokens: int = tiny.NUM_TOKENS) -> float:
    return sum(map(sum, rows)) / (len(rows) * len(rows[0]) * num_tokens)


def assert_met(rows: list[list[int]], asked: float = ASKED) -> None:
    assert abs(mean_of(rows) / asked - 1) <= EXECUTED, mean_of(rows)


def dynamic() -> Any:
    return FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)


SAMPLERS: dict[str, tuple[Callable[[], Any], Callable[[], Any]]] = {
    "sd3-euler": (SD3, lambda: FlowMatchEulerDiscreteScheduler(shift=3.0)),
    "sd3-heun": (SD3, lambda: FlowMatchHeunDiscreteScheduler(shift=3.0)),
    "sd3-unipc": (SD3, lambda: UniPCMultistepScheduler(**FLOW, flow_shift=3.0)),
    "sd3-dpm++": (SD3, lambda: DPMSolverMultistepScheduler(**FLOW, flow_shift=3.0)),
    "sd3-karras": (SD3, lambda: FlowMatchEulerDiscreteScheduler(use_karras_sigmas=True)),
    "flux": (Flux, dynamic),
    "flux-unipc": (Flux, lambda: UniPCMultistepScheduler(**FLOW, use_dynamic_shifting=True)),
    "wan-unipc": (Wan, lambda: UniPCMultistepScheduler(**FLOW, flow_shift=5.0)),
    "wan-euler": (Wan, lambda: FlowMatchEulerDiscreteScheduler(shift=7.0)),
    "pixart-dpm++": (PixArt, DPMSolverMultistepScheduler),
    "pixart-sde": (PixArt, lambda: DPMSolverMultistepScheduler(use_karras_sigmas=True)),
    "pixart-single": (PixArt, DPMSolverSinglestepScheduler),
    "pixart-euler": (PixArt, EulerDiscreteScheduler),
    "pixart-ancestral": (PixArt, EulerAncestralDiscreteScheduler),
    "pixart-unipc": (PixArt, UniPCMultistepScheduler),
    "pixart-heun": (PixArt, HeunDiscreteScheduler),
    "pixart-deis": (PixArt, DEISMultistepScheduler),
    "pixart-pndm": (PixArt, PNDMScheduler),
    "pixart-lcm": (PixArt, LCMScheduler),
    "dit-ddim": (DiT, DDIMScheduler),
    "dit-ddpm": (DiT, lambda: DDPMScheduler(timestep_spacing="trailing")),
    "ltx": (LTX, dynamic),
    "mochi": (Mochi, lambda: FlowMatchEulerDiscreteScheduler(invert_sigmas=True)),
}

MAIN = ("sd3-euler", "flux", "wan-unipc", "pixart-dpm++")
RUNS = [
    pytest.param(name, n, marks=pytest.mark.slow if n > 8 and name != "flux" else ())
    for name in SAMPLERS
    for n in (STEPS if name in MAIN else OTHERS)
]


@pytest.mark.parametrize(("name", "steps"), RUNS)
def test_every_sampler_executes_the_mean(name: str, steps: int) -> None:
    kind, scheduler = SAMPLERS[name]
    made = kind()
    made.pipe.scheduler = scheduler()
    made.pipe.set_progress_bar_config(disable=True)
    attachment = applied(made.pipe)
    with kept(attachment) as rows:
        made(False, steps)
    assert_met(rows)
    summary = shiva_dit.summary(
        made.pipe, num_tokens=tiny.NUM_TOKENS, text_tokens=7, num_inference_steps=steps
    )
    assert [list(row[1:]) for _, row in summary.rows] == rows
    assert summary.keep_ratio == pytest.approx(mean_of(rows), rel=1e-12)
    each = [pruned_flops(attachment, tiny.NUM_TOKENS, 7, [tiny.NUM_TOKENS, *row]) for row in rows]
    assert summary.flops_pruned == pytest.approx(sum(each) / len(each), abs=1)


@pytest.mark.parametrize("name", [*MAIN, "sd3-heun"])
def test_both_passes_of_guidance_count_alike(name: str) -> None:
    kind, scheduler = SAMPLERS[name]
    made = kind()
    made.pipe.scheduler = scheduler()
    attachment = applied(made.pipe)
    assert attachment.counts.clock is not None
    attachment.counts.clock.on_cpu = True  # as on a device: nothing but the first step is read
    with kept(attachment) as rows:
        made(True, 6)
    assert_met(rows)
    if name in ("flux", "wan-unipc"):
        assert rows[::2] == rows[1::2]
    assert attachment.counts.clock.reads == 1


def numbers(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


def embedded(width: int, mask: str | None = None, words: int = families.TEXT) -> dict[str, Any]:
    """Prompts, wanted and not, as embeddings."""
    given: dict[str, Any] = {"prompt_embeds": numbers(1, words, width)}
    if mask is not None:
        given[mask] = torch.ones(1, words, dtype=torch.bool)
    return {**given, **{f"negative_{key}": value for key, value in given.items()}}


OWN_WAYS: dict[str, tuple[Any, Callable[[], Any], Callable[[Any], dict[str, Any]]]] = {
    "cogview4": (
        CogView4Pipeline,
        lambda: FlowMatchEulerDiscreteScheduler(
            use_dynamic_shifting=True, base_shift=0.25, max_shift=0.75
        ),
        lambda c: embedded(c.text_embed_dim, words=16),
    ),
    "chroma": (
        ChromaPipeline,
        dynamic,
        lambda c: embedded(c.joint_attention_dim, "prompt_attention_mask"),
    ),
    "qwen-image": (
        QwenImagePipeline,
        lambda: FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift_terminal=0.02),
        lambda c: embedded(c.joint_attention_dim, "prompt_embeds_mask"),
    ),
    "auraflow": (
        AuraFlowPipeline,
        lambda: FlowMatchEulerDiscreteScheduler(shift=1.73),
        lambda c: embedded(c.joint_attention_dim, "prompt_attention_mask"),
    ),
    "cogvideox": (
        CogVideoXPipeline,
        CogVideoXDDIMScheduler,
        lambda c: embedded(c.text_embed_dim, words=c.max_text_seq_length) | {"num_frames": 13},
    ),
}


@pytest.mark.parametrize("name", OWN_WAYS)
def test_pipelines_give_their_schedulers_other_arguments(name: str) -> None:
    """What `summary` says of a number of steps is what the pipeline makes of it."""
    kind, scheduler, arguments = OWN_WAYS[name]
    model = families.made(name)
    parts = dict.fromkeys(set(inspect.signature(kind.__init__).parameters) - {"self"})
    pipe = kind(**{**parts, "transformer": model, "scheduler": scheduler()})
    pipe.set_progress_bar_config(disable=True)
    side = 64 if name == "cogvideox" else 128
    with kept(applied(pipe)) as rows:
        pipe(
            **arguments(model.config),
            height=side,
            width=side,
            num_inference_steps=6,
            generator=torch.Generator().manual_seed(0),
            output_type="latent",
        )
    assert_met(rows)
    executed = shiva_dit.summary(
        pipe, num_tokens=tiny.NUM_TOKENS, text_tokens=16, num_inference_steps=6
    )
    assert [list(row[1:]) for _, row in executed.rows] == rows[:: len(rows) // 6]


@pytest.mark.parametrize("on_cpu", [False, True])
def test_the_same_pipeline_takes_other_numbers_of_steps_in_turn(on_cpu: bool) -> None:
    made = SD3()
    attachment = applied(made.pipe)
    assert attachment.counts.clock is not None
    attachment.counts.clock.on_cpu = on_cpu
    seen = []
    for steps in (4, 7, 4, 28):
        with kept(attachment) as rows:
            made(True, steps)
        assert len(rows) == steps
        assert_met(rows)
        seen.append(rows)
    assert seen[0] == seen[2]
    made.pipe.scheduler = FlowMatchEulerDiscreteScheduler(shift=9.0)
    with kept(attachment) as rows:
        made(False, 4)
    assert rows != seen[0]
    assert_met(rows)


@pytest.mark.parametrize("on_cpu", [False, True])
@pytest.mark.parametrize("strength", [0.3, 0.6, 0.9])
def test_image_to_image_meets_the_mean_over_its_part_of_the_way(
    strength: float, on_cpu: bool
) -> None:
    made, image = flux_with_pictures(FluxImg2ImgPipeline)
    made.pipe.scheduler = dynamic()
    attachment = applied(made.pipe)
    assert attachment.counts.clock is not None
    attachment.counts.clock.on_cpu = on_cpu
    with kept(attachment) as rows:
        made(True, 10, image=image, strength=strength)
    assert len(rows) == 2 * round(10 * strength)
    assert_met(rows)


def test_image_to_image_by_a_solver_of_second_order() -> None:
    made: Any = tiny.pipeline(tiny.sd3())
    vae = AutoencoderKL(latent_channels=4, block_out_channels=(4,), norm_num_groups=2)
    scheduler: Any = FlowMatchHeunDiscreteScheduler(shift=3.0)
    pipe: Any = StableDiffusion3Img2ImgPipeline(
        **{**made.components, "vae": vae, "scheduler": scheduler}
    )
    attachment = applied(pipe)
    latents = torch.zeros(2, tiny.CHANNELS, tiny.LATENT, tiny.LATENT)
    with kept(attachment) as rows:
        tiny.generate(pipe, 1.0, num_inference_steps=10, strength=0.6, image=latents)
    assert 11 <= len(rows) <= 12
    assert_met(rows)


@pytest.mark.parametrize("steps", [4, 28])
@pytest.mark.parametrize("keep_ratio", [0.25, 0.6, 0.85])
def test_a_keep_ratio_is_what_is_executed(keep_ratio: float, steps: int) -> None:
    made = Flux()
    made.pipe.scheduler = dynamic()
    adapter = tiny.adapter(made.pipe.transformer, line(4))
    tiny.randomize(adapter.policy, seed=2, std=0.3)
    shiva_dit.apply(made.pipe, adapter, keep_ratio=keep_ratio)
    attachment = attachment_of(made.pipe.transformer)
    assert attachment is not None
    with kept(attachment) as rows:
        made(True, steps)
    assert_met(rows, keep_ratio)
    assert len({tuple(row) for row in rows}) > 1


def test_a_multiple_and_segments_hold_for_a_run(caplog: pytest.LogCaptureFixture) -> None:
    made = SD3()
    attachment = applied(made.pipe, multiple=4, segments=2)
    with kept(attachment) as rows, caplog.at_level(logging.INFO, "shiva_dit"):
        made(False, 28)
    assert {k % 4 for row in rows for k in row} == {0}
    assert len({tuple(row) for row in rows}) == 2
    # Two rows of three blocks, half a step of the longest one: 4 / 2 of 64 in a sixth at most.
    assert abs(mean_of(rows) - ASKED) <= 2 / 64 / 3
    attachment = applied(made.pipe, multiple=32)
    with kept(attachment) as rows, caplog.at_level(logging.WARNING, "shiva_dit"):
        made(False, 1)
    assert rows == [[64, 32, 32]]  # 0.667: the nearest to 0.6 are 0.5 and 0.667
    assert "66.7% of 64 tokens are kept on average, 60.0% were asked for" in caplog.text


def test_few_entries_get_a_smaller_multiple() -> None:
    """One step of one block: multiples of 16 would be off by up to 8 of 614."""
    schedule = Schedule.uniform(ASKED, num_blocks=2)
    table = schedule.for_steps([1.0], 1000)
    assert table.counts == ((1000, 600),)
    assert schedule.for_steps([1.0], 1000, multiple=16).counts == ((1000, 608),)
    many = Schedule.uniform(ASKED, num_blocks=24).for_steps([1.0, 0.5], 4096)
    assert {k % 16 for row in many.counts for k in row} == {0}


@pytest.mark.parametrize("on_cpu", [False, True])
def test_each_of_two_models_meets_the_mean_over_its_part(on_cpu: bool) -> None:
    """Wan 2.2: one for the noisy part of the way, another for the rest."""
    pipe: Any = WanPipeline(
        **{
            **Wan().pipe.components,
            "transformer_2": families.made("wan"),
            "scheduler": UniPCMultistepScheduler(**FLOW, flow_shift=3.0),
        },
        boundary_ratio=0.875,
    )
    made = Wan()
    made.pipe = pipe
    models = pipe.transformer, pipe.transformer_2
    first, second = (tiny.adapter(model, line(len(model.blocks))) for model in models)
    shiva_dit.apply(pipe, first, transformer_2=second)
    attachments = [attachment_of(model) for model in models]
    for attachment in attachments:
        assert attachment is not None
        assert attachment.counts.clock is not None
        attachment.counts.clock.on_cpu = on_cpu
    noisy, rest = attachments
    assert noisy is not None
    assert rest is not None
    with kept(noisy) as rows, kept(rest) as others:
        made(False, 12)
    assert 3 <= len(rows) <= 6
    assert len(rows) + len(others) == 12
    assert_met(rows)
    assert_met(others)
    summary = shiva_dit.summary(
        pipe, num_tokens=tiny.NUM_TOKENS, text_tokens=7, num_inference_steps=12
    )
    assert [list(row[1:]) for _, row in summary.rows] == rows
    assert summary.transformer_2 is not None
    assert [list(row[1:]) for _, row in summary.transformer_2.rows] == others
    law = Sampler.of(pipe, pipe.transformer).law(noisy.spec, tiny.NUM_TOKENS)
    assert law.times[0] >= 0.875
    assert "t >= 0.875" in law.name


@sampled("case", among=[*RUN, "BriaPipeline static", "LTXPipeline static"])
def test_a_summary_has_the_steps_that_a_pipeline_takes(case: str) -> None:
    """Whatever a pipeline asks its scheduler for, and whatever shifts its times."""
    name, _, static = case.partition(" ")
    dynamic = not static and re.search(
        r"\bmu=mu", inspect.getsource(running.kind_of(name).__call__)
    )
    pipe = running.build(name)
    if dynamic:
        pipe.scheduler.register_to_config(use_dynamic_shifting=True)
    elif isinstance(pipe.scheduler, FlowMatchEulerDiscreteScheduler):
        pipe.scheduler.set_shift(3.0)
    attachment = applied(pipe, families.schedule(pipe.transformer, COUNTS))
    calls: list[float] = []
    hook = pipe.transformer.register_forward_pre_hook(
        lambda module, args, given: calls.append(
            float(given.get("timestep", torch.ones(1)).flatten()[0])
        ),
        with_kwargs=True,
    )
    running.call(name, pipe)
    hook.remove()
    assert attachment.counts.clock is not None
    executed = attachment.counts.clock.times.run
    if name == "Cosmos2TextToImagePipeline":  # it doesn't tell the model its scheduler's timesteps
        executed = tuple(dict.fromkeys(calls))
    summary = shiva_dit.summary(pipe, num_inference_steps=running.STEPS)
    assert executed  # its last ones, for those that begin with a picture
    told = [t for t, _ in summary.rows][-len(executed) :]
    assert told == pytest.approx(executed, abs=1e-3)  # Lumina 2 has 16 channels, this one 4


def test_the_steps_of_an_editing_pipeline_are_known_when_it_has_run() -> None:
    """A picture that is given adds to N, and not to what shifts the times."""
    pipe = running.build("FluxKontextPipeline")
    pipe.scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    applied(pipe)
    summary = shiva_dit.summary(pipe, num_tokens=2 * tiny.NUM_TOKENS, num_inference_steps=3)
    assert summary.law.endswith("shifted as without a picture given")
    running.call("FluxKontextPipeline", pipe)
    assert "as last executed" in shiva_dit.summary(pipe, num_inference_steps=3).law


@pytest.mark.parametrize("on_cpu", [False, True])
def test_an_adapter_put_on_in_the_middle_of_a_run_keeps_its_list(on_cpu: bool) -> None:
    made = SD3()
    rows: list[list[int]] = []

    def put_on(pipe: Any, step: int, t: Any, arguments: dict[str, Any]) -> dict[str, Any]:
        if step == 2:
            attachment = applied(pipe)
            assert attachment.counts.clock is not None
            attachment.counts.clock.on_cpu = on_cpu
            attachment.forwards.observer = lambda block, chosen: (
                rows.append([chosen.shape[1]]) if block == 1 else None
            )
        return arguments

    made(False, 8, callback_on_step_end=put_on)
    attachment = attachment_of(made.pipe.transformer)
    assert attachment is not None
    times = Sampler.of(made.pipe, attachment.model).times(attachment.spec, tiny.NUM_TOKENS, 8)
    table = attachment.schedule.for_steps(times, tiny.NUM_TOKENS)
    assert rows == [[table.row(t)[1]] for t in times[3:]]


# --- times from a device ------------------------------------------------------------------------


@pytest.mark.parametrize("told", [True, False], ids=["told", "read"])
def test_times_of_16_bits_are_those_of_the_list(told: bool) -> None:
    """A time read as bfloat16 lies in another bin at some steps: rows are the list's own."""
    made = Flux()
    made.pipe.to(torch.bfloat16)
    made.pipe.scheduler = FlowMatchEulerDiscreteScheduler(shift=math.exp(1.15))
    # A step at every bin, so that any other bin is another row.
    steep = [[1.0] + [0.3 + 0.6 * (b % 2)] * 3 for b in range(64)]
    attachment = applied(made.pipe, Schedule.from_ratios(steep))
    assert attachment.counts.clock is not None
    attachment.counts.clock.on_cpu = told
    times = Sampler.of(made.pipe, attachment.model).times(attachment.spec, tiny.NUM_TOKENS, 28)
    rounded = torch.tensor(times).bfloat16().tolist()
    assert sum(int(a * 64) != int(b * 64) for a, b in zip(times, rounded, strict=True)) >= 4
    table = attachment.schedule.for_steps(times, tiny.NUM_TOKENS)
    with kept(attachment) as rows, torch.autocast("cpu", torch.bfloat16):
        made_16_bits(made)
    assert rows == [list(table.row(t)[1:]) for t in times]


def made_16_bits(made: Flux) -> None:
    call: Any = made.pipe
    generator = torch.Generator().manual_seed(1)
    call(
        prompt_embeds=torch.randn(2, families.TEXT, 24, generator=generator).bfloat16(),
        pooled_prompt_embeds=torch.randn(2, 20, generator=generator).bfloat16(),
        height=128,
        width=128,
        num_inference_steps=28,
        generator=generator,
        output_type="latent",
    )


def test_schedulers_that_count_no_steps_are_not_read_either() -> None:
    """DDIM has no count: pipelines pass on the very entries of its list."""
    made = DiT()
    attachment = applied(made.pipe)
    assert attachment.counts.clock is not None
    attachment.counts.clock.on_cpu = True
    with kept(attachment) as rows:
        made(True, 8)
    assert attachment.counts.clock.reads == 1
    assert_met(rows)


def test_a_call_apart_from_a_run_goes_by_the_density() -> None:
    made = SD3()
    attachment = applied(made.pipe)
    model = made.pipe.transformer
    table = attachment.counts.table(tiny.NUM_TOKENS)

    def apart() -> None:
        for t in (0.9, 0.51, 0.013):
            with kept(attachment) as rows:
                tiny.run(model, tiny.inputs(t=t))
            assert rows == [list(table.row(t)[1:])]

    apart()  # before the first run
    made(False, 4)
    apart()  # and after one


def test_listed_timesteps_meet_the_mean(caplog: pytest.LogCaptureFixture) -> None:
    model = tiny.sd3()
    steps = [1000.0, 960.0, 900.0, 800.0, 800.0]
    attachment = applied(model, timesteps=steps)
    with kept(attachment) as rows, caplog.at_level(logging.INFO, "shiva_dit"):
        for step in steps:
            tiny.run(model, tiny.inputs(t=step / 1000))
    assert_met(rows)
    assert rows[3] == rows[4]
    assert "density" not in caplog.text
    summary = shiva_dit.summary(model)
    assert summary.law == "the 5 timesteps given to apply"
    assert [list(row[1:]) for _, row in summary.rows] == rows
    with pytest.raises(RuntimeError, match=r"t = 1.000 and was 0.700 away"):
        tiny.run(model, tiny.inputs(t=0.3))


def test_a_bare_model_goes_by_the_density_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    model = tiny.sd3()
    law = law_of(FlowMatchEulerDiscreteScheduler(shift=3.0), model_spec(model), 64)
    attachment = applied(model, line(4, law))
    with caplog.at_level(logging.INFO, "shiva_dit"):
        for t in (0.9, 0.5):
            tiny.run(model, tiny.inputs(t=t))
    said = "by the density of FlowMatchEulerDiscreteScheduler (shift = 3) steps"
    assert caplog.text.count(said) == 1
    summary = shiva_dit.summary(model)
    assert summary.law == f"the density of {law.name} steps"
    assert summary.law in str(summary)
    assert attachment.schedule.mean_keep_ratio < 0.54  # over equal bins it is 0.6
    assert summary.keep_ratio == pytest.approx(attachment.schedule.mean_keep_ratio, rel=1e-3)
    with pytest.raises(ValueError, match="has no scheduler to say what 28 steps are"):
        shiva_dit.summary(model, num_inference_steps=28)


# --- laws ---------------------------------------------------------------------------------------

# The mean t of a flow shifted by s: the integral of s u / (1 + (s - 1) u) over u.
SHIFTS = [1.0, 3.0, 5.0, 7.0]


@pytest.mark.parametrize("shift", SHIFTS)
@pytest.mark.parametrize("kind", ["euler", "unipc"])
def test_a_law_is_the_density_of_its_scheduler(kind: str, shift: float) -> None:
    if kind == "euler":
        scheduler: Any = FlowMatchEulerDiscreteScheduler(shift=shift)
    else:
        scheduler = UniPCMultistepScheduler(**FLOW, flow_shift=shift)
    law = law_of(scheduler, MODELS["SD3Transformer2DModel"], 4096)
    weights = law.weights(64)
    assert sum(weights) == pytest.approx(64)
    for b in (10, 20, 40, 60):
        # t = s u / (1 + (s - 1) u), so u(t) = t / (s - (s - 1) t): its rise over a bin.
        low, high = (t / (shift - (shift - 1) * t) for t in (b / 64, (b + 1) / 64))
        # 65 times, between which steps are taken to lie evenly; the last step isn't at 0.
        assert weights[b] == pytest.approx(64 * (high - low), rel=0.08)
    assert scheduler.num_inference_steps is None if kind == "unipc" else True  # left alone


def test_a_law_sees_a_shift_that_was_set_later() -> None:
    scheduler: Any = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_shift(5.0)
    law = law_of(scheduler, MODELS["SD3Transformer2DModel"], 64)
    assert law.name == "FlowMatchEulerDiscreteScheduler (shift = 5)"
    assert law.weights(64)[60] > 3.0


def test_a_law_shifts_by_resolution() -> None:
    spec = MODELS["FluxTransformer2DModel"]
    few, many = (law_of(dynamic(), spec, n) for n in (256, 4096))
    mu = 1.15  # of 4096 tokens
    like = law_of(FlowMatchEulerDiscreteScheduler(shift=math.exp(mu)), spec, 4096)
    assert many.times == pytest.approx(like.times, abs=1e-4)
    assert few.name.endswith("256 tokens)")
    assert sum(few.times) < sum(many.times)


@given(
    st.lists(st.floats(0.0, 1.0), min_size=2, max_size=200),
    st.integers(1, 70),
)
def test_weights_of_any_steps_have_mean_one(steps: list[float], num_bins: int) -> None:
    law = TimeLaw.of_steps("any", steps)
    weights = law.weights(num_bins)
    assert min(weights) >= 0
    assert math.fsum(weights) == pytest.approx(num_bins)
    inside = [min(steps) - 1e-5, max(steps) + 1e-5]  # times are rounded to 5 digits
    for b, weight in enumerate(weights):
        if (b + 1) / num_bins < inside[0] or b / num_bins > inside[1]:
            assert weight == 0


@given(
    st.lists(st.floats(0.0, 1.0), min_size=1, max_size=30),
    st.integers(0, 99),
    st.floats(0.1, 0.95),
    st.sampled_from([64, 1000, 4096]),
)
def test_any_list_of_steps_meets_the_mean(
    times: list[float], seed: int, target: float, num_tokens: int
) -> None:
    logits = torch.randn(8, 6, generator=torch.Generator().manual_seed(seed))
    ratios = [[1.0, *row] for row in torch.sigmoid(2 * logits).tolist()]
    schedule = Schedule.from_ratios(ratios)
    table = schedule.for_steps(times, num_tokens)
    executed = table.mean_keep_ratio_at(times)
    assert executed == pytest.approx(table.mean_keep_ratio)
    # A row that comes several times is one: half a token of each of its steps.
    most = max(times.count(t) for t in times)
    slack = most / (2 * num_tokens * 6 * len(times)) + 1e-9
    assert abs(executed - schedule.mean_keep_ratio) <= max(1e-3 * executed, slack)
    for t in times:  # order within a row stays
        row, of_bin = table.row(t)[1:], ratios[min(int(t * 8), 7)][1:]
        order = sorted(range(6), key=of_bin.__getitem__)
        assert all(row[a] <= row[b] + 16 for a, b in pairwise(order))


def test_a_table_by_a_law_keeps_its_mean_and_bins_without_steps_stay_near() -> None:
    late = TimeLaw(name="the noisier half alone", times=(0.5, 0.75, 1.0))
    schedule = line(24, late)
    assert schedule.mean_keep_ratio == pytest.approx(0.5, abs=1e-9)
    table = schedule.for_tokens(4096)
    assert table.mean_keep_ratio == pytest.approx(0.5, rel=1e-3)
    for row, ratios in zip(table.counts, schedule.ratios, strict=True):
        assert all(abs(k - r * 4096) <= 16 for k, r in zip(row, ratios, strict=True))
    merged = schedule.for_tokens(4096, segments=3)
    assert len(set(merged.counts)) <= 3
    assert merged.mean_keep_ratio == pytest.approx(0.5, rel=5e-3)


def test_hand_made_schedules_and_policies_meet_a_target_by_their_law() -> None:
    law = law_of(FlowMatchEulerDiscreteScheduler(shift=3.0), MODELS["SD3Transformer2DModel"], 64)
    made = hand_made(0.4, depth=1.0, time=-2.0, form="linear", num_blocks=5, num_bins=64, law=law)
    policy = tiny.adapter(tiny.sd3()).policy
    tiny.randomize(policy, seed=2, std=0.3)
    for schedule in (made, policy.schedule(0.4, 64, law)):
        assert schedule.law == law
        assert schedule.mean_keep_ratio == pytest.approx(0.4, abs=1e-6)  # no ratio is below 1e-6
        assert abs(Schedule.from_ratios(schedule.ratios).mean_keep_ratio - 0.4) > 0.005


@pytest.mark.parametrize(
    ("times", "message"),
    [((0.5,), "at least two"), ((0.2, 1.2), r"in \[0, 1\]"), ((0.5, 0.4), "must rise")],
)
def test_laws_that_are_none_are_refused(times: tuple[float, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TimeLaw(name="wrong", times=times)


# --- training -----------------------------------------------------------------------------------


def shifted(shift: float) -> Any:
    return FlowMatchEulerDiscreteScheduler(shift=shift)


def test_training_budgets_by_the_density_of_the_samplers_steps(tmp_path: Path) -> None:
    """A policy that keeps more at clean data spends less than over equal bins; the gradient of its
    budget counts each bin by the steps that fall there."""
    law = law_of(shifted(5.0), MODELS["SD3Transformer2DModel"], 64)
    config = recipe(tmp_path, keep_ratio=0.5, micro_batches=2, batch_size=8)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        policy = AdaptiveRatioPolicy(24, 0.5)
    with torch.no_grad():
        policy.time_branch[-1].weight.normal_(generator=torch.Generator().manual_seed(3))
    fixed = Schedule.uniform(0.5, num_blocks=24, law=law)
    plans = Planner(config, 4096, policy, fixed, BudgetController(0.5))
    plan = plans.step("joint", torch.Generator().manual_seed(0))
    grid = (torch.arange(8) + 0.5) / 8
    ratios = policy(grid)[:, 1]
    weights = torch.tensor(law.weights(8))
    ratios = ratios.detach()
    by_law, evenly = float((weights * ratios).mean()), float(ratios.mean())
    assert abs(by_law - evenly) > 0.01
    assert plan.mean_keep_ratio == pytest.approx(by_law, rel=1e-3)
    plan.backward_policy()
    assert policy.anchor.grad is not None
    error = 0.2 * (plan.mean_keep_ratio - 0.5)  # of the running mean
    slope = float((weights * ratios * (1 - ratios)).mean())
    assert float(policy.anchor.grad) == pytest.approx(2 * 5.0 * error * slope, rel=1e-3)


def test_what_is_trained_is_for_the_schedulers_own_steps(tmp_path: Path) -> None:
    trainer = Trainer(recipe(tmp_path), tiny.sd3(), TinyData(), shifted(3.0))
    with torch.no_grad():
        trainer.student.adapter.policy.time_branch[-1].weight.normal_(std=0.1)
    trained = trainer.run(show_progress=False)
    name = "FlowMatchEulerDiscreteScheduler (shift = 3)"
    assert trained.schedule.law.name == name
    assert trained.schedule.mean_keep_ratio == pytest.approx(0.5, abs=1e-6)
    assert trained.at(0.3).law == trained.schedule.law
    assert trained.adapter is not None
    assert trained.adapter.training_record["sampler"]["time_law"] == name
    trainer.save()
    trainer.close()
    other = Trainer(recipe(tmp_path), tiny.sd3(), TinyData(), shifted(5.0))
    with pytest.raises(ValueError, match="another scheduler"):
        other.resume()
    other.close()
    plain = Trainer(recipe(tmp_path / "plain"), tiny.sd3(), TinyData())
    assert plain.result().schedule.law == UNIFORM
    plain.close()


def test_a_solver_that_flows_is_no_diffusion_schedule() -> None:
    """UniPC holds both; Wan's pipeline uses it for flow matching."""
    scheduler = UniPCMultistepScheduler(**FLOW, flow_shift=5.0)
    path = path_of(MODELS["WanTransformer3DModel"], scheduler)
    assert isinstance(path, FlowMatching)
    assert isinstance(path_of(MODELS["PixArtTransformer2DModel"], DDPMScheduler()), Diffusion)


# --- adapters -----------------------------------------------------------------------------------


def test_a_law_is_saved_with_an_adapter(tmp_path: Path) -> None:
    model = tiny.sd3()
    law = law_of(FlowMatchEulerDiscreteScheduler(shift=3.0), model_spec(model), 64)
    adapter = tiny.adapter(model, line(4, law))
    adapter.save_pretrained(tmp_path)
    loaded = ShivaAdapter.from_pretrained(tmp_path)
    assert loaded.schedule == adapter.schedule
    assert law.name in (tmp_path / "README.md").read_text()
    shiva_dit.apply(model, loaded, keep_ratio=0.3)
    attachment = attachment_of(model)
    assert attachment is not None
    assert attachment.schedule.law == law
    assert attachment.schedule.mean_keep_ratio == pytest.approx(0.3, abs=1e-9)
    data = json.loads((tmp_path / "config.json").read_text())
    tiny.edit_config(tmp_path, schedule={**data["schedule"], "law": {"name": "x", "times": [2]}})
    with pytest.raises(ValueError, match=r"config\.json: law: .*at least two times"):
        ShivaAdapter.from_pretrained(tmp_path)


def test_an_adapter_saved_before_keeps_its_law_and_meets_the_mean(tmp_path: Path) -> None:
    made = SD3()
    tiny.adapter(made.pipe.transformer, line(4)).save_pretrained(tmp_path)
    assert "law" not in json.loads((tmp_path / "config.json").read_text())["schedule"]
    shiva_dit.apply(made.pipe, tmp_path)
    attachment = attachment_of(made.pipe.transformer)
    assert attachment is not None
    assert shiva_dit.summary(made.pipe).law == "the density of uniform steps"
    with kept(attachment) as rows:
        made(True, 4)
    assert_met(rows)


def test_a_pipelines_scheduler_is_read_without_the_rest(tmp_path: Path) -> None:
    made = SD3()
    made.pipe.scheduler.save_pretrained(tmp_path / "scheduler")
    index = {"_class_name": "StableDiffusion3Pipeline"}
    name = "FlowMatchEulerDiscreteScheduler"
    (tmp_path / "model_index.json").write_text(
        json.dumps({**index, "scheduler": ["diffusers", name]})
    )
    assert Sampler.saved(tmp_path).scheduler.config["shift"] == 3.0
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match="no scheduler of diffusers"):
        Sampler.saved(tmp_path)


def test_a_copy_is_asked_not_the_pipelines_own_scheduler() -> None:
    made = SD3()
    applied(made.pipe)
    before = copy.deepcopy(made.pipe.scheduler.__dict__)
    shiva_dit.summary(made.pipe, num_inference_steps=5)
    assert before.keys() == made.pipe.scheduler.__dict__.keys()
    assert torch.equal(made.pipe.scheduler.timesteps, before["timesteps"])
    with pytest.raises(ValueError, match="num_inference_steps must be at least 1, got 0"):
        shiva_dit.summary(made.pipe, num_inference_steps=0)


def test_a_bare_model_says_its_law_where_that_matters(caplog: pytest.LogCaptureFixture) -> None:
    """Ratios that are the same at all times have the same mean by any law."""
    for schedule, said in ((Schedule.uniform(ASKED, num_blocks=4), 0), (line(4), 1)):
        caplog.clear()
        model = tiny.sd3()
        applied(model, schedule)
        for t in (0.9, 0.5, 0.1):
            tiny.run(model, tiny.inputs(t=t))
        told = [record for record in caplog.records if "not known" in record.getMessage()]
        assert len(told) == said
        assert all(record.levelno == logging.WARNING for record in told)
