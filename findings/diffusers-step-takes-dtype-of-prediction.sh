#!/bin/sh
# Guess: `step` keeps the dtype of the latents.
# Found: It takes that of the prediction: float32 latents become bfloat16 after one step. The sum is
# formed in float32 and then converted. Latents that were kept in float32 for accuracy lose it
# without a word.
# Versions: torch 2.13.0, diffusers 0.42.1.
# Output:
#   1.0010 torch.float32 -> 1.0000 torch.bfloat16, with a velocity of 0
set -eu
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
trap 'exit 1' INT TERM
python3 -m venv "$dir"
"$dir/bin/pip" install -q --no-compile torch==2.13.0
"$dir/bin/pip" install -q --no-compile diffusers==0.42.1
"$dir/bin/python" - <<'EOF'
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

scheduler = FlowMatchEulerDiscreteScheduler()
scheduler.set_timesteps(4)
latents = torch.tensor([1.001])
velocity = torch.zeros(1, dtype=torch.bfloat16)
new = scheduler.step(velocity, scheduler.timesteps[0], latents).prev_sample
print(f"{latents.item():.4f} {latents.dtype} -> {new.item():.4f} {new.dtype}, with a velocity of 0")
assert new.dtype == torch.bfloat16 and new.item() == 1
EOF
