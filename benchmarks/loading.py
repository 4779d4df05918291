"""How long training waits for encoded pictures: opening, the first batch, steps, memory, disk.

    PYTHONPATH=src python benchmarks/loading.py --pictures 50000 --out /tmp/loading

Writes shards of random numbers once (nothing is encoded), then reads them as training does.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from pathlib import Path

import torch

from shiva_dit.training.data import Feed
from shiva_dit.training.pictures.about import LATENTS, TEXT, About, Sample
from shiva_dit.training.pictures.encoded import FolderData
from shiva_dit.training.pictures.shards import Shards


def main() -> None:
    """Open the folder, take batches, and say how long each was waited for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for the shards")
    parser.add_argument("--pictures", type=int, default=2000)
    parser.add_argument("--captions", type=int, help="distinct ones; as many as pictures")
    parser.add_argument("--channels", type=int, default=16)
    parser.add_argument("--side", type=int, default=64, help="of the latents")
    parser.add_argument("--tokens", type=int, default=333)
    parser.add_argument("--width", type=int, default=4096, help="of the text")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--step-ms", type=float, default=10.0)
    parser.add_argument("--ahead", type=int, default=6)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--device", default="cpu", help="cuda: batches are moved there, too")
    parser.add_argument("--apart", action="store_true", help="reading on another core of its own")
    options = parser.parse_args()
    if not (options.out / "data.json").is_file():
        write(options)
    size = sum(path.stat().st_size for path in options.out.rglob("*.safetensors"))
    print(f"{size / 1e9:.2f} GB, {size / options.pictures / 1e6:.3f} MB a picture")
    begun = time.perf_counter()
    data = FolderData(options.out, workers=options.workers, pinned=options.device == "cuda")
    opened = time.perf_counter() - begun
    generator, device = torch.Generator().manual_seed(0), torch.device(options.device)
    feed = Feed(data, seed=0, ahead=options.ahead)
    data.batch(feed.take(options.batch), generator).to(device)
    print(f"opened in {opened:.2f} s, first batch after {time.perf_counter() - begun:.2f} s")
    if options.apart:
        put_apart()
    waits, memory = [], [resident()]
    own, every = time.thread_time(), time.process_time()
    for step in range(options.steps):
        begun = time.perf_counter()
        data.batch(feed.take(options.batch), generator).to(device)
        waits.append(time.perf_counter() - begun)
        time.sleep(options.step_ms / 1e3)  # the device works, the processor doesn't
        if step % (options.steps // 5) == 0:
            memory.append(resident())
    own, every = time.thread_time() - own, time.process_time() - every
    late = waits[options.steps // 10 :]
    share = statistics.mean(late) / (options.step_ms / 1e3)
    print(
        f"waited {statistics.mean(late) * 1e3:.3f} ms a step ({share:.2%} of {options.step_ms} "
        f"ms), median {statistics.median(late) * 1e3:.3f}, worst {max(late) * 1e3:.1f} ms"
    )
    print(
        f"processor time a step: {own / options.steps * 1e3:.3f} ms of the thread that trains, "
        f"{every / options.steps * 1e3:.2f} ms in all"
    )
    print("memory in MB: " + " ".join(f"{value / 1e6:.0f}" for value in memory))


def put_apart() -> None:
    """Leave the first core to this thread alone; those that were started keep the others."""
    first, *others = sorted(os.sched_getaffinity(0))
    for task in Path("/proc/self/task").iterdir():
        os.sched_setaffinity(int(task.name), others)
    os.sched_setaffinity(0, {first})


def resident() -> int:
    """Bytes of memory of this process."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def write(options: argparse.Namespace) -> None:
    """Random latents and captions, as `shiva-dit encode` writes them."""
    captions = options.captions or options.pictures
    samples = [
        Sample(f"{i:06d}.png", f"{i:032x}", (8 * options.side,) * 2, (f"{i % captions:032x}",), 1)
        for i in range(options.pictures)
    ]
    about = About(
        samples=samples,
        encoders={"vae": "random", "text": "random"},
        empty=f"{0:032x}",
        size=8 * options.side,
        model="none",
        source="none",
        files="",
        saved_as=None,
        summary=[],
    )
    latents, texts = (Shards(about.folder(options.out, kind)) for kind in (LATENTS, TEXT))
    shape = (options.channels, options.side, options.side)
    for i in range(options.pictures):
        latents.add(f"{i:032x}", {LATENTS: torch.randn(shape).bfloat16()})
    for i in range(captions):
        text = torch.randn(options.tokens, options.width).half()
        texts.add(
            f"{i:032x}",
            {"encoder_hidden_states": text, "pooled_projections": text[0, :2048].clone()},
        )
    latents.flush()
    texts.flush()
    about.write(options.out)


if __name__ == "__main__":
    main()
