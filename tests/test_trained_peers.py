"""Published methods that are trained: each by the trainer of ours, and as it was published."""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from shiva_dit import guided
from shiva_dit.core.schedule import Schedule
from shiva_dit.core.time_law import UNIFORM
from shiva_dit.experiments.frontier.executed import counted
from shiva_dit.experiments.kept import keep, put_on, put_trained_on
from shiva_dit.methods.base import Lesson
from shiva_dit.methods.blocks import BlockReducer
from shiva_dit.methods.diffcr import DiffCR
from shiva_dit.methods.dydit import DyDiT
from shiva_dit.methods.norm import NormSelector
from shiva_dit.methods.settings import DiffCRConfig, DyDiTConfig, SparseDiTConfig
from shiva_dit.methods.sparsedit import SparseDiT
from shiva_dit.models.attach import attach
from shiva_dit.models.cost import pruned_flops
from shiva_dit.models.counted import model_widths
from shiva_dit.models.families import model_spec
from shiva_dit.models.features import BlockFeatures
from shiva_dit.models.reducing import attach_reducer
from shiva_dit.training.settings import LossConfig, OptimizerConfig
from shiva_dit.training.trainer import Trainer
from tests import families, tiny
from tests.test_training import TinyData, recipe

FAST = OptimizerConfig(router=0.1, policy=0.1, backbone=1e-3, warmup_steps=1, ema=0.0)
PEERS = ("diffcr", "dydit", "sparsedit")


def trainer_of(method: str, out: Path, steps: int = 3, **changes: Any) -> Trainer:
    base: dict[str, Any] = {
        "method": method,
        "warmup_steps": 0,
        "policy_steps": 0,
        "joint_steps": steps,
        "optimizer": FAST,
        "batch_size": 4,
        "micro_batches": 4,
        "dydit": DyDiTConfig(width_bias=1.0, token_bias=1.0),
    }
    return Trainer(recipe(out, **{**base, **changes}), tiny.sd3(), TinyData())


def bare(t: float = 0.5) -> Tensor:
    return tiny.run(tiny.sd3(), tiny.inputs(t=t))


# --- all of them ------------------------------------------------------------------------------


@pytest.mark.parametrize("method", PEERS)
def test_what_was_trained_is_the_same_from_its_files(tmp_path: Path, method: str) -> None:
    trainer = trainer_of(method, tmp_path / "run")
    config, trained = trainer.config, trainer.run(show_progress=False)
    trainer.close()
    outputs = []
    for t in (0.1, 0.9):
        model = tiny.sd3()
        put_trained_on(trained, trained.schedule, model, seed=0)
        outputs.append(tiny.run(model, tiny.inputs(t=t)))
        assert not torch.equal(outputs[-1], bare(t))
    keep(trained, config, tmp_path / "kept")
    for t, output in zip((0.1, 0.9), outputs, strict=True):
        model = tiny.sd3()
        put_on(tmp_path / "kept", model)
        assert torch.equal(tiny.run(model, tiny.inputs(t=t)), output)


@pytest.mark.parametrize("method", PEERS)
def test_training_leaves_no_trace_and_goes_on_to_the_bit(tmp_path: Path, method: str) -> None:
    whole = trainer_of(method, tmp_path / "whole", steps=4)
    whole.run(show_progress=False)
    first = trainer_of(method, tmp_path / "parts", steps=4)
    for _ in range(2):
        first.train_step()
    first.save()
    marks = tiny.footprint(tiny.sd3())
    first.close()
    assert tiny.footprint(first.student.model).keys() == marks.keys()
    second = trainer_of(method, tmp_path / "parts", steps=4)
    second.resume()
    second.run(show_progress=False)
    for name, value in whole.optimization.tensors().items():
        assert torch.equal(second.optimization.tensors()[name], value), name


@pytest.mark.parametrize("method", PEERS)
def test_every_parameter_of_its_own_gets_a_gradient(tmp_path: Path, method: str) -> None:
    # With a seed by which no unit of DyDiT's two in a block is off for all tokens (ReLU).
    trainer = trainer_of(method, tmp_path, steps=20, seed=1)
    seen: dict[str, Tensor] = {}
    # Regions come one to a part; ratios leave their first value, where routers have no say, soon.
    for _ in range(8):
        before = {n: v.clone() for n, v in trainer.optimization.tensors().items()}
        trainer.train_step()
        for name, value in trainer.optimization.tensors().items():
            if name.startswith(("router.", "policy.", "updates.")):
                moved = value != before[name]
                seen[name] = seen.get(name, torch.zeros_like(moved)) | moved
    assert seen
    for name, moved in seen.items():
        assert bool(moved.all()), name


@pytest.mark.parametrize("method", PEERS)
def test_its_own_objective_or_the_recipes(tmp_path: Path, method: str) -> None:
    loss = LossConfig(diffusion=0.5, distillation=0.0, output=2.0)
    own, ours = (
        trainer_of(method, tmp_path / kind, objective=kind, loss=loss)
        for kind in ("method", "recipe")
    )
    assert ours.student.weights == ours.config.loss
    found = own.student.weights
    assert own.student.reducer is not None
    assert {n: getattr(found, n) for n in own.student.reducer.objective} == dict(
        own.student.reducer.objective
    )
    assert own.student.needs_teacher == bool(found.output or found.distillation)


@pytest.mark.parametrize("method", PEERS)
def test_beside_a_lora_both_ways_and_in_16_bits(tmp_path: Path, method: str) -> None:
    changes = {"backbone": "lora", "lora_rank": 4, "guidance": (1.0, 4.0), "precision": "bfloat16"}
    trainer = trainer_of(method, tmp_path, steps=2, **changes)
    trained = trainer.run(show_progress=False)
    trainer.close()
    assert torch.equal(tiny.run(trainer.student.model.eval(), tiny.inputs()), bare())
    model = tiny.sd3()
    put_trained_on(trained, trained.schedule, model, seed=0)
    with guided(model, "both"):
        found = tiny.run(model, tiny.inputs())
    assert torch.isfinite(found).all()
    assert not torch.equal(found, bare())


# --- DiffCR -----------------------------------------------------------------------------------


def diffcr(keep_ratio: float = 0.5, **settings: Any) -> DiffCR:
    config = DiffCRConfig(**settings)
    return DiffCR(32, 4, keep_ratio, config, generator=torch.Generator().manual_seed(0))


def test_ratios_mix_the_two_next_to_them() -> None:
    method = diffcr()
    with torch.no_grad():
        method.ratios.copy_(torch.tensor([[0.43, 0.05, 1.2]]).expand(4, -1))
    found = method.mixtures(2, 60)
    assert [found[block].counts for block in (1, 2, 3)] == [(24, 30), (6, 12), (54, 60)]
    weights = torch.stack([found[block].weights for block in (1, 2, 3)])
    # In float32, of numbers up to 10: rounding of 1e-6.
    expected = torch.tensor([[0.7, 0.3], [1.0, 0.0], [0.0, 1.0]])
    torch.testing.assert_close(weights, expected, rtol=0.0, atol=2e-6)
    schedule = method.learned_schedule(UNIFORM)
    assert schedule.ratios == ((1.0, 0.4, 0.1, 1.0),) * 4
    # The slope between two ratios, also beyond the bounds: there they can come back.
    weights[:, 1].sum().backward()
    assert method.ratios.grad is not None
    torch.testing.assert_close(method.ratios.grad[2], torch.full((3,), 10.0))


def test_the_budget_is_the_squared_distance_of_the_mean() -> None:
    method = diffcr(0.6)
    lesson = Lesson(progress=0.0, generator=torch.Generator())
    assert float(method.loss(lesson).detach()) == pytest.approx(0.3 * 0.4**2, rel=1e-6)


@pytest.mark.parametrize("site", ["feed_forward", "block"])
@pytest.mark.parametrize("kind", ["plain", "dual"])
def test_the_routers_weight_multiplies_updates(site: Any, kind: str) -> None:
    """One block by hand, all tokens of which run but one."""
    method = diffcr(weight_site=site)
    model = tiny.sd3(kind, 1)
    method = DiffCR(32, 1, 0.5, method.config, full_blocks=())
    block: Any = model.transformer_blocks[0]
    calls: list[Any] = []
    block.register_forward_hook(lambda m, a, k, out: calls.append((k, out)), with_kwargs=True)
    schedule = Schedule.from_ratios([[63 / 64]], [])
    attach(model, method, schedule)
    tiny.run(model, tiny.inputs())
    given, (_, output) = calls[0]
    x = given["hidden_states"]
    scores = x @ method.routers[0].detach()  # (B, N)
    same = tiny.sd3(kind, 1).transformer_blocks[0]
    for b in range(2):
        chosen = scores[b].argsort(descending=True)[:63]
        one = {
            name: value[b : b + 1] if isinstance(value, Tensor) else value
            for name, value in given.items()
        }
        one["hidden_states"] = before = x[b : b + 1, chosen]
        weights = scores[b, chosen].sigmoid()[:, None]
        if site == "feed_forward":
            same.ff.register_forward_hook(lambda m, a, out, w=weights: out * w)
        with torch.no_grad():
            after = same(**one)[1]
        same.ff._forward_hooks.clear()
        if site == "block":
            after = before + weights * (after - before)
        # Sums of other orders, of tokens of size 3: measured below 2e-6.
        torch.testing.assert_close(output[b, chosen], after[0], rtol=0.0, atol=1e-5)
        left = scores[b].argmin()
        assert torch.equal(output[b, left], x[b, left])


@pytest.mark.parametrize("site", ["feed_forward", "block"])
def test_training_at_a_ratio_that_runs_is_what_sampling_runs(tmp_path: Path, site: Any) -> None:
    trainer = trainer_of("diffcr", tmp_path, diffcr=DiffCRConfig(weight_site=site))
    student = trainer.student
    assert isinstance(student.reducer, DiffCR)
    with torch.no_grad():
        student.reducer.ratios.copy_(torch.tensor([0.5, 1.0, 0.3]).expand(4, -1))
    arguments = tiny.inputs(t=0.6)
    model = student.model.eval()
    part = trainer.planner.step("joint", trainer.generator).parts[2]
    lesson = Lesson(progress=0.0, generator=trainer.generator)
    with torch.no_grad(), student._in_training(part, lesson, BlockFeatures()):
        ours = model(**arguments).sample
    trainer.close()
    schedule = student.reducer.learned_schedule(UNIFORM)
    assert schedule.ratios[2] == (1.0, 0.5, 1.0, 0.3)
    attach(model, student.reducer, tiny.from_counts([[64, 32, 64, 20]] * 4))
    theirs = tiny.run(model, arguments)
    # The same operations, once times 1 and once beside others times 0 (0.3 of 64 is rounded up).
    torch.testing.assert_close(ours, theirs, rtol=0.0, atol=1e-6)


def test_samples_of_a_part_share_their_region(tmp_path: Path) -> None:
    for parts in (1, 2, 4):
        trainer = trainer_of("diffcr", tmp_path, batch_size=8, micro_batches=parts)
        seen = set()
        for _ in range(30):
            plan = trainer.planner.step("joint", trainer.generator)
            for part in plan.parts:
                (region,) = set((part.t * 4).long().clamp(max=3).tolist())
                seen.add(region)
            times = torch.cat([part.t for part in plan.parts])
            if parts == 4:  # its samples lie in one region as they are drawn
                assert (times.sort().values * 8).floor().tolist() == list(range(8))
        assert seen == {0, 1, 2, 3}
        trainer.close()


def test_the_budget_leads_the_ratios_to_their_target(tmp_path: Path) -> None:
    settings = DiffCRConfig(budget_weight=30.0)
    optimizer = dataclasses.replace(FAST, policy=0.03, backbone=0.0)
    changes = {"diffcr": settings, "optimizer": optimizer, "keep_ratio": 0.6}
    trainer = trainer_of("diffcr", tmp_path, steps=40, **changes)
    trained = trainer.run(show_progress=False)
    assert isinstance(trained.reducer, DiffCR)
    assert float(trained.reducer.kept().detach().mean()) == pytest.approx(0.6, abs=0.03)
    assert trained.schedule == trained.reducer.learned_schedule(trained.schedule.law)
    assert trained.schedule.num_bins == 4


def test_flops_are_those_of_the_kept_tokens_and_of_the_routers() -> None:
    model = tiny.sd3()
    schedule = tiny.from_counts([[64, 32, 16, 64]])
    bare_ones = attach(model, diffcr(), schedule)
    size = tiny.NUM_TOKENS, tiny.TEXT_TOKENS
    found = pruned_flops(bare_ones, *size, schedule.for_tokens(64).counts[0])
    others = attach(model, NormSelector(), schedule)
    without = pruned_flops(others, *size, schedule.for_tokens(64).counts[0])
    assert found - without == 2 * 32 * (64 + 64 + 32 + 16)  # logits of all, weights of the chosen


@pytest.mark.parametrize("name", ["flux", "pixart-sigma", "qwen-image", "wan"])
def test_other_families_take_diffcr_too(name: str) -> None:
    model = families.made(name)
    spec = model_spec(model)
    width, blocks = model_widths(model).width, len(spec.blocks(model))
    full = spec.full_blocks(model) or (0,)
    schedule = Schedule.uniform(0.5, num_blocks=blocks, full_blocks=full)
    arguments = families.arguments(name)
    before = families.run(model, arguments)
    for site in ("block", "feed_forward"):
        method = DiffCR(width, blocks, 0.5, DiffCRConfig(weight_site=site), full_blocks=full)
        if site == "feed_forward" and name != "pixart-sigma":
            with pytest.raises(ValueError, match=r'set its weight_site = "block"'):
                attach(model, method, schedule)
            continue
        attached = attach(model, method, schedule)
        assert not torch.equal(families.run(model, arguments), before)
        attached.detach()
    assert torch.equal(families.run(model, arguments), before)


@pytest.mark.parametrize("settings", [{"regions": 0}, {"budget_weight": -1.0}])
def test_what_diffcr_refuses(settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"diffcr {next(iter(settings))}"):
        DiffCRConfig(**settings)
    with pytest.raises(ValueError, match="block 0 unpruned"):
        diffcr().scores(torch.zeros(1, 4, 32), None, 0)


# --- DyDiT ------------------------------------------------------------------------------------

KINDS = pytest.mark.parametrize("kind", ["plain", "dual"])


def dydit(spread: float = 0.0, **settings: Any) -> DyDiT:
    """Fresh, or with gates as far apart as a training may have brought them."""
    bias = {"width_bias": 0.0, "token_bias": -40.0} if spread else {}
    config = DyDiTConfig(**{**bias, **settings})
    method = DyDiT(32, 32, 4, 4, 0.6, config, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        method.width_weight *= max(spread, 1.0)
        method.token_out *= max(spread, 1.0)
    return method


@KINDS
def test_dydit_begins_as_the_model_itself(kind: str) -> None:
    model = tiny.sd3(kind)
    before = tiny.run(model, tiny.inputs())
    reduction = attach_reducer(model, dydit())
    assert torch.equal(tiny.run(model, tiny.inputs()), before)
    lesson = Lesson(progress=1.0, generator=torch.Generator().manual_seed(0))
    with reduction.taught(lesson):
        after = tiny.run(model, tiny.inputs())
    # All gates on by 15 and 35, against noise that is above 14 once in a million draws; heads are
    # multiplied by 1 and put together as attention does: equal but for other kernels.
    torch.testing.assert_close(after, before, rtol=0.0, atol=1e-6)
    assert [float(part) for note in lesson.noted for part in note[:3]] == [1.0] * 12
    assert float(dydit().loss(lesson)) == pytest.approx(2 * 0.4**2, rel=1e-6)


@KINDS
@pytest.mark.parametrize("widths", [True, False])
def test_dydit_sliced_and_ragged_is_dydit_masked(kind: str, widths: bool) -> None:
    """Gates that noise can't change, in training; what is off left out, in sampling."""
    model = tiny.sd3(kind)
    before = tiny.run(model, tiny.inputs())
    method = dydit(spread=1e6, widths=widths)
    reduction = attach_reducer(model, method)
    less = tiny.run(model, tiny.inputs())
    lesson = Lesson(progress=1.0, generator=torch.Generator().manual_seed(0))
    with reduction.taught(lesson):
        masked = tiny.run(model, tiny.inputs())
    shares = [float(part) for note in lesson.noted for part in note[:3]]
    assert any(0.0 < share < 1.0 for share in shares[2::3])  # of tokens
    assert (min(shares[0::3] + shares[1::3]) < 1.0) == widths
    assert (less - before).abs().max() > 0.05
    # Products of fewer terms, in other orders, of values of size 1: measured below 5e-7.
    torch.testing.assert_close(less, masked, rtol=0.0, atol=2e-6)


def test_samples_with_other_times_have_other_widths() -> None:
    model = tiny.sd3()
    attach_reducer(model, dydit(spread=1e6))
    arguments = tiny.inputs()
    arguments["timestep"] = torch.tensor([100.0, 900.0])
    both = tiny.run(model, arguments)
    for b in range(2):
        alone = tiny.run(model, {name: value[b : b + 1] for name, value in arguments.items()})
        # One masked, the other sliced, as above.
        torch.testing.assert_close(both[b : b + 1], alone, rtol=0.0, atol=2e-6)


def test_layers_that_are_not_plain_are_masked() -> None:
    """What lies on a layer runs as ever, and nothing is saved there."""
    model = tiny.sd3()
    attach_reducer(model, dydit(spread=1e6))
    with counted(model) as fewer:
        sliced = tiny.run(model, tiny.inputs())
    seen: list[int] = []
    for block in model.transformer_blocks:
        for layer in (block.attn.to_v, block.ff.net[2]):
            layer.register_forward_hook(lambda m, a, out: seen.append(a[0].shape[-1]))
    with counted(model) as more:
        masked = tiny.run(model, tiny.inputs())
    assert sorted(set(seen)) == [32, 128]
    # Products of fewer terms, in other orders, of values of size 1.
    torch.testing.assert_close(masked, sliced, rtol=0.0, atol=2e-6)
    assert more[0] > fewer[0]


def test_flops_of_dydit_are_those_that_its_gates_say() -> None:
    """Executed, less those of the dense model: what masks hide would still be counted."""
    model = tiny.sd3()
    with counted(model) as dense:
        tiny.run(model, tiny.inputs(batch=1))
    method = dydit(spread=1e6)
    reduction = attach_reducer(model, method)
    with counted(model) as executed:
        tiny.run(model, tiny.inputs(batch=1))
    lesson = Lesson(progress=1.0, generator=torch.Generator().manual_seed(0))
    with reduction.taught(lesson):
        tiny.run(model, tiny.inputs(batch=1))
    n, t, d = tiny.NUM_TOKENS, tiny.TEXT_TOKENS, 32
    saved = 0.0
    for block, (heads, hidden, tokens, _) in enumerate(lesson.noted):
        off = 1.0 - float(heads)
        text_outputs = 3 if block == 3 else 4  # the last block's text has no output layer
        saved += off * (4 * 2 * n * d * d + text_outputs * 2 * t * d * d)
        saved += off * (2 * 2 * (n + t) ** 2 * d)
        saved += (1.0 - float(hidden) * float(tokens)) * 2 * 2 * n * d * 4 * d
    gates = 4 * (2 * d * 6 + 2 * n * (d * 2 + 2))  # widths by time; tokens by D / 16 channels
    assert saved > 0.2 * dense[0]
    assert executed[0] - dense[0] == pytest.approx(gates - saved, abs=1e-6 * dense[0])


def test_the_budget_leads_dydit_to_its_target(tmp_path: Path) -> None:
    changes = {
        "optimizer": dataclasses.replace(FAST, router=0.02, backbone=0.0),
        "dydit": DyDiTConfig(width_bias=2.0, token_bias=2.0, flops_weight=30.0, anneal=0.1),
        "keep_ratio": 0.6,
        "micro_batches": 1,
    }
    trainer = trainer_of("dydit", tmp_path, steps=150, **changes)
    reducer = trainer.student.reducer
    assert isinstance(reducer, DyDiT)
    found: list[float] = []
    loss = reducer.loss

    def noted(lesson: Lesson) -> Tensor:
        value = loss(lesson)
        found.append(float(value.detach()) / 30.0)
        return value

    reducer.loss = noted  # type: ignore[method-assign]
    trainer.run(show_progress=False)
    # Squares of what the share is off by: 0.35 where the target has fallen and nothing has
    # learned, 0.03 by chance at the end, since it is a mean over drawn gates.
    assert max(found) > 0.05
    assert sum(found[-20:]) / 20 < 0.05**2


# --- SparseDiT --------------------------------------------------------------------------------


def sparsedit(keep_ratio: float = 0.4, **settings: Any) -> SparseDiT:
    config = SparseDiTConfig(**{"groups": (1, 0, 1, 1), **settings})
    return SparseDiT(32, 4, keep_ratio, config)


def test_roles_are_as_published_and_fit_small_models() -> None:
    assert SparseDiTConfig().roles(24) == "P" + 4 * "MSRD" + 7 * "D"
    assert SparseDiTConfig().roles(6) == "PMSRDD"
    large = SparseDiTConfig(modules=4, groups=(1, 3, 1, 1))
    assert large.roles(28) == "P" + 4 * "MSSSRD" + "DDD"
    with pytest.raises(ValueError, match="are more than the model's 4"):
        SparseDiTConfig().roles(4)
    with pytest.raises(ValueError, match="merges and recovers"):
        SparseDiTConfig(groups=(1, 1, 0, 1))
    with pytest.raises(ValueError, match="growth"):
        SparseDiTConfig(growth=1.0)


def test_the_share_is_held_and_then_grows_evenly() -> None:
    method = sparsedit(0.5, bins=400, growth=0.2)
    shares = [method.share(b) for b in reversed(range(400))]  # from noise to data
    assert sum(shares) / 400 == pytest.approx(0.5, abs=1e-5)
    assert shares[:100] == [shares[0]] * 100
    steps = [b - a for a, b in itertools.pairwise(shares[100:])]
    assert steps == pytest.approx([0.2 / 300] * 299, rel=1e-6)
    assert method.size((16, 24), 399) == (10, 16)  # the root of 0.425 is 0.652
    for share in (0.05, 0.98):  # grows by less where it would leave [0, 1]
        wide = sparsedit(share, bins=100, growth=0.5)
        assert 0.0 <= wide.share(99) <= wide.share(0) <= 1.0
        assert sum(map(wide.share, range(100))) / 100 == pytest.approx(share, abs=1e-3)


@KINDS
def test_blocks_of_sparsedit_are_those_of_plain_formulas(kind: str) -> None:
    """Each role against a loop over heads and tokens, in the first block of its kind."""
    model = tiny.sd3(kind)
    method = sparsedit()
    tiny.randomize(method, seed=1)
    seen: list[tuple[Tensor, Tensor, Tensor, Any]] = []
    for block in model.transformer_blocks:
        block.register_forward_hook(
            lambda m, a, k, out: seen.append(
                (k["hidden_states"], k["encoder_hidden_states"], k["temb"], out)
            ),
            with_kwargs=True,
        )
    attach_reducer(model, method)
    tiny.run(model, tiny.inputs(t=0.9))
    assert [given[0].shape[1] for given in seen] == [64, 64, 25, 64]
    for index in range(3):
        x, text, temb, (text_out, out) = seen[index]
        block: Any = model.transformer_blocks[index]
        queries = keys = x
        if index == 1:
            rows = torch.stack([_cell(i, 8, 5) for i in range(5)])  # (5, 8)
            queries = torch.einsum("ih,jw,bhwd->bijd", rows, rows, x.unflatten(1, (8, 8)))
            queries = queries.flatten(1, 2)
        if index == 2:
            near = (torch.arange(8) * 5 // 8).tolist()
            wide = x.unflatten(1, (5, 5))[:, near][:, :, near].flatten(1, 2)
            queries = wide @ method.up[0].detach().T + seen[1][0] @ method.through[0].detach().T
        after, after_text = _block_by_loops(block, queries, keys, text, temb, pools=index == 0)
        # Float32 against float32 in other orders, of tokens of size 3.
        torch.testing.assert_close(out, after, rtol=0.0, atol=2e-5)
        torch.testing.assert_close(text_out, after_text, rtol=0.0, atol=2e-5)


def _cell(index: int, size: int, cells: int) -> Tensor:
    """Weights of the mean that adaptive pooling takes."""
    start, end = index * size // cells, -(-(index + 1) * size // cells)
    inside = torch.arange(size)
    return ((inside >= start) & (inside < end)).float() / (end - start)


@torch.no_grad()
def _block_by_loops(
    block: Any, x: Tensor, keys: Tensor, text: Tensor, temb: Tensor, *, pools: bool
) -> tuple[Tensor, Tensor]:
    def attend(attn: Any, x: Tensor, keys: Tensor, text: Tensor | None) -> list[Tensor]:
        q, k, v = attn.to_q(x), attn.to_k(keys), attn.to_v(keys)
        size = q.shape[-1] // attn.heads
        outs = []
        for h in range(attn.heads):
            part = slice(h * size, (h + 1) * size)
            norms = [attn.norm_q, attn.norm_k] if attn.norm_q else [lambda y: y] * 2
            head = [norms[0](q[..., part]), norms[1](k[..., part]), v[..., part]]
            if text is not None:
                norms = [lambda y: y] * 2
                if attn.norm_added_q is not None:
                    norms = [attn.norm_added_q, attn.norm_added_k]
                added = [attn.add_q_proj, attn.add_k_proj, attn.add_v_proj]
                more = [layer(text)[..., part] for layer in added]
                more = [norms[0](more[0]), norms[1](more[1]), more[2]]
                head = [torch.cat(pair, dim=1) for pair in zip(head, more, strict=True)]
            weights = (head[0] @ head[1].transpose(1, 2) / size**0.5).softmax(-1)
            if pools:
                weights[:, : x.shape[1]] = 1.0 / weights.shape[-1]
            outs.append(weights @ head[2])
        out = torch.cat(outs, dim=-1)
        return [attn.to_out[0](out[:, : x.shape[1]]), out[:, x.shape[1] :]]

    norms, others = block.norm1(x, emb=temb), block.norm1(keys, emb=temb)
    of_text = block.norm1_context(text, emb=temb)
    update, text_update = attend(block.attn, norms[0], others[0], of_text[0])
    y = x + norms[1][:, None] * update
    if block.use_dual_attention:
        y = y + norms[6][:, None] * attend(block.attn2, norms[5], others[5], None)[0]
    y = y + norms[4][:, None] * block.ff(
        block.norm2(y) * (1 + norms[3][:, None]) + norms[2][:, None]
    )
    text = text + of_text[1][:, None] * block.attn.to_add_out(text_update)
    changed = block.norm2_context(text) * (1 + of_text[3][:, None]) + of_text[2][:, None]
    return y, text + of_text[4][:, None] * block.ff_context(changed)


def test_sparsedit_needs_one_time_and_all_blocks() -> None:
    model = tiny.sd3()
    attach_reducer(model, sparsedit())
    arguments = tiny.inputs()
    with pytest.raises(ValueError, match="skip no layers"):
        model(**arguments, skip_layers=[1])
    arguments["timestep"] = torch.tensor([100.0, 900.0])
    with pytest.raises(ValueError, match=r"must share their time bin.*0\.1.*0\.89"):
        tiny.run(model, arguments)
    arguments["timestep"] = torch.tensor([510.0, 520.0])
    tiny.run(model, arguments)


def test_only_sparsedits_own_objective_goes_without_a_teacher(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"set loss.distillation = 0"):
        trainer_of("sparsedit", tmp_path, objective="recipe")
    loss = LossConfig(diffusion=0.0, distillation=0.0)
    trainer = trainer_of("sparsedit", tmp_path, objective="recipe", loss=loss)
    assert trainer.student.needs_teacher
    before = bare()
    with trainer.student.as_teacher():
        model = trainer.student.teacher
        assert torch.equal(tiny.run(model, tiny.inputs()), before)
    trainer.close()


# --- both -------------------------------------------------------------------------------------

CHANGING = {"dydit": lambda: dydit(spread=1e6), "sparsedit": sparsedit}
both = pytest.mark.parametrize("name", CHANGING)


@both
def test_grids_that_are_no_squares(name: str) -> None:
    model = tiny.sd3()
    arguments = tiny.inputs()
    arguments["hidden_states"] = arguments["hidden_states"][:, :, :, :10]
    before = tiny.run(model, arguments)
    reduction = attach_reducer(model, CHANGING[name]())
    found = tiny.run(model, arguments)
    assert found.shape == before.shape
    assert not torch.equal(found, before)
    reduction.detach()
    assert torch.equal(tiny.run(model, arguments), before)


@both
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_in_16_bits(name: str, dtype: torch.dtype) -> None:
    model = tiny.sd3("dual")
    arguments = tiny.inputs()
    dense = tiny.run(model, arguments)
    attach_reducer(model, CHANGING[name]())
    exact = tiny.run(model, arguments)
    narrow = tiny.run(
        model.to(dtype), {n: v if n == "timestep" else v.to(dtype) for n, v in arguments.items()}
    )
    assert narrow.dtype == dtype
    # Gates near 0 may turn over by rounding: far from what the method itself changes.
    assert (narrow.float() - exact).abs().mean() < 0.5 * (exact - dense).abs().mean()


@both
def test_runs_in_turn_and_by_pipelines(name: str) -> None:
    one, other = tiny.sd3(), tiny.sd3()
    reducer = CHANGING[name]()
    for model in (one, other):
        attach_reducer(model, reducer)
    alone = [tiny.run(one, tiny.inputs(t=t)) for t in (0.2, 0.8)]
    mixed = [tiny.run(m, tiny.inputs(t=t)) for t in (0.2, 0.8) for m in (one, other)]
    for found, expected in zip(mixed, [alone[0], alone[0], alone[1], alone[1]], strict=True):
        assert torch.equal(found, expected)
    images = tiny.generate(tiny.pipeline(one), 4.0)
    assert torch.equal(images, tiny.generate(tiny.pipeline(other), 4.0))


@both
def test_other_models_and_calls_are_refused(name: str) -> None:
    reducer = CHANGING[name]()
    assert isinstance(reducer, BlockReducer)
    for other in ("flux", "pixart-sigma", "dit"):
        with pytest.raises(ValueError, match=r"is here for Stable Diffusion 3 and 3\.5 alone"):
            attach_reducer(families.made(other), reducer)
    model = tiny.sd3()
    reduction = attach_reducer(model, reducer)
    with pytest.raises(ValueError, match="counts what is executed"):
        reduction.flops(8, 8, tiny.TEXT_TOKENS)
    with pytest.raises(RuntimeError, match="ran outside of a call of its model"):
        model.forward(**tiny.inputs())
    model.enable_gradient_checkpointing()
    with pytest.raises(ValueError, match="disable_gradient_checkpointing"):
        model(**tiny.inputs())
    reduction.detach()
