#!/bin/sh
# Guess: A call with `scale` 0 leaves the weight from `set_adapters` as it was.
# Found: Afterwards the weight is 1; with other scales it is restored. Scaling is undone by a
# division, which 0 doesn't allow; it is set to 1 instead.
# Versions: torch 2.13.0, peft 0.21.2, transformers 5.23.0, accelerate 1.15.0, diffusers 0.42.1.
# Output:
#   weight of the adapter after a call with scale 0.3, then 0.0: [0.5, 1.0]
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
from peft import LoraConfig

small = {"sample_size": 8, "in_channels": 4, "out_channels": 4, "pos_embed_max_size": 8}
small |= {"num_layers": 1, "attention_head_dim": 8, "num_attention_heads": 1}
small |= {"joint_attention_dim": 8, "caption_projection_dim": 8, "pooled_projection_dim": 8}
model = SD3Transformer2DModel(**small)
model.add_adapter(LoraConfig(target_modules=["to_q"]), "a")
model.set_adapters("a", 0.5)
inputs = torch.zeros(1, 4, 8, 8), torch.zeros(1, 3, 8), torch.zeros(1, 8), torch.zeros(1)
weights = []
for scale in (0.3, 0.0):
    model(*inputs, joint_attention_kwargs={"scale": scale})
    weights.append(model.transformer_blocks[0].attn.to_q.scaling["a"])
print("weight of the adapter after a call with scale 0.3, then 0.0:", weights)
assert abs(weights[0] - 0.5) < 1e-6 and weights[1] == 1
EOF
