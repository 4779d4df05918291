"""Records in shards: what is added is read, whole or not at all, a few of them in memory."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from shiva_dit.training.data import Feed
from shiva_dit.training.pictures import shards as module
from shiva_dit.training.pictures.about import LATENTS, TEXT, About, Sample
from shiva_dit.training.pictures.encoded import FolderData
from shiva_dit.training.pictures.shards import Shards


def record(seed: int, *shape: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    wide = torch.randn(*shape, generator=generator)
    return {"wide": wide, "narrow": wide.flatten()[:3].half()}


@pytest.mark.parametrize("limit", ["MOST_RECORDS", "MOST_BYTES"])
def test_what_was_added_is_read(
    limit: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, limit, 4 if limit == "MOST_RECORDS" else 4 * (6 * 4 + 3 * 2))
    shards, shapes = Shards(tmp_path), [(2, 3), (3, 2)]
    for seed in range(10):
        shards.add(f"{seed:x}", record(seed, *shapes[seed % 2]))
    assert len(list(tmp_path.iterdir())) == 2
    assert "9" in shards
    shards.flush()
    shards.flush()  # there is nothing more
    assert len(list(tmp_path.iterdir())) == 3
    again = Shards(tmp_path)
    assert len(again) == len(shards) == 10
    for found in (shards, again):
        read = found.read(["8", "0", "2"])
        for row, seed in enumerate((8, 0, 2)):
            for name, value in record(seed, 2, 3).items():
                assert torch.equal(read[name][row], value)
                assert read[name].dtype == value.dtype
        with pytest.raises(ValueError, match="tensors of several kinds"):
            found.read(["0", "1"])
    assert again.kind("0") is again.kind("2")
    assert again.kind("0") is not again.kind("1")
    again.add("a", record(10, 2, 3))
    again.flush()
    assert [path.name for path in sorted(tmp_path.iterdir())][-1] == "000003.safetensors"


def test_what_is_being_written_is_no_shard(tmp_path: Path) -> None:
    (tmp_path / ".writing-000000.safetensors").write_bytes(b"x")
    assert len(Shards(tmp_path)) == 0


def folder(out: Path, count: int) -> Path:
    """Encoded pictures, without a pipeline."""
    keys = [f"{number:032x}" for number in range(count)]
    about = About(
        samples=[Sample(f"{key}.png", key, (32, 32), (key,), 1) for key in keys],
        encoders={"vae": "v", "text": "t"},
        empty=keys[0],
        size=32,
        pipeline="StableDiffusion3Pipeline",
        model="",
        source="",
        files="",
        saved_as=None,
        summary=[],
    )
    latents, texts = (Shards(about.folder(out, kind)) for kind in (LATENTS, TEXT))
    for number, key in enumerate(keys):
        latents.add(key, {LATENTS: torch.full((4, 4, 4), float(number))})
        texts.add(key, {"encoder_hidden_states": torch.full((2, 8), float(number)).half()})
    latents.flush()
    texts.flush()
    about.write(out)
    return out


def test_thousands_of_samples_are_read_a_few_at_a_time(tmp_path: Path) -> None:
    data = FolderData(folder(tmp_path, 2500))
    assert len(data) == 2500
    assert len(list(tmp_path.rglob("*.safetensors"))) == 6  # not a file for each
    feed, seen = Feed(data, seed=0, ahead=6), []
    for _ in range(500):
        indices = feed.take(5)
        batch = data.batch(indices, torch.Generator())
        assert batch.latents[:, 0, 0, 0].tolist() == indices.tolist()
        assert batch.conditioning["encoder_hidden_states"][:, 0, 0].tolist() == [
            float(torch.tensor(i).half()) for i in indices.tolist()
        ]
        seen += indices.tolist()
        assert len(data._expected) <= 7
    assert sorted(seen) == list(range(2500))
    data.forget()
    assert not data._expected
