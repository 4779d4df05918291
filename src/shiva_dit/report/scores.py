"""Tables of what pictures are worth."""

from __future__ import annotations

from typing import Any

from shiva_dit.report.layout import known, markdown_rows

NAMES = {
    "fid": "FID",
    "kid": "KID x 1000",
    "fd_dinov2": "Frechet, DINOv2",
    "kd_dinov2": "kernel, DINOv2, x 1000",
    "fd_clip": "Frechet, CLIP",
    "kd_clip": "kernel, CLIP, x 1000",
    "cmmd": "CMMD",
    "clip_score": "CLIP score",
    "clip_iqa": "CLIP-IQA",
    "image_reward": "ImageReward",
    "psnr": "PSNR to dense, dB",
    "ssim": "SSIM to dense",
    "lpips": "LPIPS to dense",
}
THOUSANDFOLD = ("kid", "kd_dinov2", "kd_clip")


def score_rows(record: dict[str, Any]) -> list[list[str]]:
    """Header and a row per score."""
    rows = [["score", "value", "95% interval", "reference", "floor", "better", "weights"]]
    for name, shown in NAMES.items():
        if name not in record["scores"]:
            continue
        row = record["scores"][name]
        scale = 1000.0 if name in THOUSANDFOLD else 1.0

        def cell(value: float | None, scale: float = scale) -> str:
            return known(None if value is None else scale * value, "{:.4g}")

        ends = row["interval"]
        rows.append(
            [
                shown,
                cell(row["value"]),
                "-" if ends is None else f"{cell(ends[0])} to {cell(ends[1])}",
                cell(row.get("reference")),
                cell(row["floor"]),
                row["better"],
                "-" if row["weights"] is None else row["weights"][:12],
            ]
        )
    return rows


def score_note(record: dict[str, Any]) -> str:
    """What a table's figures are of."""
    said = [f"{record['pictures']['count']} pictures"]
    if record["reference"] is not None:
        said.append(f"reference of {record['reference']['count']}")
    return "; ".join([*said, *record["notes"]]) + "."


def scores_table(record: dict[str, Any]) -> str:
    """Table and note."""
    return f"{markdown_rows(score_rows(record))}\n\n{score_note(record)}"
