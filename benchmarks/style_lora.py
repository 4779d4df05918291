"""Trains a style LoRA on a demo backbone, to see what an adapter does beside one.

The style is the task's own pictures with their colours turned round, red to green to blue; a LoRA
on all attention projections learns it in a few minutes, with the captions as they were.

    python benchmarks/style_lora.py --task scenes --out runs/style-lora
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from diffusers import StableDiffusion3Pipeline
from peft import LoraConfig, get_peft_model_state_dict
from tqdm import tqdm

from shiva_dit.demo.base import load_backbone
from shiva_dit.demo.tasks import load_task
from shiva_dit.training.data import ShuffledIndices, drop_captions

LAYERS = ["to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2"]


def main() -> None:
    """Train it, and save it as diffusers loads it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--task", default="scenes")
    parser.add_argument("--out", type=Path, required=True, help="folder for the LoRA")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    task = load_task(options.task)
    model: Any = load_backbone(task)
    model.requires_grad_(False)
    torch.manual_seed(options.seed)
    model.add_adapter(LoraConfig(r=options.rank, lora_alpha=options.rank, target_modules=LAYERS))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-3)
    falling = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, options.steps)
    generator = torch.Generator().manual_seed(options.seed)
    indices = ShuffledIndices(len(task), options.seed)
    bar = tqdm(range(options.steps), unit="step")
    for _ in bar:
        batch = task.batch(indices.take(options.batch), generator)
        batch = drop_captions(batch, task.unconditional(), 0.1, generator)
        clean = batch.latents.roll(1, dims=1)
        noise = torch.randn(clean.shape, generator=generator)
        t = torch.rand(len(clean), generator=generator)
        share = t[:, None, None, None]
        noisy = (1.0 - share) * clean + share * noise
        found = model(noisy, timestep=1000.0 * t, return_dict=False, **batch.conditioning)[0]
        loss = (found - (noise - clean)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        falling.step()
        bar.set_postfix(loss=f"{loss.item():.4f}", refresh=False)
    layers: dict[str, Any] = get_peft_model_state_dict(model)
    StableDiffusion3Pipeline.save_lora_weights(options.out, transformer_lora_layers=layers)


if __name__ == "__main__":
    main()
