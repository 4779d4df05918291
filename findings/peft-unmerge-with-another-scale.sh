#!/bin/sh
# Guess: `unmerge` gives the base weight back.
# Found: Not if the scale was changed in between: it takes off the LoRA at the new scale, and the
# rest stays in the weight. Nothing warns; changing the scale while merged has no effect on the
# output either.
# Versions: torch 2.13.0, peft 0.21.2, transformers 5.23.0, accelerate 1.15.0.
# Output:
#   merged, then scaled by 0.5: 11.0; base weight after unmerge: 6.0
set -eu
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
trap 'exit 1' INT TERM
python3 -m venv "$dir"
"$dir/bin/pip" install -q --no-compile torch==2.13.0
"$dir/bin/pip" install -q --no-compile peft==0.21.2 transformers==5.23.0 accelerate==1.15.0
"$dir/bin/python" - <<'EOF'
import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import nn

model = nn.Sequential(nn.Linear(1, 1, bias=False))
inject_adapter_in_model(LoraConfig(r=1, lora_alpha=1, target_modules=["0"]), model, "a")
layer, x = model[0], torch.ones(1, 1)
with torch.no_grad():  # weight 1, the LoRA adds 10
    layer.base_layer.weight.fill_(1)
    layer.lora_A["a"].weight.fill_(1)
    layer.lora_B["a"].weight.fill_(10)
layer.merge()
layer.set_scale("a", 0.5)
merged = model(x).item()
layer.unmerge()
weight = layer.base_layer.weight.item()
print(f"merged, then scaled by 0.5: {merged}; base weight after unmerge: {weight}")
assert (merged, weight) == (11, 6)
EOF
