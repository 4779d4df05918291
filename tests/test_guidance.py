"""Who says how a call is guided: every pipeline of diffusers, guiders, the user; and nobody."""

from __future__ import annotations

import asyncio
import inspect
import logging
import re
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    ClassifierFreeGuidance,
    FlowMatchEulerDiscreteScheduler,
    FluxImg2ImgPipeline,
    StableDiffusion3Pipeline,
)
from diffusers.modular_pipelines.stable_diffusion_3.denoise import StableDiffusion3DenoiseStep
from torch import Tensor

import shiva_dit
from shiva_dit.models.attach import attachment_of
from shiva_dit.models.families import MODELS
from shiva_dit.models.pipelines import PIPELINES
from shiva_dit.report.layout import markdown_rows
from tests import families, running, tiny
from tests.matrix import sampled

DOCUMENT = Path(__file__).parent.parent / "docs" / "models.md"
COUNTS = [[64, 5, 30, 17], [64, 33, 2, 48], [64, 63, 20, 9]]
RUN = """
    AllegroPipeline AuraFlowPipeline BriaFiboPipeline BriaPipeline ChromaImg2ImgPipeline
    ChromaInpaintPipeline ChromaPipeline ChronoEditPipeline CogVideoXFunControlPipeline
    AceStepPipeline ConsisIDPipeline ErnieImagePipeline GlmImagePipeline HunyuanVideo15Pipeline
    Cosmos2TextToImagePipeline Ideogram4Pipeline JoyImageEditPlusPipeline LTX2Pipeline
    JoyImageEditPipeline LongCatAudioDiTPipeline MotifVideoPipeline QwenImage21Pipeline
    StableAudio3Pipeline StableAudioPipeline
    CogVideoXImageToVideoPipeline CogVideoXPipeline CogVideoXVideoToVideoPipeline
    CogView3PlusPipeline CogView4ControlPipeline CogView4Pipeline DiTPipeline
    EasyAnimatePipeline Flux2KleinPipeline Flux2Pipeline FluxControlNetPipeline
    FluxImg2ImgPipeline FluxInpaintPipeline FluxKontextInpaintPipeline FluxKontextPipeline
    FluxPipeline HunyuanDiTPAGPipeline HunyuanDiTPipeline HunyuanImagePipeline
    HunyuanSkyreelsImageToVideoPipeline HunyuanVideoImageToVideoPipeline
    HunyuanVideoPipeline Krea2Pipeline LTXConditionPipeline LTXPipeline LucyEditPipeline
    Lumina2Pipeline LuminaPipeline MochiPipeline OvisImagePipeline PRXPipeline
    PRXPixelPipeline PixArtAlphaPipeline PixArtSigmaPAGPipeline PixArtSigmaPipeline
    QwenImagePipeline SkyReelsV2DiffusionForcingPipeline SkyReelsV2Pipeline
    StableDiffusion3ControlNetPipeline StableDiffusion3Img2ImgPipeline
    StableDiffusion3InpaintPipeline StableDiffusion3PAGImg2ImgPipeline
    StableDiffusion3PAGPipeline StableDiffusion3Pipeline WanImageToVideoPipeline WanPipeline
    WanVACEPipeline WanVideoToVideoPipeline ZImageImg2ImgPipeline ZImageInpaintPipeline
    ZImagePipeline
""".split()  # noqa: SIM905
"""Pipelines that are run below; of the others the source is read."""


def applied(pipe: Any) -> Any:
    model = pipe.transformer
    shiva_dit.apply(pipe, tiny.adapter(model, families.schedule(model, COUNTS)))
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


def pairs_of(calls: list[dict[int, Tensor]], how: str) -> list[tuple[Tensor, Tensor]]:
    """Tokens of the two passes, by step and block."""
    if how == "in turn":
        steps = zip(calls[::2], calls[1::2], strict=True)
        return [(first[b], second[b]) for first, second in steps for b in first]
    halves = [tuple(chosen.chunk(2)) for call in calls for chosen in call.values()]
    return [(half[0], half[1]) for half in halves]


def differ(chosen: Tensor) -> bool:
    """Whether two samples keep different tokens."""
    return not torch.equal(chosen[0], chosen[1])


# --- the table ----------------------------------------------------------------------------------


def test_the_table_has_every_pipeline_of_a_served_class() -> None:
    found = running.served_pipelines()
    assert set(PIPELINES) == set(found)
    modular = {model for _, model, _ in running.served_denoisers().values()}
    modular.add("MiniMaxMusic3Transformer1DModel")  # loop and call are one block
    assert set(found.values()) | modular == set(MODELS)
    for name, model_class in found.items():
        assert PIPELINES[name].how in (MODELS[model_class].guidance, "one pass"), name


@sampled("name", RUN)
def test_a_pipeline_does_what_the_table_says(name: str) -> None:
    """Guided, both passes keep the same tokens; unguided, every image chooses for itself."""
    pipe, how = running.build(name), PIPELINES[name].how
    with calls_of(applied(pipe)) as calls:
        running.call(name, pipe)
    alike = len(calls) // (2 if how == "in turn" else 1)
    assert alike in (2, 3)  # those that begin with a picture do part of the steps
    single = name in running.ONE
    if how != "one pass":
        pairs = pairs_of(calls, how)
        assert len(pairs) == 3 * alike
        assert all(torch.equal(first, second) for first, second in pairs)
        assert single or any(differ(first) for first, _ in pairs)
    if hasattr(pipe, "guider"):  # that is set, not its scale
        return
    with calls_of(pipe.transformer) as calls:
        running.call(name, pipe, guided=False)
    assert len(calls) == alike
    assert single or all(any(differ(chosen) for chosen in call.values()) for call in calls)


@pytest.mark.parametrize("name", [name for name in PIPELINES if name not in RUN])
def test_a_source_reads_as_the_table_says(name: str) -> None:
    """Of pipelines whose parts are too many to build: how their source calls the transformer."""
    guided = PIPELINES[name]
    source = inspect.getsource(inspect.unwrap(running.kind_of(name).__call__))
    calls = len(re.findall(r"(self\.transformer|current_model)\(", source))
    doubled = bool(re.search(r"\* 2\b.* if |apply_cfg:\n", source))
    further = source.count('cache_context("uncond_')  # passes that are perturbed
    named = re.findall(r'cache_context\((?:"(\w+)"|(context_name))', source)
    if guided.how == "one pass":
        assert not doubled
        assert calls <= (3 if "KV" in name else 2 if "DFR" in name else 1)
        assert "do_classifier_free_guidance" not in source.replace(
            "do_classifier_free_guidance=False", ""
        )
    elif guided.on is None:
        assert named in ([("cond", ""), ("uncond", "")], [("", "context_name")])
    elif guided.how == "in turn":
        assert calls == 2
        assert re.search(rf"if {guided.on}.*?\n.*?self\.transformer\(", source, re.S)
    else:
        assert calls == 1 + further
        assert doubled
        assert guided.on in source
        assert re.search(rf"^\s*{guided.latents}\b.* = self", source, re.M)
    if guided.how != "one pass":
        assert re.search(r"for i, t in enumerate\(", source)


# --- what was guessed ---------------------------------------------------------------------------


def test_two_prompts_from_one_noise_are_no_guidance() -> None:
    """Equal halves of latents: what five families took for guidance."""
    for name in ("PixArtSigmaPipeline", "AuraFlowPipeline", "ZImagePipeline"):
        pipe = running.build(name)
        noise = running.normal(1, 4, 16, 16, seed=9).repeat(2, 1, 1, 1)
        with calls_of(applied(pipe)) as calls:
            running.call(name, pipe, guided=False, latents=noise)
        assert any(differ(chosen) for chosen in calls[0].values()), name


def test_guidance_that_ends_before_the_run_does() -> None:
    """Z-Image doubles its latents until a time, Lumina 2 leaves the second pass out from one."""
    pipe = running.build("ZImagePipeline")
    with calls_of(applied(pipe)) as calls:
        running.call("ZImagePipeline", pipe, cfg_normalization=False, cfg_truncation=0.4)
    sizes = [len(call[1]) for call in calls]
    assert sizes == [4, 4, 2]
    assert torch.equal(*calls[0][1].chunk(2))
    assert any(differ(chosen) for chosen in calls[-1].values())
    pipe = running.build("Lumina2Pipeline")
    with calls_of(applied(pipe)) as calls:
        running.call("Lumina2Pipeline", pipe, cfg_trunc_ratio=0.4)
    first, second, third, fourth = calls
    assert all(torch.equal(first[b], second[b]) for b in first)
    assert any(not torch.equal(third[b], fourth[b]) for b in third)


def test_a_direct_call_after_a_guided_one_is_alone() -> None:
    model = tiny.sd3()
    pipe = tiny.pipeline(model)
    applied(pipe)
    tiny.generate(pipe, 5.0)
    with calls_of(model) as calls:
        tiny.run(model, tiny.inputs())
    assert any(differ(chosen) for chosen in calls[0].values())


def test_whichever_pipeline_runs_is_asked() -> None:
    """Two pipelines on one transformer; the adapter came by the first, or by the bare model."""
    for target in ("pipeline", "model"):
        model = tiny.sd3()
        first, second = tiny.pipeline(model), tiny.pipeline(model)
        adapter = tiny.adapter(model, tiny.from_counts(COUNTS))
        shiva_dit.apply(first if target == "pipeline" else model, adapter)
        tiny.generate(first, 1.0)
        with calls_of(model) as calls:
            tiny.generate(second, 5.0)
            tiny.generate(first, 1.0)
        assert all(torch.equal(*c.chunk(2)) for call in calls[:4] for c in call.values())
        assert any(differ(c) for call in calls[4:] for c in call.values())


class BrokeError(Exception):
    pass


@pytest.mark.parametrize("error", [BrokeError, KeyboardInterrupt])
def test_nothing_is_believed_after_a_run_broke_off(error: type[BaseException]) -> None:
    """The conditional pass has run, the other one not: the next run's first pass leads again."""
    name = "FluxKontextPipeline"
    pipe = running.build(name)
    model = applied(pipe)
    with calls_of(model) as undisturbed:
        running.call(name, pipe)
    latents = running.normal(2, 64, 4, seed=9)
    passes = []

    def interrupt(module: Any, args: Any) -> None:
        passes.append(1)
        if len(passes) == 2:
            raise error

    handle = model.register_forward_pre_hook(interrupt)
    with pytest.raises(error):
        running.call(name, pipe, latents=latents)
    handle.remove()
    with calls_of(model) as calls:
        families.run(model, families.arguments("flux"))
        running.call(name, pipe)
    assert calls[0].keys() == {1, 2, 3}
    for before, after in zip(undisturbed, calls[1:], strict=True):
        assert all(torch.equal(before[b], after[b]) for b in before)


def test_a_callback_that_ends_guidance_is_followed() -> None:
    """Its documented use: scale to 0 and the conditional text alone, from a step on."""

    def end(pipe: Any, step: int, t: Any, given: dict[str, Any]) -> dict[str, Any]:
        if step == 1:
            pipe._guidance_scale = 0.0
            given = {name: value.chunk(2)[1] for name, value in given.items()}
        return given

    model = tiny.sd3()
    pipe = tiny.pipeline(model)
    applied(pipe)
    names = ["prompt_embeds", "pooled_prompt_embeds"]
    with calls_of(model) as calls:
        tiny.generate(pipe, 5.0, callback_on_step_end=end, callback_on_step_end_tensor_inputs=names)
    assert [len(call[1]) for call in calls] == [4, 4, 2, 2]
    assert all(torch.equal(*c.chunk(2)) for call in calls[:2] for c in call.values())
    assert any(differ(c) for call in calls[2:] for c in call.values())


def test_a_direct_call_from_a_callback_is_alone() -> None:
    """Of as many samples as the pipeline's own call has."""
    model = tiny.sd3()
    pipe = tiny.pipeline(model)
    applied(pipe)
    four = tiny.inputs(batch=4)

    def call(pipe: Any, step: int, t: Any, given: dict[str, Any]) -> dict[str, Any]:
        tiny.run(pipe.transformer, four)
        return given

    with calls_of(model) as calls:
        tiny.generate(pipe, 5.0, callback_on_step_end=call)
    own, direct = calls[::2], calls[1::2]
    assert len(own) == len(direct) == 4
    assert all(torch.equal(*c.chunk(2)) for each in own for c in each.values())
    assert all(any(not torch.equal(*c.chunk(2)) for c in each.values()) for each in direct)


class Mine(FluxImg2ImgPipeline):
    """Counts like its base."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return super().__call__(*args, **kwargs)


class Own(StableDiffusion3Pipeline):
    """A loop of its own, of which nothing is known."""

    def __call__(self, given: dict[str, Any]) -> Tensor:  # type: ignore[override]
        return tiny.run(self.transformer, {**given, "hidden_states": given["hidden_states"]})


def test_a_pipeline_of_ones_own(caplog: pytest.LogCaptureFixture) -> None:
    pipe = running.build("FluxImg2ImgPipeline", Mine)
    with calls_of(applied(pipe)) as calls:
        running.call("FluxImg2ImgPipeline", pipe)
    assert len(calls) == 4
    assert all(torch.equal(a, b) for a, b in pairs_of(calls, "in turn"))
    own = tiny.pipeline(tiny.sd3(), Own)
    model = applied(own)

    with caplog.at_level(logging.INFO, "shiva_dit"), calls_of(model) as calls:
        for _ in range(3):
            own(tiny.inputs(batch=4))
    assert not any(torch.equal(*c.chunk(2)) for call in calls for c in call.values())
    said = [r.getMessage() for r in caplog.records if "for itself" in r.getMessage()]
    assert len(said) == 1
    assert re.search(r"Own doesn't say .* shiva_dit\.guided\(model, passes=\.\.\.\)", said[0])


PAG = (
    "HunyuanDiTPAGPipeline",
    "PixArtSigmaPAGPipeline",
    "StableDiffusion3PAGPipeline",
    "StableDiffusion3PAGImg2ImgPipeline",
)


@pytest.mark.parametrize("name", PAG)
@pytest.mark.parametrize("guided", [True, False])
def test_batches_of_perturbed_attention_are_refused(name: str, guided: bool) -> None:
    """Three parts, or conditional and perturbed, which are no halves."""
    layers = {"pag_applied_layers": "blocks.1"}
    kind = running.kind_of(name)
    pipe = running.build(name, lambda **parts: kind(**{**parts, **layers}))
    applied(pipe)
    with pytest.raises(ValueError, match=r"perturbed-attention guidance puts .* pag_scale=0"):
        running.call(name, pipe, guided=guided, pag_scale=2.0)


# --- modular pipelines --------------------------------------------------------------------------


def modular(guider: Any) -> tuple[Any, Any]:
    """The denoising part of a modular pipeline of SD3, and its scheduler."""
    pipe = StableDiffusion3DenoiseStep().init_pipeline()
    scheduler = FlowMatchEulerDiscreteScheduler()
    pipe.update_components(transformer=tiny.sd3(), scheduler=scheduler, guider=guider)
    return pipe, scheduler


def denoise(pipe: Any, scheduler: Any) -> None:
    scheduler.set_timesteps(4)
    given, negative = tiny.inputs(), tiny.inputs(seed=5)
    pipe(
        latents=given["hidden_states"],
        timesteps=scheduler.timesteps,
        num_inference_steps=4,
        prompt_embeds=given["encoder_hidden_states"],
        pooled_prompt_embeds=given["pooled_projections"],
        negative_prompt_embeds=negative["encoder_hidden_states"],
        negative_pooled_prompt_embeds=negative["pooled_projections"],
        output="latents",
    )


def test_the_guider_of_a_modular_pipeline_says_which_pass_runs() -> None:
    pipe, scheduler = modular(ClassifierFreeGuidance(guidance_scale=5.0))
    with calls_of(applied(pipe)) as calls:
        denoise(pipe, scheduler)
    assert len(calls) == 8
    pairs = pairs_of(calls, "in turn")
    assert all(torch.equal(first, second) for first, second in pairs)
    assert any(differ(first) for first, _ in pairs)


@pytest.mark.parametrize("name", running.served_denoisers())
def test_blocks_of_modular_pipelines(name: str, caplog: pytest.LogCaptureFixture) -> None:
    """All of diffusers' own that call a served model; those without a guider have one pass."""
    kind, model_class, is_guided = running.served_denoisers()[name]
    family = running.FAMILY[model_class]
    model = families.made(family)
    shiva_dit.apply(model, tiny.adapter(model, families.schedule(model, COUNTS)))
    with calls_of(model) as calls, caplog.at_level(logging.INFO, "shiva_dit"):
        guider = ClassifierFreeGuidance(guidance_scale=5.0)
        running.denoise(kind, model, families.arguments(family), guider)
    said = [r.getMessage() for r in caplog.records if r.name == "shiva_dit"]
    assert all(
        "the steps of the run are not known" in each for each in said
    )  # no pipeline is there
    if not is_guided:
        assert len(calls) == 2
        return
    assert len(calls) == 4
    pairs = pairs_of(calls, "in turn")
    assert all(torch.equal(first, second) for first, second in pairs)
    # Had each pass chosen for itself, they would differ: the texts do.
    with calls_of(model) as apart, shiva_dit.guided(model, passes="alone"):
        running.denoise(kind, model, families.arguments(family), guider)
    assert any(not torch.equal(first, second) for first, second in pairs_of(apart, "in turn"))


def test_a_guider_that_starts_late_and_stops_early() -> None:
    pipe, scheduler = modular(ClassifierFreeGuidance(guidance_scale=5.0, start=0.25, stop=0.75))
    with calls_of(applied(pipe)) as calls:
        denoise(pipe, scheduler)
    assert len(calls) == 6  # one, two, two, one
    assert all(torch.equal(a, b) for a, b in pairs_of(calls[1:5], "in turn"))
    assert any(not torch.equal(calls[0][b], calls[1][b]) for b in calls[0])


# --- told ---------------------------------------------------------------------------------------


def test_a_loop_of_ones_own_tells() -> None:
    model = tiny.sd3()
    shiva_dit.apply(model, tiny.adapter(model, tiny.from_counts(COUNTS)))
    first, second = tiny.inputs(seed=1), tiny.inputs(seed=2)
    with calls_of(model) as calls:
        for given, passes in ((first, "cond"), (second, "uncond"), (second, "uncond")):
            with shiva_dit.guided(model, passes=passes):
                tiny.run(model, given)
        both = {name: torch.cat([second[name], first[name]]) for name in first}
        with shiva_dit.guided(model, passes="both"):
            tiny.run(model, both)
        tiny.run(model, both)
    cond, uncond, alone, halves, apart = calls
    assert all(torch.equal(cond[b], uncond[b]) for b in cond)
    assert any(not torch.equal(alone[b], uncond[b]) for b in alone)
    assert all(torch.equal(*halves[b].chunk(2)) for b in halves)
    assert any(not torch.equal(*apart[b].chunk(2)) for b in apart)


def test_what_is_told_overrules_a_pipeline_and_ends() -> None:
    model = tiny.sd3()
    pipe = tiny.pipeline(model)
    applied(pipe)
    with calls_of(model) as calls:
        with shiva_dit.guided(pipe, passes="alone"):
            tiny.generate(pipe, 5.0)
        tiny.generate(pipe, 5.0)
    assert not all(torch.equal(*c.chunk(2)) for call in calls[:4] for c in call.values())
    assert all(torch.equal(*c.chunk(2)) for call in calls[4:] for c in call.values())


def test_wrong_words_are_refused() -> None:
    model = tiny.sd3()
    with pytest.raises(ValueError, match="no adapter is attached"), shiva_dit.guided(model, "cond"):
        pass
    shiva_dit.apply(model, tiny.adapter(model))
    with (
        pytest.raises(ValueError, match="one of cond, uncond, both, alone; got 'negative'"),
        shiva_dit.guided(model, "negative"),
    ):
        pass


def test_a_lead_of_a_pipeline_serves_no_call_outside_of_it() -> None:
    """It broke off after its conditional pass; a loop of one's own names an unconditional one."""
    pipe = running.build("FluxPipeline")
    model = applied(pipe)

    def stop(module: Any, args: Any, output: Any) -> None:
        raise BrokeError

    handle = model.register_forward_hook(stop)
    with pytest.raises(BrokeError):
        running.call("FluxPipeline", pipe)
    handle.remove()
    given = families.arguments("flux")
    with calls_of(model) as calls, torch.no_grad():
        with model.cache_context("uncond"):
            families.run(model, given)
        families.run(model, given)
    assert all(torch.equal(calls[0][b], calls[1][b]) for b in calls[0])


# --- threads ------------------------------------------------------------------------------------

Thread = Callable[..., Any]


@pytest.fixture
def threads() -> Iterator[list[Thread]]:
    """Two threads: each runs what it is given, while all else waits, and is there until the end."""
    with ThreadPoolExecutor(1) as one, ThreadPoolExecutor(1) as other:
        yield [partial(_there, pool) for pool in (one, other)]


def _there(pool: ThreadPoolExecutor, work: Thread, *args: Any) -> Any:
    return pool.submit(work, *args).result()


SAID = {
    "guided": shiva_dit.guided,
    "cache_context": lambda model, passes: model.cache_context(passes),
}


@pytest.mark.parametrize("by", SAID)
def test_what_a_thread_says_and_leaves_is_its_own(by: str, threads: list[Thread]) -> None:
    """Two threads in turn on one model, each within its own words, and a third that says none."""
    model, given = families.made("flux"), families.arguments("flux")
    shiva_dit.apply(model, tiny.adapter(model, families.schedule(model, COUNTS)))
    sample = given["hidden_states"]
    samples = sample, -sample, sample.roll(1, 1), -sample.roll(1, 1)

    def call(index: int) -> None:
        with torch.no_grad():
            families.run(model, {**given, "hidden_states": samples[index]})

    with calls_of(model) as calls:
        for passes, order in (("cond", (0, 1)), ("uncond", (1, 0))):
            words = [SAID[by](model, passes) for _ in threads]
            for thread, word in zip(threads, words, strict=True):
                thread(word.__enter__)
            for index in order:
                threads[index](call, index + (2 if passes == "uncond" else 0))
            call(2)
            for thread, word in zip(threads, words, strict=True):
                thread(word.__exit__, None, None, None)
        threads[0](call, 2)
    one, other, third, other_follows, one_follows, third_again, after = calls
    for lead, led in ((one, one_follows), (other, other_follows), (third, third_again)):
        assert all(torch.equal(lead[b], led[b]) for b in lead)
    assert all(torch.equal(after[b], third[b]) for b in after)
    for apart in (other, third):
        assert any(not torch.equal(one[b], apart[b]) for b in one)


def test_two_pipelines_in_two_threads_share_a_model(threads: list[Thread]) -> None:
    """One says how it is guided, the other is read: neither is told the other's."""
    model = tiny.sd3()
    pipes = tiny.pipeline(model), tiny.pipeline(model)
    applied(pipes[0])
    alone = shiva_dit.guided(pipes[0], passes="alone")
    threads[0](alone.__enter__)
    with calls_of(model) as calls:
        threads[1](tiny.generate, pipes[1], 5.0)
        threads[0](tiny.generate, pipes[0], 5.0)
    threads[0](alone.__exit__, None, None, None)
    assert all(torch.equal(*c.chunk(2)) for call in calls[:4] for c in call.values())
    assert not all(torch.equal(*c.chunk(2)) for call in calls[4:] for c in call.values())


def test_words_end_in_any_order_and_reach_tasks() -> None:
    """Words on two models that overlap; and a call that a task leaves to another thread."""
    models = families.made("flux"), families.made("flux")
    for model in models:
        shiva_dit.apply(model, tiny.adapter(model, families.schedule(model, COUNTS)))
    given = families.arguments("flux")

    def call(model: Any) -> None:
        with torch.no_grad():
            families.run(model, given)

    async def task() -> None:
        with shiva_dit.guided(models[1], "both"):
            await asyncio.to_thread(call, models[1])

    first, second = (shiva_dit.guided(model, "both") for model in models)
    with calls_of(models[1]) as calls:
        first.__enter__()
        second.__enter__()
        first.__exit__(None, None, None)
        call(models[1])
        second.__exit__(None, None, None)
        call(models[1])
        asyncio.run(task())
        call(models[1])
    shared = [all(torch.equal(*c.chunk(2)) for c in call.values()) for call in calls]
    assert shared == [True, False, True, False]


# --- the document -------------------------------------------------------------------------------

SAYS = {
    "one batch": "shares tokens",
    "in turn": "leads and follows",
    "one pass": "each pass for itself: there is one, guidance is distilled into the model",
}


def table() -> str:
    """A row for every pipeline."""
    rows = [["pipeline", "class", "tokens of the two passes", "tested by"]]
    for name, model_class in sorted(running.served_pipelines().items()):
        how = "running it" if name in RUN else "its source"
        rows.append([f"`{name}`", f"`{model_class}`", SAYS[PIPELINES[name].how], how])
    for name, (_, model_class, is_guided) in running.served_denoisers().items():
        says = SAYS["in turn" if is_guided else "one pass"]
        rows.append([f"`{name}` (modular)", f"`{model_class}`", says, "running it"])
    return markdown_rows(rows)


def document() -> str:
    """docs/models.md with the table of pipelines."""
    text = DOCUMENT.read_text(encoding="utf-8")
    start, end = "<!-- pipelines -->\n", "<!-- end pipelines -->"
    return f"{text.split(start)[0]}{start}{table()}\n{end}{text.split(end)[1]}"


def test_the_document_says_what_pipelines_do() -> None:
    assert DOCUMENT.read_text(encoding="utf-8") == document(), "run `python -m tests.test_guidance`"


if __name__ == "__main__":
    DOCUMENT.write_text(document(), encoding="utf-8")
