"""What is encoded by each pipeline is what that pipeline itself gives its transformer."""

from __future__ import annotations

import inspect
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline, Lumina2Pipeline, QwenImagePipeline
from PIL import Image
from torch import Tensor

import shiva_dit
from shiva_dit import cli
from shiva_dit.models.families import model_spec
from shiva_dit.models.guidance import Pass
from shiva_dit.provenance import data_digest, module_digest
from shiva_dit.training.calls import Calls
from shiva_dit.training.data import Batch
from shiva_dit.training.folder import Facts, FolderData, encode_folder
from shiva_dit.training.looks.measure import _Kept
from shiva_dit.training.paths import path_of
from shiva_dit.training.pictures import encode as encoding
from shiva_dit.training.pictures.decoder import Decoder
from shiva_dit.training.pictures.encoders import digests
from shiva_dit.training.pictures.pipelines import PIPELINES
from shiva_dit.training.recipe import TrainConfig
from shiva_dit.training.trainer import Trainer
from tests import families
from tests.whole import WHOLE

SIDE, WIDE, HIGH = 64, 80, 48
"""Of squares, and of a picture of another shape."""
CAPTION = 'the word "on"'
UNSAID = {"return_dict", "joint_attention_kwargs", "attention_kwargs"}
"""Arguments that say nothing of picture or text."""

QUICK = {"flux-dev", "chroma", "qwen", "z-image", "pixart-alpha", "wan"}
"""One of each layout, path and way to be guided: of these `make check` goes all the way."""

FURTHER = pytest.mark.matrix
every_pipeline = pytest.mark.parametrize("name", WHOLE)


def built(name: str, folder: Path) -> Any:
    pipe = WHOLE[name].build(folder)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def draw(pipe: Any, **options: Any) -> Any:
    given = {"width": SIDE, "height": SIDE, "num_inference_steps": 2, "output_type": "pt"}
    generator = torch.Generator().manual_seed(0)
    return pipe(prompt=CAPTION, generator=generator, **{**given, **options})[0]


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """A wide one, and squares with a caption of another length."""
    folder, generator = tmp_path / "pictures", torch.Generator().manual_seed(0)
    folder.mkdir()
    for number, (wide, high) in enumerate([(WIDE, HIGH), (SIDE, SIDE), (SIDE, SIDE)]):
        colours = torch.rand(3, 1, 1, generator=generator) + torch.linspace(-0.5, 0.5, wide)
        pixels = (255 * colours.clamp(0, 1)).expand(3, high, wide).permute(1, 2, 0).byte()
        Image.fromarray(pixels.numpy()).save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text("a longer one" if number == 2 else CAPTION)
    return folder


def encoded(pipe: Any, pictures: Path, out: Path, batch_size: int = 1) -> FolderData:
    options = {"size": SIDE, "buckets": True, "show_progress": False, "batch_size": batch_size}
    return FolderData(encode_folder(pipe, pictures, out, **options))


def batch_of(data: FolderData, *rows: int) -> Batch:
    return data.batch(torch.tensor(rows), torch.Generator())


def calls_of(pipe: Any, **options: Any) -> list[dict[str, Any]]:
    """Arguments by name of each call of the transformer in the first step of a drawing."""
    found: list[dict[str, Any]] = []
    names = list(inspect.signature(type(pipe.transformer).forward).parameters)[1:]

    def record(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        del module
        found.append({**dict(zip(names, args, strict=False)), **kwargs})

    handle = pipe.transformer.register_forward_pre_hook(record, with_kwargs=True)
    try:
        draw(pipe, **options)
    finally:
        handle.remove()
    return found[: len(found) // 2]


def assert_same(ours: Any, theirs: Any, name: str) -> None:
    """Equal in shape and value, or as 16 bits hold it."""
    if isinstance(theirs, dict):
        assert ours.keys() == theirs.keys(), name
        for key, value in theirs.items():
            assert_same(ours[key], value, f"{name}.{key}")
    elif isinstance(theirs, list):
        assert len(ours) == len(theirs), name
        for one, other in zip(ours, theirs, strict=True):
            assert_same(one, other, name)
    elif isinstance(theirs, Tensor):
        assert ours.shape == theirs.shape, name
        kept = theirs.half().to(theirs) if theirs.is_floating_point() else theirs
        assert torch.equal(ours, kept) or torch.equal(ours, theirs), name
    else:
        assert ours == theirs, name


def assert_same_arguments(pipe: Any, ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    """All that is said of picture and text; of latents, how they are laid out."""
    spec = model_spec(pipe.transformer)
    ours, theirs = (
        {n: v for n, v in given.items() if n not in {spec.timestep, *UNSAID} and v is not None}
        for given in (ours, theirs)
    )
    mask = "encoder_hidden_states_mask"
    if isinstance(pipe, QwenImagePipeline):  # a caption alone is as long as it is, without a mask
        text, padded = theirs["encoder_hidden_states"], ours.pop(mask)
        length = text.shape[1]
        assert padded.shape == (1, 512)
        assert torch.equal(padded.bool(), (torch.arange(512) < length)[None])
        assert not ours["encoder_hidden_states"][:, length:].any()
        ours["encoder_hidden_states"] = ours["encoder_hidden_states"][:, :length]
    shapes = [[tuple(one.shape) for one in given.pop(spec.sample)] for given in (ours, theirs)]
    assert shapes[0] == shapes[1]
    assert_same(ours, theirs, "")


@every_pipeline
def test_training_gives_what_the_pipeline_gives(name: str, pictures: Path, tmp_path: Path) -> None:
    pipe, whole = built(name, tmp_path / "own"), WHOLE[name]
    data = encoded(pipe, pictures, tmp_path / "data")
    spec = model_spec(pipe.transformer)
    path, dtype = path_of(spec, pipe.scheduler), pipe.transformer.dtype
    calls = Calls(spec=spec, path=path, dtype=dtype, passes=Pass.ALONE)
    scales = None if whole.told is None else torch.tensor([whole.told])
    empty = {n: value[None] for n, value in data.unconditional().items()}

    def ours(batch: Batch) -> dict[str, Any]:
        return calls.guided(batch.latents, torch.ones(1), batch, scales, data.unconditional())

    for row, (wide, high) in enumerate([(WIDE, HIGH), (SIDE, SIDE)]):
        batch, sides = batch_of(data, row), {"width": wide, "height": high}
        (theirs,) = calls_of(pipe, **whole.plain, **sides)
        assert_same_arguments(pipe, ours(batch), theirs)
        if whole.guided is None:
            continue
        found = [
            families.sample_of(call, i)
            for call in calls_of(pipe, **whole.guided, **sides)
            for i in range(len(call[spec.sample]))
        ]
        with_caption, without = found[::-1] if whole.empty_first else found
        assert_same_arguments(pipe, ours(batch), with_caption)
        assert_same_arguments(pipe, ours(replace(batch, conditioning=empty)), without)


@every_pipeline
def test_pictures_are_decoded_as_the_pipeline_decodes(
    name: str, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe, whole = built(name, tmp_path / "own"), WHOLE[name]
    batch = batch_of(encoded(pipe, pictures, tmp_path / "data"), 0)
    with Image.open(pictures / "0.png") as image:
        processor = getattr(pipe, "image_processor", None) or pipe.video_processor
        pixels = processor.preprocess(image)
    video = PIPELINES[type(pipe).__name__].frames
    with torch.no_grad():
        pixels = pixels[:, :, None] if video else pixels
        alone = pipe.vae.decode(pipe.vae.encode(pixels).latent_dist.mode()).sample
    alone = alone[:, :, 0] if video else alone

    def last(out: Tensor, t: Any, sample: Tensor, **_: Any) -> tuple[Tensor, ...]:
        return (batch.latents.view_as(sample),)

    monkeypatch.setattr(pipe.scheduler, "step", last)
    theirs = draw(pipe, **whole.plain, width=WIDE, height=HIGH).reshape(alone.shape)
    # Scaled and back in float32: some roundings of latents of about 1, and a decoder's sums.
    torch.testing.assert_close(theirs, (alone / 2 + 0.5).clamp(0, 1), rtol=0, atol=1e-5)
    assert theirs.std() > 0.01
    decode = Decoder(PIPELINES[type(pipe).__name__], pipe.vae, torch.device("cpu"))
    ours = decode(batch.pictured(batch.latents))
    torch.testing.assert_close((ours / 2 + 0.5).clamp(0, 1), theirs, rtol=0, atol=1e-6)


@every_pipeline
def test_batches_give_what_single_ones_give(name: str, pictures: Path, tmp_path: Path) -> None:
    pipe = built(name, tmp_path / "own")
    one, three = (encoded(pipe, pictures, tmp_path / str(size), size) for size in (1, 3))
    assert one.identity() == three.identity()
    ours, theirs = batch_of(one, 1, 2), batch_of(three, 1, 2)
    torch.testing.assert_close(ours.latents, theirs.latents)
    for key, value in ours.conditioning.items():
        # Sums of another order, rounded to 16 bits: the next number at most.
        torch.testing.assert_close(theirs.conditioning[key], value, rtol=2**-10, atol=1e-5)


@every_pipeline
def test_encoders_in_bfloat16_give_bfloat16(name: str, pictures: Path, tmp_path: Path) -> None:
    pipe = built(name, tmp_path / "own").to(torch.bfloat16)
    data = encoded(pipe, pictures, tmp_path / "data")
    batch = batch_of(data, 1, 2)  # with and without a word in quotes
    given = [*batch.conditioning.values(), *data.unconditional().values()]
    assert {value.dtype for value in given if value.is_floating_point()} == {torch.bfloat16}
    assert batch.latents.dtype == torch.float32
    assert torch.equal(batch.latents, batch.latents.bfloat16().float())
    assert torch.isfinite(batch.latents).all()


@every_pipeline
def test_texts_and_latents_take_what_is_said_before(
    name: str, pictures: Path, tmp_path: Path
) -> None:
    pipe = built(name, tmp_path / "own")
    data, facts = encoded(pipe, pictures, tmp_path / "data"), Facts.of(pipe)
    batch, empty = batch_of(data, 1), data.unconditional()
    given = [value for value in empty.values() if value.is_floating_point()]
    assert {value.dtype for value in given} == {torch.float16}
    wide = sum(value.nbytes for n, value in empty.items() if "mask" not in n)
    assert wide == facts.text_bytes
    assert batch.latents.nbytes == facts.latent_bytes((SIDE, SIDE))
    pipe.save_pretrained(tmp_path / "pipeline")
    assert Facts.saved(str(tmp_path / "pipeline"), torch.float32) == facts


@pytest.mark.parametrize(
    "name",
    [name if name in QUICK else pytest.param(name, marks=FURTHER) for name in WHOLE],
)
def test_from_pictures_to_an_adapter(
    name: str, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole, folder, data = WHOLE[name], tmp_path / "pipeline", tmp_path / "data"
    pipe = built(name, tmp_path / "own")
    pipe.save_pretrained(folder)
    words = ["--pipeline", str(folder)]
    call = ["encode", str(pictures), *words, "--out", str(data), "--size", str(SIDE), "--buckets"]
    assert cli.main(call) == 0
    recipe = Path(__file__).parents[1] / "recipes" / "sd35.toml"
    short = ["warmup_steps=1", "policy_steps=1", "joint_steps=1", "batch_size=2", "micro_batches=1"]
    short += ["precision=float32", "lora_rank=2", f"out={tmp_path / 'run'}"]
    if not whole.checkpointing:
        assert cli.main(["train", str(recipe), *short, "--data", str(data), *words]) == 2
        assert "loses the attention_mask" in capsys.readouterr().err
        short += ["gradient_checkpointing=false"]
    short += [f"backbone={whole.backbone}", "watch.every=3", "watch.times=1", "watch.steps=2"]
    short += ["watch.held_out_share=0.7"]
    call = ["train", str(recipe), *short, "--data", str(data), *words]
    assert cli.main(call) == 0
    told = capsys.readouterr().err
    assert "failed" not in told
    look = json.loads((tmp_path / "run" / "log.jsonl").read_text().splitlines()[-1])
    assert look["held_out"] > 0
    assert (tmp_path / "run" / "watch" / "step-000003.png").is_file()
    pipe = DiffusionPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    options = whole.plain if whole.guided is None else whole.guided
    dense = draw(pipe, **options)
    shiva_dit.apply(pipe, tmp_path / "run" / "adapter")
    pruned = draw(pipe, **options)
    assert pruned.shape == dense.shape
    assert torch.isfinite(pruned).all()
    assert not torch.equal(pruned, dense)
    shiva_dit.remove(pipe)
    assert torch.equal(draw(pipe, **options), dense)


@pytest.mark.parametrize("name", [pytest.param("z-image", marks=FURTHER), "hunyuan-image"])
def test_memory_is_counted_where_values_do_not_matter(
    name: str, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, pipe = tmp_path / "pipeline", built(name, tmp_path / "own")
    pipe.save_pretrained(folder)
    encoded(pipe, pictures, tmp_path / "data")
    recipe = Path(__file__).parents[1] / "recipes" / "sd35.toml"
    call = ["train", str(recipe), "--data", str(tmp_path / "data"), "--pipeline", str(folder)]
    status = cli.main([*call, "--plan", "batch_size=2", "micro_batches=1"])
    told = capsys.readouterr()
    if name == "hunyuan-image":  # it sorts text by its mask
        assert status == 2
        assert "HunyuanImageTransformer2DModel looks at values: what it needs can't" in told.err
    else:
        assert status == 0
        assert "weights are trained" in told.out


def test_a_model_that_is_told_its_guidance_is_not_trained_without(
    pictures: Path, tmp_path: Path
) -> None:
    pipe = built("flux-dev", tmp_path / "own")
    data = encoded(pipe, pictures, tmp_path / "data")
    config = TrainConfig(out=tmp_path / "run", task=None)
    with pytest.raises(ValueError, match=r"is told its guidance: say which .* guidance=\[1,7\]"):
        Trainer(config, pipe.transformer, data, pipe.scheduler)


def test_what_another_pipeline_made_of_captions_is_not_trained_on(
    pictures: Path, tmp_path: Path
) -> None:
    folders = [tmp_path / name for name in ("alpha", "sigma")]
    for folder in folders:  # with the same encoders
        built(f"pixart-{folder.name}", tmp_path / "own").save_pretrained(folder)
    pipe = DiffusionPipeline.from_pretrained(folders[0])
    data = encoded(pipe, pictures, tmp_path / "data")
    data.check_pipeline(str(folders[0]))
    with pytest.raises(
        ValueError, match=r"encoded by another pipeline than .*sigma \(class differ"
    ):
        data.check_pipeline(str(folders[1]))
    other = DiffusionPipeline.from_pretrained(folders[1])
    assert digests(other) != digests(pipe)


def test_others_are_refused_by_name(tmp_path: Path) -> None:
    absent: Any = None
    pipe = Lumina2Pipeline(
        transformer=families.made("lumina2"),
        scheduler=absent,
        vae=absent,
        text_encoder=absent,
        tokenizer=absent,
    )
    with pytest.raises(ValueError, match=r"pipelines StableDiffusion3, .*Wan, got Lumina2Pipeline"):
        encode_folder(pipe, tmp_path, tmp_path / "data")
    whole = built("hunyuan-image", tmp_path / "own")
    whole.transformer.register_to_config(use_meanflow=True)
    with pytest.raises(ValueError, match=r"can't be trained \(use_meanflow\): it is told the next"):
        Facts.of(whole)


def test_what_was_encoded_before_there_were_others_goes_on(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe = built("sd3", tmp_path / "own")
    tokenizers = [pipe.tokenizer, pipe.tokenizer_2, pipe.tokenizer_3]
    words = [[json.dumps(t.backend_tokenizer.to_str()), t.model_max_length] for t in tokenizers]
    encoders = [pipe.text_encoder, pipe.text_encoder_2, pipe.text_encoder_3]
    data, out = encoded(pipe, pictures, tmp_path / "data"), tmp_path / "data"
    assert data.about.encoders == {
        "vae": data_digest([module_digest(pipe.vae), 0.1, 1.5]),
        "text": data_digest([[module_digest(one) for one in encoders], words]),
    }
    about = json.loads((out / "data.json").read_text())
    del about["pipeline"]
    (out / "data.json").write_text(json.dumps(about))
    assert FolderData(out).identity() == data.identity()
    for name in ("encode_pictures", "encode_captions"):
        monkeypatch.setattr(encoding, name, lambda *_: pytest.fail("encoded again"))
    assert encoded(pipe, pictures, out).identity() == data.identity()


@pytest.mark.parametrize("name", ["sd3", "klein", "qwen", "wan"])
def test_looks_know_the_grid_of_tokens(name: str, pictures: Path, tmp_path: Path) -> None:
    pipe = built(name, tmp_path / "own")
    data = encoded(pipe, pictures, tmp_path / "data")
    config = TrainConfig(out=tmp_path / "run", task=None)
    student = Trainer(config, pipe.transformer, data, pipe.scheduler).student
    for row, (wide, high) in enumerate([(WIDE, HIGH), (SIDE, SIDE)]):
        assert _Kept(student, batch_of(data, row), steps=2).grid == (high // 4, wide // 4)
