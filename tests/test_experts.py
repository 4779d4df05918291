"""An adapter for two transformers of one pipeline (Wan 2.2): its folder, `apply`, its training."""

from __future__ import annotations

import json
import logging
import math
import re
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusers import UniPCMultistepScheduler

import shiva_dit
from shiva_dit.adapter import ShivaAdapter
from shiva_dit.adapter.storage import files_of
from shiva_dit.cli import main
from shiva_dit.config import from_dict
from shiva_dit.models.attach import attachment_of
from shiva_dit.models.families import model_spec
from shiva_dit.models.sampling import Sampler
from shiva_dit.pictures.publish import publish
from shiva_dit.pictures.putting import adapter_digest
from shiva_dit.saved_folder import (
    BACKBONE_FILE,
    CARD_FILE,
    CONFIG_FILE,
    LORA_FILE,
    WEIGHTS_FILE,
    part_file,
)
from shiva_dit.training.recipe import TrainConfig
from shiva_dit.training.settings import PolicyConfig, TrajectoryConfig
from shiva_dit.training.trainer import Trainer
from tests import families, running, tiny
from tests.test_adapter import KINDS_OF_BACKBONE, make, same
from tests.test_training_families import FamilyData

HIGH, LOW = [[64, 32, 30, 17], [64, 33, 16, 48]], [[64, 8, 8, 8]]


def pipeline(name: str = "WanPipeline", boundary_ratio: float | None = 0.6) -> Any:
    """Wan 2.2: one transformer for the noisy steps, another for the others."""
    pipe = running.build(name)
    second = families.made("wan")
    tiny.randomize(second, seed=11)
    pipe.register_modules(
        scheduler=UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
        ),
        transformer_2=second,
    )
    pipe.register_to_config(boundary_ratio=boundary_ratio)
    return pipe


def videos(pipe: Any, **options: Any) -> Any:
    return running.call(type(pipe).__name__, pipe, **{"num_inference_steps": 4, **options}).frames


def trained(model: Any, counts: list[list[int]], expert: str | None = None, **more: Any) -> Any:
    made = tiny.adapter(model, families.schedule(model, counts))
    if expert is not None:
        made.training_record = {"expert": {"name": expert, **more}}
    return made


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    """Ours: transformers has some of its own when it is first imported."""
    own = [r for r in caplog.records if r.name == "shiva_dit" and r.levelno >= logging.WARNING]
    return [record.getMessage() for record in own]


def of_both(pipe: Any, **options: Any) -> ShivaAdapter:
    parts = trained(pipe.transformer, HIGH), trained(pipe.transformer_2, LOW)
    return ShivaAdapter.of_experts(*parts, **options)


# --- one folder -----------------------------------------------------------------------------------


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def two(first: str = "frozen", second: str = "frozen", **options: Any) -> ShivaAdapter:
    high, low = make(first), make(second)
    tiny.randomize(low.router, seed=9)
    return ShivaAdapter.of_experts(high, low, **options)


@pytest.mark.parametrize(
    ("first", "second"),
    zip(KINDS_OF_BACKBONE, (*KINDS_OF_BACKBONE[1:], KINDS_OF_BACKBONE[0]), strict=True),
)
def test_both_are_one_folder_and_come_back(first: str, second: str, tmp_path: Path) -> None:
    made = two(first, second, boundary_ratio=0.875)
    made.save_pretrained(tmp_path)
    tuned = {"frozen": None, "full": BACKBONE_FILE}
    names = [WEIGHTS_FILE, tuned.get(first, LORA_FILE)]
    names += [part_file(n, "low") for n in (WEIGHTS_FILE, tuned.get(second, LORA_FILE)) if n]
    assert set(bytes_of(tmp_path)) == {CONFIG_FILE, CARD_FILE, *filter(None, names)}
    assert set(files_of(made)) == {*filter(None, names)}

    loaded = ShivaAdapter.from_pretrained(tmp_path)
    for name in ("high", "low"):
        assert same(loaded.part(name), made.part(name))
        assert not loaded.part(name).training
    assert not same(made.part("high"), made.part("low"))
    assert loaded.parts is not None
    assert loaded.parts.grouping.boundary_ratio == 0.875
    loaded.save_pretrained(tmp_path / "again")
    shared = bytes_of(tmp_path / "again")
    assert {n: b for n, b in bytes_of(tmp_path).items() if n in shared} == shared  # to the byte


def test_a_part_is_an_adapter_by_itself(tmp_path: Path) -> None:
    high, low = make("lora"), make("full")
    both = ShivaAdapter.of_experts(high, low)
    for name, one in (("high", high), ("low", low)):
        both.part(name).save_pretrained(tmp_path / name)
        one.save_pretrained(tmp_path / f"{name}-alone")
        assert bytes_of(tmp_path / name) == bytes_of(tmp_path / f"{name}-alone")
    assert high.parts is None  # of_experts leaves what it was given as it was
    shared, own = (one.router.layer_embedding.weight for one in (both, high))
    assert shared.data_ptr() == own.data_ptr()
    with pytest.raises(ValueError, match="no part 'middle'; its parts: high, low"):
        both.part("middle")
    with pytest.raises(ValueError, match="no part 'low'; its parts: none"):
        high.part("low")


def test_folders_become_one(tmp_path: Path) -> None:
    made = two()
    for name in ("high", "low"):
        made.part(name).save_pretrained(tmp_path / name)
    both = ShivaAdapter.of_experts(str(tmp_path / "high"), tmp_path / "low")
    assert adapter_digest(both) == adapter_digest(made)
    assert adapter_digest(made) != adapter_digest(made.part("high"))
    swapped = ShivaAdapter.of_experts(made.part("low"), made.part("high"))
    assert adapter_digest(made) != adapter_digest(swapped)


def test_saving_over_each_other_leaves_nothing_of_the_other(tmp_path: Path) -> None:
    kinds = {"single": make("lora"), "two": two("dora", "full"), "other": two("full", "lora")}
    for name, made in kinds.items():
        made.save_pretrained(tmp_path / name)
    (tmp_path / "one").mkdir()
    (tmp_path / "one" / "notes.txt").write_text("mine")
    for name in ("two", "single", "other", "two", "single"):
        kinds[name].save_pretrained(tmp_path / "one")
        assert bytes_of(tmp_path / "one") == {**bytes_of(tmp_path / name), "notes.txt": b"mine"}


def test_an_adapter_alone_is_written_as_before(tmp_path: Path) -> None:
    """Older versions read it; of two they say that they can't."""
    make().save_pretrained(tmp_path / "alone")
    two().save_pretrained(tmp_path / "two")
    alone, both = (json.loads((tmp_path / n / CONFIG_FILE).read_text()) for n in ("alone", "two"))
    assert alone["format_version"] == 1
    assert set(alone) == set(both) - {"parts"}
    assert both["format_version"] == 2


def test_the_card_tells_both(tmp_path: Path) -> None:
    two(boundary_ratio=0.875).save_pretrained(tmp_path)
    card = (tmp_path / CARD_FILE).read_text(encoding="utf-8")
    assert "`boundary_ratio = 0.875`" in card
    assert re.findall(r"^- (\w+): ", card, flags=re.M) == ["high", "low"]


@pytest.mark.parametrize("damage", ["altered", "missing", "swapped"])
def test_a_damaged_part_is_refused(damage: str, tmp_path: Path) -> None:
    two().save_pretrained(tmp_path)
    path = tmp_path / part_file(WEIGHTS_FILE, "low")
    if damage == "missing":
        path.unlink()
    else:
        other = (tmp_path / WEIGHTS_FILE).read_bytes()
        path.write_bytes(other if damage == "swapped" else path.read_bytes()[:-1] + b"x")
    said = "is missing" if damage == "missing" else "SHA-256 differs"
    with pytest.raises(ValueError, match=rf"{path.name} .*{said}"):
        ShivaAdapter.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"others": {}}, r"parts: 2 to 16 parts of different names, got high"),
        ({"others": None}, r"'others' is missing"),
        ({"others": {"../../low": {}}}, r"'../../low' is no name of a part"),
        ({"others": {"middle": {}}}, r"experts are high and low, got high, middle"),
        ({"others": {"low": {}}}, r"parts\.others\.low is damaged: 'config' is missing"),
        ({"first": "low"}, r"different names, got low, low"),
        ({"kind": "twins"}, r"kind: expected one of 'experts'"),
        ({"boundary_ratio": 1.5}, r"boundary_ratio must lie in \(0, 1\), got 1.5"),
        ({"more": 1}, r"unknown key 'more'"),
    ],
)
def test_a_config_whose_parts_are_wrong_is_refused(
    changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    two().save_pretrained(tmp_path)
    parts = json.loads((tmp_path / CONFIG_FILE).read_text())["parts"]
    tiny.edit_config(tmp_path, parts={**parts, **changes})
    with pytest.raises(ValueError, match=rf"config\.json\.{message}|config\.json.*{message}"):
        ShivaAdapter.from_pretrained(tmp_path)


@pytest.mark.parametrize("parts", [None, [], 3])
def test_a_version_with_parts_has_some(parts: Any, tmp_path: Path) -> None:
    two().save_pretrained(tmp_path)
    tiny.edit_config(tmp_path, parts=parts)
    with pytest.raises(ValueError, match="damaged: 'parts' is missing"):
        ShivaAdapter.from_pretrained(tmp_path)


def test_what_cannot_be_two_experts_is_refused() -> None:
    one, wan = make(), families.made("wan")
    of = ShivaAdapter.of_experts
    with pytest.raises(ValueError, match=r"of one class, got SD3Tr.* and WanTr"):
        of(one, tiny.adapter(wan))
    with pytest.raises(ValueError, match="low has parts itself"):
        of(one, two())
    for wrong in (0.0, 1.0, float("nan")):
        with pytest.raises(ValueError, match="boundary_ratio"):
            of(one, make(), boundary_ratio=wrong)
    high, low = (trained(wan, HIGH, name, boundary_ratio=0.9) for name in ("high", "low"))
    assert of(high, low).parts.grouping.boundary_ratio == 0.9  # type: ignore[union-attr]
    with pytest.raises(ValueError, match="the adapter given for 'high' was trained for 'low'"):
        of(low, high)
    with pytest.raises(ValueError, match=r"meet at one boundary_ratio \(high: 0.9, low: 0.8\)"):
        of(high, trained(wan, LOW, "low", boundary_ratio=0.8))
    with pytest.raises(ValueError, match=r"\(boundary_ratio=: 0.5, high: 0.9, low: 0.9\)"):
        of(high, low, boundary_ratio=0.5)


@pytest.mark.parametrize("backbone", ["lora", "dora"])
def test_diffusers_loads_the_lora_of_both_from_the_folder(backbone: str, tmp_path: Path) -> None:
    """By the file's own name, and of the first also without one."""
    two(backbone, backbone).save_pretrained(tmp_path)
    for options in ({}, {"weight_name": part_file(LORA_FILE, "low")}):
        pipe = tiny.pipeline(tiny.sd3())
        bare = tiny.run(pipe.transformer, tiny.inputs())
        pipe.load_lora_weights(str(tmp_path), **options)
        assert not torch.equal(tiny.run(pipe.transformer, tiny.inputs()), bare)


# --- on a pipeline --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["WanPipeline", "WanImageToVideoPipeline"])
def test_one_adapter_serves_both(name: str, tmp_path: Path) -> None:
    pipe = pipeline(name)
    models = pipe.transformer, pipe.transformer_2
    bare = videos(pipe)
    before = [tiny.footprint(model) for model in models]
    both = of_both(pipe, boundary_ratio=0.6)
    both.save_pretrained(tmp_path)
    shiva_dit.apply(pipe, str(tmp_path))
    seen: list[list[int]] = [[], []]
    for model, counts in zip(models, seen, strict=True):
        attachment = attachment_of(model)
        assert attachment is not None
        attachment.forwards.observer = lambda block, chosen, to=counts: to.append(chosen.shape[1])
    pruned = videos(pipe)
    assert set(seen[1]) == {8}
    assert seen[0]
    assert not torch.equal(pruned, bare)
    for model in models:
        attachment_of(model).forwards.observer = None  # type: ignore[union-attr]
    summary = shiva_dit.summary(pipe, num_inference_steps=4)
    assert summary.transformer_2 is not None
    assert summary.transformer_2.keep_ratio == 8 / 64
    first, second = summary, summary.transformer_2
    steps = first.num_steps or 0, second.num_steps or 0
    assert min(steps) > 0
    assert sum(steps) == 4
    shares = first.flops_saved * steps[0] + second.flops_saved * steps[1]  # equal when unpruned
    assert summary.saved_by_both == pytest.approx(shares / 4, abs=1e-12)
    assert "both together: " in str(summary)
    assert shiva_dit.summary(pipe).saved_by_both is None
    with shiva_dit.disabled(pipe):
        assert torch.equal(videos(pipe), bare)
    shiva_dit.apply(pipe, both.part("high"), transformer_2=both.part("low"))  # the same, by hand
    assert torch.equal(videos(pipe), pruned)
    shiva_dit.remove(pipe)
    assert torch.equal(videos(pipe), bare)
    assert [tiny.footprint(model) for model in models] == before


def test_both_or_none(caplog: pytest.LogCaptureFixture) -> None:
    pipe = pipeline()
    both = of_both(pipe)
    flux = trained(families.made("flux"), HIGH)
    wrong = ShivaAdapter.of_experts(flux, flux)
    low = trained(pipe.transformer, LOW, "low")
    refused: list[tuple[Any, dict[str, Any], str]] = [
        (both, {"transformer_2": both}, "one for both transformers: leave transformer_2 out"),
        (low, {"transformer_2": both}, "one for both transformers: leave transformer_2 out"),
        (both, {"timesteps": [1000.0, 500.0]}, "timesteps name the calls of one model"),
        (wrong, {}, "the adapter is for FluxTransformer2DModel"),
        (low, {}, r"for the first .* was trained for 'low', which is the second"),
    ]
    for adapter, options, message in refused:
        with pytest.raises(ValueError, match=message):
            shiva_dit.apply(pipe, adapter, **options)
    with pytest.raises(ValueError, match=r"WanTransformer3DModel has one: pass the pipeline"):
        shiva_dit.apply(pipe.transformer, both)
    pipe.register_to_config(boundary_ratio=None)
    with pytest.raises(ValueError, match=r"WanPipeline has no boundary_ratio, so its second"):
        shiva_dit.apply(pipe, both)
    for model in (pipe.transformer, pipe.transformer_2):
        assert attachment_of(model) is None
    shiva_dit.apply(pipe.transformer_2, both.part("low"))
    assert attachment_of(pipe.transformer) is None
    assert warnings(caplog) == []


def test_another_boundary_than_in_training_is_said(caplog: pytest.LogCaptureFixture) -> None:
    pipe = pipeline()
    shiva_dit.apply(pipe, of_both(pipe, boundary_ratio=0.6))
    assert warnings(caplog) == []
    shiva_dit.apply(pipe, of_both(pipe, boundary_ratio=0.875))
    said = warnings(caplog)
    assert len(said) == 1
    assert "trained for boundary_ratio = 0.875, the pipeline has 0.6" in said[0]


# --- training -------------------------------------------------------------------------------------


def trainer(expert: Any, out: Path, pipe: Any, model: Any = None, **changes: Any) -> Trainer:
    own = {"high": pipe.transformer, "low": pipe.transformer_2}[expert or "high"]
    config = TrainConfig(
        **{
            "out": out,
            "expert": expert,
            "keep_ratio": 0.5,
            "backbone": "frozen",
            "warmup_steps": 1,
            "policy_steps": 1,
            "joint_steps": 1,
            "batch_size": 4,
            "micro_batches": 2,
            "policy": PolicyConfig(adaptive=True, num_bins=8),
            **changes,
        }
    )
    model = own if model is None else model
    return Trainer(config, own, FamilyData("wan", model_spec(own)), Sampler.of(pipe, model))


FIXED = PolicyConfig(adaptive=False, num_bins=64)


@pytest.mark.parametrize(
    ("expert", "low", "high", "changes"),
    [
        ("high", 0.6, 1.0, {}),
        ("low", 0.0, 0.6, {"shared_bin": True, "rejected": "low_rank", "rejected_rank": 2}),
        ("high", 0.6, 1.0, {"shared_bin": True}),
        ("low", 0.0, 0.6, {"time_sampling": "logit_normal", "policy": FIXED}),
        ("high", 0.6, 1.0, {"time_sampling": "sampler", "num_steps": 6, "policy": FIXED}),
    ],
)
def test_each_is_trained_on_its_share_of_times(
    expert: str, low: float, high: float, changes: dict[str, Any], tmp_path: Path
) -> None:
    pipe = pipeline()
    model = pipe.transformer if expert == "high" else pipe.transformer_2
    seen: list[float] = []

    def look(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        seen.extend((kwargs["timestep"] / 1000.0).tolist())

    handle = model.register_forward_pre_hook(look, with_kwargs=True)
    made = trainer(expert, tmp_path, pipe, **changes)
    times = [made.train_step() for _ in range(3)] and seen
    made.close()
    handle.remove()
    assert len(times) >= 12
    assert low - 1e-6 <= min(times) < max(times) <= high + 1e-6
    assert max(times) - min(times) > 0.15  # not one time alone


def test_what_is_trained_is_known_and_joined(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    pipe = pipeline()
    for expert in ("high", "low"):
        made = trainer(expert, tmp_path / expert, pipe)
        adapter = made.result().adapter
        made.close()
        assert adapter is not None
        assert adapter.trained_expert == (expert, 0.6)
        assert ("t >= 0.6" if expert == "high" else "t < 0.6") in adapter.schedule.law.name
        adapter.save_pretrained(tmp_path / expert / "adapter")
    folders = [str(tmp_path / name) for name in ("high", "low")]
    assert main(["join", *folders, "--out", str(tmp_path / "high" / "adapter")]) == 2
    assert "is one of them itself" in capsys.readouterr().err
    assert main(["join", *reversed(folders), "--out", str(tmp_path / "both")]) == 0
    shiva_dit.apply(pipe, tmp_path / "both")
    assert warnings(caplog) == []
    for expert, model in (("high", pipe.transformer), ("low", pipe.transformer_2)):
        attachment = attachment_of(model)
        assert attachment is not None
        assert attachment.adapter.trained_expert == (expert, 0.6)
    published = publish(tmp_path / "both", tmp_path / "hub")
    card = (published / CARD_FILE).read_text(encoding="utf-8")
    assert card.count("### high") == card.count("### low") == 2  # figures and provenance
    assert ShivaAdapter.from_pretrained(published).part("low").trained_expert == ("low", 0.6)
    shiva_dit.remove(pipe)
    begun = trainer("low", tmp_path / "again", pipe, start=tmp_path / "both")
    assert begun.student.started is not None
    begun.close()


def test_a_recipe_and_a_pipeline_fit_together(tmp_path: Path) -> None:
    pipe = pipeline()
    with pytest.raises(ValueError, match=r'has two transformers.*set expert = "high" for its'):
        trainer(None, tmp_path, pipe)
    with pytest.raises(ValueError, match=r"the model is the first of the pipeline's"):
        trainer("low", tmp_path, pipe, model=pipe.transformer)
    pipe.register_to_config(boundary_ratio=None)
    with pytest.raises(ValueError, match=r"is for a pipeline of two transformers and a boundary_"):
        trainer("high", tmp_path, pipe)
    with pytest.raises(ValueError, match=r"an expert makes a part of them: set trajectories.count"):
        TrainConfig(expert="low", trajectories=TrajectoryConfig(count=2))
    with pytest.raises(ValueError, match="expert: expected one of 'high', 'low'"):
        from_dict(TrainConfig, {"expert": "middle"})


def test_steps_of_which_an_expert_gets_none(tmp_path: Path) -> None:
    changes = {"time_sampling": "sampler", "num_steps": 1, "policy": FIXED}
    with pytest.raises(ValueError, match=r"of 1 steps of UniPC.* this transformer gets none"):
        trainer("low", tmp_path, pipeline(), **changes)


def test_the_sampler_of_a_saved_pipeline_is_of_one_or_the_other(tmp_path: Path) -> None:
    pipe = pipeline()
    pipe.scheduler.save_pretrained(tmp_path / "scheduler")
    pipe.save_config(tmp_path)
    bounds = [Sampler.saved(tmp_path, second=second).bounds for second in (False, True)]
    assert bounds == [(0.6, math.inf), (0.0, 0.6)]
    single = running.build("WanPipeline")
    single.scheduler.save_pretrained(tmp_path / "one" / "scheduler")
    single.save_config(tmp_path / "one")
    with pytest.raises(ValueError, match="has no transformer_2"):
        Sampler.saved(tmp_path / "one", second=True)


def test_the_pipelines_of_two_transformers_are_those_of_wan() -> None:
    """What else would be served, or has to be refused, is looked at when this fails."""
    import inspect  # noqa: PLC0415

    found = []
    for name in dir(diffusers):
        kind = getattr(diffusers, name, None)
        is_one = name.endswith("Pipeline") and inspect.isclass(kind)
        if is_one and "transformer_2" in inspect.signature(kind.__init__).parameters:
            found.append(name)
    assert found == [
        "LucyEditPipeline",
        "WanImageToVideoPipeline",
        "WanPipeline",
        "WanVACEPipeline",
    ]
