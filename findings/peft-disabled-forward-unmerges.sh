#!/bin/sh
# Guess: `disable_adapter()` leaves a merged model merged when it ends.
# Found: A forward inside it unmerges for good. Entering the context alone changes nothing: the
# forward does it. What comes out afterwards is the same but for rounding, with the cost of an
# unmerged LoRA.
# Versions: torch 2.13.0, peft 0.21.2, transformers 5.23.0, accelerate 1.15.0.
# Output:
#   merged: at first, disabled, after a forward, enabled again = [True, True, False, False]
set -eu
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
trap 'exit 1' INT TERM
python3 -m venv "$dir"
"$dir/bin/pip" install -q --no-compile torch==2.13.0
"$dir/bin/pip" install -q --no-compile peft==0.21.2 transformers==5.23.0 accelerate==1.15.0
"$dir/bin/python" - <<'EOF'
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

model = get_peft_model(nn.Sequential(nn.Linear(2, 2)), LoraConfig(r=1, target_modules=["0"]))
layer = model.base_model.model[0]
model.merge_adapter()
seen = [layer.merged]
with model.disable_adapter():
    seen.append(layer.merged)
    model(torch.ones(1, 2))
    seen.append(layer.merged)
seen.append(layer.merged)
print("merged: at first, disabled, after a forward, enabled again =", seen)
assert seen == [True, True, False, False]
EOF
