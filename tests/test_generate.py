"""Pictures of prompts: noise, resuming, sharing out, and what is refused."""

from __future__ import annotations

import copy
import inspect
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    DiffusionPipeline,
    DiTPipeline,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    StableDiffusion3Pipeline,
)
from PIL import Image
from transformers import CLIPTextModel

import shiva_dit
from shiva_dit.cli import main
from shiva_dit.config import from_dict
from shiva_dit.ownership import owned
from shiva_dit.pictures.generate import METADATA, RECORD, Generation, Wanted, arguments, generate
from shiva_dit.pictures.processes import Process
from shiva_dit.pictures.prompts import Prompt, read_prompts
from shiva_dit.pictures.putting import adapter_digest
from tests import seeing, tiny
from tests.ranks import launched
from tests.test_folder import pipeline

__all__ = ["pipeline"]

PROMPTS = [Prompt("star", "a star"), Prompt("disc", "a red disc"), Prompt("box", "boxes")]
PLAIN: dict[str, Any] = {"seeds": [0, 7], "steps": 2, "guidance": 3.0, "size": [32, 32]}


@pytest.fixture(scope="module")
def adapter(pipeline: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("adapter") / "adapter"
    model = loaded(pipeline).transformer
    tiny.adapter(model, keep_ratio=0.5).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def dense(pipeline: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("dense") / "out"
    assert make(pipeline, out) == 0
    return out


def loaded(pipeline: Path, **options: Any) -> Any:
    return DiffusionPipeline.from_pretrained(pipeline, **options)


def make(
    pipeline: Path, out: Path, *, batch: int = 1, process: Process | None = None, **changes: Any
) -> int:
    generation = from_dict(Generation, {**PLAIN, **changes})
    pipe = loaded(pipeline)
    return generate(
        pipe, generation, PROMPTS, out, batch=batch, process=process, show_progress=False
    )


def pictures(out: Path) -> dict[str, np.ndarray]:
    return {path.name: np.asarray(Image.open(path)) for path in sorted(out.glob("*.png"))}


def off(ours: Path, theirs: Path) -> list[int]:
    """Largest difference of each picture, in levels of 255."""
    a, b = pictures(ours), pictures(theirs)
    assert a.keys() == b.keys()
    return [int(np.abs(a[name].astype(int) - b[name]).max()) for name in a]


def test_each_prompt_has_a_picture_from_each_seed(dense: Path) -> None:
    names = [f"{prompt.id}-{seed}.png" for prompt in PROMPTS for seed in (0, 7)]
    rows = [json.loads(line) for line in (dense / METADATA).read_text().splitlines()]
    assert [row["file_name"] for row in rows] == names
    assert rows[2] == {"file_name": "disc-0.png", "id": "disc", "prompt": "a red disc", "seed": 0}
    assert sorted(p.name for p in dense.iterdir()) == sorted(
        [*names, METADATA, RECORD, "generation.json"]
    )
    found = pictures(dense)
    assert {image.shape for image in found.values()} == {(32, 32, 3)}
    distinct = {image.tobytes() for image in found.values()}
    assert len(distinct) == len(names)
    record = json.loads((dense / RECORD).read_text())
    assert record["pictures"] == 6
    assert record["provenance"]["versions"]["diffusers"]
    assert record["settings"]["guidance"] == 3.0


def test_pictures_are_those_of_the_pipeline_called_by_hand(pipeline: Path, dense: Path) -> None:
    pipe: Any = StableDiffusion3Pipeline.from_pretrained(pipeline)
    image = pipe(
        "a red disc",
        generator=Wanted(PROMPTS[1], 7).generator(),
        num_inference_steps=2,
        guidance_scale=3.0,
        height=32,
        width=32,
    ).images[0]
    # Diffusers rounds on its own way through numpy.
    difference = np.asarray(image).astype(int) - pictures(dense)["disc-7.png"]
    assert np.abs(difference).max() <= 1


def test_noise_is_of_prompt_and_seed_alone(pipeline: Path, dense: Path, tmp_path: Path) -> None:
    """Batches sum otherwise, so a level may differ; other noise differs by many."""
    make(pipeline, tmp_path / "batch", batch=4)
    assert max(off(tmp_path / "batch", dense)) <= 1
    draws = {
        tuple(Wanted(prompt, seed).generator().get_state().tolist())
        for prompt in PROMPTS
        for seed in (0, 7)
    }
    assert len(draws) == 6
    names = ("disc-0.png", "disc-7.png")
    one, other = (pictures(dense)[name].astype(int) for name in names)
    assert np.abs(one - other).max() > 5


def test_every_method_starts_from_the_same_noise(
    pipeline: Path, adapter: Path, dense: Path, tmp_path: Path
) -> None:
    whole = {"adapter": str(adapter), "keep_ratio": 1.0}
    make(pipeline, tmp_path / "whole", served=whole)
    assert off(tmp_path / "whole", dense) == [0] * 6
    make(pipeline, tmp_path / "pruned", served={"adapter": str(adapter)})
    assert min(off(tmp_path / "pruned", dense)) > 0
    corrected = {"adapter": str(adapter), "whole_steps": 2}
    make(pipeline, tmp_path / "corrected", served=corrected)
    assert off(tmp_path / "corrected", dense) == [0] * 6
    make(pipeline, tmp_path / "merged", served={"method": "tomesd", "keep_ratio": 0.6})
    assert min(off(tmp_path / "merged", dense)) > 0


@pytest.mark.parametrize("sampler", ["euler", "unipc", "dpmpp"])
def test_samplers_make_other_pictures_of_the_same_noise(
    sampler: str, pipeline: Path, dense: Path, tmp_path: Path
) -> None:
    make(pipeline, tmp_path, sampler=sampler)
    assert min(off(tmp_path, dense)) > 0


def test_a_run_that_was_killed_goes_on(
    pipeline: Path, dense: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    saved: list[str] = []
    save = Image.Image.save

    def killed(image: Any, path: Path, **options: Any) -> None:
        if len(saved) == 2:
            Path(path).write_bytes(b"half of a pict")
            raise KeyboardInterrupt
        saved.append(path.name)
        save(image, path, **options)

    with monkeypatch.context() as patch:
        patch.setattr(Image.Image, "save", killed)
        with pytest.raises(KeyboardInterrupt):
            make(pipeline, tmp_path)
    assert sorted(pictures(tmp_path)) == ["star-0.png", "star-7.png"]
    assert not (tmp_path / RECORD).exists()
    calls: list[Any] = []
    call: Any = StableDiffusion3Pipeline.__call__

    def counted(pipe: Any, *args: Any, **options: Any) -> Any:
        calls.append(options["prompt"])
        return call(pipe, *args, **options)

    counted.__signature__ = inspect.signature(call)  # type: ignore[attr-defined]
    monkeypatch.setattr(StableDiffusion3Pipeline, "__call__", counted)
    assert make(pipeline, tmp_path) == 0
    assert calls == [["a red disc"], ["a red disc"], ["boxes"], ["boxes"]]
    assert off(tmp_path, dense) == [0] * 6
    assert make(pipeline, tmp_path) == 0
    assert len(calls) == 4  # nothing again
    assert (tmp_path / RECORD).exists()


def test_processes_share_the_work_and_none_is_done_twice(
    pipeline: Path, dense: Path, tmp_path: Path
) -> None:
    assert make(pipeline, tmp_path, batch=2, process=Process(rank=0, count=4)) == 4
    first = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*.png")}
    assert sorted(path.name for path in first) == ["box-0.png", "star-0.png"]
    # Going on with another number of processes.
    assert make(pipeline, tmp_path, process=Process(rank=0, count=2)) == 3
    assert not (tmp_path / RECORD).exists()
    assert make(pipeline, tmp_path, process=Process(rank=1, count=2)) == 0
    assert (tmp_path / RECORD).exists()
    assert max(off(tmp_path, dense)) <= 1
    assert {path: path.stat().st_mtime_ns for path in first} == first
    assert not list(tmp_path.glob(".process*"))


def test_processes_of_a_number_exclude_each_other(pipeline: Path, tmp_path: Path) -> None:
    with owned(tmp_path / ".process-0"), pytest.raises(ValueError, match="another run"):
        make(pipeline, tmp_path)
    assert not list(tmp_path.glob("*.png"))


def test_processes_are_told_by_their_launcher() -> None:
    said = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1"}
    third = Process.launched(said)
    assert (third.rank, third.count, third.device("cuda")) == (3, 4, "cuda:1")
    assert third.device("cpu") == "cpu"
    assert Process.launched({}).device("cuda") == "cuda"
    parts = [Process(rank=rank, count=3).share(range(10)) for rank in range(3)]
    assert sorted(item for part in parts for item in part) == list(range(10))
    for wrong in ({"RANK": "2", "WORLD_SIZE": "2"}, {"RANK": "x"}, {"LOCAL_RANK": "-1"}):
        with pytest.raises(ValueError, match="RANK"):
            Process.launched(wrong)


@pytest.mark.parametrize(
    ("changes", "differs"),
    [
        ({"seeds": [0, 7, 8]}, "seeds"),
        ({"steps": 3}, "call, steps"),
        ({"guidance": 3.5}, "call, guidance"),
        ({"sampler": "unipc"}, "sampler"),
        ({"size": [32, 64]}, "call, size"),
        ({"call": {"max_sequence_length": 64}}, "call"),
        ({"served": {"method": "tomesd", "keep_ratio": 0.6}}, "served"),
    ],
)
def test_other_settings_are_never_mixed_in(
    changes: dict[str, Any], differs: str, pipeline: Path, dense: Path
) -> None:
    with pytest.raises(ValueError, match=rf"what differs: {differs}\)"):
        make(pipeline, dense, **changes)
    assert len(pictures(dense)) == 6


def test_another_model_adapter_or_prompt_is_refused_too(
    pipeline: Path, adapter: Path, tmp_path: Path
) -> None:
    served = {"adapter": str(adapter)}
    make(pipeline, tmp_path, served=served)
    generation = from_dict(Generation, {**PLAIN, "served": served})
    pipe = loaded(pipeline)
    with torch.no_grad():
        next(pipe.vae.decoder.parameters()).mul_(1.01)
    with pytest.raises(ValueError, match=r"what differs: pipeline\)"):
        generate(pipe, generation, PROMPTS, tmp_path)
    with pytest.raises(ValueError, match=r"what differs: pipeline\)"):
        generate(loaded(pipeline, torch_dtype=torch.bfloat16), generation, PROMPTS, tmp_path)
    pipe = loaded(pipeline)
    pipe.scheduler.register_to_config(shift=2.0)
    with pytest.raises(ValueError, match=r"what differs: scheduler\)"):
        generate(pipe, generation, PROMPTS, tmp_path)
    others = [Prompt("star", "two stars"), *PROMPTS[1:]]
    with pytest.raises(ValueError, match=r"what differs: prompts\)"):
        generate(loaded(pipeline), generation, others, tmp_path)
    other = tiny.adapter(loaded(pipeline).transformer, keep_ratio=0.6)
    other.save_pretrained(adapter.parent / "other")
    elsewhere = from_dict(
        Generation, {**PLAIN, "served": {"adapter": str(adapter.parent / "other")}}
    )
    with pytest.raises(ValueError, match=r"what differs: served\)"):
        generate(loaded(pipeline), elsewhere, PROMPTS, tmp_path)


def test_a_changed_adapter_of_the_same_name_has_another_digest(pipeline: Path) -> None:
    model = loaded(pipeline).transformer
    one = tiny.adapter(model, keep_ratio=0.5)
    same, other = copy.deepcopy(one), copy.deepcopy(one)
    with torch.no_grad():
        next(other.router.parameters()).add_(1e-3)
    assert adapter_digest(one) == adapter_digest(same) != adapter_digest(other)
    assert adapter_digest(one) != adapter_digest(tiny.adapter(model, keep_ratio=0.6))


def test_what_was_not_made_by_us_is_left_alone(pipeline: Path, tmp_path: Path) -> None:
    (tmp_path / "disc-7.png").write_bytes(b"mine")
    with pytest.raises(ValueError, match=r"holds a disc-7\.png, and no generation\.json"):
        make(pipeline, tmp_path)
    assert (tmp_path / "disc-7.png").read_bytes() == b"mine"


def test_pictures_that_are_not_finite_are_not_written(pipeline: Path, tmp_path: Path) -> None:
    pipe = loaded(pipeline)
    with torch.no_grad():
        next(pipe.vae.decoder.parameters()).fill_(float("nan"))
    with pytest.raises(FloatingPointError, match="the pictures of star hold values that are not"):
        generate(pipe, from_dict(Generation, PLAIN), PROMPTS, tmp_path, show_progress=False)
    assert not pictures(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"call": {"gudance_rescale": 1.0}}, "takes no gudance_rescale"),
        ({"call": {"negative_promt": "x"}}, "did you mean 'negative_prompt'"),
        ({"call": {"num_inference_steps": 3}}, r"num_inference_steps=\.\.\.: use --steps"),
        ({"call": {"latents": 3}}, "latents=...: leave it out"),
    ],
)
def test_arguments_that_a_pipeline_does_not_take_are_named(
    changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        arguments(tiny.pipeline(tiny.sd3()), from_dict(Generation, changes))


def test_a_pipeline_without_prompts_is_refused() -> None:
    pipe = DiTPipeline.__new__(DiTPipeline)
    with pytest.raises(ValueError, match="DiTPipeline makes no pictures of prompts"):
        arguments(pipe, Generation())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seeds": []}, "at least one"),
        ({"seeds": [1, 1]}, "different numbers"),
        ({"seeds": [-1]}, "must be at least 0"),
        ({"steps": 0}, "steps must be at least 1"),
        ({"sampler": "ddim"}, "sampler: expected one of"),
        ({"served": {"keep_ratio": 0.5}}, "keep_ratio: for an adapter, and there is none"),
        ({"served": {"whole_steps": 2}}, "whole_steps: for an adapter"),
        ({"served": {"whole_steps": -1}}, "whole_steps must be at least 0"),
        ({"served": {"method": "random", "keep_ratio": 0.5}}, "no method without training"),
        ({"served": {"method": "tomesd"}}, "needs a keep ratio"),
        ({"served": {"method": "tomesd", "adapter": "x"}}, "an adapter or a method"),
    ],
)
def test_settings_that_make_no_sense_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        from_dict(Generation, changes)


# --- prompts --------------------------------------------------------------------------------------


def test_prompts_are_lines_or_objects(tmp_path: Path) -> None:
    lines = tmp_path / "p.txt"
    lines.write_text("\ufeffa star\n\n  a disc \n", encoding="utf-8")
    assert read_prompts(lines) == [Prompt("00000", "a star"), Prompt("00001", "a disc")]
    objects = tmp_path / "p.jsonl"
    rows: list[dict[str, Any]] = [
        {"id": "a", "prompt": "a star"},
        {"id": 7, "text": "é"},
        {"prompt": "x"},
    ]
    objects.write_text("\n".join(map(json.dumps, rows)))
    assert read_prompts(objects) == [Prompt("a", "a star"), Prompt("7", "é"), Prompt("00002", "x")]


def test_metadata_are_prompts_again(dense: Path) -> None:
    assert read_prompts(dense / METADATA) == PROMPTS


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "holds no prompts"),
        (b"\n  \n", "holds no prompts"),
        (b"\xff\xfe", "is not UTF-8"),
        (b"{", "line 1 is no JSON"),
        (b"[1]", "line 1 is no prompt"),
        (b'{"prompt": " "}', "line 1 is no prompt"),
        (b'{"prompt": "a"}\n{"prompt": "b", "id": "../x"}', "line 2: an id becomes a part"),
        (b'{"prompt": "a", "id": "A"}\n{"prompt": "b", "id": "a"}', "line 2: the id 'a' is taken"),
        (b"[" * 10**5, "line 1 is no JSON"),
    ],
)
def test_prompts_that_are_none_are_named(content: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_prompts(path)


# --- the command ----------------------------------------------------------------------------------


def said(capsys: pytest.CaptureFixture[str], arguments: list[str]) -> str:
    """The last line on stderr; bars of loading stand before it."""
    capsys.readouterr()
    assert main(arguments) == 2
    *_, last = capsys.readouterr().err.splitlines()
    assert last.startswith("shiva-dit: ")
    return last


def words(pipeline: Path, folder: Path, *more: str) -> list[str]:
    prompts = folder / "prompts.txt"
    if not prompts.exists():
        prompts.write_text("a star\na disc\n")
    out = ["--prompts", str(prompts), "--out", str(folder / "out"), "--size", "32", "--steps", "2"]
    return ["generate", "--pipeline", str(pipeline), *out, "--threads", "1", *more]


def test_the_command_makes_pictures(
    pipeline: Path, adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more = ["--adapter", str(adapter), "--keep", "0.6", "--whole-steps", "1", "--dtype", "float32"]
    call = words(pipeline, tmp_path, *more, "negative_prompt=blur", "max_sequence_length=64")
    assert main(call) == 0
    assert "2 pictures" in capsys.readouterr().out
    assert sorted(pictures(tmp_path / "out")) == ["00000-0.png", "00001-0.png"]
    settings = json.loads((tmp_path / "out" / RECORD).read_text())["settings"]
    assert settings["call"]["negative_prompt"] == "blur"
    assert settings["guidance"] == 7.0  # the pipeline's own
    assert settings["served"]["whole_steps"] == 1
    line = said(capsys, words(pipeline, tmp_path, *more))
    assert "made otherwise (what differs: call)" in line
    assert main(words(pipeline, tmp_path, "--out", str(tmp_path / "wide"), "--size", "48x32")) == 0
    assert {image.shape for image in pictures(tmp_path / "wide").values()} == {(32, 48, 3)}


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--pipeline", "nowhere/to/be/found"], "nowhere"),
        (["--prompts", "nowhere.txt"], "there is no file nowhere.txt of prompts"),
        (["--adapter", "nowhere"], "nowhere"),
        (["--dtype", "int8"], "--dtype must be one of"),
        (["--device", "cuda:99"], "device 'cuda:99' can't be used here"),
        (["--keep", "0.5"], "keep_ratio: for an adapter, and there is none"),
        (["negative_promt=x"], "did you mean 'negative_prompt'"),
    ],
)
def test_bad_input_is_one_line(
    more: list[str], message: str, pipeline: Path, tmp_path: Path, capsys: Any, monkeypatch: Any
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert message in said(capsys, words(pipeline, tmp_path, *more))
    assert not (tmp_path / "out").exists()


def test_flux_takes_the_same_call(pipeline: Path, adapter: Path, tmp_path: Path) -> None:
    """Packed latents, embedded guidance, no guidance by two passes."""
    parts = loaded(pipeline).components
    text = CLIPTextModel(parts["text_encoder"].config)
    transformer = FluxTransformer2DModel(
        in_channels=16,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=8,
        num_attention_heads=4,
        joint_attention_dim=32,
        pooled_projection_dim=12,
        guidance_embeds=True,
        axes_dims_rope=(2, 2, 4),
    )
    tiny.randomize(text, seed=1)
    tiny.randomize(transformer, seed=0)
    pipe = FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=parts["vae"],
        text_encoder=text,
        tokenizer=parts["tokenizer"],
        text_encoder_2=parts["text_encoder_3"],
        tokenizer_2=parts["tokenizer_3"],
        transformer=transformer,
    )
    tiny.adapter(transformer, keep_ratio=0.5).save_pretrained(tmp_path / "adapter")
    found = {}
    for name, served in (("dense", {}), ("whole", {"keep_ratio": 1.0}), ("pruned", {})):
        made = {} if name == "dense" else {"adapter": str(tmp_path / "adapter"), **served}
        changes = {**PLAIN, "served": made, "call": {"max_sequence_length": 32}}
        generation = from_dict(Generation, changes)
        assert generate(pipe, generation, PROMPTS, tmp_path / name, batch=3) == 0
        found[name] = tmp_path / name
        shiva_dit.remove(pipe)
    assert off(found["whole"], found["dense"]) == [0] * 6
    assert max(off(found["pruned"], found["dense"])) > 0


def test_pictures_of_a_method_are_scored_beside_the_dense_ones(
    pipeline: Path, adapter: Path, dense: Path, tmp_path: Path
) -> None:
    """The more whole steps, the nearer; and what the dense ones score stands beside."""
    clip = seeing.clip_folder(tmp_path / "clip")
    steps = 4
    sets = {
        "dense": {},
        "pruned": {"adapter": str(adapter)},
        "corrected": {"adapter": str(adapter), "whole_steps": 2},
    }
    found = {}
    for name, served in sets.items():
        make(pipeline, tmp_path / name, steps=steps, served=served)
        beside = ["--dense", str(tmp_path / "dense"), "--reference", str(tmp_path / "dense")]
        call = ["evaluate", str(tmp_path / name), *beside, "--clip", str(clip)]
        assert main([*call, "--threads", "1", "--resamples", "5"]) == 0
        found[name] = json.loads((tmp_path / name / "scores.json").read_text())
    scores = {name: record["scores"] for name, record in found.items()}
    assert scores["dense"]["psnr"]["value"] == 100.0
    assert scores["dense"]["fd_clip"]["value"] == pytest.approx(0.0, abs=1e-5)
    assert scores["corrected"]["psnr"]["value"] > scores["pruned"]["psnr"]["value"] + 1
    assert scores["pruned"]["psnr"]["value"] > scores["pruned"]["psnr"]["floor"]
    own = scores["dense"]["clip_score"]["value"]
    assert scores["pruned"]["clip_score"]["reference"] == pytest.approx(own)
    served = found["corrected"]["pictures"]["settings"]["served"]
    assert served["whole_steps"] == 2


@pytest.mark.slow
def test_two_processes_make_all_pictures(pipeline: Path, tmp_path: Path) -> None:
    call = words(pipeline, tmp_path, "--seeds", "0", "1", "2")
    launched(2, main, *call)
    record = json.loads((tmp_path / "out" / RECORD).read_text())
    assert (record["pictures"], record["processes"]) == (6, 2)
    assert len(pictures(tmp_path / "out")) == 6


@pytest.mark.parametrize("word", ["--height", "--width=512"])
def test_sides_are_set_by_one_option(
    word: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main([*words(tmp_path, tmp_path), word, "512"])
    assert f"unrecognized arguments: {word}" in (said := capsys.readouterr().err)
    assert said.rstrip().endswith("(pixels are set by --size WxH)")
