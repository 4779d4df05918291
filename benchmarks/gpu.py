"""Times a dense against a pruned SD3 transformer of real size on a GPU, and writes a record.

Random weights, bfloat16, both arms compiled block by block, calls interleaved in one process. The
schedule is uniform over blocks 2 to L. Only the transformer is timed: one call is one denoising
step of one batch.

    python benchmarks/gpu.py --out results --keep 0.8 0.6 0.4
"""

from __future__ import annotations

import argparse
import datetime
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers import SD3Transformer2DModel

import shiva_dit
from shiva_dit.adapter import ShivaAdapter, ShivaConfig
from shiva_dit.models.attach import attachment_of
from shiva_dit.provenance import provenance, write_json

# Checked against the published configuration: 2243.17 M parameters.
SD35_MEDIUM: dict[str, Any] = {
    "sample_size": 128,
    "patch_size": 2,
    "in_channels": 16,
    "out_channels": 16,
    "num_layers": 24,
    "attention_head_dim": 64,
    "num_attention_heads": 24,
    "joint_attention_dim": 4096,
    "caption_projection_dim": 1536,
    "pooled_projection_dim": 2048,
    "pos_embed_max_size": 384,
    "dual_attention_layers": tuple(range(13)),
    "qk_norm": "rms_norm",
}
TINY = {**SD35_MEDIUM, "num_layers": 3, "num_attention_heads": 2, "caption_projection_dim": 128}
TINY |= {"sample_size": 32, "pos_embed_max_size": 32, "dual_attention_layers": (0,)}
TEXT_TOKENS = 333


def main() -> None:
    """Run all cases and write one record."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder for the record")
    parser.add_argument("--keep", type=float, nargs="+", default=[0.8, 0.6, 0.4])
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--repeats", type=int, default=15, help="interleaved calls per arm")
    parser.add_argument("--eager", action="store_true", help="compile neither arm")
    parser.add_argument("--tiny", action="store_true", help="a small model, on a CPU too")
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu" and not options.tiny:
        raise SystemExit("there is no GPU here: pass --tiny to try the script on a CPU.")
    config = TINY if options.tiny else SD35_MEDIUM
    torch.manual_seed(0)
    # One code object serves all blocks: dense and pruned, dual and plain, each k symbolic.
    torch._dynamo.config.recompile_limit = 64
    with torch.device(device):
        model = SD3Transformer2DModel(**config).to(torch.bfloat16).eval()
    cases = []
    for batch in options.batch:
        cases.append(_case(model, batch, options, device))
        print(json.dumps(cases[-1], indent=1), flush=True)
    stamp = datetime.date.today().isoformat()
    name = "tiny" if options.tiny else "sd35-medium"
    mode = "eager" if options.eager else "compiled"
    hardware = provenance()["device"].split(",")[0].replace(" ", "-").lower()
    record = {
        "what": f"speed-{name}-{mode}",
        "config": {key: value for key, value in vars(options).items() if key != "out"},
        "model": config,
        "text_tokens": TEXT_TOKENS,
        "dtype": "bfloat16",
        "cases": cases,
        "provenance": provenance(),
    }
    write_json(options.out / f"speed-{name}-{mode}--{hardware}--{stamp}.json", record)


def _case(
    model: Any, batch: int, options: argparse.Namespace, device: torch.device
) -> dict[str, Any]:
    """Dense against every keep ratio at one batch size."""
    side = model.config.sample_size
    num_tokens = (side // model.config.patch_size) ** 2
    inputs = {
        "hidden_states": torch.randn(batch, model.config.in_channels, side, side, device=device),
        "encoder_hidden_states": torch.randn(batch, TEXT_TOKENS, 4096, device=device),
        "pooled_projections": torch.randn(batch, 2048, device=device),
        "timestep": torch.full((batch,), 500.0, device=device),
    }
    inputs = {k: v if k == "timestep" else v.to(torch.bfloat16) for k, v in inputs.items()}
    adapter = ShivaAdapter(ShivaConfig.for_model(model)).to(device)

    def call() -> None:
        model(**inputs, return_dict=False)

    def prepare(keep_ratio: float | None) -> None:
        attachment = attachment_of(model)
        assert attachment is not None
        attachment.enabled = keep_ratio is not None
        if keep_ratio is not None:
            attachment.schedule = schedules[keep_ratio]
            attachment._tables.clear()

    blocks = model.config.num_layers
    schedules = {r: shiva_dit.Schedule.uniform(r, num_blocks=blocks) for r in options.keep}
    shiva_dit.apply(model, adapter)
    if not options.eager:
        shiva_dit.compile(model)
    arms: list[float | None] = [None, *options.keep]
    times: dict[float | None, list[float]] = {arm: [] for arm in arms}
    peaks = {}
    with torch.no_grad():
        for arm in [*arms, *arms]:  # the second round meets every symbolic size once more
            prepare(arm)
            for _ in range(3):
                call()
        for _ in range(options.repeats):
            for arm in arms:
                prepare(arm)
                times[arm].append(_milliseconds(call, device))
        for arm in arms:
            prepare(arm)
            peaks[arm] = _peak_mib(call, device)
    dense = statistics.median(times[None])
    rows = []
    for arm in options.keep:
        prepare(arm)
        ideal = shiva_dit.summary(model, num_tokens=num_tokens, text_tokens=TEXT_TOKENS)
        median = statistics.median(times[arm])
        rows.append(
            {
                "keep_ratio": arm,
                "latency_ms": median,
                "latency_ms_spread": [min(times[arm]), max(times[arm])],
                "memory_peak_mib": peaks[arm],
                "speed_up": dense / median,
                "ideal_speed_up": ideal.flops_dense / ideal.flops_pruned,
                "efficiency": dense / median / (ideal.flops_dense / ideal.flops_pruned),
            }
        )
    shiva_dit.remove(model)
    return {
        "batch": batch,
        "image_tokens": num_tokens,
        "dense_latency_ms": dense,
        "dense_latency_ms_spread": [min(times[None]), max(times[None])],
        "dense_memory_peak_mib": peaks[None],
        "rows": rows,
    }


def _milliseconds(call: Callable[[], None], device: torch.device) -> float:
    """Mean over three calls in a row, on the device's own clock."""
    if device.type == "cpu":
        start = time.perf_counter()
        call()
        return 1000 * (time.perf_counter() - start)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(3):
        call()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / 3


def _peak_mib(call: Callable[[], None], device: torch.device) -> float | None:
    if device.type == "cpu":
        return None
    torch.cuda.reset_peak_memory_stats()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() / 2**20


if __name__ == "__main__":
    main()
