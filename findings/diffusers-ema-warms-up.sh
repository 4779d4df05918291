#!/bin/sh
# Guess: `EMAModel(decay=0.9999)` without `use_ema_warmup` averages with 0.9999.
# Found: It warms up all the same: 0 for the first step, then (1 + n) / (10 + n) after n steps,
# 0.991 after 1000. use_ema_warmup chooses between two kinds of warm-up, not whether there is one.
# Versions: torch 2.13.0, diffusers 0.42.1.
# Output:
#   use_ema_warmup=False, decay by step {1: 0.0, 100: 0.9174, 1000: 0.9911, 10000: 0.9991, 100000:
#       0.9999}
#   average of 0 and 1 after a step: 1.0
set -eu
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
trap 'exit 1' INT TERM
python3 -m venv "$dir"
"$dir/bin/pip" install -q --no-compile torch==2.13.0
"$dir/bin/pip" install -q --no-compile diffusers==0.42.1
"$dir/bin/python" - <<'EOF'
import torch
from diffusers.training_utils import EMAModel

weights = [torch.nn.Parameter(torch.zeros(1))]
ema = EMAModel(weights, decay=0.9999)
decays = {step: round(ema.get_decay(step), 4) for step in (1, 100, 1000, 10000, 100000)}
torch.nn.init.ones_(weights[0])
ema.step(weights)
print(f"use_ema_warmup={ema.use_ema_warmup}, decay by step {decays}")
print(f"average of 0 and 1 after a step: {ema.shadow_params[0].item()}")
assert not ema.use_ema_warmup and ema.shadow_params[0].item() == 1
assert decays == {1: 0, 100: 0.9174, 1000: 0.9911, 10000: 0.9991, 100000: 0.9999}
EOF
