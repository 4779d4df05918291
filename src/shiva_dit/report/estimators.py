"""Tables of what holds estimators and selections against the truth."""

from __future__ import annotations

from typing import Any

from shiva_dit.report.layout import known, markdown_rows


def flips_rows(record: dict[str, Any]) -> list[list[str]]:
    """Header and rows of a flip test's table."""
    groups = ("all", "selected", "rejected")
    rows = [
        ["estimator", *groups, *(f"sign, {g}" for g in groups[1:]), "dL/dk sign", "dL/dk est/true"]
    ]
    for name, found in record["estimators"].items():
        budget = record["budget"].get(name)
        rows.append(
            [
                name,
                *(known(found[group]["spearman"], "{:+.2f}") for group in groups),
                *(known(found[group]["sign"], "{:.0%}") for group in groups[1:]),
                known(budget and budget["sign"], "{:.0%}"),
                known(budget and budget["median_of_estimate_over_truth"], "{:+.2f}"),
            ]
        )
    return rows


def flips_table(record: dict[str, Any]) -> str:
    """A flip test's table, as Markdown."""
    config = record["config"]
    tokens = config["tokens"] or "all"
    note = (
        f"{record['title']}: {config['images']} samples at as many times, {tokens} tokens of each "
        f"block flipped; loss: {config['loss']}. Rank correlations with the true effect, mean over "
        "samples and blocks; `-`: says nothing."
    )
    return f"{markdown_rows(flips_rows(record))}\n\n{note}"


def caption_rows(record: dict[str, Any]) -> list[list[str]]:
    """Header and rows of the caption ablation: share of ink kept, mean over pruned blocks."""
    names = {
        "true": "own caption",
        "empty": "no caption",
        "swapped": "another image's caption",
        "chance": "any token",
    }
    times = sorted(record["shares"]["true"], key=float, reverse=True)  # as a sampler goes
    rows = [["share of ink tokens kept", *(f"t = {t}" for t in times)]]
    for kind, name in names.items():
        found = record["shares"][kind]
        rows.append([name, *(f"{sum(found[t]) / len(found[t]):.0%}" for t in times)])
    return rows


def caption_table(record: dict[str, Any]) -> str:
    """The caption ablation's table, as Markdown."""
    return (
        f"{markdown_rows(caption_rows(record))}\n\n{record['count']} held-out images; ink is "
        f"{record['ink']:.0%} of the tokens; mean over the pruned blocks. At t = 1 nothing of the "
        "image is left."
    )
