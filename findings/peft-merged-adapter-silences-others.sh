#!/bin/sh
# Guess: With LoRAs a and b active and a merged, the output is base + a + b.
# Found: It is base + a: a layer with anything merged applies no unmerged LoRA, though b is still
# listed as active. The layer's forward goes straight to the base layer as soon as one adapter is
# merged.
# Versions: torch 2.13.0, peft 0.21.2, transformers 5.23.0, accelerate 1.15.0.
# Output:
#   active ['a', 'b']: 111.0; with a merged: 11.0
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
for name in ("a", "b"):
    inject_adapter_in_model(LoraConfig(r=1, lora_alpha=1, target_modules=["0"]), model, name)
layer = model[0]
with torch.no_grad():  # weight 1, LoRA a adds 10, LoRA b adds 100
    layer.base_layer.weight.fill_(1)
    for name, value in (("a", 10), ("b", 100)):
        layer.lora_A[name].weight.fill_(1)
        layer.lora_B[name].weight.fill_(value)
layer.set_adapter(["a", "b"])
x = torch.ones(1, 1)
before = model(x).item()
layer.merge(adapter_names=["a"])
after = model(x).item()
print(f"active {layer.active_adapters}: {before}; with a merged: {after}")
assert (before, after) == (111, 11) and layer.active_adapters == ["a", "b"]
EOF
