#!/bin/sh
# Guess: DoRA starts as the identity on any layer, as LoRA does.
# Found: On a layer initialised to zero, common for adaLN and output layers of diffusion
# transformers, it gives NaN. The direction is the weight divided by its norm, which is 0 here.
# Versions: torch 2.13.0, peft 0.21.2, transformers 5.23.0, accelerate 1.15.0.
# Output:
#   {'lora': [[0.0, 0.0]], 'dora': [[nan, nan]]}
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

outputs = {}
for use_dora in (False, True):
    model = nn.Sequential(nn.Linear(2, 2, bias=False))
    nn.init.zeros_(model[0].weight)
    config = LoraConfig(r=1, target_modules=["0"], use_dora=use_dora)
    inject_adapter_in_model(config, model, "a")
    outputs["dora" if use_dora else "lora"] = model(torch.ones(1, 2)).detach()
print({name: value.tolist() for name, value in outputs.items()})
assert (outputs["lora"] == 0).all() and outputs["dora"].isnan().all()
EOF
