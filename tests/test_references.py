"""References and targets: budgets of their own, exact in every block, through real pipelines."""

import logging
from typing import Any

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, Flux2KleinKVPipeline
from PIL import Image
from torch import Tensor

import shiva_dit
from shiva_dit.adapter import ShivaAdapter, ShivaConfig
from shiva_dit.core.estimators import EstimatorConfig
from shiva_dit.core.roles import REFERENCE, TARGET, Span, best_by_group, grouped, num_of
from shiva_dit.core.schedule import Schedule
from shiva_dit.methods.gates import SelectionGates
from shiva_dit.methods.norm import NormSelector
from shiva_dit.methods.role_gates import GroupGates
from shiva_dit.models.attach import attach, attachment_of
from shiva_dit.models.families import model_spec
from shiva_dit.models.gating import GatedForward
from shiva_dit.models.spec import REFERENCES as REFERENCES_OF_BATCH
from shiva_dit.training.data import Batch
from shiva_dit.training.recipe import TrainConfig
from shiva_dit.training.settings import OptimizerConfig, RouterConfig, WatchConfig
from shiva_dit.training.trainer import Trainer
from tests import families, running, tiny
from tests.families.kit import normal

TARGETS, FIRST, SECOND = 64, 30, 12
REFERENCES = FIRST + SECOND
COUNTS = [[64, 40, 20, 20], [64, 30, 30, 10]]
KEEP = 0.5


def ids(numbers: tuple[int, ...], of_four: bool) -> Tensor:
    """Places of a target of 8 x 8 tokens and of references of 5 x 6 and 3 x 4."""
    found = []
    for number, (high, wide) in zip(numbers, ((8, 8), (5, 6), (3, 4)), strict=True):
        grid = torch.cartesian_prod(torch.arange(float(high)), torch.arange(float(wide)))
        rows = torch.cat([torch.full((len(grid), 1), float(number)), grid], dim=1)
        found.append(torch.nn.functional.pad(rows, (0, 1)) if of_four else rows)
    return torch.cat(found)


def with_references(name: str, batch: int = 2, t: float = 0.5) -> dict[str, Any]:
    """Arguments of a forward with two references of other sizes than the target."""
    given = families.arguments(name, batch, t)
    width = given["hidden_states"].shape[-1]
    rows = normal(batch, TARGETS + REFERENCES, width, seed=7)
    if name.startswith("qwen"):
        shapes = [(1, 8, 8), (1, 5, 6), (1, 3, 4)]
        return {**given, "hidden_states": rows, "img_shapes": [shapes] * batch}
    if "joint_attention_kwargs" in given:
        mask = given["joint_attention_kwargs"]["attention_mask"]
        longer = torch.nn.functional.pad(mask, (0, REFERENCES))
        given["joint_attention_kwargs"] = {"attention_mask": longer}
    numbers = (0, 10, 20) if name.startswith("flux2") else (1, 2, 3)
    return {**given, "hidden_states": rows, "img_ids": ids(numbers, name.startswith("flux2"))}


def adapter_for(model: Any, **options: Any) -> ShivaAdapter:
    """An adapter that reads roles, its vectors random."""
    options = {"reference_keep_ratio": KEEP, **options}
    return tiny.adapter(model, tiny.from_counts(COUNTS), **options)


class Seen(list[dict[int, Tensor]]):
    """The tokens of every forward by block, as they are chosen."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[tuple[int, ...]] = []
        """Of every forward, k of the target's tokens by block, as they are asked for."""


def kept(model: Any) -> Seen:
    """What a model's forwards choose from now on."""
    seen = Seen()
    attachment = attachment_of(model)
    assert attachment is not None
    row = attachment.counts.row

    def noted(num_tokens: int, timestep: Tensor) -> tuple[int, ...]:
        assert num_tokens == TARGETS
        seen.rows.append(row(num_tokens, timestep))
        return seen.rows[-1]

    attachment.counts.row = noted  # type: ignore[method-assign]
    model.register_forward_pre_hook(lambda *args: seen.append({}))
    attachment.forwards.observer = lambda block, chosen: seen[-1].__setitem__(block, chosen)
    return seen


def check(model: Any, seen: Seen, references: int, first: bool = False) -> None:
    """In every forward and block exactly as many of each role as are asked for."""
    attachment = attachment_of(model)
    assert attachment is not None
    asked = attachment.counts.reference_row(references)
    prunable = attachment.schedule.prunable_blocks
    assert sum(asked[b] for b in prunable) == round(KEEP * references * len(prunable))
    assert len(seen) == len(seen.rows) > 0
    for forward, row in zip(seen, seen.rows, strict=True):
        for block in prunable:
            chosen = forward[block]
            assert bool((chosen[:, 1:] > chosen[:, :-1]).all())  # no token twice
            is_reference = chosen < references if first else chosen >= TARGETS
            assert is_reference.sum(1).tolist() == [asked[block]] * len(chosen)
            assert chosen.shape[1] == row[block] + asked[block]


# --- groups -------------------------------------------------------------------------------------


def test_groups_choose_within_themselves_and_keep_their_order() -> None:
    spans = [Span(REFERENCE, 3), Span(TARGET, 4)]
    scores = torch.tensor([[9.0, 7.0, 8.0, 1.0, 4.0, 2.0, 3.0]])
    assert best_by_group(scores, grouped(spans, [2, 1])).tolist() == [[0, 2, 4]]
    assert best_by_group(scores, grouped(spans, [0, 4])).tolist() == [[4, 6, 5, 3]]
    assert (num_of(spans, TARGET), num_of(spans, REFERENCE)) == (4, 3)
    with pytest.raises(ValueError, match=r"\[0, 3\], got 4"):
        grouped(spans, [4, 1])


# --- the mechanism on models --------------------------------------------------------------------

NAMES = ("flux", "flux2-klein", "qwen-image-edit", "longcat", "bria-fibo")


@pytest.mark.parametrize("name", NAMES)
def test_each_role_has_its_own_k_in_every_block(name: str) -> None:
    model, given = families.made(name), with_references(name)
    full = len(model_spec(model).blocks(model)) - 4
    made = ShivaAdapter(
        ShivaConfig.for_model(model, hidden=8, reference_keep_ratio=KEEP),
        tiny.from_counts([row + [64] * full for row in COUNTS]),
    )
    tiny.randomize(made.router, seed=1, std=1.0)
    shiva_dit.apply(model, made)
    seen = kept(model)
    families.run(model, given)
    check(model, seen, REFERENCES)


@pytest.mark.parametrize("name", ["flux", "wan"])  # of pictures, of clean frames
def test_forwards_without_references_are_as_without_the_setting(name: str) -> None:
    model, given = families.made(name), families.arguments(name)
    made = adapter_for(model)
    plain = tiny.adapter(model, tiny.from_counts(COUNTS))
    plain.router.load_state_dict(made.router.state_dict(), strict=False)
    shiva_dit.apply(model, plain)
    wanted = families.run(model, given)
    shiva_dit.apply(model, made)
    assert torch.equal(families.run(model, given), wanted)


def test_ratios_of_one_are_the_model_itself_and_the_role_moves_its_tokens_alone() -> None:
    model, given = families.made("flux"), with_references("flux")
    wanted = families.run(model, given)
    shiva_dit.apply(model, adapter_for(model), keep_ratio=1.0, reference_keep_ratio=1.0)
    assert torch.equal(families.run(model, given), wanted)

    made = adapter_for(model)
    shiva_dit.apply(model, made)
    seen = kept(model)
    families.run(model, given)
    with torch.no_grad():
        for group in made.router.groups:
            group.roles.add_(torch.randn(group.roles.shape, generator=tiny_generator()))
    shiva_dit.apply(model, made)
    again = kept(model)
    families.run(model, given)
    before, after = seen[0][1], again[0][1]
    assert torch.equal(before[before < TARGETS], after[after < TARGETS])
    assert not torch.equal(before, after)


def tiny_generator() -> torch.Generator:
    return torch.Generator().manual_seed(3)


def test_any_selector_keeps_its_share_of_each_role() -> None:
    model, given = families.made("flux2-klein"), with_references("flux2-klein")
    attach(model, NormSelector(), tiny.from_counts(COUNTS), reference_keep_ratio=KEEP)
    seen = kept(model)
    families.run(model, given)
    check(model, seen, REFERENCES)


def test_layers_are_targets_and_what_they_are_made_of_is_the_reference() -> None:
    model = families.made("qwen-image-edit")
    model.register_to_config(use_layer3d_rope=True)
    attach(model, NormSelector(), Schedule.uniform(0.5, num_blocks=4), reference_keep_ratio=KEEP)
    attachment = attachment_of(model)
    assert attachment is not None
    shapes = {"img_shapes": [[(1, 2, 2), (1, 2, 2), (1, 3, 3)]] * 2}
    assert attachment.counts.references is not None
    assert attachment.counts.references.spans(shapes) == (Span(TARGET, 8), Span(REFERENCE, 9))


# --- pipelines ----------------------------------------------------------------------------------


def kontext(pipe: Any) -> dict[str, Any]:
    places = ids((0, 1, 1), of_four=False)
    rows = normal(2, TARGETS, 4, seed=8), normal(2, REFERENCES, 4, seed=9)
    pipe.prepare_latents = lambda *args: (*rows, places[:TARGETS], places[TARGETS:])
    return {}


def klein(pipe: Any) -> dict[str, Any]:
    places = ids((0, 10, 20), of_four=True).expand(2, -1, -1)
    pipe.prepare_image_latents = lambda **given: (
        normal(2, REFERENCES, 4, seed=9),
        places[:, TARGETS:],
    )
    return {"image": [Image.new("RGB", (128, 128))] * 2}


@pytest.mark.parametrize(
    ("name", "prepare", "reads"),
    [("FluxKontextPipeline", kontext, 0), ("Flux2KleinPipeline", klein, 0)],
)
def test_pipelines_say_what_is_a_reference_without_a_look_at_the_device(
    name: str, prepare: Any, reads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe = running.build(name)
    options = prepare(pipe)
    shiva_dit.apply(pipe, adapter_for(pipe.transformer))
    seen = kept(pipe.transformer)
    looked: list[Any] = []
    monkeypatch.setattr("shiva_dit.models.references._by_ids", looked.append)
    running.call(name, pipe, **options)
    check(pipe.transformer, seen, REFERENCES)
    assert len(looked) == reads
    summary = shiva_dit.summary(pipe)
    assert (summary.num_tokens, summary.num_references) == (TARGETS + REFERENCES, REFERENCES)


def test_qwen_edit_plus_with_two_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    where = "diffusers.pipelines.qwenimage.pipeline_qwenimage_edit_plus."
    for size in ("VAE_IMAGE_SIZE", "CONDITION_IMAGE_SIZE"):
        monkeypatch.setattr(f"{where}{size}", 128 * 128)
    pipe = running.build("QwenImageEditPlusPipeline")
    sizes = 8 * 8, 12 * 6  # of the two pictures, by their aspect ratios
    pipe.prepare_latents = lambda *args: (normal(1, TARGETS, 8), normal(1, sum(sizes), 8, seed=9))
    shiva_dit.apply(pipe, adapter_for(pipe.transformer))
    seen = kept(pipe.transformer)
    given = {
        "prompt_embeds": normal(1, 7, 24, seed=1),
        "prompt_embeds_mask": torch.ones(1, 7, dtype=torch.long),
        "negative_prompt_embeds": normal(1, 7, 24, seed=3),
        "negative_prompt_embeds_mask": torch.ones(1, 7, dtype=torch.long),
    }
    pictures = [Image.new("RGB", (64, 64)), Image.new("RGB", (128, 64))]
    pipe(
        image=pictures,
        height=128,
        width=128,
        num_inference_steps=2,
        true_cfg_scale=4.0,
        output_type="latent",
        **given,
    )
    check(pipe.transformer, seen, sum(sizes))
    assert len(seen) == 4  # two passes in turn at each step
    for first, second in (seen[:2], seen[2:]):
        assert all(torch.equal(first[block], second[block]) for block in first)


# --- keys of references that are kept over steps -------------------------------------------------


def klein_kv() -> tuple[Any, list[Any]]:
    """The pipeline and, of each of its runs, the cache that its first step left."""
    pipe = Flux2KleinKVPipeline(
        transformer=families.made("flux2-klein"),
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=running._bn_of_flux2(),
        text_encoder=None,
        tokenizer=None,
    )
    pipe.set_progress_bar_config(disable=True)
    klein(pipe)
    sizes: list[Any] = []

    def note(module: Any, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        if kwargs.get("kv_cache_mode") == "extract":
            caches = output[1].double_block_caches, output[1].single_block_caches
            sizes.append([cache.k_ref.shape[1] for held in caches for cache in held])

    pipe.transformer.register_forward_hook(note, with_kwargs=True)
    return pipe, sizes


def run_kv(pipe: Any) -> Tensor:
    return pipe(
        prompt_embeds=normal(2, 7, 24, seed=1),
        image=[Image.new("RGB", (128, 128))] * 2,
        height=128,
        width=128,
        num_inference_steps=3,
        output_type="latent",
        generator=torch.Generator().manual_seed(0),
    ).images


def test_kept_keys_of_references_are_those_of_their_budget() -> None:
    pipe, sizes = klein_kv()
    wanted = run_kv(pipe)
    shiva_dit.apply(pipe, adapter_for(pipe.transformer), keep_ratio=1.0, reference_keep_ratio=1.0)
    assert torch.equal(run_kv(pipe), wanted)

    shiva_dit.apply(pipe, adapter_for(pipe.transformer))
    seen = kept(pipe.transformer)
    found = run_kv(pipe)
    assert bool(found.isfinite().all())
    assert not torch.equal(found, wanted)
    attachment = attachment_of(pipe.transformer)
    assert attachment is not None
    assert sizes[-1] == list(attachment.counts.reference_row(REFERENCES))
    assert sizes[-1][0] == REFERENCES
    for forward, row in zip(seen[1:], seen.rows[1:], strict=True):  # the target alone is left
        assert [forward[block].shape[1] for block in (1, 2, 3)] == list(row[1:])
    del seen[1:], seen.rows[1:]
    check(pipe.transformer, seen, REFERENCES, first=True)


def test_kept_keys_are_refused_where_all_tokens_share_one_budget() -> None:
    pipe, _ = klein_kv()
    shiva_dit.apply(pipe, tiny.adapter(pipe.transformer, tiny.from_counts(COUNTS)))
    with pytest.raises(ValueError, match=r"kv_cache_mode.*reference_keep_ratio"):
        run_kv(pipe)


# --- bad input ----------------------------------------------------------------------------------


def test_what_has_no_references_refuses_their_budget() -> None:
    model = tiny.sd3()
    with pytest.raises(ValueError, match="SD3Transformer2DModel are the target's alone"):
        ShivaConfig.for_model(model, reference_keep_ratio=0.5)
    with pytest.raises(ValueError, match="leave reference_keep_ratio out"):
        shiva_dit.apply(model, tiny.adapter(model), reference_keep_ratio=0.5)
    assert attachment_of(model) is None


@pytest.mark.parametrize("ratio", [0.0, -0.5, 1.5, float("nan")])
def test_shares_that_cannot_be_kept_are_refused(ratio: float) -> None:
    model = families.made("flux")
    with pytest.raises(ValueError, match="reference_keep_ratio"):
        shiva_dit.apply(model, tiny.adapter(model), reference_keep_ratio=ratio)
    with pytest.raises(ValueError, match="reference_keep_ratio"):
        ShivaConfig.for_model(model, reference_keep_ratio=ratio)
    assert attachment_of(model) is None


def test_references_of_other_sizes_within_a_batch_and_out_of_order_are_refused() -> None:
    model, given = families.made("qwen-image-edit"), with_references("qwen-image-edit")
    shiva_dit.apply(model, adapter_for(model))
    given["img_shapes"] = [given["img_shapes"][0], [(1, 8, 8), (1, 6, 5), (1, 3, 4)]]
    with pytest.raises(ValueError, match="references of the same sizes"):
        families.run(model, given)
    model, given = families.made("flux"), with_references("flux")
    shiva_dit.apply(model, adapter_for(model))
    with pytest.raises(ValueError, match="must follow the target's"):
        families.run(model, {**given, "img_ids": given["img_ids"].roll(4, 0)})


# --- the adapter --------------------------------------------------------------------------------


def test_roles_are_saved_and_read_again(tmp_path: Any, caplog: pytest.LogCaptureFixture) -> None:
    model, given = families.made("flux"), with_references("flux")
    made = adapter_for(model)
    made.save_pretrained(tmp_path)
    again = ShivaAdapter.from_pretrained(tmp_path)
    assert again.config.reference_keep_ratio == KEEP
    shiva_dit.apply(model, made)
    wanted = families.run(model, given)
    with caplog.at_level(logging.INFO, "shiva_dit"):
        shiva_dit.apply(model, again)
    assert torch.equal(families.run(model, given), wanted)
    assert "references' tokens 50% are kept" in (tmp_path / "README.md").read_text()
    names = set(made.state_dict()) - set(tiny.adapter(model).state_dict())
    assert names == {f"router.groups.{i}.roles" for i in range(2)}


# --- training -----------------------------------------------------------------------------------

TRAINED = ("flux", "flux2-klein", "qwen-image-edit")


class Edits:
    """Two samples with two references each."""

    def __init__(self, name: str) -> None:
        given = with_references(name)
        rows = given.pop("hidden_states")
        self.latents, references = rows[:, :TARGETS], rows[:, TARGETS:]
        del given["timestep"]
        self.shared = {n: given.pop(n) for n in ("img_ids", "txt_ids", "img_shapes") if n in given}
        self.conditioning = {**given, REFERENCES_OF_BATCH: references}

    def __len__(self) -> int:
        return 2

    def batch(self, indices: Tensor, generator: torch.Generator) -> Batch:
        del generator
        conditioning = {name: value[indices] for name, value in self.conditioning.items()}
        return Batch(latents=self.latents[indices], conditioning=conditioning, shared=self.shared)

    def unconditional(self) -> dict[str, Tensor]:
        named = self.conditioning.items()
        return {name: value[0] for name, value in named if name != REFERENCES_OF_BATCH}


def trainer(name: str, folder: Any, **changes: Any) -> Trainer:
    config = {
        "out": folder,
        "keep_ratio": 0.5,
        "reference_keep_ratio": KEEP,
        "backbone": "lora",
        "warmup_steps": 1,
        "policy_steps": 0,
        "joint_steps": 2,
        "batch_size": 2,
        "micro_batches": 1,
        "router": RouterConfig(hidden=8),
        "optimizer": OptimizerConfig(router=1e-2, backbone=1e-3, warmup_steps=1),
    }
    return Trainer(TrainConfig(**{**config, **changes}), families.made(name), Edits(name))


@pytest.mark.parametrize("name", TRAINED)
def test_a_short_training_moves_the_router_by_role(name: str, tmp_path: Any) -> None:
    run = trainer(name, tmp_path)
    student = run.student
    assert (student.num_tokens, student.num_references) == (TARGETS, REFERENCES)
    chosen: list[tuple[int, Tensor]] = []
    student.attachment.forwards.observer = lambda block, tokens: chosen.append((block, tokens))
    shapes: list[Any] = []
    predicted = student.path.prediction

    def noted(output: Any, num_tokens: int) -> Tensor:
        found = predicted(output, num_tokens)
        shapes.append(found.shape)
        return found

    student.path.prediction = noted  # type: ignore[method-assign]
    losses = [run.train_step()["loss"] for _ in range(3)]
    assert all(torch.isfinite(torch.tensor(losses)))
    asked = student.attachment.counts.reference_row(REFERENCES)
    for block, tokens in chosen:
        assert (tokens >= TARGETS).sum(1).tolist() == [asked[block]] * 2
    assert {block for block, _ in chosen} == {1, 2, 3}
    assert {shape[1] for shape in shapes} == {TARGETS}
    for group in student.adapter.router.groups:
        assert bool((group.roles != 0).all())
    run.close()


def test_both_roles_teach_the_router_and_the_gates_are_those_of_each(tmp_path: Any) -> None:
    config = EstimatorConfig()
    scores = normal(2, 14, seed=4).requires_grad_()
    groups = grouped([Span(TARGET, 8), Span(REFERENCE, 6)], [3, 2])
    usual = {"config": config, "tau_rank": 0.2, "tau_select": 0.1}
    both = GroupGates.of(SelectionGates(**usual, soft_k=3.4), groups, [3.4, 2.0])
    assert torch.equal(both.choose(scores, 5), best_by_group(scores, groups))
    both.learn(scores)
    for part, k, soft_k in ((slice(0, 8), 3, 3.4), (slice(8, 14), 2, 2.0)):
        alone = SelectionGates(**usual, soft_k=soft_k)
        alone.choose(scores[:, part], k)
        alone.learn(scores[:, part])
        assert torch.equal(alone.inclusion, both.inclusion[:, part])
    with pytest.raises(ValueError, match="noise_std > 0 needs a generator"):
        GroupGates.of(
            SelectionGates(**usual, soft_k=3.0, noise_std=0.1), groups, [3.0, 2.0]
        ).choose(scores, 5)


def test_a_recomputed_score_gives_each_role_its_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the recomputation and by plain backward."""
    model, given = families.made("flux"), with_references("flux")
    made = adapter_for(model)
    attachment = attach(model, made.selector(), tiny.from_counts(COUNTS), reference_keep_ratio=KEEP)
    plainly: list[Any] = []

    def gate(block: int) -> SelectionGates:
        del block
        config = EstimatorConfig(rejected="ridge")
        return SelectionGates(config=config, tau_rank=0.2, tau_select=0.1, soft_k=20.0)

    def plain(gates: Any, score: Any, terms: Any, scores: Any, x: Tensor, before: Any) -> Tensor:
        plainly.append(gates)
        parts = list(zip(gates.groups, terms, strict=True))
        return torch.cat([score(group.of(x.detach()), own) for group, own in parts], dim=1)

    def gradients() -> list[Tensor]:
        made.zero_grad()
        with attachment.forwards.gated(GatedForward(counts=COUNTS[0], gates=gate)):
            model(**given).sample[:, :TARGETS].square().mean().backward()
        return [group.roles.grad.clone() for group in made.router.groups]

    recomputed = gradients()
    monkeypatch.setattr(GroupGates, "scored", plain)
    wanted = gradients()
    assert len(plainly) == 3
    for found, truth in zip(recomputed, wanted, strict=True):
        assert bool((truth != 0).all())
        # Sums over tokens in another order: rounding, some 1e-7 of the norm.
        assert (found - truth).norm() < 1e-5 * truth.norm()


def test_data_with_references_need_a_budget_for_them(tmp_path: Any) -> None:
    with pytest.raises(ValueError, match="set reference_keep_ratio"):
        trainer("flux", tmp_path, reference_keep_ratio=None)
    with pytest.raises(ValueError, match=r'method = "shiva", not "random"'):
        trainer("flux", tmp_path, method="random", backbone="frozen")
    rows = {REFERENCES_OF_BATCH: normal(1, 4, 4)}
    with pytest.raises(ValueError, match="reads no pictures to go by"):
        model_spec(tiny.sd3()).arguments_of(normal(1, 4, 16, 16), rows)


def test_what_was_trained_is_told_and_runs_again(tmp_path: Any) -> None:
    watch = WatchConfig(every=3, held_out=1, held_out_share=0.57, times=2, prompts=0)
    run = trainer("flux", tmp_path, watch=watch, batch_size=1)
    trained = run.run()
    run.close()
    assert trained.adapter is not None
    trained.adapter.save_pretrained(tmp_path / "adapter")
    model, given = families.made("flux"), with_references("flux")
    shiva_dit.apply(model, tmp_path / "adapter")
    families.run(model, given)
    summary = shiva_dit.summary(model, text_tokens=7)
    assert summary.num_references == REFERENCES
    assert summary.reference_keep_ratio == KEEP
    assert "50.0% of the references'" in str(summary)
    smaller = shiva_dit.summary(model, num_tokens=TARGETS + 12, text_tokens=7, num_references=12)
    assert smaller.references == tuple(12 if b == 0 else 6 for b in range(4))
    assert smaller.flops_pruned < summary.flops_pruned
