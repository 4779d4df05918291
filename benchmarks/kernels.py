"""Times each Triton kernel against the torch code that it stands in for, and writes a record.

Tokens in bfloat16. Four arms: torch code and kernel, each called from Python and through
`torch.compile`; soft ranks, forward and backward, by every method. Calls are interleaved. Twice
timed: as Python launches it, and where possible from a CUDA graph, which is the device's share
alone. Inputs are the same in every call, hence in the cache where they fit. What is timed is first
compared with the torch code.

    python benchmarks/kernels.py --out results
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before triton is imported

import torch.nn.functional as F
from torch import Tensor

from shiva_dit import kernels
from shiva_dit.core.selection import gather_tokens, keep_count, scatter_tokens, select_top_k
from shiva_dit.core.soft_rank import RankMethod, soft_rank
from shiva_dit.modules.router import TokenScorer
from shiva_dit.provenance import hardware_name, provenance, write_json

SHAPES = [(1, 4096, 1536), (4, 4096, 1536), (1, 4096, 3072), (1, 16384, 3072)]
TINY = [(2, 40, 24)]
HIDDEN, TAU, IN_GRAPH = 64, 0.2, 10
METHODS: tuple[RankMethod, ...] = ("chunked", "exp_sum", "triton")
Arms = dict[str, Callable[[], Any]]


def main() -> None:
    """Run all cases and write one record."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder for the record")
    parser.add_argument("--keep", type=float, default=0.6)
    parser.add_argument("--repeats", type=int, default=30, help="interleaved timings per arm")
    parser.add_argument("--tiny", action="store_true", help="small tensors, on a CPU too")
    options = parser.parse_args()
    if not torch.cuda.is_available() and not options.tiny:
        raise SystemExit("there is no GPU here: pass --tiny to try the script on a CPU.")
    repeats = 2 if options.tiny else options.repeats
    torch.manual_seed(0)
    torch._dynamo.config.recompile_limit = 64
    cases = []
    for shape in TINY if options.tiny else SHAPES:
        for name, arms in _arms(*shape, options.keep).items():
            case = {"what": name, "shape": list(shape), "arms": _time(arms, repeats)}
            cases.append(case)
            print(json.dumps(case), flush=True)
    stamp = datetime.date.today().isoformat()
    hardware = hardware_name(provenance())
    name = "kernels-tiny" if options.tiny else "kernels"
    record = {
        "what": name,
        "config": {key: value for key, value in vars(options).items() if key != "out"},
        "hidden": HIDDEN,
        "dtype": "bfloat16",
        "tau": TAU,
        "triton": importlib.metadata.version("triton"),
        "cases": cases,
        "provenance": provenance(),
    }
    write_json(options.out / f"{name}--{hardware}--{stamp}.json", record)


def _arms(batch: int, num_tokens: int, width: int, keep_ratio: float) -> dict[str, Arms]:
    """What is timed at one size, by kernel; every result has been checked."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with torch.device(device):
        x = torch.randn(batch, num_tokens, width).bfloat16()
        condition = torch.randn(batch, HIDDEN)
        scorer = TokenScorer(width, 16, 16, HIDDEN, True).requires_grad_(False)
    k = keep_count(num_tokens, keep_ratio)
    with kernels.use():
        scores = scorer(x, condition)
        chosen = select_top_k(scores, k)
        after = -gather_tokens(x, chosen)

    def block() -> Tensor:
        kept = select_top_k(scorer(x, condition), k)
        return scatter_tokens(x, kept, -gather_tokens(x, kept))

    calls: Arms = {
        "router_scores": lambda: scorer(x, condition),
        "select_top_k": lambda: select_top_k(scores, k),
        "gather_tokens": lambda: gather_tokens(x, chosen),
        "scatter_tokens": lambda: scatter_tokens(x, chosen, after),
        "all": block,
    }
    found = {}
    for name, call in calls.items():
        on = kernels.NAMES if name == "all" else (name,)
        arms = {
            "torch": _switched(call),
            "torch_compiled": _switched(_compiled(call)),
            "kernel": _switched(call, *on),
            "kernel_compiled": _switched(_compiled(call), *on),
        }
        _check(name, arms, lambda: _in_double(scorer, x, condition))
        found[name] = arms
    upstream = torch.randn_like(scores)
    ranked = scores.clone().requires_grad_()

    def rank(method: RankMethod) -> Tensor:
        ranks = soft_rank(ranked, TAU, method=method)
        return torch.stack([ranks.detach(), *torch.autograd.grad(ranks, ranked, upstream)])

    ranks: Arms = {method: lambda method=method: rank(method) for method in METHODS}
    # Rounding of float32, in units of the whole; measured about 1e-7 each.
    for exact, mine in zip(ranks["chunked"](), ranks["triton"](), strict=True):
        assert (exact - mine).norm() <= 1e-5 * exact.norm()
    return {**found, "soft_rank": ranks}


def _switched(call: Callable[[], Any], *names: str) -> Callable[[], Any]:
    def run() -> Any:
        with torch.no_grad(), kernels.use(*names):
            return call()

    return run


def _compiled(call: Callable[[], Any]) -> Callable[[], Any]:
    backend = "inductor" if torch.cuda.is_available() else "eager"
    return torch.compile(call, fullgraph=True, backend=backend)


def _in_double(scorer: TokenScorer, x: Tensor, condition: Tensor) -> Tensor:
    """Eq. 9 in float64."""
    wide = {name: value.double() for name, value in scorer.state_dict().items()}
    x = F.layer_norm(x.double(), x.shape[-1:])
    h = F.linear(x, wide["project_tokens.weight"], wide["project_tokens.bias"])
    h = F.silu(h + condition.double()[:, None])
    h = F.layer_norm(h, h.shape[-1:], wide["score_norm.weight"], wide["score_norm.bias"])
    return (h * wide["score.weight"][0]).sum(-1)


def _check(name: str, arms: Arms, truth: Callable[[], Tensor]) -> None:
    expected = arms["torch"]()
    if name == "all":
        return  # scores round differently: a token near the border may change places
    for arm in ("kernel", "kernel_compiled"):
        found = arms[arm]()
        if name != "router_scores":
            assert torch.equal(found, expected), (name, arm)
            continue
        exact = truth()
        # The interpreter cuts off bits where a GPU rounds to bfloat16.
        slack = 4.0 if kernels.interpreted() else 2.0
        assert (found - exact).norm() <= slack * (expected - exact).norm(), (name, arm)


def _time(arms: Arms, repeats: int) -> dict[str, dict[str, Any]]:
    """Medians and spreads in milliseconds, as launched and from a graph."""
    for call in arms.values():
        for _ in range(3):
            call()
    rows: dict[str, dict[str, Any]] = {name: {} for name in arms}
    ways = {"latency_ms": (arms, 1)}
    if torch.cuda.is_available():
        graphs = {n: _graph(call) for n, call in arms.items() if n not in METHODS}
        ways["device_ms"] = (graphs, IN_GRAPH)
    for way, (calls, count) in ways.items():
        times: dict[str, list[float]] = {name: [] for name in calls}
        for _ in range(repeats):
            for name, call in calls.items():
                times[name].append(_milliseconds(call) / count)
        for name, found in times.items():
            rows[name] |= {
                way: statistics.median(found),
                f"{way}_spread": [min(found), max(found)],
            }
    return rows


def _graph(call: Callable[[], Any]) -> Callable[[], Any]:
    """Several calls in a row as one CUDA graph."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(IN_GRAPH):
            call()
    return graph.replay


def _milliseconds(call: Callable[[], Any]) -> float:
    """Mean over five calls in a row, on the device's own clock."""
    if not torch.cuda.is_available():
        start = time.perf_counter()
        call()
        return 1000 * (time.perf_counter() - start)
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for _ in range(5):
        call()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end) / 5


if __name__ == "__main__":
    main()
