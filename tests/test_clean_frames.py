"""Image to video: tokens at time 0 beside others, with a budget of their own, by real pipelines."""

import inspect
import re
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from torch import Tensor

import shiva_dit
from shiva_dit.adapter import ShivaAdapter, ShivaConfig
from shiva_dit.core import roles
from shiva_dit.core.roles import REFERENCE, TARGET, Span, best_by_group, grouped, in_order
from shiva_dit.core.schedule import Schedule
from shiva_dit.export import Programs, export_run
from shiva_dit.methods.norm import NormSelector
from shiva_dit.models.attach import attach, attachment_of
from shiva_dit.models.counted import model_flops
from shiva_dit.models.families import MODELS, model_spec
from shiva_dit.models.token_times import MARKS, ONE, Layout, layout_of
from shiva_dit.training.recipe import TrainConfig
from shiva_dit.training.settings import (
    LossConfig,
    OptimizerConfig,
    RouterConfig,
    TrajectoryConfig,
    WatchConfig,
)
from shiva_dit.training.trainer import Trainer
from tests import families, running, tiny
from tests.families.kit import normal
from tests.test_device_reads import reads
from tests.test_families import executed
from tests.test_training_families import FamilyData

FRAMES, EACH = 4, 16
TOKENS = FRAMES * EACH
COUNTS = [[64, 40, 20, 20], [64, 30, 30, 10]]
NAMES = ("wan", "chronoedit", "ltx", "ltx2", "cosmos", "skyreels")
BY_FRAME = ("cosmos", "skyreels")


def with_times(name: str, clean: tuple[int, ...] = (0,), t: float = 0.5) -> dict[str, Any]:
    """Arguments of a forward whose clean frames are at time 0."""
    given = families.arguments(name, t=t)
    times = given["timestep"][:, None].repeat(1, FRAMES)
    times[:, list(clean)] = 0.0
    if name in BY_FRAME:
        shaped = times[:, None, :, None, None] if name == "cosmos" else times
    else:
        shaped = times.repeat_interleave(EACH, dim=1)
    beside = {"audio_timestep": given["timestep"]} if name == "ltx2" else {}
    forcing = {"enable_diffusion_forcing": True} if name == "skyreels" else {}
    return {**given, "timestep": shaped, **beside, **forcing}


def places(clean: tuple[int, ...]) -> Tensor:
    """Of each token whether it is clean."""
    mask = torch.zeros(FRAMES, dtype=torch.bool)
    mask[list(clean)] = True
    return mask.repeat_interleave(EACH)


def adapter_for(model: Any, **options: Any) -> ShivaAdapter:
    options = {"reference_keep_ratio": 1.0, **options}
    return tiny.adapter(model, tiny.from_counts(COUNTS), **options)


def seen_of(model: Any) -> list[dict[int, Tensor]]:
    """The tokens of every forward by block, as they are chosen."""
    seen: list[dict[int, Tensor]] = []
    attachment = attachment_of(model)
    assert attachment is not None
    model.register_forward_pre_hook(lambda *args: seen.append({}))
    attachment.forwards.observer = lambda block, chosen: seen[-1].__setitem__(block, chosen)
    return seen


def check(model: Any, seen: list[dict[int, Tensor]], is_clean: Tensor, keep: float) -> None:
    """In every forward and block exactly as many of each role as are asked for."""
    attachment = attachment_of(model)
    assert attachment is not None
    number = int(is_clean.sum())
    asked = attachment.counts.reference_row(number)
    prunable = attachment.schedule.prunable_blocks
    assert sum(asked[b] for b in prunable) == round(keep * number * len(prunable))
    rows = {
        tuple(row) for row in attachment.counts.table(len(is_clean) - number).counts
    } | attachment.executed  # type: ignore[attr-defined]
    assert len(seen) > 0
    for forward in seen:
        kept = {block: is_clean[chosen].sum(1).tolist() for block, chosen in forward.items()}
        assert kept == {block: [asked[block]] * 2 for block in kept}
        target = tuple(forward[b].shape[1] - asked[b] for b in prunable if b in forward)
        assert target in {tuple(row[b] for b in prunable if b in forward) for row in rows}
        for chosen in forward.values():
            assert bool((chosen[:, 1:] > chosen[:, :-1]).all())  # no token twice


def noted(model: Any) -> None:
    """Rows of counts that are asked for from now on."""
    attachment = attachment_of(model)
    assert attachment is not None
    row, attachment.executed = attachment.counts.row, set()  # type: ignore[attr-defined]

    def note(num_tokens: int, timestep: Tensor) -> tuple[int, ...]:
        found = row(num_tokens, timestep)
        attachment.executed.add(found)  # type: ignore[attr-defined]
        return found

    attachment.counts.row = note  # type: ignore[method-assign]


# --- groups of several spans ---------------------------------------------------------------------


def test_spans_of_a_role_are_one_group_wherever_they_lie() -> None:
    spans = [Span(REFERENCE, 2), Span(TARGET, 3), Span(REFERENCE, 1), Span(TARGET, 2)]
    groups = grouped(spans, [1, 3])
    assert [(group.role, group.size, group.k) for group in groups] == [(1, 3, 1), (0, 5, 3)]
    scores = torch.tensor([[1.0, 2.0, 0.0, 9.0, 8.0, 3.0, 1.0, 8.5]])
    assert best_by_group(scores, groups).tolist() == [[5, 3, 7, 4]]
    assert torch.equal(in_order(groups, [group.of(scores) for group in groups]), scores)
    assert [group.is_fixed for group in grouped(spans, [3, 5])] == [True, False]
    assert [group.is_fixed for group in grouped(spans, [0, 0])] == [True, False]


# --- the layout -----------------------------------------------------------------------------------


def test_layouts_are_read_off_the_times() -> None:
    ltx, wan = families.made("ltx"), families.made("wan")

    def found(model: Any, *rows: list[float]) -> Layout:
        timestep = 1000.0 * torch.tensor(rows)
        return layout_of(model, model_spec(model), timestep, 2 * len(rows[0]))

    assert found(wan, [0.5] * 3, [0.25] * 3) is ONE
    first = found(wan, [0.0, 0.0, 0.5], [0.0, 0.0, 0.25])
    assert (first.runs, first.place) == (((True, 2), (False, 1)), 2)
    assert first.spans(6) == (Span(REFERENCE, 4), Span(TARGET, 2))
    assert found(wan, [0.0, 0.0005]).runs == ((True, 1), (False, 1))  # a last step
    for least in (1e-8, 0.0):  # as training draws it, beside others
        assert found(wan, [0.0, 0.0, least], [0.0, 0.0, 0.25]) == first
    assert found(wan, [0.0, 0.0]) is ONE
    several = found(ltx, [0.25, 0.5, 0.0, 0.5])
    assert (several.runs, several.place) == (((False, 2), (True, 1), (False, 1)), 1)
    assert found(ltx, [0.25, 0.5]).spans(4) == ()
    alike = "different times for the tokens of a sample"
    for model, rows in (
        (wan, [[0.25, 0.5]]),
        (wan, [[0.25, 0.0, 0.5]]),
        (ltx, [[0.0, 0.5], [0.5, 0.0]]),
        (ltx, [[0.25, 0.5], [0.5, 0.25]]),
    ):
        with pytest.raises(ValueError, match=alike):
            found(model, *rows)


# --- models -----------------------------------------------------------------------------------


@pytest.mark.parametrize("clean", [(0,), (0, 2)])
@pytest.mark.parametrize("name", NAMES)
def test_clean_frames_have_their_own_k_in_every_block(name: str, clean: tuple[int, ...]) -> None:
    model, given = families.made(name), with_times(name, clean)
    bare = families.run(model, given)
    for keep in (1.0, 0.5, 0.0):
        shiva_dit.apply(model, adapter_for(model, reference_keep_ratio=keep))
        noted(model)
        seen = seen_of(model)
        found = families.run(model, given)
        check(model, seen, places(clean), keep)
        assert not torch.equal(found, bare)
    shiva_dit.apply(model, adapter_for(model), keep_ratio=1.0)
    assert torch.equal(families.run(model, given), bare)


@pytest.mark.parametrize("name", NAMES)
def test_modulation_goes_with_the_tokens(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """All tokens in an order of chance that differs by sample."""
    model, given = families.made(name), with_times(name, (0, 2))
    bare = families.run(model, given)
    generator = torch.Generator().manual_seed(4)

    def shuffled(scores: Tensor, k: int) -> Tensor:
        assert k == scores.shape[1] == TOKENS // 2
        return torch.rand(scores.shape, generator=generator).argsort(dim=-1)

    monkeypatch.setattr(roles, "best_tokens", shuffled)
    whole = Schedule.uniform(1.0, num_blocks=4)
    attachment = attach(model, NormSelector(), whole, reference_keep_ratio=1.0)
    attachment.forwards.always_select = True
    found = families.run(model, given)
    # As of all models without times by token (tests/test_families.py).
    assert (found - bare).norm() < 2e-6 * bare.norm()


@pytest.mark.parametrize("name", NAMES)
def test_routers_read_the_time_of_the_noisy_tokens(name: str) -> None:
    model = families.made(name)
    shiva_dit.apply(model, adapter_for(model))
    attachment = attachment_of(model)
    assert attachment is not None
    told: list[Tensor] = []
    condition = attachment.forwards._condition

    def note(time: Tensor) -> None:
        told.append(time)
        condition(time)

    attachment.forwards._condition = note  # type: ignore[method-assign]
    families.run(model, families.arguments(name))
    families.run(model, with_times(name))
    assert torch.allclose(*told, atol=1e-6)


def test_clean_frames_that_are_dropped_pass_by_and_are_no_keys() -> None:
    """Nothing of them reaches the others but through the first block, which keeps all."""
    model = families.made("wan")
    attach(model, NormSelector(), tiny.from_counts([[64, 20, 20, 20]]), reference_keep_ratio=0.0)
    outputs: list[Tensor] = []
    for block in model.blocks:
        block.register_forward_hook(lambda m, a, output: outputs.append(output))
    families.run(model, with_times("wan"))
    first, *later = outputs
    assert all(torch.equal(output[:, :EACH], first[:, :EACH]) for output in later)
    assert not torch.equal(later[0][:, EACH:], first[:, EACH:])


@pytest.mark.parametrize("name", ["wan", "ltx"])
def test_flops_with_a_time_for_each_token_are_what_the_counter_counts(name: str) -> None:
    model, given = families.made(name), with_times(name)
    given = families.sample_of(given, 0)
    flops = model_flops(model, TOKENS, families.TEXT, by_frame=True)
    assert flops.dense() == executed(model, given)
    assert flops.dense() > model_flops(model, TOKENS, families.TEXT).dense()
    attach(model, NormSelector(), tiny.from_counts(COUNTS), reference_keep_ratio=0.0)
    families.run(model, given)
    counts = attachment_of(model).counts  # type: ignore[union-attr]
    row = counts.row(TOKENS - EACH, given["timestep"][:, -1])
    kept = counts.reference_row(EACH)
    assert flops.pruned([a + b for a, b in zip(row, kept, strict=True)]) == executed(model, given)
    summary = shiva_dit.summary(model, text_tokens=families.TEXT)
    assert summary.flops_dense == flops.dense()
    families.run(model, with_times(name, ()))  # from text to video some tell all the same time
    summary = shiva_dit.summary(model, text_tokens=families.TEXT)
    assert (summary.num_references, summary.flops_dense) == (0, flops.dense())


def test_programs_are_found_by_the_time_of_the_noisy_tokens(tmp_path: Any) -> None:
    model, times = families.made("wan"), (0.9, 0.2)
    shiva_dit.apply(model, adapter_for(model, reference_keep_ratio=0.5))

    def run(*of_calls: tuple[int, ...]) -> None:
        for clean, t in zip(of_calls, times, strict=True):
            families.run(model, with_times("wan", clean, t))

    export_run(model, lambda: run((0,), (0,)), tmp_path / "first")
    programs = Programs(tmp_path / "first")
    assert programs.timesteps == pytest.approx([1000 * t for t in times])
    for t in times:
        given = with_times("wan", t=t)
        tensors = {name: value for name, value in given.items() if isinstance(value, Tensor)}
        expected = families.run(model, given)
        assert (programs(**tensors) - expected).norm() <= 1e-5 * expected.norm()
    with pytest.raises(ValueError, match="called with other clean frames than before"):
        export_run(model, lambda: run((0,), (0, 2)), tmp_path / "both")


# --- pipelines ----------------------------------------------------------------------------------


def _wan() -> Any:
    pipe = running.build("WanImageToVideoPipeline")
    pipe.register_to_config(expand_timesteps=True)
    mask = torch.ones(1, 1, FRAMES, 8, 8)
    mask[:, :, 0] = 0.0
    pipe.prepare_latents = lambda *args, **kwargs: (
        normal(2, 4, FRAMES, 8, 8, seed=8),
        normal(2, 4, FRAMES, 8, 8, seed=9),
        mask.clone(),
    )
    return pipe, "WanImageToVideoPipeline", {}


def _ltx() -> Any:
    pipe = running.build("LTXImageToVideoPipeline")
    pipe.vae_spatial_compression_ratio, pipe.vae_temporal_compression_ratio = 32, 8
    mask = torch.zeros(2, FRAMES, EACH)
    mask[:, 0] = 1.0
    pipe.video_processor = SimpleNamespace(preprocess=lambda *args, **kwargs: torch.zeros(1))
    pipe.prepare_latents = lambda *args, **kwargs: (normal(2, TOKENS, 4), mask.flatten(1))
    options = {"image": running.picture()[:1], "height": 128, "width": 128, "num_frames": 25}
    return pipe, "LTXImageToVideoPipeline", options


def _ltx_conditions() -> Any:
    """The first frame half given, the third whole."""
    pipe = running.build("LTXConditionPipeline")
    pipe.vae_spatial_compression_ratio, pipe.vae_temporal_compression_ratio = 32, 8
    mask = torch.zeros(2, FRAMES, EACH)
    mask[:, 0], mask[:, 2] = 0.5, 1.0
    coordinates = normal(2, 3, TOKENS, seed=3)
    pipe.check_inputs = lambda *args, **kwargs: None
    pipe.prepare_latents = lambda *args, **kwargs: (
        normal(2, TOKENS, 4),
        mask.flatten(1),
        coordinates.clone(),  # scaled in place
        0,
    )
    pipe.video_processor = SimpleNamespace(
        preprocess=lambda *args, **kwargs: torch.zeros(1, 3, 8, 8)
    )
    condition = SimpleNamespace(
        image=running.picture()[:1], video=None, frame_index=0, strength=0.5
    )
    return pipe, "LTXConditionPipeline", {"conditions": [condition, condition]}


def _ltx2() -> Any:
    pipe = running.build("LTX2ImageToVideoPipeline")
    mask = torch.zeros(2, FRAMES, EACH)
    mask[:, 0] = 1.0
    pipe.check_inputs = lambda *args, **kwargs: None
    pipe.video_processor = SimpleNamespace(preprocess=lambda *args, **kwargs: torch.zeros(1))
    pipe.prepare_latents = lambda *args, **kwargs: (normal(2, TOKENS, 4), mask.flatten(1))
    options = {"image": running.picture()[:1], "image_crf": 0}
    return pipe, "LTX2ImageToVideoPipeline", options


def _ltx2_conditions() -> Any:
    """The first frame given whole and the last by half."""
    pipe = running.build("LTX2ConditionPipeline")
    mask = torch.zeros(2, FRAMES, EACH)
    mask[:, 0], mask[:, 3] = 1.0, 0.5
    latents, clean = normal(2, TOKENS, 4), normal(2, TOKENS, 4, seed=9)
    pipe.check_inputs = lambda *args, **kwargs: None
    pipe.prepare_latents = lambda *args, **kwargs: (
        latents,
        mask.flatten(1)[..., None],
        clean,
        None,
    )
    return pipe, "LTX2ConditionPipeline", {"conditions": []}


ELSEWHERE = {
    "Cosmos2_5_TransferPipeline",  # tells its ControlNet as well
    "SkyReelsV2DiffusionForcingImageToVideoPipeline",
    "SkyReelsV2DiffusionForcingPipeline",
    "SkyReelsV2DiffusionForcingVideoToVideoPipeline",
    "WanImageToVideoPipeline",
}
"""Pipelines that make a time for each token or frame in other words than the usual."""


def test_every_pipeline_with_times_by_token_says_which_are_clean() -> None:
    """In a variable of its call; SkyReels' are read in each forward."""
    usual = r"timestep\w* = [^\n]*(mask|indicator)|timestep = torch.min\("
    found = set()
    for name, model in running.served_pipelines().items():
        kind = running.kind_of(name)
        source = inspect.getsource(kind)
        if re.search(usual, source) or name in ELSEWHERE:
            found.add(name)
            assert MODELS[model].token_times != "one"
        if name in MARKS:
            names = inspect.unwrap(kind.__call__).__code__.co_varnames
            assert MARKS[name].name in names
    silent = {name for name in found if name.startswith("SkyReels")}
    blocks = {name for name in MARKS if name.endswith("Denoiser")}
    assert found - silent == set(MARKS) - blocks


@pytest.mark.parametrize("guided", [True, False])
@pytest.mark.parametrize(
    ("make", "clean"),
    [
        (_wan, (0,)),
        (_ltx, (0,)),
        (_ltx_conditions, (2,)),
        pytest.param(_ltx2, (0,), marks=pytest.mark.matrix),
        pytest.param(_ltx2_conditions, (0,), marks=pytest.mark.matrix),
    ],
)
def test_pipelines_from_image_to_video(make: Any, clean: tuple[int, ...], guided: bool) -> None:
    """Exact counts in every forward; which tokens are clean is read once in a run."""
    pipe, name, options = make()
    bare = running.call(name, pipe, guided, **options).frames
    model = pipe.transformer
    shiva_dit.apply(pipe, adapter_for(model))
    attachment = attachment_of(model)
    assert attachment is not None
    assert attachment.counts.clock is not None
    attachment.counts.clock.on_cpu = True
    noted(model)
    seen = seen_of(model)
    with reads() as found:
        running.call(name, pipe, guided, **options)
    in_turn = 2 if guided and "Wan" in name else 1
    assert len(seen) == running.STEPS * in_turn
    assert found.count("unique_consecutive in _layout") == 2  # as called and as run: one read
    # LTX-2's sound is guided here as well.
    both = 4 if "LTX2" in name or (guided and "LTX" in name) else 2
    for forward in seen:
        assert {len(chosen) for chosen in forward.values()} == {both}
        if both == 4:
            halves = [(chosen[:2], chosen[2:]) for chosen in forward.values()]
            assert all(torch.equal(one, other) for one, other in halves)
    check(model, [{b: c[:2] for b, c in forward.items()} for forward in seen], places(clean), 1.0)
    if in_turn == 2:
        for first, second in zip(seen[::2], seen[1::2], strict=True):
            assert all(torch.equal(first[block], second[block]) for block in first)
    summary = shiva_dit.summary(pipe, text_tokens=7)
    assert (summary.num_tokens, summary.num_references) == (TOKENS, EACH * len(clean))
    assert summary.reference_keep_ratio == 1.0
    shiva_dit.apply(pipe, adapter_for(model), keep_ratio=1.0)
    assert torch.equal(running.call(name, pipe, guided, **options).frames, bare)


def test_a_run_whose_frames_have_schedulers_of_their_own_is_told_its_times() -> None:
    """SkyReels steps by copies, so that the pipeline's own scheduler stays at its first step."""
    pipe = running.build("SkyReelsV2DiffusionForcingPipeline")
    shiva_dit.apply(pipe, adapter_for(pipe.transformer))
    attachment = attachment_of(pipe.transformer)
    assert attachment is not None
    clock = attachment.counts.clock
    assert clock is not None
    clock.on_cpu = True
    seen = seen_of(pipe.transformer)
    running.call("SkyReelsV2DiffusionForcingPipeline", pipe, True)
    run = clock.times.run
    assert run is not None
    table = attachment.counts.table(TOKENS, run)
    wanted = [table.row(t) for t in run for _ in range(2)]
    found = [(TOKENS, *(forward[b].shape[1] for b in (1, 2, 3))) for forward in seen]
    assert found == wanted


def test_times_are_shifted_by_all_frames() -> None:
    """Unlike pictures to go by, clean frames count as the pipeline's own tokens."""
    pipe, name, options = _ltx()
    pipe.scheduler = FlowMatchEulerDiscreteScheduler(
        use_dynamic_shifting=True, base_image_seq_len=16, max_image_seq_len=TOKENS
    )
    shiva_dit.apply(pipe, adapter_for(pipe.transformer))
    running.call(name, pipe, False, **options)
    summary = shiva_dit.summary(pipe, text_tokens=7, num_inference_steps=running.STEPS)
    taken = [float(t) / 1000 for t in pipe.scheduler.timesteps]
    assert [t for t, _ in summary.rows] == pytest.approx(taken)


# --- bad input, saving ------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_clean_frames_without_a_budget_are_refused(name: str) -> None:
    model = families.made(name)
    shiva_dit.apply(model, tiny.adapter(model, tiny.from_counts(COUNTS)))
    wanted = r"16 of 64 clean: .*reference_keep_ratio=1.0"
    with pytest.raises(ValueError, match=wanted):
        families.run(model, with_times(name))


def test_what_has_no_clean_frames_refuses_to_drop_them() -> None:
    model = families.made("flux")
    with pytest.raises(ValueError, match="reference_keep_ratio = 0 is for clean frames alone"):
        ShivaConfig.for_model(model, reference_keep_ratio=0.0)
    with pytest.raises(ValueError, match=r"WanVACETransformer3DModel are the target's alone"):
        ShivaConfig.for_model(families.made("wan-vace"), reference_keep_ratio=1.0)


def test_shares_of_clean_frames_are_saved_and_read_again(tmp_path: Any) -> None:
    model, given = families.made("wan"), with_times("wan")
    made = adapter_for(model, reference_keep_ratio=0.0)
    made.save_pretrained(tmp_path)
    again = ShivaAdapter.from_pretrained(tmp_path)
    assert again.config.reference_keep_ratio == 0.0
    shiva_dit.apply(model, made)
    wanted = families.run(model, given)
    shiva_dit.apply(model, again)
    assert torch.equal(families.run(model, given), wanted)
    assert "references' tokens 0% are kept" in (tmp_path / "README.md").read_text()


# --- training -----------------------------------------------------------------------------------


TRAINED = ("ltx", "ltx2", "cosmos", "skyreels")


def trainer(name: str, folder: Any, **changes: Any) -> Trainer:
    config = {
        "out": folder,
        "keep_ratio": 0.5,
        "clean_frames": 1,
        "reference_keep_ratio": 0.5,
        "backbone": "frozen",
        "warmup_steps": 1,
        "policy_steps": 0,
        "joint_steps": 2,
        "batch_size": 2,
        "micro_batches": 1,
        "router": RouterConfig(hidden=8),
        "optimizer": OptimizerConfig(router=1e-2, warmup_steps=1),
    }
    model = families.made(name)
    data = FamilyData(name, model_spec(model))
    return Trainer(TrainConfig(**{**config, **changes}), model, data)


@pytest.mark.parametrize(
    ("name", "keep"),
    [*(("wan", keep) for keep in (0.5, 1.0, 0.0)), *((name, 0.5) for name in TRAINED)],
)
def test_a_short_training_with_clean_frames(name: str, keep: float, tmp_path: Any) -> None:
    """Exact counts by role, frames at time 0 as they are, losses on the others, and gradients."""
    run = trainer(name, tmp_path, reference_keep_ratio=keep)
    student = run.student
    assert (student.num_tokens, student.num_references) == (TOKENS - EACH, EACH)
    chosen: list[tuple[int, Tensor]] = []
    student.attachment.forwards.observer = lambda block, tokens: chosen.append((block, tokens))
    given: list[Tensor] = []
    student.model.register_forward_pre_hook(
        lambda model, args, kwargs: given.append(kwargs["hidden_states"]), with_kwargs=True
    )
    losses = [run.train_step()["loss"] for _ in range(3)]
    assert all(torch.isfinite(torch.tensor(losses)))
    asked = student.attachment.counts.reference_row(EACH)
    is_clean = places((0,))
    assert {block for block, _ in chosen} == {1, 2, 3}
    for block, tokens in chosen:
        assert is_clean[tokens].sum(1).tolist() == [asked[block]] * 2
    first = (lambda x: x[:, :EACH]) if name.startswith("ltx") else (lambda x: x[:, :, :1])
    clips = {tuple(first(clip[None]).flatten().tolist()) for clip in run.data.latents}  # type: ignore[attr-defined]
    seen = {tuple(first(clip[None]).flatten().tolist()) for each in given for clip in each}
    assert seen <= clips
    joint = [tokens.shape[1] - asked[block] for block, tokens in chosen[3:]]  # after the warm-up
    assert sum(joint) == len(joint) * (TOKENS - EACH) / 2
    for group in student.adapter.router.groups:
        moved = group.roles
        assert bool((moved != 0).all()) == (keep == 0.5)
        assert all(p.grad is None or bool(p.grad.isfinite().all()) for p in group.parameters())
    run.close()


def test_losses_know_nothing_of_clean_frames(tmp_path: Any) -> None:
    """What is predicted for them changes none of it."""
    run = trainer("wan", tmp_path, loss=LossConfig(distillation=0.0))
    model = run.student.model

    def loss(add: float) -> float:
        def change(module: Any, args: Any, output: Any) -> Any:
            output[0][:, :, :1] += add
            return output

        handle = model.register_forward_hook(change)
        run.student.generator.manual_seed(3)
        batch = run.data.batch(torch.arange(2), torch.Generator())
        part = run.planner.step("warmup", torch.Generator().manual_seed(1)).parts[0]
        found, _ = run.student.loss(part, batch, 0.5, run.data.unconditional())
        handle.remove()
        return found.item()

    assert loss(0.0) == loss(5.0)
    run.close()


def test_what_was_trained_with_clean_frames_runs_from_image_to_video(tmp_path: Any) -> None:
    watch = WatchConfig(every=3, held_out=1, held_out_share=0.57, times=2, prompts=0)
    run = trainer("wan", tmp_path, watch=watch, batch_size=1, reference_keep_ratio=0.0)
    trained = run.run()
    run.close()
    assert trained.adapter is not None
    trained.adapter.save_pretrained(tmp_path / "adapter")
    model = families.made("wan")
    shiva_dit.apply(model, tmp_path / "adapter")
    noted(model)
    seen = seen_of(model)
    families.run(model, with_times("wan"))
    check(model, seen, places((0,)), 0.0)


def test_recipes_with_clean_frames_that_cannot_be_are_refused(tmp_path: Any) -> None:
    with pytest.raises(ValueError, match=r"clean_frames are references, .* reference_keep_ratio"):
        trainer("wan", tmp_path, reference_keep_ratio=None)
    with pytest.raises(ValueError, match="FluxTransformer2DModel takes one time for all frames"):
        trainer("flux", tmp_path)
    with pytest.raises(ValueError, match="videos of 4 frames leaves none"):
        trainer("wan", tmp_path, clean_frames=4)
    with pytest.raises(ValueError, match=r"trajectories.count = 0"):
        trainer("wan", tmp_path, trajectories=TrajectoryConfig(count=4))
