"""Pages: everything is in the file, what they show is what was measured, and browsers run them."""

from __future__ import annotations

import base64
import io
import json
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from shiva_dit.cli import main
from shiva_dit.demo.base import load_backbone
from shiva_dit.demo.tasks import load_task
from shiva_dit.experiments.compare import Comparison, run_comparison
from shiva_dit.experiments.contest import compete
from shiva_dit.experiments.contestants import Outcome, Settings
from shiva_dit.experiments.maps import kept_shares
from shiva_dit.experiments.outcomes import Runs
from shiva_dit.experiments.page.content import Page, Row, Table, image_uri, map_uri, written
from shiva_dit.experiments.page.folders import page_of
from shiva_dit.experiments.scoring import sample
from shiva_dit.models.attach import attachment_of
from shiva_dit.pictures.generate import ABOUT
from tests.test_frontier import made, run_frontier

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")


class Found(HTMLParser):
    """What a browser would load, and the cells of tables."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.sources: list[str] = []
        self.images: list[dict[str, str | None]] = []
        self.cells: list[list[str]] = []
        self._in_cell = False
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        self.sources += [v for k, v in attrs if k in ("src", "href", "srcset") and v]
        if tag == "img":
            self.images.append(given)
        if tag == "tr":
            self.cells.append([])
        if tag in ("td", "th"):
            self.cells[-1].append("")
        self._in_cell = tag in ("td", "th") or (self._in_cell and tag != "tr")

    def handle_endtag(self, tag: str) -> None:
        if tag in ("td", "th"):
            self._in_cell = False

    def handle_data(self, data: str) -> None:
        if self._in_cell and self.cells and self.cells[-1]:
            self.cells[-1][-1] += data


def pixels(source: str | None) -> Image.Image:
    assert source is not None
    return Image.open(io.BytesIO(base64.b64decode(source.partition(",")[2])))


@pytest.fixture(scope="module")
def comparison(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A comparison's folder."""
    out = tmp_path_factory.mktemp("page") / "out"
    short = {"backbone": "frozen", "batch_size": 4, "micro_batches": 2}
    short |= {"warmup_steps": 1, "policy_steps": 1, "joint_steps": 1}
    arms = {
        "ours": {"name": "ours <b>", "series": "ours"},
        "map": {"name": "a map", "method": "fixed_map"},
    }
    plan = Comparison(
        what="x & y",
        about="Which?",
        seeds=(0,),
        settings=Settings(count=20, num_steps=2, guidance=3.0),
        recipe=short,
        arms=arms,
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            "shiva_dit.experiments.compare.run_jobs", lambda jobs, workers: map(compete, jobs)
        )
        run_comparison(plan, out, workers=1)
    return out


def test_a_comparisons_page_holds_what_was_measured(comparison: Path) -> None:
    assert main(["page", str(comparison), "--pictures", "3"]) == 0
    text = (comparison / "page.html").read_text(encoding="utf-8")
    found = Found(text)
    assert all(source.startswith("data:image/") for source in found.sources)
    assert "ours &lt;b&gt;" in text
    assert "ours <b>" not in text.partition("<script>")[0]
    record = json.loads((comparison / "record.json").read_text())
    names = [row[0] for row in found.cells if len(row) > 6]
    assert [row["name"] for row in record["rows"]] == names[-len(record["rows"]) :]
    # The first pictures of every arm, to the bit of what a screen shows; the truth is arm -1.
    for arm, key in ((-1, "reference"), (0, "unpruned"), (1, "ours"), (2, "map")):
        shown = [one for one in found.images if one.get("data-arm") == str(arm)]
        assert len(shown) == 3
        tensors = load_file(comparison / f"{key}-0.safetensors")
        wanted = (255 * (tensors["images"][1, 0] + 1) / 2).clamp(0, 255).round()
        got = torch.tensor(pixels(shown[1]["src"]).getdata(0)).view(16, 16)
        assert torch.equal(got.float(), wanted)
    maps = {one["data-map"]: pixels(one["src"]) for one in found.images if "data-map" in one}
    assert set(maps) == {f"{arm}-{picture}" for arm in (1, 2) for picture in range(3)}
    shares = load_file(comparison / "ours-0.safetensors")["kept"]
    assert shares.shape == (8, 64)
    assert maps["1-0"].size == (8, 8)
    assert torch.equal(torch.tensor(maps["1-2"].getdata()), (255 * shares[2]).round().to(torch.int))
    assert 'const prompts = ["' in text


def test_shares_are_those_of_what_was_kept(comparison: Path) -> None:
    """Their mean is the keep ratio, and a fixed map keeps the same of every picture."""
    record = json.loads((comparison / "record.json").read_text())
    rows = {row["method"]: row for row in record["rows"]}
    for key in ("ours", "map"):
        shares = load_file(comparison / f"{key}-0.safetensors")["kept"]
        assert float(shares.mean()) == pytest.approx(rows[key]["keep_ratio"], abs=1e-6)
        assert torch.equal(shares, shares[:1].expand_as(shares)) == (key == "map")
    model = load_backbone(load_task("digits"))
    with kept_shares(model, 2) as kept:
        sample(load_task("digits"), model, 2, seed=0, num_steps=1)
    assert kept.shares is None
    assert kept.num_tokens == 64
    assert attachment_of(model) is None


def test_a_frontiers_page_shows_the_front_and_every_arm(tmp_path: Path) -> None:
    out = tmp_path / "out"
    record = run_frontier(made(), out)
    page = page_of(out, count=2)
    front = record["fronts"][-1]["rows"]
    shown = {row.name for row in page.rows}
    wanted = {f"{row['name']}, {row['steps']}" for row in front if row.get("on_front")}
    assert wanted <= shown
    assert {row["name"] for row in front if "psnr" in row} == {n.partition(", ")[0] for n in shown}
    assert page.truth is not None
    assert page.truth.name == "unpruned, 4 steps"
    assert [len(row.pictures) for row in page.rows] == [2] * len(page.rows)
    by_name = {row.name: row for row in page.rows}
    assert len(by_name["ours, 3"].maps) == 2
    assert not by_name["merging, 3"].maps
    assert len(page.tables) == 4
    assert Found(written(page)).sources


def test_bad_folders_say_what_is_wanted(
    tmp_path: Path, comparison: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["page", str(tmp_path)]) == 2
    assert "has no record.json: give a folder of `shiva-dit train`" in capsys.readouterr().err
    (tmp_path / "record.json").write_text('{"what": "evaluation"}')
    assert main(["page", str(tmp_path)]) == 2
    assert "neither a comparison nor a frontier" in capsys.readouterr().err
    assert main(["page", str(comparison), "--dense", str(tmp_path)]) == 2
    assert "--dense is for" in capsys.readouterr().err
    assert not (tmp_path / "page.html").exists()


def test_a_damaged_file_is_one_line(
    tmp_path: Path, comparison: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = Path(shutil.copytree(comparison, tmp_path / "damaged"))
    broken = next(folder.glob("*.safetensors"))
    broken.write_bytes(broken.read_bytes()[:300])
    assert main(["page", str(folder)]) == 2
    assert f"{broken} is damaged (" in capsys.readouterr().err
    made = tmp_path / "made"
    made.mkdir()
    Image.new("RGB", (8, 8)).save(made / "0-0.png")
    (made / ABOUT).write_text("{}")
    assert main(["page", str(made)]) == 2
    assert f"{made / ABOUT}" in capsys.readouterr().err


def test_large_pictures_are_made_small_and_odd_maps_left_out() -> None:
    picture = Image.new("RGB", (2000, 1000), (200, 30, 30))
    assert pixels(image_uri(picture)).size == (768, 384)
    assert map_uri(torch.ones(32), 4, 8).startswith("data:image/png")
    assert pixels(map_uri(torch.ones(32), 4, 8)).size == (8, 4)
    assert map_uri(torch.ones(7), 4, 8) == ""


def test_a_runs_page_shows_its_looks_and_its_recipe(tmp_path: Path) -> None:
    """Also while it is under way: then it says how far it is."""
    out = tmp_path / "run"
    recipe = str(Path(__file__).parents[1] / "recipes" / "digits.toml")
    short = ["warmup_steps=1", "policy_steps=1", "joint_steps=2", "batch_size=4"]
    looked = ["watch.every=2", "watch.steps=2", "watch.prompts=1", "watch.held_out=4"]
    few = [*short, "micro_batches=2", *looked, f"out={out}"]
    assert main(["train", recipe, *few, "--threads", "1"]) == 0
    page = page_of(out)
    assert page.about.startswith("Done after 4 steps")
    assert [caption for caption, _ in page.figures] == ["Curves", "First look", "Last look"]
    rows = page.tables[0].rows
    assert rows[0][:4] == ["step", "stage", "loss", "keep"]
    assert [row[0] for row in rows[1:]] == ["2", "4"]
    log = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert rows[2][list(rows[0]).index("held out")] == f"{log[3]['held_out']:.4g}"
    facts = dict(page.facts)
    assert "joint_steps = 2" in facts["recipe"]
    assert "torch" in facts["versions"]
    (out / "result.json").unlink()
    shutil.rmtree(out / "watch")
    (out / "log.jsonl").write_text(json.dumps({k: log[0][k] for k in ("step", "stage", "loss")}))
    assert page_of(out).about == "Not done: 1 steps so far."
    assert Found(written(page_of(out))).sources


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here")
def test_a_browser_runs_it(comparison: Path, tmp_path: Path) -> None:
    """The viewer shows the arm and picture of the address, and the map where it is asked for."""
    page = tmp_path / "page.html"
    page.write_text(written(page_of(comparison, count=3)), encoding="utf-8")
    assert CHROMIUM is not None
    address = f"{page.as_uri()}#arm=1&picture=2&cut=25&kept=1"
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom", address]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=True)
    found = Found(done.stdout)
    by_id = {one["id"]: one for one in found.images if "id" in one}
    chosen = {(o["data-arm"], o["data-picture"]): o["src"] for o in found.images if "data-arm" in o}
    assert by_id["left"]["src"] == chosen["-1", "2"]
    assert by_id["right"]["src"] == chosen["1", "2"]
    assert "hidden" not in by_id["map"]
    assert "--cut: 25%" in done.stdout
    assert '<span class="tag right" id="name">ours &lt;b&gt;</span>' in done.stdout


def test_a_page_without_a_truth_has_no_viewer() -> None:
    row = Row(name="ours", pictures=["data:image/png;base64,"])
    table = Table(caption="Rows", rows=[["arm", "dB"], ["**ours**", "**1.0**"]])
    text = written(Page(title="t", rows=[row], tables=[table]))
    assert "<script>" not in text
    assert '<tr class="best"><td>ours</td><td>1.0</td></tr>' in text


def test_shares_survive_the_round_trip(comparison: Path) -> None:
    found: Any = Runs(comparison, Settings()).load("ours", 0)
    assert isinstance(found, Outcome)
    assert torch.equal(found.shares, load_file(comparison / "ours-0.safetensors")["kept"])
