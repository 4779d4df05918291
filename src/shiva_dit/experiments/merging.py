"""One record of a comparison from several, whose seeds ran on several machines."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from shiva_dit.config import from_dict
from shiva_dit.experiments.compare import Comparison
from shiva_dit.experiments.scoring import UNNAMED

BY_SEED = "_by_seed"
SCHEDULES = "schedules"
FAILED = "failed"


def merge_records(records: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Records of one comparison, each with seeds of its own, as one.

    Means are taken anew. What isn't by seed (FLOPs, the floor) is the first record's.

    Args:
        records: At least two, as `shiva-dit compare` writes them.

    Raises:
        ValueError: If they aren't of one comparison, share a seed, or one is of nothing.
    """
    if len(records) < 2:
        raise ValueError("merging needs at least two records.")
    if any(not record.keys() >= {"config", "rows", "runs_at"} for record in records):
        raise ValueError("one of these is no record of a comparison (`shiva-dit compare`).")
    if not all(record["rows"] and record["config"]["seeds"] for record in records):
        raise ValueError("one of these has no rows or names no seeds: there is nothing to merge.")
    first = records[0]
    plain = [_comparison(record["config"]) for record in records]
    names = [[row["method"] for row in record["rows"]] for record in records]
    for record, config, methods in zip(records[1:], plain[1:], names[1:], strict=True):
        if config != plain[0] or methods != names[0]:
            raise ValueError(
                f"records of {first['what']!r} and {record['what']!r} differ in more than seeds: "
                "merge records of one recipe."
            )
    seeds = [seed for record in records for seed in record["config"]["seeds"]]
    if len(set(seeds)) < len(seeds):
        raise ValueError(f"a seed is in two records: {sorted(seeds)}; each must be in one.")
    runs = [run for record in records for run in record["runs_at"]]
    return {
        **first,
        "config": {**first["config"], "seeds": seeds},
        "rows": [_merged_row(rows) for rows in zip(*(r["rows"] for r in records), strict=True)],
        "runs_at": [run for i, run in enumerate(runs) if run not in runs[:i]],
        "runs_of_this_call": sum(record["runs_of_this_call"] for record in records),
        "wall_s": sum(record["wall_s"] for record in records),
        "merged": [record["provenance"] for record in records],
    }


def _comparison(config: dict[str, Any]) -> Comparison:
    """Read as recipes are: what a record was written without counts as its default."""
    settings = {"sampler": UNNAMED, **config["settings"]}
    return from_dict(Comparison, {**config, "settings": settings, "seeds": [0]}, "a record")


def _merged_row(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """One arm's row, over all seeds; a record in which all of its seeds diverged adds no values."""
    whole = [row for row in rows if f"flops{BY_SEED}" in row] or rows[:1]
    merged = dict(whole[0])
    for name in whole[0]:
        if name.endswith(BY_SEED) or name == SCHEDULES:
            merged[name] = [value for row in whole for value in row[name]]
    for name in whole[0]:
        if name + BY_SEED in merged:
            merged[name] = statistics.fmean(merged[name + BY_SEED])
    failed = [found for row in rows for found in row.get(FAILED, [])]
    return {**merged, FAILED: failed} if failed else merged
