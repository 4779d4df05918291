"""How rows, cells and notes are written."""

from __future__ import annotations


def markdown_rows(rows: list[list[str]]) -> str:
    """Header and rows as a Markdown table.

    Raises:
        ValueError: If there are no rows below the header, or nothing stands in them.
    """
    head, *body = rows
    if not body or len(head) < 2:
        raise ValueError("it gives an empty table: there is nothing in it that could stand there.")
    return "\n".join("| " + " | ".join(r) + " |" for r in [head, ["---"] * len(head), *body])


def plain_rows(rows: list[list[str]]) -> str:
    """Header and rows in columns, for a terminal."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)) for row in rows]
    lines.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join(line.rstrip() for line in lines)


def known(value: float | int | None, form: str) -> str:
    """A cell of one number, where there is one."""
    return "-" if value is None else form.format(value)


def spread(values: list[float], form: str) -> str:
    """A cell of a number by seed: mean and, of several, standard deviation."""
    mean = sum(values) / len(values)
    if len(values) == 1:
        return form.format(mean)
    deviation = (sum((v - mean) ** 2 for v in values) / (len(values) - 1)) ** 0.5
    return f"{form.format(mean)} ± {form.format(deviation)}"


def by_seed(seeds: list[int]) -> str:
    """How many seeds a table is of, and what its cells then hold."""
    if not seeds:
        raise ValueError("its config names no seeds: at least one is needed.")
    return f"{len(seeds)} seeds (mean ± standard deviation)." if len(seeds) > 1 else "1 seed."


SAMPLERS = {
    "euler": "Euler over t = 1, 1 - 1/n, ..., 1/n",
    "unipc": "UniPC",
    "dpmpp": "DPM-Solver++",
    "euler_diffusers": "Euler with diffusers' default steps",
}


def sampled_by(sampler: str | None) -> str:
    """How a record's pictures were sampled, in a sentence or two; None: the record doesn't say."""
    if sampler is None:
        return "Sampled by Euler with diffusers' default steps, before the fix."
    return (
        f"Sampled by {SAMPLERS[sampler]} unless a row says otherwise; what is compared with the "
        "unpruned model is with its pictures by UniPC in twice the steps."
    )
