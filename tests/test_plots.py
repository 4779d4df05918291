"""Plots stand in documents by markers, and are drawn from records."""

import json
import re
from pathlib import Path

import pytest
from PIL import Image

from shiva_dit.experiments.plots import draw_plots, draw_tradeoff

DOCS = Path(__file__).parents[1] / "docs"


PLOTS = {
    "performance.md": 1,
    "results/estimators-digits.md": 6,
    "results/estimators-scenes.md": 9,
    "results/flips.md": 4,
    "results/frontier.md": 2,
    "results/rejected.md": 1,
    "results/routers.md": 1,
    "results/schedules.md": 4,
    "results/synthetic.md": 1,
    "results/targets.md": 1,
    "results/variations.md": 1,
}


@pytest.mark.slow
@pytest.mark.parametrize("page", sorted(p.relative_to(DOCS).as_posix() for p in DOCS.rglob("*.md")))
def test_every_plot_has_its_record_and_is_drawn(page: str, tmp_path: Path) -> None:
    document = DOCS / page
    text = document.read_text(encoding="utf-8")
    assert text.count("<!-- plot ") == PLOTS.get(page, 0)
    records = DOCS.parent / "results"
    drawn = draw_plots(re.sub(r"(\.\./)+results/", f"{records}/", text), tmp_path)
    for path in drawn:
        with Image.open(path) as picture, Image.open(document.parent / path.name) as shipped:
            assert picture.size == shipped.size


def test_a_tradeoff_is_drawn_by_series(tmp_path: Path) -> None:
    arms = {"a": {"series": "one"}, "b": {"series": "one"}, "c": {"name": "apart"}}
    rows = [
        {"method": key, "flops": flops, "held_out_error": 0.1, "frechet": 2.0}
        | {"held_out_error_by_seed": [0.1, 0.2], "frechet_by_seed": [2.0, 3.0]}
        for key, flops in (("unpruned", 4.0), ("a", 2.0), ("b", 1.0), ("c", 3.0))
    ]
    record = {
        "rows": rows, "config": {"arms": arms}, "floor": {"frechet": 1.0}, "about": "Test."
    }  # fmt: skip
    draw_tradeoff(record, tmp_path / "x.png")
    with Image.open(tmp_path / "x.png") as picture:
        assert picture.size == (1210, 418)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("<!-- plot flips: gone.json -->\n![x](x.png)", "gone.json is missing"),
        ("<!-- plot pies: a.json -->\n![x](x.png)", "there is no plot 'pies'; known: comparison"),
        ("<!-- plot flips: a.json -->\n\n![x](x.png)", "has no image on the line below"),
    ],
)
def test_a_plot_that_cannot_be_drawn_is_an_error(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(json.dumps({}))
    with pytest.raises(ValueError, match=message):
        draw_plots(text, tmp_path)
