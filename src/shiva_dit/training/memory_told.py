"""What a run needs, for people."""

from __future__ import annotations

from shiva_dit.training.memory import Needs


def told(needs: Needs, processes: int) -> str:
    """For people."""
    weights = ", ".join(f"{name} {_size(held)}" for name, held in needs.weights.items())
    rows = {
        "the model's weights": f"{_size(sum(needs.weights.values()))} ({weights})",
        "the teacher's": _size(needs.teacher) if needs.teacher else "0 (the model is its own)",
        "routers and policy": _size(needs.adapter),
        "moving average, weights as given": _size(needs.averages),
        "Adam's moments": _size(needs.moments),
        "gradients and their sums": _size(needs.gradients),
        "weights gathered at once": _size(needs.gathered),
        "activations of a part": f"{_size(needs.activations)} at the mean keep ratio, "
        f"{_size(needs.activations_dense)} if it keeps all tokens",
        "at most at once": _size(needs.total),
    }
    if not needs.gathered:
        del rows["weights gathered at once"]
    each = "" if processes == 1 else f", each of {processes} processes"
    width = max(map(len, rows))
    lines = [f"Memory{each}; {needs.trained:,} weights are trained:"]
    lines += [f"  {name:<{width}}  {value}" for name, value in rows.items()]
    lines.append(
        f"On the disk {_size(needs.disk)} at most: checkpoints of {_size(needs.checkpoint)}, "
        f"the adapter {_size(needs.adapter_file)}."
    )
    lines.append(
        "Not counted: what a GPU's driver, its kernels and its allocator take (1 to 2 GiB)."
    )
    return "\n".join(lines)


def _size(size: int) -> str:
    for unit, name in ((2**30, "GiB"), (2**20, "MiB")):
        if size >= unit:
            return f"{size / unit:.1f} {name}"
    return f"{size / 2**10:.1f} KiB"
