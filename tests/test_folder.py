"""From a folder of pictures to an adapter, by a tiny SD3 pipeline with all its parts."""

from __future__ import annotations

import json
import shutil
import sys
import tarfile
from pathlib import Path
from typing import Any

import pyarrow as arrow
import pytest
import torch
from diffusers import (
    AutoModel,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from PIL import Image
from pyarrow import parquet
from torch import Tensor
from transformers import (
    T5Config,
    T5EncoderModel,
)

import shiva_dit
from shiva_dit import cli
from shiva_dit.training.folder import Encoding, Facts, FolderData, encode_folder
from shiva_dit.training.looks.material import place_of
from shiva_dit.training.pictures import encode as encoding
from shiva_dit.training.pictures.decoder import Decoder
from shiva_dit.training.recipe import TrainConfig
from shiva_dit.training.trainer import Trainer
from tests import tiny
from tests.whole import clip, clip_tokenizer, shifted, t5_tokenizer

SIDE = 32  # 16x16 latents, 64 tokens


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as `from_pretrained` reads it."""
    folder = tmp_path_factory.mktemp("sd3")
    transformer = SD3Transformer2DModel(
        sample_size=16,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=4,
        attention_head_dim=8,
        num_attention_heads=4,
        joint_attention_dim=32,
        caption_projection_dim=32,
        pooled_projection_dim=20,
        pos_embed_max_size=16,
    )
    tiny.randomize(transformer, seed=0)
    tokenizer, pieces = clip_tokenizer(folder / "words"), t5_tokenizer()
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2}
    t5 = T5EncoderModel(T5Config(vocab_size=len(pieces), **sizes)).eval()
    tiny.randomize(t5, seed=3)
    pipe = StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=shifted(4),
        text_encoder=clip(1),
        tokenizer=tokenizer,
        text_encoder_2=clip(2),
        tokenizer_2=tokenizer,
        text_encoder_3=t5,
        tokenizer_3=pieces,
    )
    pipe.save_pretrained(folder / "pipeline")
    return folder / "pipeline"


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """Of several shapes and kinds, one in a folder below."""
    folder = tmp_path / "pictures"
    (folder / "more").mkdir(parents=True)
    draw = torch.Generator().manual_seed(0)
    for name, size in (("a.png", (40, 32)), ("b.jpg", (32, 50)), ("more/c.webp", (64, 64))):
        pixels = torch.randint(0, 256, (size[1], size[0], 3), generator=draw, dtype=torch.uint8)
        Image.fromarray(pixels.numpy()).save(folder / name)
        (folder / name).with_suffix(".txt").write_text(f"a picture {Path(name).stem}\n")
    return folder


def encode(pipeline: Path, pictures: Path, out: Path, **options: Any) -> Path:
    pipe = StableDiffusion3Pipeline.from_pretrained(pipeline)
    return encode_folder(pipe, pictures, out, **{"size": SIDE, "show_progress": False, **options})


def shards(out: Path, kind: str) -> list[Path]:
    return sorted((out / kind).rglob("*.safetensors"))


def count_encoded(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """Counts what is encoded from now on."""
    counts = {"pictures": 0, "captions": 0}
    for what in counts:
        own = getattr(encoding, f"encode_{what}")

        def counted(pipe: Any, given: Any, what: str = what, own: Any = own) -> Any:
            counts[what] += len(given)
            return own(pipe, given)

        monkeypatch.setattr(encoding, f"encode_{what}", counted)
    return counts


def test_what_is_read_is_what_the_pipelines_own_parts_give(
    pipeline: Path, pictures: Path, tmp_path: Path
) -> None:
    data = FolderData(encode(pipeline, pictures, tmp_path / "data", batch_size=1))
    assert len(data) == 3
    assert data.groups() is None
    batch = data.batch(torch.tensor([2, 0]), torch.Generator())
    pipe: Any = StableDiffusion3Pipeline.from_pretrained(pipeline)
    with Image.open(pictures / "more" / "c.webp") as image:
        # Of 64x64, made half as large, as `preprocess` alone does with these sides.
        pixels = pipe.image_processor.preprocess(image.resize((SIDE, SIDE), Image.BICUBIC))
    with torch.no_grad():
        latents = (pipe.vae.encode(pixels).latent_dist.mode() - 0.1) * 1.5
        text, _, pooled, _ = pipe.encode_prompt("a picture c", None, None)
    assert batch.latents.shape == (2, 4, 16, 16)
    assert torch.equal(batch.latents[0], latents[0])
    assert torch.equal(batch.conditioning["encoder_hidden_states"][0], text[0].half())
    assert torch.equal(batch.conditioning["pooled_projections"][0], pooled[0].half())
    empty = data.unconditional()
    assert empty.keys() == batch.conditioning.keys()
    assert not torch.equal(empty["pooled_projections"], pooled[0].half())


def test_batches_give_what_single_pictures_give(
    pipeline: Path, pictures: Path, tmp_path: Path
) -> None:
    every, none = torch.arange(3), torch.Generator()
    first, second = (
        FolderData(encode(pipeline, pictures, tmp_path / str(size), batch_size=size))
        for size in (1, 3)
    )
    assert first.identity() == second.identity()
    ours, theirs = first.batch(every, none), second.batch(every, none)
    torch.testing.assert_close(ours.latents, theirs.latents)
    for name, value in ours.conditioning.items():
        torch.testing.assert_close(value, theirs.conditioning[name])


def test_encoding_goes_on_where_it_was_stopped(
    pipeline: Path, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = encode(pipeline, pictures, tmp_path / "whole", batch_size=1)
    out, own, left = tmp_path / "data", encoding.encode_pictures, [2]

    def stopping(pipe: Any, images: Any) -> Any:
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        return own(pipe, images)

    monkeypatch.setattr(encoding, "encode_pictures", stopping)
    with pytest.raises(KeyboardInterrupt):
        encode(pipeline, pictures, out, batch_size=1)
    monkeypatch.setattr(encoding, "encode_pictures", own)
    with pytest.raises(ValueError, match="not complete, 1 of 3 pictures and 4 captions are miss"):
        FolderData(out)
    stamps = [path.stat().st_mtime_ns for path in shards(out, "latents")]
    counts = count_encoded(monkeypatch)
    encode(pipeline, pictures, out, batch_size=1)
    assert counts == {"pictures": 1, "captions": 0}
    assert [path.stat().st_mtime_ns for path in shards(out, "latents")][:-1] == stamps
    every, none = torch.arange(3), torch.Generator()
    assert torch.equal(
        FolderData(out).batch(every, none).latents, FolderData(whole).batch(every, none).latents
    )
    assert FolderData(out).identity() == FolderData(whole).identity()


def test_only_what_changed_is_encoded(
    pipeline: Path, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = encode(pipeline, pictures, tmp_path / "data")
    before = {path: path.read_bytes() for path in out.rglob("*.safetensors")}
    counts = count_encoded(monkeypatch)

    def encoded() -> tuple[int, int]:
        counts.update(pictures=0, captions=0)
        encode(pipeline, pictures, out)
        FolderData(out)
        return counts["pictures"], counts["captions"]

    first = FolderData(out).identity()
    assert encoded() == (0, 0)
    (pictures / "b.txt").write_text("another caption")
    assert encoded() == (0, 1)
    assert FolderData(out).identity() != first
    shutil.copy(pictures / "a.png", pictures / "z.png")  # the same picture with the same caption
    shutil.copy(pictures / "a.txt", pictures / "z.txt")
    assert encoded() == (0, 0)
    assert len(FolderData(out)) == 4
    Image.new("RGB", (32, 32), (1, 2, 3)).save(pictures / "z.png")
    assert encoded() == (1, 0)
    for name in ("z.png", "z.txt", "b.jpg", "b.txt"):
        (pictures / name).unlink()
    assert encoded() == (0, 0)
    assert len(FolderData(out)) == 2
    (pictures / "more" / "c.webp").rename(pictures / "more" / "d.webp")
    (pictures / "more" / "c.txt").rename(pictures / "more" / "d.txt")
    assert encoded() == (0, 0)
    counts.update(pictures=0, captions=0)
    encode(pipeline, pictures, out, size=64)
    assert (counts["pictures"], counts["captions"]) == (2, 0)
    assert {path: path.read_bytes() for path in before} == before  # nothing is removed
    assert FolderData(out).batch(torch.tensor([0]), torch.Generator()).latents.shape[-1] == 32


def test_tars_and_parquet_give_what_the_folder_gives(
    pipeline: Path, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = encode(pipeline, pictures, tmp_path / "data")
    first, counts = FolderData(out).identity(), count_encoded(monkeypatch)
    with tarfile.open(tmp_path / "all.tar", "w") as tar:
        for path in sorted(pictures.rglob("*.*")):
            tar.add(path, path.relative_to(pictures).as_posix())
    files = [pictures / name for name in ("a.png", "b.jpg", "more/c.webp")]
    cells = [{"bytes": path.read_bytes(), "path": path.name} for path in files]
    texts = [path.with_suffix(".txt").read_text() for path in files]
    parquet.write_table(arrow.table({"image": cells, "text": texts}), tmp_path / "all.parquet")
    for name in ("all.tar", "all.parquet"):
        encode(pipeline, tmp_path / name, out)
        assert FolderData(out).identity() == first
    assert counts == {"pictures": 0, "captions": 0}
    for name in ("all.tar", "all.parquet"):
        other = encode(pipeline, tmp_path / name, tmp_path / name.replace(".", "-"))
        assert FolderData(other).identity() == first
    assert counts == {"pictures": 6, "captions": 8}


def test_from_pictures_to_an_adapter_on_the_command_line(
    pipeline: Path, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = tmp_path / "data"
    words = ["--pipeline", str(pipeline)]
    assert cli.main(["encode", str(pictures), *words, "--out", str(data), "--size", "32"]) == 0
    recipe = Path(__file__).parents[1] / "recipes" / "sd35.toml"
    short = ["warmup_steps=1", "policy_steps=1", "joint_steps=1", "batch_size=2", "micro_batches=1"]
    out = [f"out={tmp_path / 'run'}", "precision=float32"]
    whole = ["train", str(recipe), *short, *out, "--data", str(data), *words]
    assert cli.main([*whole, "--plan"]) == 0
    planned = capsys.readouterr().out.removeprefix(f"{data}\n")
    assert "weights are trained:" in planned
    assert not (tmp_path / "run").exists()
    assert cli.main(whole) == 0
    assert str(tmp_path / "run" / "adapter") in capsys.readouterr().out
    # diffusers' AutoModel reads another file, once it has loaded a model.
    assert cli.main([*whole, "--plan"]) == 0
    assert capsys.readouterr().out == planned
    pipe: Any = StableDiffusion3Pipeline.from_pretrained(pipeline)
    pipe.set_progress_bar_config(disable=True)

    def draw() -> Tensor:
        generator = torch.Generator().manual_seed(0)
        options = {"num_inference_steps": 2, "num_images_per_prompt": 2, "output_type": "pt"}
        return pipe("a picture", height=SIDE, width=SIDE, generator=generator, **options).images

    dense = draw()
    shiva_dit.apply(pipe, tmp_path / "run" / "adapter")
    pruned = draw()
    assert pruned.shape == (2, 3, SIDE, SIDE)
    assert torch.isfinite(pruned).all()
    assert not torch.equal(pruned, dense)
    shiva_dit.remove(pipe)
    assert torch.equal(draw(), dense)
    shiva_dit.apply(pipe, tiny.adapter(pipe.transformer), keep_ratio=1.0)
    assert torch.equal(draw(), dense)


def test_data_has_an_identity_of_its_content(
    pipeline: Path, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = FolderData(encode(pipeline, pictures, tmp_path / "first"))
    moved = tmp_path / "moved"
    pictures.rename(moved)
    again = FolderData(encode(pipeline, moved, tmp_path / "again"))
    assert again.identity() == first.identity()
    copied = tmp_path / "copied"  # the same pipeline by another path
    shutil.copytree(pipeline, copied)
    counts = count_encoded(monkeypatch)
    assert FolderData(encode(copied, moved, tmp_path / "again")).identity() == first.identity()
    assert counts == {"pictures": 0, "captions": 0}
    found = {first.identity()}
    (moved / "b.txt").write_text("another caption")
    found.add(FolderData(encode(pipeline, moved, tmp_path / "caption")).identity())
    with Image.open(moved / "a.png") as image:
        other = image.convert("RGB")
    other.putpixel((0, 0), (1, 2, 3))
    other.save(moved / "a.png")
    out = tmp_path / "picture"
    found.add(FolderData(encode(pipeline, moved, out)).identity())
    for part, new in (("vae", (3, 0)), ("text_encoder_3", (0, 4))):
        pipe: Any = StableDiffusion3Pipeline.from_pretrained(pipeline)
        with torch.no_grad():
            next(getattr(pipe, part).parameters()).view(-1)[0] += 1.0
        counts.update(pictures=0, captions=0)
        encode_folder(pipe, moved, out, size=SIDE, show_progress=False)
        found.add(FolderData(out).identity())
        # What was begun with one encoder isn't gone on with by another.
        assert (counts["pictures"], counts["captions"]) == new
    assert len(found) == 5


def test_resume_and_record_know_the_data_and_the_pipeline(
    pipeline: Path,
    pictures: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in [n for n in sys.modules if n.partition(".")[0] == "sklearn"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "sklearn", None)  # pictures need none
    data = encode(pipeline, pictures, tmp_path / "data")
    pipe: Any = StableDiffusion3Pipeline.from_pretrained(pipeline)
    with torch.no_grad():
        pipe.vae.encoder.conv_in.weight.mul_(1.1)
    other = encode_folder(pipe, pictures, tmp_path / "other", size=SIDE, show_progress=False)
    recipe = Path(__file__).parents[1] / "recipes" / "sd35.toml"
    short = ["warmup_steps=1", "policy_steps=1", "joint_steps=1", "batch_size=2", "micro_batches=1"]
    out = tmp_path / "run"
    words = ["train", str(recipe), *short, f"out={out}", "precision=float32"]
    words += ["--pipeline", str(pipeline), "--data"]
    assert cli.main([*words, str(data)]) == 0
    capsys.readouterr()
    assert cli.main([*words, str(other), "--resume"]) == 2
    assert "made with another data than this run's" in capsys.readouterr().err
    assert cli.main([*words, str(data), "--resume"]) == 0
    config = json.loads((out / "adapter" / "config.json").read_text())
    made = config["training"]
    assert made["recipe"]["task"] is None
    assert made["data"]["identity"] == FolderData(data).identity()
    assert made["data"]["name"] == str(data)
    assert made["backbone"]["name"] == str(pipeline)
    assert config["config"]["base_model"] == str(pipeline)


def test_a_damaged_shard_is_named(pipeline: Path, pictures: Path, tmp_path: Path) -> None:
    out = encode(pipeline, pictures, tmp_path / "data")
    every, none = torch.arange(3), torch.Generator()
    for kind in ("latents", "text"):
        (path,) = shards(out, kind)
        good = path.read_bytes()
        for content in (good[:-1], b"", b"hello", good + b"x", b"\xff" * 100):
            path.write_bytes(content)
            with pytest.raises(
                ValueError, match=r"000000\.safetensors is not a whole safetensors f"
            ):
                FolderData(out)
            with pytest.raises(ValueError, match=r"remove it and run the same `shiva-dit encode`"):
                encode(pipeline, pictures, out)
        path.write_bytes(good)
        data = FolderData(out)
        path.write_bytes(good[: len(good) // 2])
        with pytest.raises(ValueError, match=r"000000\.safetensors is not .*it ends too early"):
            data.batch(every, none)
        path.unlink()
        with pytest.raises(ValueError, match="not complete"):
            FolderData(out)
        encode(pipeline, pictures, out)
        assert FolderData(out).batch(every, none).latents.shape == (3, 4, 16, 16)
    about = out / "data.json"
    for content in (
        b"{",
        b"[]",
        b"{}",
        b"\xff",
        b'{"format": 3}',
        b'{"format": 2, "samples": [3]}',
    ):
        about.write_bytes(content)
        with pytest.raises(ValueError, match=r"data\.json"):
            FolderData(out)
        with pytest.raises(ValueError, match=r"data\.json"):
            encode(pipeline, pictures, out)
        assert about.read_bytes() == content
    about.write_text(json.dumps({"pictures": ["a.png"], "size": 32, "model": "x"}))
    with pytest.raises(ValueError, match="older version's, with a file for each picture"):
        FolderData(out)


def test_data_and_pipeline_go_together(capsys: pytest.CaptureFixture[str]) -> None:
    recipe = Path(__file__).parents[1] / "recipes" / "sd35.toml"
    assert cli.main(["train", str(recipe), "--data", "gone"]) == 2
    assert "--data and --pipeline go together" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ("caption", r"b.jpg has no caption: write it into b.txt"),
        ("picture", r"a.png can't be read as a picture"),
        ("none", r"there are no pictures that can be taken in .*empty"),
        ("gone", r"empty is not there"),
        ("size", "multiple of 4 pixels, got 30"),
        ("colour", "background must be a colour such as white"),
        ("bomb", r"a.png is too large a picture, make it smaller"),
        ("cut", r"a.png can't be read as a picture"),
        ("encoding", r"b.txt is not UTF-8 text .*save it as UTF-8"),
        ("space", r"data needs \d+.\d GB and has 0.0 GB of space: choose another"),
    ],
)
def test_bad_pictures_are_refused(
    damage: str,
    message: str,
    pictures: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    options: dict[str, Any] = {}
    if damage == "caption":
        (pictures / "b.txt").unlink()
    elif damage == "picture":
        (pictures / "a.png").write_bytes(b"no picture")
    elif damage == "cut":
        (pictures / "a.png").write_bytes((pictures / "a.png").read_bytes()[:100])
    elif damage == "bomb":
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    elif damage == "encoding":
        (pictures / "b.txt").write_bytes("caf\u00e9".encode("latin-1"))
    elif damage == "space":
        monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(1, 1, 0))
    elif damage in ("none", "gone"):
        pictures = tmp_path / "empty"
        if damage == "none":
            pictures.mkdir()
    else:
        options = {"size": 30} if damage == "size" else {"background": "whyte"}
    facts = Facts(step=4, latent_step=2, channels=4)
    with pytest.raises(ValueError, match=message):
        encoding.encode(
            facts,
            lambda: pytest.fail("loaded too early"),
            pictures,
            tmp_path / "data",
            Encoding(**{"size": SIDE, **options}),
            show_progress=False,
        )
    assert not (tmp_path / "data").exists()


def test_other_folders_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds no encoded pictures"):
        FolderData(tmp_path)


def test_pictures_of_several_shapes_train_and_go_on_to_the_bit(
    pipeline: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    draw = torch.Generator().manual_seed(0)
    for number, (width, height) in enumerate([(64, 64), (90, 60), (60, 90), (70, 60)] * 3):
        pixels = torch.randint(0, 256, (height, width, 3), generator=draw, dtype=torch.uint8)
        Image.fromarray(pixels.numpy()).save(pictures / f"{number:02d}.png")
        (pictures / f"{number:02d}.txt").write_text(f"one of {number}\nanother")
    data = tmp_path / "data"
    words = ["--pipeline", str(pipeline)]
    given = ["encode", str(pictures), *words, "--out", str(data), "--size", "32", "--buckets"]
    assert cli.main(given) == 0
    assert "12 have several captions" in capsys.readouterr().err
    read = FolderData(data)
    groups = read.groups()
    assert groups is not None
    assert len(set(groups)) >= 3
    assert read.longest_side() > SIDE
    with pytest.raises(ValueError, match="one batch has pictures of 2 shapes"):
        read.batch(torch.tensor([0, 1]), torch.Generator())
    recipe = Path(__file__).parents[1] / "recipes" / "sd35.toml"
    model = AutoModel.from_pretrained(str(pipeline), subfolder="transformer")
    control = TrainConfig(method="fixed_map", task=None, out=tmp_path / "control")
    with pytest.raises(ValueError, match='method = "fixed_map" is for one grid of tokens'):
        Trainer(control, model, read)
    short = ["warmup_steps=2", "policy_steps=2", "joint_steps=4", "batch_size=4", "micro_batches=2"]
    short += ["precision=float32", "checkpoint_every=3", "rejected=low_rank"]
    for name in ("whole", "parts"):
        call = ["train", str(recipe), *short, f"out={tmp_path / name}", "--data", str(data), *words]
        assert cli.main(call) == 0
        if name == "parts":
            shutil.rmtree(tmp_path / name / "adapter")
            for path in (tmp_path / name / "checkpoints").iterdir():
                if not path.name.endswith("6"):
                    shutil.rmtree(path)
            assert cli.main([*call, "--resume"]) == 0
    files = [path.name for path in (tmp_path / "whole" / "adapter").glob("*.safetensors")]
    assert files
    for name in files:
        whole, parts = (tmp_path / run / "adapter" / name for run in ("whole", "parts"))
        assert whole.read_bytes() == parts.read_bytes()


def test_one_of_several_captions_is_drawn_by_the_generator(
    pipeline: Path, pictures: Path, tmp_path: Path
) -> None:
    (pictures / "a.txt").write_text("one\ntwo\nthree\n")
    data = FolderData(encode(pipeline, pictures, tmp_path / "data", batch_size=1))
    pipe: Any = StableDiffusion3Pipeline.from_pretrained(pipeline)
    with torch.no_grad():
        pooled = [pipe.encode_prompt(text, None, None)[2][0] for text in ("one", "two", "three")]
    generator, indices = torch.Generator().manual_seed(0), torch.tensor([0, 1])
    found = []
    for _ in range(30):
        data.expect(indices)
        batch = data.batch(indices, generator)
        own = batch.conditioning["pooled_projections"][0]
        found.append([torch.equal(own, value.half()) for value in pooled].index(True))
    assert {0, 1, 2} == set(found)
    again = torch.Generator().manual_seed(0)
    drawn = [int(torch.rand(2, generator=again)[0] * 3) for _ in range(30)]
    assert found == drawn
    assert torch.equal(generator.get_state(), again.get_state())


def test_what_was_read_ahead_is_what_is_read(
    pipeline: Path, pictures: Path, tmp_path: Path
) -> None:
    data = FolderData(encode(pipeline, pictures, tmp_path / "data"))
    none = torch.Generator()
    for indices in (torch.tensor([2, 0]), torch.tensor([1])):
        plain = data.batch(indices, none)
        data.expect(indices)
        ahead = data.batch(indices, none)
        assert torch.equal(plain.latents, ahead.latents)
        for name, value in plain.conditioning.items():
            assert torch.equal(ahead.conditioning[name], value)
    path = shards(tmp_path / "data", "latents")[0]
    path.write_bytes(path.read_bytes()[:200])
    data.expect(torch.tensor([0]))
    with pytest.raises(ValueError, match="it ends too early"):
        data.batch(torch.tensor([0]), none)


def test_the_command_lists_all_problems_and_can_leave_them_out(
    pipeline: Path, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (pictures / "b.txt").unlink()
    (pictures / "more" / "c.webp").write_bytes(b"<html>")
    out = tmp_path / "data"
    call = ["encode", str(pictures), "--pipeline", str(pipeline), "--out", str(out), "--size", "32"]
    assert cli.main(call) == 2
    lines = capsys.readouterr().err.splitlines()
    assert any(
        line.endswith("b.jpg has no caption: write it into b.txt beside it") for line in lines
    )
    assert any("c.webp can't be read as a picture: it is a web page" in line for line in lines)
    assert lines[-1] == (
        "shiva-dit: 2 problems beside 1 good pictures: mend them, or leave them out by --skip-bad."
    )
    assert not out.exists()
    assert cli.main([*call, "--skip-bad", "--look"]) == 0
    made, text = capsys.readouterr()
    assert made == ""  # nothing was
    assert "1 pictures taken, 2 problems (1 for no caption, 1 for picture)" in text
    # 4 channels of 16x16 in float32, and (77 + 256) tokens of 32 and 20 values in 16 bits.
    assert "to encode: 1 pictures and 1 captions, 0.00 GB (0.00 MB a picture, 0.02 MB a cap" in text
    assert not out.exists()
    assert cli.main([*call, "--skip-bad"]) == 0
    made, text = capsys.readouterr()
    assert made == f"{out}\n"
    assert "1 pictures are in" in text
    assert len(FolderData(out)) == 1


def test_cheap_checks_come_before_the_pipeline_is_loaded(
    pipeline: Path,
    pictures: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(
        StableDiffusion3Pipeline, "from_pretrained", lambda *_, **__: pytest.fail("loaded")
    )
    out = tmp_path / "data"
    call = ["encode", str(pictures), "--pipeline", str(pipeline), "--out", str(out), "--size"]
    assert cli.main([*call, "128"]) == 2
    assert "size must be at most 64 pixels, for which the model has positions" in (
        capsys.readouterr().err
    )
    (pictures / "a.txt").unlink()
    assert cli.main([*call, "32"]) == 2
    assert "a.png has no caption" in capsys.readouterr().err
    index = pipeline / "model_index.json"
    broken = tmp_path / "other"
    shutil.copytree(pipeline, broken)
    made = json.loads(index.read_text())
    (broken / "model_index.json").write_text(json.dumps({**made, "_class_name": "LuminaPipeline"}))
    call[3] = str(broken)
    assert cli.main([*call, "32"]) == 2
    assert "Wan, got LuminaPipeline: for other models" in capsys.readouterr().err
    call[3] = str(tmp_path / "nowhere" / "at" / "all")
    assert cli.main([*call, "32"]) == 2
    assert f"shiva-dit: there is no folder {call[3]} of a pipeline" in capsys.readouterr().err


def test_training_says_what_is_stale_and_refuses_data_of_other_encoders(
    pipeline: Path, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = tmp_path / "data"
    call = ["encode", str(pictures), "--pipeline", str(pipeline), "--out", str(data)]
    assert cli.main([*call, "--size", "32"]) == 0
    read = FolderData(data)
    assert read.changed_since() is None
    (pictures / "a.txt").write_text("changed")
    message = read.changed_since()
    assert message is not None
    assert "has changed since it was encoded into" in message
    read.check_pipeline(str(pipeline))
    other = tmp_path / "other"
    pipe: Any = StableDiffusion3Pipeline.from_pretrained(pipeline)
    pipe.save_pretrained(other)  # the same weights, written again
    read.check_pipeline(str(other))
    vae = other / "vae" / "config.json"
    usual = vae.read_text()
    vae.write_text(json.dumps({**json.loads(usual), "scaling_factor": 1.6}))
    with pytest.raises(ValueError, match=r"encoded by another pipeline .*scale of latents differ"):
        read.check_pipeline(str(other))
    vae.write_text(usual)
    with torch.no_grad():
        pipe.text_encoder_2.get_input_embeddings().weight.mul_(1.1)
    pipe.save_pretrained(other)
    with pytest.raises(ValueError, match=r"encoded by another pipeline .*text_encoder_2 differ"):
        read.check_pipeline(str(other))
    recipe = Path(__file__).parents[1] / "recipes" / "sd35.toml"
    out = f"out={tmp_path / 'run'}"
    words = ["train", str(recipe), out, "--data", str(data), "--pipeline", str(other)]
    capsys.readouterr()
    assert cli.main(words) == 2
    text = capsys.readouterr().err
    assert "has changed since it was encoded" in text
    assert "text_encoder_2 differ" in text


def test_a_run_on_own_pictures_is_looked_at_and_published(
    pipeline: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pictures, data, run = tmp_path / "pictures", tmp_path / "data", tmp_path / "run"
    pictures.mkdir()
    draw = torch.Generator().manual_seed(0)
    for number in range(12):
        width, height = ((64, 64), (90, 60))[number % 2]
        pixels = torch.randint(0, 256, (height, width, 3), generator=draw, dtype=torch.uint8)
        Image.fromarray(pixels.numpy()).save(pictures / f"{number:02d}.png")
        (pictures / f"{number:02d}.txt").write_text(f"picture {number}")
    words = ["--pipeline", str(pipeline)]
    given = ["encode", str(pictures), *words, "--out", str(data), "--size", "32", "--buckets"]
    assert cli.main(given) == 0
    recipe = Path(__file__).parents[1] / "recipes" / "sd35.toml"
    short = ["warmup_steps=1", "policy_steps=1", "joint_steps=1", "batch_size=2", "micro_batches=1"]
    short += ["precision=float32", "watch.every=3", "watch.times=2", "watch.steps=2"]
    call = ["train", str(recipe), *short, f"out={run}", "--data", str(data), *words]
    capsys.readouterr()
    assert cli.main([*call, "watch.held_out_share=1e-9"]) == 2
    assert "holds back none of 12 samples: set it to" in capsys.readouterr().err
    assert not (run / "checkpoints").exists()
    assert cli.main([*call, "watch.held_out_share=0.5", "watch.prompts=3"]) == 0
    read = FolderData(data)
    held = [key for key in read.keys() if place_of(key) < 0.5]  # noqa: SIM118
    assert 0 < len(held) < 12
    told = capsys.readouterr().err
    assert f"{len(held)} of 12 samples are held back" in told
    assert "no VAE" not in told
    look = json.loads((run / "log.jsonl").read_text().splitlines()[-1])
    assert look["held_out"] > 0
    assert look["held_out_guided"] > 0
    about = json.loads((run / "run.json").read_text())
    assert about["data"]["samples"] == 12 - len(held)
    assert Image.open(run / "watch" / "step-000003.png").size[1] > 400
    prompts, out = tmp_path / "prompts.txt", tmp_path / "public"
    prompts.write_text("a cat\na dog")
    words += ["--prompts", str(prompts), "--steps", "2", "--license", "mit"]
    assert cli.main(["publish", str(run), "--out", str(out), *words]) == 0
    assert Image.open(out / "pictures" / "examples.png").size[1] > 400
    assert "](pictures/examples.png)" in (out / "README.md").read_text()
    assert str(tmp_path) not in (out / "README.md").read_text() + (out / "config.json").read_text()


def test_latents_are_decoded_as_the_pipeline_does(pipeline: Path, tmp_path: Path) -> None:
    decode = Decoder.saved(pipeline, torch.device("cpu"))
    assert decode is not None
    latents = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    pipe: Any = StableDiffusion3Pipeline.from_pretrained(pipeline)
    with torch.no_grad():
        theirs = pipe.vae.decode(latents / 1.5 + 0.1).sample
    assert torch.equal(decode(latents), theirs)
    bare = tmp_path / "bare"
    shutil.copytree(pipeline, bare)
    index = json.loads((bare / "model_index.json").read_text())
    (bare / "model_index.json").write_text(json.dumps({**index, "vae": [None, None]}))
    assert Decoder.saved(bare, torch.device("cpu")) is None
