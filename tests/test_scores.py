"""Scores of pictures against the libraries' own and formulas; files, and what is refused."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from scipy.linalg import sqrtm
from scipy.ndimage import gaussian_filter
from torch import Tensor
from transformers import (
    AutoTokenizer,
    BitImageProcessorPil,
    BlipConfig,
    BlipForImageTextRetrieval,
    CLIPImageProcessorPil,
    CLIPModel,
    Dinov2Model,
)

from shiva_dit.cli import main
from shiva_dit.metrics import frechet_distance, kernel_distance, psnr, ssim
from shiva_dit.pictures import evaluate as evaluation
from shiva_dit.pictures.evaluate import evaluate
from shiva_dit.pictures.libraries import ALEXNET, INCEPTION, need, published
from shiva_dit.pictures.measured import Measured, load, measure, save
from shiva_dit.pictures.prompts import read_prompts
from shiva_dit.pictures.reading import find_pictures, read_picture
from shiva_dit.pictures.resampling import cmmd, drawn, frechet, interval, kernel, means
from shiva_dit.pictures.reward import MEAN, STD, ImageReward, published_config
from shiva_dit.pictures.scorers import Clip, Dino
from shiva_dit.report.documents import render
from tests import seeing
from tests.ranks import launched

COUNT = 12


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models, pictures of a method, the unpruned model's, real ones, and prompts."""
    top = tmp_path_factory.mktemp("scores")
    seeing.clip_folder(top / "clip")
    seeing.dino_folder(top / "dino")
    seeing.reward_folder(top / "reward")
    seeing.paint(top / "ours", COUNT, seed=1, shift=5)
    seeing.paint(top / "dense", COUNT, seed=1)
    seeing.paint(top / "real", 2 * COUNT, seed=2)
    seeing.texts(top / "prompts.txt", 2 * COUNT)
    return top


def words(place: Path, *more: str) -> list[str]:
    return ["evaluate", str(place / "ours"), "--prompts", str(place / "prompts.txt"), *more]


def said(capsys: pytest.CaptureFixture[str], arguments: list[str]) -> str:
    capsys.readouterr()
    assert main([*arguments, "--threads", "1", "--resamples", "20"]) == 2
    *_, last = capsys.readouterr().err.splitlines()
    assert last.startswith("shiva-dit: ")
    return last


def images(place: Path, count: int = 5) -> list[Tensor]:
    pictures = find_pictures(place / "ours")
    return [pictures.read(name) for name in pictures.names[:count]]


def arrays(place: Path, count: int = 5) -> list[np.ndarray]:
    return [image.permute(1, 2, 0).numpy() for image in images(place, count)]


# --- what models say ------------------------------------------------------------------------------


def test_clip_says_what_transformers_own_model_says(place: Path) -> None:
    texts = ["a star", "disc", "red red red", "box", "blue"]
    found = Clip(str(place / "clip"), "cpu").measure(images(place), texts)
    model: Any = CLIPModel.from_pretrained(place / "clip").eval()
    processor = CLIPImageProcessorPil.from_pretrained(place / "clip")
    tokenizer: Any = AutoTokenizer.from_pretrained(place / "clip")
    pixels = processor(arrays(place), return_tensors="pt")["pixel_values"]

    def outputs(prompts: list[str]) -> Any:
        tokens = tokenizer(prompts, padding=True, return_tensors="pt")
        with torch.no_grad():
            return model(**tokens, pixel_values=pixels)

    made = outputs(texts)
    torch.testing.assert_close(found["clip"].float(), made.image_embeds)
    alike = made.logits_per_image.diagonal() / math.exp(1.5)
    torch.testing.assert_close(
        found["clip_score"].float(), 100 * alike.clamp_min(0), atol=1e-3, rtol=0
    )
    quality = outputs(["Good photo.", "Bad photo."]).logits_per_image.softmax(-1)[:, 0]
    torch.testing.assert_close(found["clip_iqa"].float(), quality, atol=1e-5, rtol=0)
    assert quality.std() > 1e-4  # above the tolerance
    assert set(Clip(str(place / "clip"), "cpu").measure(images(place), None)) == {
        "clip",
        "clip_iqa",
    }


def test_prompts_that_clip_reads_in_part_are_counted(place: Path) -> None:
    scorer = Clip(str(place / "clip"), "cpu")
    long = "abcdefghijklmnopqrstuvwxyz"  # one token a letter
    assert scorer.notes([long, "a"]) == [f"1 prompts cut to {seeing.LONGEST} tokens"]
    same = scorer.measure(images(place, 1), [long[:10]])["clip_score"]
    torch.testing.assert_close(scorer.measure(images(place, 1), [long])["clip_score"], same)


def test_dinov2_says_what_transformers_own_model_says(place: Path) -> None:
    found = Dino(str(place / "dino"), "cpu").measure(images(place), None)["dinov2"]
    model: Any = Dinov2Model.from_pretrained(place / "dino").eval()
    processor = BitImageProcessorPil.from_pretrained(place / "dino")
    pixels = processor(arrays(place), return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        torch.testing.assert_close(found.float(), model(pixel_values=pixels).pooler_output)


def test_image_reward_reads_the_published_weights_by_their_names(place: Path) -> None:
    """Against transformers' BLIP for retrieval, filled by hand, and the chain of layers."""
    texts = ["a star", "disc", "red red red", "box", "blue"]
    scorer = ImageReward(str(place / "reward"), "cpu")
    found = scorer.measure(images(place), texts)["image_reward"]
    config = BlipConfig.from_pretrained(place / "reward")
    blip: Any = BlipForImageTextRetrieval(config).eval()
    held = load_file(place / "reward" / "ImageReward.safetensors")
    inner = scorer._model
    blip.vision_model.load_state_dict(inner.vision.state_dict())
    blip.text_encoder.load_state_dict(inner.text.state_dict())
    for ours, theirs in (
        (
            blip.vision_model.encoder.layers[1].self_attn.qkv.weight,
            "visual_encoder.blocks.1.attn.qkv",
        ),
        (blip.vision_model.post_layernorm.weight, "visual_encoder.norm"),
        (
            blip.text_encoder.encoder.layer[0].crossattention.self.key.weight,
            "text_encoder.encoder.layer.0.crossattention.self.key",
        ),
    ):
        assert torch.equal(ours, held[f"blip.{theirs}.weight"])
    side = {"height": seeing.SIDE, "width": seeing.SIDE}
    processor = CLIPImageProcessorPil(size={"shortest_edge": seeing.SIDE}, crop_size=side)
    tokenizer: Any = AutoTokenizer.from_pretrained(place / "reward")
    tokens = tokenizer(texts, padding="max_length", max_length=35, return_tensors="pt")
    with torch.no_grad():
        seen = blip.vision_model(processor(arrays(place), return_tensors="pt")["pixel_values"])
        x = blip.text_encoder(
            input_ids=tokens.input_ids,
            attention_mask=tokens.attention_mask,
            encoder_hidden_states=seen.last_hidden_state,
        ).last_hidden_state[:, 0]
    for layer in (0, 2, 4, 6, 7):
        x = x @ held[f"mlp.layers.{layer}.weight"].T + held[f"mlp.layers.{layer}.bias"]
    torch.testing.assert_close(found.float(), (x[:, 0] - MEAN) / STD, atol=1e-5, rtol=1e-4)
    assert found.std() > 1e-3
    assert scorer.notes(None) == ["ImageReward: not validated against the published weights"]
    assert scorer.measure(images(place), None) == {}
    alike = scorer.measure(images(place), ["disc"] * 5)["image_reward"]
    assert alike.std() > 1e-3  # what it sees counts, not what it reads alone


def test_image_reward_has_its_published_sizes() -> None:
    config: Any = published_config()
    assert config.vision_config.num_hidden_layers == 24
    assert config.vision_config.patch_size == 16
    assert config.text_config.num_hidden_layers == 12
    assert config.text_config.encoder_hidden_size == 1024


# --- distances ------------------------------------------------------------------------------------


def features(count: int, width: int, seed: int, scale: float = 1.0, shift: float = 0.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(count, width, generator=generator, dtype=torch.float64) + shift


@pytest.mark.parametrize(("count", "width"), [(40, 6), (9, 24), (24, 24)])
def test_frechets_distance_is_that_of_scipys_square_root(count: int, width: int) -> None:
    """More pictures than dimensions and fewer are computed in different ways."""
    x, y = features(count, width, 0), features(60, width, 1, scale=1.3, shift=0.2)
    cov_x, cov_y = np.cov(x.T.numpy()), np.cov(y.T.numpy())
    root = sqrtm(cov_x @ cov_y).real
    shift = float((x.mean(0) - y.mean(0)).square().sum())
    truth = shift + float(np.trace(cov_x) + np.trace(cov_y) - 2 * np.trace(root))
    weights = drawn(count, 3)
    found = frechet(x, y)(weights)
    # Roots of eigenvalues that are 0 but for rounding (1e-16) are 1e-8 each, in scipy's as in ours.
    assert float(found[0]) == pytest.approx(truth, abs=1e-5)
    assert float(found[0]) == pytest.approx(frechet_distance(x, y), abs=1e-5)
    again = torch.repeat_interleave(torch.arange(count), weights[2].long())
    assert float(found[2]) == pytest.approx(frechet_distance(x[again], y), abs=1e-5)


def test_kernel_distances_are_sums_over_pairs() -> None:
    x, y = features(5, 3, 0), features(7, 3, 1, shift=0.5)
    weights = torch.tensor([[1.0] * 5, [2.0, 0.0, 1.0, 1.0, 1.0]], dtype=torch.float64)

    def pairs(a: list[Tensor], b: list[Tensor], apart: bool) -> float:
        values = [
            float((p @ q / 3 + 1) ** 3)
            for p in a
            for q in b
            if not (apart and p.data_ptr() == q.data_ptr())
        ]
        return sum(values) / len(values)

    found = kernel(x, y)(weights)
    for row, value in zip(weights, found, strict=True):
        own = [x[i] for i in range(5) for _ in range(int(row[i]))]
        others = [y[i] for i in range(7)]
        truth = pairs(own, own, True) + pairs(others, others, True) - 2 * pairs(own, others, False)
        assert float(value) == pytest.approx(truth, rel=1e-12)
    assert float(found[0]) == pytest.approx(kernel_distance(x, y), rel=1e-12)


def test_cmmd_is_as_published() -> None:
    """1,000 times the mean over all pairs, a picture with itself among them; sigma is 10."""
    x = torch.nn.functional.normalize(features(5, 4, 0), dim=1)
    y = torch.nn.functional.normalize(features(6, 4, 1, shift=0.5), dim=1)

    def mean(a: Tensor, b: Tensor) -> float:
        values = [math.exp(-float((p - q).square().sum()) / 200) for p in a for q in b]
        return sum(values) / len(values)

    truth = 1000 * (mean(x, x) + mean(y, y) - 2 * mean(x, y))
    found = cmmd(x, y)(drawn(5, 1))
    assert float(found[0]) == pytest.approx(truth, rel=1e-9)
    assert float(cmmd(x, x)(drawn(5, 0))[0]) == pytest.approx(0.0, abs=1e-10)


def test_large_sets_are_the_same_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = features(11, 3, 0), features(9, 3, 1)
    weights = drawn(11, 4)
    whole = kernel(x, y)(weights), cmmd(x, y)(weights)
    monkeypatch.setattr("shiva_dit.pictures.resampling.ROWS", 4)
    for one, other in zip(whole, (kernel(x, y)(weights), cmmd(x, y)(weights)), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("distance", [frechet, kernel, cmmd])
def test_intervals_lie_about_the_value_and_hold_what_chance_does(distance: Any) -> None:
    """Of 60 sets of one law, most intervals hold the mean of all their distances."""
    y = features(200, 4, 99, scale=0.5)
    values, ends = [], []
    for seed in range(60):
        found = distance(features(40, 4, seed, shift=0.4), y)(drawn(40, 100, seed=seed))
        values.append(float(found[0]))
        ends.append(interval(found))
    centre = sum(values) / len(values)
    held = [low <= centre <= high for low, high in ends]
    assert 0.8 <= sum(held) / len(held) <= 1.0
    assert all(low < value < high for (low, high), value in zip(ends, values, strict=True))


def test_what_is_slow_gets_fewer_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shiva_dit.pictures.evaluate.SLOW", 3)
    scorers = {"dinov2": {"sha256": "0" * 64}}
    sets = [Measured({"dinov2": features(30, 4, i)}, scorers, "", 30, "x") for i in range(2)]
    found = evaluate(*sets, resamples=50, show_progress=False)
    assert found["fd_dinov2"]["draws"] == 20
    assert found["kd_dinov2"]["draws"] == 50
    few = evaluate(*sets, resamples=5, show_progress=False)
    assert few["fd_dinov2"]["draws"] == 5


def test_an_interval_of_means_is_the_normal_laws() -> None:
    values = features(400, 1, 0)[:, 0]
    ends = interval(means(values)(drawn(400, 400)))
    assert ends is not None
    assert ends[1] - ends[0] == pytest.approx(2 * 1.96 * float(values.std()) / 20, rel=0.15)
    assert interval(means(values)(drawn(400, 1))) is None


# --- pairs ----------------------------------------------------------------------------------------


def two_pictures() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(0, 256, (3, 3, 17, 23), generator=generator, dtype=torch.uint8)
    other = torch.randint(0, 256, (3, 3, 17, 23), generator=generator)
    y = (0.7 * x.double() + 0.3 * other).round().to(torch.uint8)
    return x, y


def test_ssim_is_scikit_images() -> None:
    """What scikit-image 0.26.0 says, and its formula by scipy's filter."""
    x, y = two_pictures()
    found = ssim(x.double() / 127.5 - 1, y.double() / 127.5 - 1)
    stored = [0.8702210933675193, 0.8887210477470666, 0.8834412209079997]
    assert found.tolist() == pytest.approx(stored, abs=1e-12)

    def mean(image: np.ndarray) -> np.ndarray:
        return gaussian_filter(image, 1.5, truncate=3.5)[5:-5, 5:-5]

    a, b = x[0, 0].double().numpy(), y[0, 0].double().numpy()
    va, vb = mean(a * a) - mean(a) ** 2, mean(b * b) - mean(b) ** 2
    both = mean(a * b) - mean(a) * mean(b)
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    top = (2 * mean(a) * mean(b) + c1) * (2 * both + c2)
    truth = top / ((mean(a) ** 2 + mean(b) ** 2 + c1) * (va + vb + c2))
    ours = ssim(x[:1, :1].double() / 127.5 - 1, y[:1, :1].double() / 127.5 - 1)
    assert float(ours) == pytest.approx(truth.mean(), rel=1e-9)
    with pytest.raises(ValueError, match="at least 11 x 11 pixels, got 10 x 17"):
        ssim(torch.zeros(1, 3, 17, 10), torch.zeros(1, 3, 17, 10))


# --- files ----------------------------------------------------------------------------------------


def run(place: Path, out: Path, *more: str) -> dict[str, Any]:
    call = words(place, *more, "--threads", "1", "--resamples", "20", "--out", str(out))
    assert main(call) == 0
    return json.loads(out.read_text())


def test_all_scores_stand_in_one_record(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    models = ["--clip", str(place / "clip"), "--dinov2", str(place / "dino")]
    models += ["--image-reward", str(place / "reward")]
    sets = ["--reference", str(place / "real"), "--dense", str(place / "dense")]
    record = run(place, tmp_path / "scores.json", *models, *sets)
    scores = record["scores"]
    distances = ["cmmd", "fd_clip", "fd_dinov2", "kd_clip", "kd_dinov2"]
    single = ["clip_iqa", "clip_score", "image_reward"]
    assert sorted(scores) == sorted([*distances, *single, "psnr", "ssim"])
    for name in distances:
        row = scores[name]
        assert row["interval"][0] < row["value"] < row["interval"][1]
        assert row["floor"] is not None
        assert len(row["weights"]) == 64
    folder = find_pictures(place / "ours", read_prompts(place / "prompts.txt"))
    clip = Clip(str(place / "clip"), "cpu")
    ours = measure(folder, [clip], show_progress=False).columns
    real = measure(find_pictures(place / "real"), [clip], show_progress=False).columns
    assert scores["fd_clip"]["value"] == pytest.approx(
        frechet_distance(ours["clip"], real["clip"]), abs=1e-6
    )
    assert scores["clip_score"]["value"] == pytest.approx(float(ours["clip_score"].mean()))
    assert scores["clip_score"]["reference"] is None  # nobody says what real pictures show
    iqa = scores["clip_iqa"]
    assert iqa["reference"] == pytest.approx(float(real["clip_iqa"].mean()))
    assert 0 < iqa["floor"] < float(real["clip_iqa"].std())
    x, y = (
        torch.stack([read_picture(p).double() for p in sorted((place / n).glob("*.png"))])
        for n in ("ours", "dense")
    )
    assert scores["psnr"]["value"] == pytest.approx(psnr(x / 127.5 - 1, y / 127.5 - 1))
    assert scores["psnr"]["value"] > scores["psnr"]["floor"] + 10
    assert scores["ssim"]["value"] > scores["ssim"]["floor"]
    assert record["pictures"]["count"] == COUNT
    assert record["reference"]["count"] == 2 * COUNT
    assert record["provenance"]["versions"]["transformers"]
    assert any("not validated" in note for note in record["notes"])
    assert not any("cut to" in note for note in record["notes"])
    assert any("Frechet's distances of 12 pictures" in note for note in record["notes"])
    shown = capsys.readouterr().out
    assert "CLIP score" in shown
    assert "reference of 24" in shown
    document = "<!-- table scores: scores.json -->\n<!-- end table -->\n"
    table = render(document, tmp_path)
    assert "| PSNR to dense, dB |" in table
    assert scores["fd_clip"]["weights"][:12] in table


def test_an_evaluation_that_was_killed_goes_on(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of 12 and 24 pictures, 4 at a time; what has changed since is scored again."""
    shutil.copytree(place / "ours", tmp_path / "ours")
    asked: list[int] = []
    limit = [5]
    measured, compared = Clip.measure, evaluation._pair

    def measure(self: Clip, *given: Any) -> Any:
        if len(asked) == limit[0]:
            raise KeyboardInterrupt
        asked.append(len(given[0]))
        return measured(self, *given)

    def compare(*given: Any) -> Any:
        asked.append(1)
        return compared(*given)

    monkeypatch.setattr(Clip, "measure", measure)
    monkeypatch.setattr(evaluation, "_pair", compare)
    call = ["evaluate", str(tmp_path / "ours"), "--prompts", str(place / "prompts.txt")]
    call += ["--clip", str(place / "clip"), "--reference", str(place / "real"), "--batch", "4"]
    call += ["--dense", str(place / "dense"), "--threads", "1", "--resamples", "5"]
    out, kept = tmp_path / "scores.json", tmp_path / ".scores.json.answers"
    assert main([*call, "--out", str(out)]) == 130
    assert len(list(kept.glob("*.safetensors"))) == 5
    damaged = sorted(kept.glob("*.safetensors"))[0]
    damaged.write_bytes(damaged.read_bytes()[:-1])
    asked.clear()
    limit[0] = 100
    assert main([*call, "--out", str(out)]) == 0
    # Four parts that are new, one that was damaged, 12 pairs and their floors.
    assert len([count for count in asked if count == 4]) == 5
    assert len(asked) == 5 + 24
    assert not kept.exists()
    whole = tmp_path / "whole.json"
    assert main([*call, "--out", str(whole)]) == 0
    ours, theirs = (json.loads(path.read_text()) for path in (out, whole))
    for record in (ours, theirs):
        del record["provenance"]
    assert ours == theirs
    # Another picture under a name that was there.
    limit[0] = len(asked) + 4
    assert main([*call, "--out", str(out)]) == 130
    name = sorted((tmp_path / "ours").glob("*.png"))[0]
    Image.new("RGB", Image.open(name).size, "red").save(name)
    asked.clear()
    limit[0] = 100
    assert main([*call, "--out", str(out)]) == 0
    assert len([count for count in asked if count == 4]) == 5 + 1
    assert json.loads(out.read_text())["pictures"]["sha256"] != ours["pictures"]["sha256"]


@pytest.mark.slow
def test_two_processes_find_the_same_scores(place: Path, tmp_path: Path) -> None:
    models = ["--clip", str(place / "clip"), "--dinov2", str(place / "dino"), "--batch", "5"]
    call = words(
        place, *models, "--reference", str(place / "real"), "--dense", str(place / "dense")
    )
    found = []
    for count in (1, 2):
        out = tmp_path / f"{count}.json"
        options = ["--out", str(out), "--resamples", "5", "--threads", "1"]
        assert launched(count, main, *call, *options).count("Record: ") == 1
        found.append(json.loads(out.read_text()))
        del found[-1]["provenance"]
    assert found[0] == found[1]


def test_statistics_stand_for_the_folder(place: Path, tmp_path: Path) -> None:
    models = ["--clip", str(place / "clip"), "--dinov2", str(place / "dino")]
    stats = tmp_path / "real.safetensors"
    folder = ["--reference", str(place / "real"), "--save-stats", str(stats)]
    first = run(place, tmp_path / "a.json", *models, *folder)
    second = run(place, tmp_path / "b.json", *models, "--reference", str(stats))
    assert first["scores"].keys() == second["scores"].keys()
    for name, row in first["scores"].items():
        other = second["scores"][name]
        # Features are kept in 32 bits.
        assert other["value"] == pytest.approx(row["value"], rel=1e-4, abs=1e-5)
        if row["floor"] is not None:
            assert other["floor"] == pytest.approx(row["floor"], rel=1e-3, abs=1e-5)
    assert first["reference"] == second["reference"]
    fewer = run(place, tmp_path / "c.json", *models[:2], "--reference", str(stats))
    assert fewer["scores"]["cmmd"]["value"] == pytest.approx(second["scores"]["cmmd"]["value"])


def test_a_floor_is_what_the_reference_has_within_itself() -> None:
    """Pictures of the reference's own law score about their floor, others far above it."""

    def measured(rows: Tensor) -> Measured:
        return Measured({"dinov2": rows}, {"dinov2": {"sha256": "0" * 64}}, "", len(rows), "x")

    real = measured(features(400, 4, 0))
    same = evaluate(measured(features(100, 4, 1)), real, resamples=20, show_progress=False)
    other = evaluate(
        measured(features(100, 4, 1, shift=1.0)), real, resamples=20, show_progress=False
    )
    row = same["fd_dinov2"]
    assert 0.3 * row["floor"] < row["value"] < 3 * row["floor"]
    assert other["fd_dinov2"]["floor"] == row["floor"]
    assert other["fd_dinov2"]["value"] > 10 * row["floor"]
    assert abs(same["kd_dinov2"]["value"]) < 0.05 * other["kd_dinov2"]["value"]


def test_generated_pictures_bring_their_prompts_and_settings(place: Path, tmp_path: Path) -> None:
    shutil.copytree(place / "ours", tmp_path / "ours")
    prompts = read_prompts(place / "prompts.txt")[:COUNT]
    rows = [
        {"file_name": f"{p.id}-0.png", "id": p.id, "prompt": p.text, "seed": 0} for p in prompts
    ]
    lines = "\n".join(map(json.dumps, rows))
    (tmp_path / "ours" / "metadata.jsonl").write_text(lines)
    (tmp_path / "ours" / "record.json").write_text('{"settings": {"steps": 2}}')
    call = ["evaluate", str(tmp_path / "ours"), "--clip", str(place / "clip"), "--threads", "1"]
    assert main([*call, "--resamples", "0"]) == 0
    record = json.loads((tmp_path / "ours" / "scores.json").read_text())
    given = run(place, tmp_path / "b.json", "--clip", str(place / "clip"))
    assert record["scores"]["clip_score"]["value"] == given["scores"]["clip_score"]["value"]
    assert record["scores"]["clip_score"]["interval"] is None
    assert record["pictures"]["settings"] == {"steps": 2}


def test_cut_prompts_are_those_of_the_pictures_that_are_judged(place: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(place / "real", tmp_path / "real")
    long = "abcdefghijklmnopqrstuvwxyz"
    rows = [{"file_name": p.name, "prompt": long} for p in sorted(folder.glob("*.png"))]
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("\n".join([long, *["disc"] * (COUNT - 1)]))
    call = ["evaluate", str(place / "ours"), "--prompts", str(prompts), "--threads", "1"]
    sets = ["--reference", str(folder), "--clip", str(place / "clip"), "--resamples", "5"]
    out = tmp_path / "scores.json"
    assert main([*call, *sets, "--out", str(out)]) == 0
    record = json.loads(out.read_text())
    assert "1 prompts cut to 12 tokens" in record["notes"]
    assert record["scores"]["clip_score"]["reference"] is not None
    assert record["scores"]["fd_clip"]["interval"][0] >= 0.0


def test_pictures_are_read_as_a_viewer_shows_them(tmp_path: Path) -> None:
    corner = np.zeros((4, 6, 3), dtype=np.uint8)
    corner[0, 0] = 200, 100, 50
    turned = Image.fromarray(corner)
    exif = turned.getexif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    turned.save(tmp_path / "turned.png", exif=exif)
    found = read_picture(tmp_path / "turned.png")
    assert found.shape == (3, 6, 4)
    assert found[:, 0, 3].tolist() == [200, 100, 50]
    Image.fromarray(corner[:, :, 0]).save(tmp_path / "gray.png")
    assert read_picture(tmp_path / "gray.png")[:, 0, 0].tolist() == [200, 200, 200]
    opaque = np.concatenate([corner, np.full((4, 6, 1), 255, np.uint8)], axis=2)
    Image.fromarray(opaque).save(tmp_path / "opaque.png")
    assert read_picture(tmp_path / "opaque.png")[:, 0, 0].tolist() == [200, 100, 50]
    opaque[1, 1, 3] = 10
    Image.fromarray(opaque).save(tmp_path / "glass.png")
    with pytest.raises(ValueError, match=r"glass\.png is transparent in places"):
        read_picture(tmp_path / "glass.png")
    Image.fromarray(np.full((4, 4), 40000, np.uint16)).save(tmp_path / "deep.png")
    with pytest.raises(ValueError, match=r"deep\.png has more than 8 bits a channel"):
        read_picture(tmp_path / "deep.png")


# --- what is refused ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ([], "nothing to score by"),
        (["--reference", "{place}/real"], "--reference needs what it is seen by"),
        (["--dinov2", "{place}/dino"], "name a --reference"),
        (["--lpips", "x.pth", "--clip", "{place}/clip"], "--lpips is of pairs"),
        (["--clip", "{place}/clip", "--save-stats", "x"], "there is none"),
        (["--clip", "openai/clip-vit-base-patch32"], "add --download to fetch a Hub id"),
        (["--clip", "{place}/dino"], "holds a model of type 'dinov2', expected 'clip'"),
        (["--clip", "{place}/real"], "can't be read as a model's folder"),
        (["--clip", "{place}/clip", "--reference", "{place}/none"], "there is no folder"),
        (["--clip", "{place}/clip", "--reference", "{place}/prompts.txt"], "neither a folder of"),
        (["--dense", "{place}/real"], "12 of 24 pictures (00012-0.png, 00013-0.png, 00014-0.png"),
        (["--image-reward", "{place}/clip"], "holds no ImageReward.safetensors: make it there by"),
    ],
)
def test_calls_that_make_no_sense_are_one_line(
    more: list[str], message: str, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert message in said(capsys, words(place, *(w.format(place=place) for w in more)))


def test_missing_strange_and_damaged_pictures_are_named(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "ours"
    clip = ["--clip", str(place / "clip")]
    call = ["evaluate", str(folder), *clip]
    folder.mkdir()
    assert "there are no pictures (.png, .jpg, .jpeg, .webp) in" in said(capsys, call)
    shutil.copytree(place / "ours", folder, dirs_exist_ok=True)
    rows = [{"file_name": f"{i:05d}-0.png", "id": f"{i:05d}", "prompt": "a"} for i in range(COUNT)]
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows[:-1])))
    assert "1 of 12 pictures (00011-0.png) that metadata.jsonl doesn't list" in said(capsys, call)
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (folder / "00003-0.png").unlink()
    line = said(capsys, call)
    assert "is not complete, 1 of 12 pictures (00003-0.png)" in line
    assert "run the same `shiva-dit generate` again" in line
    (folder / "00003-0.png").write_bytes((folder / "00004-0.png").read_bytes()[:200])
    assert "00003-0.png can't be read as a picture" in said(capsys, call)
    other = [*call, "--prompts", str(place / "prompts.txt")]
    assert "was made of another prompt than that of the file of prompts" in said(capsys, other)
    (folder / "metadata.jsonl").write_text("nothing")
    assert "metadata.jsonl can't be read as list of pictures" in said(capsys, call)


def test_pictures_without_prompts_are_named(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    few = seeing.texts(tmp_path / "few.txt", 5)
    call = ["evaluate", str(place / "ours"), "--clip", str(place / "clip"), "--prompts", str(few)]
    assert "00005-0.png has no prompt in the file of prompts" in said(capsys, call)
    reward = ["evaluate", str(place / "ours"), "--image-reward", str(place / "reward")]
    assert "--image-reward needs the prompts of the pictures" in said(capsys, reward)


def test_pairs_of_other_sizes_are_named(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    seeing.paint(tmp_path / "dense", COUNT, seed=1, side=32)
    line = said(capsys, words(place, "--dense", str(tmp_path / "dense")))
    assert "00000-0.png has 24 x 24 pixels, its twin in" in line
    assert "32 x 32" in line


def test_too_few_pictures_are_named(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    seeing.paint(tmp_path / "real", 3)
    clip = ["--clip", str(place / "clip"), "--reference", str(tmp_path / "real")]
    assert "has 3 pictures: at least 4 are a reference" in said(capsys, words(place, *clip))
    seeing.paint(tmp_path / "one", 1)
    call = ["evaluate", str(tmp_path / "one"), "--clip", str(place / "clip")]
    line = said(capsys, [*call, "--reference", str(place / "real")])
    assert "has 1 pictures: at least 2 are judged" in line


def test_statistics_of_another_model_are_refused(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    dino = Dino(str(place / "dino"), "cpu")
    stats = tmp_path / "real.safetensors"
    save(measure(find_pictures(place / "real"), [dino], show_progress=False), stats)
    ask = ["--reference", str(stats)]
    line = said(capsys, words(place, *ask, "--clip", str(place / "clip")))
    assert "holds nothing of clip (it is of dinov2)" in line
    other = seeing.dino_folder(tmp_path / "dino", seed=1)
    line = said(capsys, words(place, *ask, "--dinov2", str(other)))
    assert "was made by another dinov2: the weights have SHA-256" in line
    shutil.copytree(place / "dino", tmp_path / "scaled")
    settings = tmp_path / "scaled" / "preprocessor_config.json"
    settings.write_text(
        settings.read_text().replace('"do_center_crop": true', '"do_center_crop": false')
    )
    line = said(capsys, words(place, *ask, "--dinov2", str(tmp_path / "scaled")))
    assert "the preprocessing have SHA-256" in line


@pytest.mark.parametrize("kind", ["truncated", "plain", "rows"])
def test_damaged_statistics_are_named(kind: str, place: Path, tmp_path: Path) -> None:
    path = tmp_path / "real.safetensors"
    dino = Dino(str(place / "dino"), "cpu")
    found = measure(find_pictures(place / "real"), [dino], show_progress=False)
    if kind == "plain":
        save_file({"dinov2": torch.zeros(4, 2)}, path)
    elif kind == "rows":
        short = {"dinov2": found.columns["dinov2"][:3]}
        save(Measured(short, found.scorers, found.pictures, found.count, found.where), path)
    else:
        save(found, path)
        path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(ValueError, match=r"real\.safetensors"):
        load(path)


def test_models_that_are_not_whole_are_named(place: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(place / "dino", tmp_path / "dino")
    state = load_file(folder / "model.safetensors")
    state.pop("layernorm.weight")
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"lacks 1 weights of a Dinov2Model \(first layernorm"):
        Dino(str(folder), "cpu")
    (folder / "preprocessor_config.json").unlink()
    save_file(
        load_file(place / "dino" / "model.safetensors"),
        folder / "model.safetensors",
        {"format": "pt"},
    )
    with pytest.raises(ValueError, match=r"holds no preprocessor_config\.json"):
        Dino(str(folder), "cpu")
    reward = shutil.copytree(place / "reward", tmp_path / "reward")
    state = load_file(reward / "ImageReward.safetensors")
    state["mlp.layers.3.weight"] = state.pop("mlp.layers.2.weight")
    save_file(state, reward / "ImageReward.safetensors")
    with pytest.raises(ValueError, match=r"2 are missing, unknown or of another size \(first mlp"):
        ImageReward(str(reward), "cpu")


def test_weights_that_are_not_finite_are_named(place: Path) -> None:
    dino = Dino(str(place / "dino"), "cpu")
    with torch.no_grad():
        dino._model.layernorm.weight.fill_(math.inf)
    with pytest.raises(FloatingPointError, match=r"dinov2 of 00000-0\.png.* isn't finite"):
        measure(find_pictures(place / "ours"), [dino], show_progress=False)


def test_models_are_fetched_only_if_asked(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []

    def fetched(source: str, **options: Any) -> str:
        asked.append(source)
        assert "model*.safetensors" in options["allow_patterns"]
        return str(place / "dino")

    monkeypatch.setattr("huggingface_hub.snapshot_download", fetched)
    with pytest.raises(ValueError, match="Nothing is fetched unasked"):
        Dino("some/model", "cpu")
    Dino(str(place / "dino"), "cpu", download=True)
    assert asked == []
    one = Dino("some/model", "cpu", download=True)
    assert asked == ["some/model"]
    assert one.sha256 == Dino(str(place / "dino"), "cpu").sha256
    assert one.about["source"] == "some/model"


@pytest.mark.parametrize("package", ["torch_fidelity", "lpips"])
def test_packages_that_are_missing_are_named_with_their_extra(
    package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shiva_dit.pictures.libraries.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=rf"{package} is not installed.*shiva-dit\[eval\]"):
        need(package)
    here = {package: object()}
    monkeypatch.setattr("shiva_dit.pictures.libraries.find_spec", here.get)
    with pytest.raises(ValueError, match=r"torchvision is not installed.*same build"):
        need(package)


@pytest.mark.parametrize("known", [INCEPTION, ALEXNET])
def test_only_published_files_are_given_to_who_unpickles_them(
    known: tuple[str, str], tmp_path: Path
) -> None:
    path = tmp_path / known[0]
    with pytest.raises(ValueError, match="there is no file"):
        published(path, known, "--x")
    path.write_bytes(b"anything")
    with pytest.raises(ValueError, match="is not the published"):
        published(path, known, "--x")
