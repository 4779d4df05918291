#!/bin/sh
# Guess: A LoRA on a bfloat16 model has the same dtype, however it is put on.
# Found: `get_peft_model` makes it float32, `inject_adapter_in_model` and diffusers' `add_adapter`
# leave bfloat16. It matters in training: steps of an optimizer that are below half a unit in the
# last place of bfloat16 are lost.
# Versions: torch 2.13.0, peft 0.21.2, transformers 5.23.0, accelerate 1.15.0, diffusers 0.42.1.
# Output:
#   get_peft_model, inject_adapter_in_model, diffusers' add_adapter: {'torch.float32'}
#       {'torch.bfloat16'} {'torch.bfloat16'}
set -eu
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
trap 'exit 1' INT TERM
python3 -m venv "$dir"
"$dir/bin/pip" install -q --no-compile torch==2.13.0
"$dir/bin/pip" install -q --no-compile peft==0.21.2 transformers==5.23.0 accelerate==1.15.0 diffusers==0.42.1
"$dir/bin/python" - <<'EOF'
import torch
from diffusers import SD3Transformer2DModel
from peft import LoraConfig, get_peft_model, inject_adapter_in_model
from torch import nn


def dtypes(model):
    return {str(p.dtype) for name, p in model.named_parameters() if "lora_" in name}


def linear():
    return nn.Sequential(nn.Linear(2, 2, dtype=torch.bfloat16))


config = LoraConfig(r=1, target_modules=["0"])
small = {"num_layers": 1, "num_attention_heads": 1, "attention_head_dim": 8}
sd3 = SD3Transformer2DModel(caption_projection_dim=8, **small).to(torch.bfloat16)
sd3.add_adapter(LoraConfig(r=1, target_modules=["to_q"]))
found = [
    dtypes(get_peft_model(linear(), config)),
    dtypes(inject_adapter_in_model(config, linear())),
    dtypes(sd3),
]
print("get_peft_model, inject_adapter_in_model, diffusers' add_adapter:", *found)
assert found == [{"torch.float32"}, {"torch.bfloat16"}, {"torch.bfloat16"}]
EOF
