"""Rows and notes of the benchmark's tables, from its records."""

from __future__ import annotations

from collections.abc import Callable
from statistics import median
from typing import Any

from shiva_dit.benchmark.operators import OPERATORS
from shiva_dit.benchmark.parts import PARTS
from shiva_dit.benchmark.timing import quartiles


def benchmark_rows(record: dict[str, Any]) -> list[list[str]]:
    """Header and rows of a benchmark's table."""
    on_cpu = record["rows"][0]["cpu_ms"] is not None
    steps = record["config"]["steps"]
    head = ["arm", "FLOPs", "ms per forward (quartiles)", "speed-up", "by FLOPs", "efficiency"]
    head += ["efficiency, CPU time"] if on_cpu else ["peak, GiB"]
    head += ["images/s", f"dense steps in the time of {steps}", *PARTS]
    rows = [head]
    dense = record["rows"][0]
    for row in record["rows"]:
        low, high = quartiles(row["latency_ms"])
        cells = [
            row["arm"],
            f"{row['flops'] / dense['flops']:.3f}",
            f"{median(row['latency_ms']):.1f} ({low:.1f} to {high:.1f})",
            f"{row['speed_up']:.2f}",
            f"{row['ideal_speed_up']:.2f}",
            f"{row['efficiency']:.2f}",
        ]
        if on_cpu:
            cells.append(f"{row['speed_up_cpu'] / row['ideal_speed_up']:.2f}")
        else:
            cells.append(f"{row['memory_peak_mib'] / 1024:.2f}")
        cells += [f"{row['images_per_second']:.3g}", f"{row['dense_steps_at_equal_time']:.1f}"]
        parts = row.get("parts_ms")
        whole = median(dense["latency_ms"])
        cells += [f"{parts[part] / whole:.1%}" if parts else "-" for part in PARTS]
        rows.append(cells)
    return rows


def benchmark_note(record: dict[str, Any]) -> str:
    """What must be known to read a benchmark's table."""
    config, where = record["config"], record["provenance"]
    threads = f", {where['threads']} threads" if record["rows"][0]["cpu_ms"] is not None else ""
    adapter = config["adapter"]
    schedule = "equal ratios in all blocks but the first" if adapter is None else f"by {adapter}"
    if config.get("select_every"):  # older records don't say
        schedule += f", {config['select_every']} in a row share their scores"
    return (
        f"{config['model']}: {record['image_tokens']:,} image and {record['text_tokens']} text "
        f"tokens, batch {config['batch']}, {config['dtype']}, all arms {config['mode']}, "
        f"{record['pruned_blocks']} of {record['blocks']} blocks pruned, {schedule}; "
        f"{where['device']}{threads}; medians of {config['repeats']} interleaved rounds. The "
        "transformer alone, one forward per step. Parts are timed each by itself, as shares of the "
        f"dense forward. {_break_even(record['break_even'])}"
    )


def _break_even(keep: float | None) -> str:
    if keep is None:
        return "Here pruning pays at no ratio: selecting costs more than all blocks save."
    return f"Here pruning pays below a keep ratio of {keep:.2f}."


def training_rows(record: dict[str, Any]) -> list[list[str]]:
    """Header and rows of a benchmark of training steps."""
    on_cpu = record["rows"][0]["cpu_ms"] is not None
    head = ["arm", "ms per step (quartiles)", "of the dense step"]
    head += ["of it, CPU time"] if on_cpu else []
    has_saved = "saved_of_dense" in record["rows"][0]  # older records don't say
    rows = [head + (["kept for backward, of the dense step's"] if has_saved else [])]
    for row in record["rows"]:
        low, high = quartiles(row["latency_ms"])
        cells = [row["arm"], f"{median(row['latency_ms']):.0f} ({low:.0f} to {high:.0f})"]
        cells.append(f"{row['of_dense']:.2f}")
        cells += [f"{row['of_dense_cpu']:.2f}"] if on_cpu else []
        rows.append(cells + ([f"{row['saved_of_dense']:.2f}"] if has_saved else []))
    return rows


def training_note(record: dict[str, Any]) -> str:
    """What must be known to read a benchmark of training steps."""
    config, where = record["config"], record["provenance"]
    tuned = {"full": "all weights tuned", "lora": "a LoRA of rank 16 tuned"}[config["train"]]
    return (
        f"{config['model']}: {record['image_tokens']:,} image and {record['text_tokens']} text "
        f"tokens, batch {config['batch']}, {config['dtype']}, {tuned}; {where['device']}, "
        f"{where['threads']} threads; medians of {config['repeats']} interleaved steps with their "
        "optimizer's part."
    )


def scaling_rows(record: dict[str, Any]) -> list[list[str]]:
    """Header and rows of a benchmark at several sizes."""
    first = record["sizes"][0]["rows"]
    arms = [row["arm"] for row in first if "parts_ms" in row]
    columns = [f"{arm}: {what}" for arm in arms for what in ("speed-up", "by FLOPs")]
    rows = [["image tokens", "dense, ms", *columns, "pays below"]]
    for size in record["sizes"]:
        by_arm = {row["arm"]: row for row in size["rows"]}
        cells = [f"{size['image_tokens']:,}", f"{median(by_arm['dense']['latency_ms']):.0f}"]
        for arm in arms:
            cells.append(f"{by_arm[arm]['speed_up']:.2f}")
            cells.append(f"{by_arm[arm]['ideal_speed_up']:.2f}")
        cells.append("never" if size["break_even"] is None else f"{size['break_even']:.2f}")
        rows.append(cells)
    return rows


def scaling_note(record: dict[str, Any]) -> str:
    """What must be known to read it."""
    config, where = record["config"], record["provenance"]
    return (
        f"{config['model']}, batch {config['batch']}, {config['dtype']}, {config['mode']}, "
        f"{record['sizes'][0]['text_tokens']} text tokens; {where['device']}, {where['threads']} "
        f"threads; medians of {config['repeats']} interleaved rounds. `pays below`: the keep ratio "
        "below which pruning pays."
    )


OTHERS = {"compile": "compile", "int8": "int8", "mag_cache": "MagCache"}


def pair_rows(record: dict[str, Any]) -> list[list[str]]:
    """Header and rows of a benchmark of arms without and with something else."""
    other = OTHERS[record["config"]["beside"]]
    head = ["arm", "ms per forward", f"with {other}", f"{other} gives", "pruning gives"]
    rows = [[*head, f"pruning gives, with {other}", "both", "both, if they multiplied"]]
    dense = record["rows"][0]
    for row in record["rows"]:
        times = [f"{median(row[kind]['latency_ms']):.1f}" for kind in ("alone", "beside")]
        gains = ("other_gives", "pruning_gives", "pruning_gives_beside", "both_give")
        product = row["pruning_gives"] * dense["other_gives"]
        rows.append([row["arm"], *times, *(f"{row[gain]:.2f}" for gain in gains), f"{product:.2f}"])
    return rows


def pair_note(record: dict[str, Any]) -> str:
    """What must be known to read it."""
    config, where = record["config"], record["provenance"]
    mode = "" if config["beside"] == "compile" else f", all arms {config['mode']}"
    what = {
        "compile": "",
        "int8": "int8: weights and activations of all linear layers, by torchao. ",
        "mag_cache": f"MagCache runs {record['share_run']:.0%} of a sampling's "
        f"{record['forwards_per_time']} steps. ",
    }
    return (
        f"{config['model']}: {record['image_tokens']:,} image and {record['text_tokens']} text "
        f"tokens, batch {config['batch']}, {config['dtype']}{mode}; {where['device']}, "
        f"{where['threads']} threads; medians of {config['repeats']} interleaved rounds. "
        f"{what[config['beside']]}Times only: what both cost in quality is not told here."
    )


def operator_rows(record: dict[str, Any]) -> list[list[str]]:
    """Header and rows: where each arm's time goes, as shares of the dense one's."""
    rows = [["arm", "time", *OPERATORS]]
    whole = sum(record["rows"][0]["operators_ms"].values())
    for row in record["rows"]:
        shares = [row["operators_ms"][kind] / whole for kind in OPERATORS]
        rows.append([row["arm"], *(f"{share:.3f}" for share in (sum(shares), *shares))])
    return rows


def operator_note(record: dict[str, Any]) -> str:
    """What must be known to read it."""
    config = record["config"]
    return (
        f"{config['model']}, {config['dtype']}, {config['mode']}, by torch's profiler, apart from "
        "the times above, as shares of the dense arm's time; what passes between operators is not "
        "in it."
    )


def timing_rows(record: dict[str, Any]) -> list[list[str]]:
    """Header and rows of a benchmark of any kind."""
    return _timing(record)[0](record)


def timing_note(record: dict[str, Any]) -> str:
    """What must be known to read them."""
    return _timing(record)[1](record)


def _timing(
    record: dict[str, Any],
) -> tuple[Callable[[dict[str, Any]], list[list[str]]], Callable[[dict[str, Any]], str]]:
    if "sizes" in record:
        return scaling_rows, scaling_note
    if record["config"].get("beside") is not None:  # older records don't say
        return pair_rows, pair_note
    if record["config"]["train"] is not None:
        return training_rows, training_note
    return benchmark_rows, benchmark_note
