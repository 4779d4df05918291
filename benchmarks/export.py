"""A forward of a pruned model: as it is, compiled, and from files, in turns.

TORCHINDUCTOR_COMPILE_THREADS=1 python benchmarks/export.py --out results/export--CPU--DATE.json

Weights are random. Seconds are of CPU, of all threads and of the compiler's processes: what else
the machine does isn't in them.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

import shiva_dit
from shiva_dit.adapter import ShivaAdapter, ShivaConfig
from shiva_dit.benchmark.timing import interleaved, keep_memory
from shiva_dit.benchmark.workloads import workload
from shiva_dit.core.schedule import Schedule
from shiva_dit.export import Programs, export_run
from shiva_dit.models.families import model_spec
from shiva_dit.provenance import provenance, write_json

SIZE, TEXT, KEEP, TIME = (512, 512), 77, 0.4, 0.5


def main() -> None:
    """Time all arms and write the record."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--repeats", type=int, default=11)
    options = parser.parse_args()
    torch.set_num_threads(1)
    keep_memory()
    work = workload("sd3-small")
    work = replace(work, config={**work.config, "num_layers": options.layers})
    grid = work.grid(SIZE)

    def made() -> Any:
        model = work.build(grid, torch.float32, torch.device("cpu"))
        torch.manual_seed(1)
        adapter = ShivaAdapter(ShivaConfig.for_model(model))
        schedule = Schedule.uniform(KEEP, num_blocks=options.layers, full_blocks=(0,))
        return shiva_dit.apply(model, adapter, schedule=schedule)

    eager, compiled = made(), made()
    spec = model_spec(eager)
    torch.manual_seed(2)
    inputs = work.inputs(eager, 1, grid, TEXT, torch.float32)
    inputs |= spec.times(spec.timestep_at(torch.full((1,), TIME)))

    def run() -> Any:
        return eager(**inputs, return_dict=False)[0]

    rows: dict[str, dict[str, Any]] = {"eager": {"off_by": 0.0}}
    calls: dict[str, Callable[[], Any]] = {"eager": run}
    with tempfile.TemporaryDirectory() as place, torch.no_grad():
        expected = run()
        for engine, name in (("export", "torch.export"), ("inductor", "AOTInductor")):
            folder = Path(place, engine)
            making = seconds(lambda f=folder, e=engine: export_run(eager, run, f, engine=e))
            programs: list[Programs] = []
            loading = seconds(lambda f=folder, p=programs: p.append(Programs(f)))
            loading += seconds(lambda p=programs: p[0](call=0, **inputs))
            calls[name] = lambda p=programs: p[0](call=0, **inputs)
            rows[name] = {"made_cpu_s": making, "first_cpu_s": loading}
            rows[name]["mib"] = sum(f.stat().st_size for f in folder.glob("*.pt2")) / 2**20
        shiva_dit.compile(compiled)
        calls["torch.compile"] = lambda: compiled(**inputs, return_dict=False)[0]
        rows["torch.compile"] = {"first_cpu_s": seconds(calls["torch.compile"])}
        for name, call in calls.items():
            rows[name]["off_by"] = float((call() - expected).norm() / expected.norm())
        found = interleaved(calls, repeats=options.repeats, device=torch.device("cpu"))
    for name, row in rows.items():
        row |= {"arm": name, "latency_ms": found[name].latency_ms, "cpu_ms": found[name].cpu_ms}
        row["of_eager"] = found[name].share_of(found["eager"])
    about = {"model": "sd3-small", "layers": options.layers, "size": SIZE, "text": TEXT}
    about |= {"keep": KEEP, "dtype": "float32", "repeats": options.repeats}
    about["tokens"] = work.num_tokens(grid)
    record = {"what": "export", "config": about, "rows": list(rows.values())}
    write_json(options.out, {**record, "provenance": provenance()})


def seconds(call: Callable[[], object]) -> float:
    """CPU seconds of a call, of this process and of those that it has waited for."""
    before = os.times()
    call()
    after = os.times()
    return sum(after[:4]) - sum(before[:4])


if __name__ == "__main__":
    main()
