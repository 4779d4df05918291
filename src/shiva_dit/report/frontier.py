"""A frontier's tables."""

from __future__ import annotations

from typing import Any

from shiva_dit.report.layout import known, markdown_rows

BUDGETS = (0.5, 1.0, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0)
"""In forwards of the unpruned model."""


def frontier_rows(record: dict[str, Any], guidance: float) -> list[list[str]]:
    """Header and rows of one guidance, by cost; the front's in bold."""
    front = _front(record, guidance)
    modes = list(record["modes"])
    has_judge = any("frechet" in row for row in front["rows"])
    head = ["arm", "steps", "forwards", "PSNR to unpruned, dB"]
    head += ["distance to unpruned", "distance to real", "right"] if has_judge else []
    head += [f"time, {mode}" for mode in modes]
    rows = [head]
    for row in sorted(front["rows"], key=lambda row: row.get("forwards", float("inf"))):
        if "failed" in row:
            rows.append([row["name"], str(row["steps"]), row["failed"], *["-"] * (len(head) - 3)])
            continue
        low, high = row["psnr_within"]
        cells = [row["name"], str(row["steps"]), f"{row['forwards']:.2f}"]
        cells.append(f"{row['psnr']:.1f} [{low:.1f}, {high:.1f}]")
        if has_judge:
            cells += [f"{row['frechet_to_truth']:.2f}", f"{row['frechet']:.2f}"]
            cells.append(f"{row['right_all']:.1%}")
        for mode in modes:
            cells.append(known(row["times"].get(mode, {}).get("share"), "{:.3f}"))
        rows.append([f"**{cell}**" for cell in cells] if row["on_front"] else cells)
    return rows


def budget_rows(record: dict[str, Any], guidance: float) -> list[list[str]]:
    """The best arm within each budget, and the best of the other series."""
    rows = [["forwards", "best", "PSNR, dB", "best of another kind", "PSNR, dB"]]
    found = [row for row in _front(record, guidance)["rows"] if "psnr" in row]
    for budget in BUDGETS:
        best = _best(found, budget)
        if best is None:
            continue
        other = _best([row for row in found if row["kind"] != best["kind"]], budget)
        cells = [f"{budget:g}", _said(best), f"{best['psnr']:.1f}"]
        cells += ["-", "-"] if other is None else [_said(other), f"{other['psnr']:.1f}"]
        rows.append(cells)
    return rows


def frontier_table(record: dict[str, Any]) -> str:
    """A frontier's tables, as Markdown: of each guidance the budgets, then all points."""
    config, parts = record["config"], []
    for front in record["fronts"]:
        scale = front["guidance"]
        parts.append("**No guidance**" if scale == 1 else f"**Guidance {scale:g}**")
        parts.append(markdown_rows(budget_rows(record, scale)))
        parts.append(markdown_rows(frontier_rows(record, scale)))
    floor = ""
    if "floor" in record:
        floor = f" Floor of the distance to real: {record['floor']['frechet']:.2f}."
    parts.append(
        f"{record['about']} {config['count']} pictures per point and seed, "
        f"{len(config['seeds'])} seeds; the truth is the unpruned model by UniPC in "
        f"{config['reference_steps']} steps. In brackets 95% of sets of pictures drawn anew; bold: "
        "on the front by FLOPs. A forward is the unpruned model's, of both halves where guided."
        f"{floor}"
    )
    return "\n\n".join(parts)


def _front(record: dict[str, Any], guidance: float) -> dict[str, Any]:
    return next(front for front in record["fronts"] if front["guidance"] == guidance)


def _best(rows: list[dict[str, Any]], budget: float) -> dict[str, Any] | None:
    within = [row for row in rows if row["forwards"] <= budget * 1.01]
    return max(within, key=lambda row: row["psnr"], default=None)


def _said(row: dict[str, Any]) -> str:
    return f"{row['name']}, {row['steps']} steps"
