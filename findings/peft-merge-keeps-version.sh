#!/bin/sh
# Guess: A weight's version counter shows that `merge` changed it.
# Found: It stays: merging goes through `.data`, which doesn't count. A cache that is keyed by a
# parameter's _version doesn't notice. Autograd's check for changed tensors rests on the same
# counter.
# Versions: torch 2.13.0, peft 0.21.2, transformers 5.23.0, accelerate 1.15.0.
# Output:
#   value changed by merge: True; version: +0 by merge, +1 by add_
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
config = LoraConfig(r=1, target_modules=["0"], init_lora_weights=False)
inject_adapter_in_model(config, model, "a")
layer = model[0]
weight = layer.base_layer.weight
value, version = weight.item(), weight._version
layer.merge()
changed, by_merge = weight.item() != value, weight._version - version
with torch.no_grad():
    weight.add_(1)
by_add = weight._version - version
print(f"value changed by merge: {changed}; version: +{by_merge} by merge, +{by_add} by add_")
assert changed and (by_merge, by_add) == (0, 1)
EOF
