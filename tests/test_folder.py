"""From a folder of pictures to an adapter, by a tiny SD3 pipeline with all its parts."""

from __future__ import annotations

import json
import string
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    PixArtSigmaPipeline,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor
from transformers import (
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

import shiva_dit
from shiva_dit import cli
from shiva_dit.training.folder import FolderData, encode_folder
from tests import families, tiny

SIDE = 32  # 16x16 latents, 64 tokens


def write_tokenizer(folder: Path) -> CLIPTokenizer:
    """One token a letter."""
    letters = [*string.ascii_lowercase, *(letter + "</w>" for letter in string.ascii_lowercase)]
    words = [*letters, "<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(parents=True)
    (folder / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    return CLIPTokenizer(
        str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=77
    )


def text_encoder(seed: int) -> CLIPTextModelWithProjection:
    config = CLIPTextConfig(
        vocab_size=54,
        hidden_size=12,
        intermediate_size=16,
        projection_dim=10,
        num_hidden_layers=2,
        num_attention_heads=2,
        bos_token_id=52,
        eos_token_id=53,
    )
    made = CLIPTextModelWithProjection(config)
    tiny.randomize(made, seed)
    return made.eval()


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as `from_pretrained` reads it."""
    folder = tmp_path_factory.mktemp("sd3")
    vae = AutoencoderKL(
        latent_channels=4,
        block_out_channels=(4, 8),
        down_block_types=("DownEncoderBlock2D", "DownEncoderBlock2D"),
        up_block_types=("UpDecoderBlock2D", "UpDecoderBlock2D"),
        norm_num_groups=2,
        shift_factor=0.1,
        scaling_factor=1.5,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )
    tiny.randomize(vae, seed=5)
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
    tokenizer = write_tokenizer(folder / "words")
    specials = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("\u2581", -2.0)]
    pieces = T5Tokenizer(vocab=[*specials, *((letter, -3.0) for letter in string.ascii_lowercase)])
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2}
    t5 = T5EncoderModel(T5Config(vocab_size=len(pieces), **sizes)).eval()
    tiny.randomize(t5, seed=3)
    pipe = StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=vae,
        text_encoder=text_encoder(1),
        tokenizer=tokenizer,
        text_encoder_2=text_encoder(2),
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


def test_what_is_read_is_what_the_pipelines_own_parts_give(
    pipeline: Path, pictures: Path, tmp_path: Path
) -> None:
    data = FolderData(encode(pipeline, pictures, tmp_path / "data"))
    assert len(data) == 3
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
    assert torch.equal(batch.conditioning["encoder_hidden_states"][0], text[0])
    assert torch.equal(batch.conditioning["pooled_projections"][0], pooled[0])
    empty = data.unconditional()
    assert empty.keys() == batch.conditioning.keys()
    assert not torch.equal(empty["pooled_projections"], pooled[0])


def test_encoding_goes_on_where_it_was_stopped(
    pipeline: Path, pictures: Path, tmp_path: Path
) -> None:
    out = encode(pipeline, pictures, tmp_path / "data")
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    (out / "000001.safetensors").unlink()
    with pytest.raises(ValueError, match=r"not complete, 1 files are missing \(first 000001"):
        FolderData(out)
    stamp = (out / "000000.safetensors").stat().st_mtime_ns
    encode(pipeline, pictures, out)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    assert (out / "000000.safetensors").stat().st_mtime_ns == stamp
    with pytest.raises(ValueError, match="holds data of other pictures, another size"):
        encode(pipeline, pictures, out, size=64)


def test_from_pictures_to_an_adapter_on_the_command_line(
    pipeline: Path, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = tmp_path / "data"
    words = ["--pipeline", str(pipeline)]
    assert cli.main(["encode", str(pictures), *words, "--out", str(data), "--size", "32"]) == 0
    recipe = Path(__file__).parents[1] / "recipes" / "sd35.toml"
    short = ["warmup_steps=1", "policy_steps=1", "joint_steps=1", "batch_size=2", "micro_batches=1"]
    out = [f"out={tmp_path / 'run'}", "precision=float32"]
    assert cli.main(["train", str(recipe), *short, *out, "--data", str(data), *words]) == 0
    assert str(tmp_path / "run" / "adapter") in capsys.readouterr().out
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
    pipeline: Path, pictures: Path, tmp_path: Path
) -> None:
    first = FolderData(encode(pipeline, pictures, tmp_path / "first"))
    moved = tmp_path / "moved"
    pictures.rename(moved)
    again = FolderData(encode(pipeline, moved, tmp_path / "again"))
    assert again.identity() == first.identity()
    found = {first.identity()}
    (moved / "b.txt").write_text("another caption")
    found.add(FolderData(encode(pipeline, moved, tmp_path / "caption")).identity())
    with Image.open(moved / "a.png") as image:
        other = image.convert("RGB")
    other.putpixel((0, 0), (1, 2, 3))
    other.save(moved / "a.png")
    found.add(FolderData(encode(pipeline, moved, tmp_path / "picture")).identity())
    for part in ("vae", "text_encoder_3"):
        pipe: Any = StableDiffusion3Pipeline.from_pretrained(pipeline)
        with torch.no_grad():
            next(getattr(pipe, part).parameters()).view(-1)[0] += 1.0
        out = encode_folder(pipe, moved, tmp_path / part, size=SIDE, show_progress=False)
        found.add(FolderData(out).identity())
        # What was begun with one encoder doesn't go on with another.
        with pytest.raises(ValueError, match=r"another model \(what differs: encoders\)"):
            encode(pipeline, moved, out)
    assert len(found) == 5
    about = tmp_path / "first" / "data.json"
    older = {k: json.loads(about.read_text())[k] for k in ("pictures", "size", "model")}
    about.write_text(json.dumps(older))
    assert FolderData(tmp_path / "first").identity() == "not given"


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


def test_a_damaged_sample_is_named(pipeline: Path, pictures: Path, tmp_path: Path) -> None:
    data = FolderData(encode(pipeline, pictures, tmp_path / "data"))
    every, none = torch.arange(3), torch.Generator()
    path = data.files[1]
    good = path.read_bytes()
    for content in (good[:-1], b"", b"hello"):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"000001\.safetensors is not a whole safetensors fi"):
            data.batch(every, none)
    for tensors in ({"latents": torch.zeros(4, 8, 8)}, {"x": torch.zeros(1)}):
        save_file(tensors, path)
        with pytest.raises(ValueError, match=r"000001\.safetensors is not a sample like the othe"):
            data.batch(every, none)
    path.write_bytes(good)
    data.empty.write_bytes(b"")
    with pytest.raises(ValueError, match=r"unconditional\.safetensors is not a whole"):
        data.unconditional()
    for content in (b"{", b"[]", b"{}", b"\xff", b'{"pictures": 3}'):
        (tmp_path / "data" / "data.json").write_bytes(content)
        with pytest.raises(ValueError, match=r"data\.json"):
            FolderData(tmp_path / "data")


def test_data_and_pipeline_go_together(capsys: pytest.CaptureFixture[str]) -> None:
    recipe = Path(__file__).parents[1] / "recipes" / "sd35.toml"
    assert cli.main(["train", str(recipe), "--data", "gone"]) == 2
    assert "--data and --pipeline go together" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ("caption", r"b.jpg has no caption: write it into b.txt"),
        ("picture", r"a.png can't be read as a picture"),
        ("none", r"there are no pictures \(.png"),
        ("size", "multiple of 4 pixels, got 30"),
        ("bomb", r"a.png is too large a picture, make it smaller"),
        ("cut", r"a.png can't be read as a picture"),
        ("encoding", r"b.txt is not UTF-8 text .*save it as UTF-8"),
    ],
)
def test_bad_pictures_are_refused(
    damage: str,
    message: str,
    pipeline: Path,
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
    elif damage == "none":
        pictures = tmp_path / "empty"
        pictures.mkdir()
    else:
        options["size"] = 30
    with pytest.raises(ValueError, match=message):
        encode(pipeline, pictures, tmp_path / "data", **options)


def test_other_pipelines_and_folders_are_refused(tmp_path: Path) -> None:
    absent: Any = None
    model = families.made("pixart-sigma")
    pipe = PixArtSigmaPipeline(
        tokenizer=absent, text_encoder=absent, vae=absent, transformer=model, scheduler=absent
    )
    with pytest.raises(ValueError, match=r"got PixArtSigmaPipeline: .*docs/training"):
        encode_folder(pipe, tmp_path, tmp_path / "data", size=32)
    with pytest.raises(ValueError, match="holds no encoded pictures"):
        FolderData(tmp_path)
