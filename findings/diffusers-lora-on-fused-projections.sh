#!/bin/sh
# Guess: A LoRA for to_q, to_k and to_v works on an SD3 transformer with fused projections, or is
# refused.
# Found: It is accepted and changes nothing. The model reads to_qkv by then; the layers that the
# LoRA is on aren't called.
# Versions: torch 2.13.0, peft 0.21.2, transformers 5.23.0, accelerate 1.15.0, diffusers 0.42.1.
# Output:
#   relative change by the LoRA: 0.16; with fused projections: 0.00
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

torch.manual_seed(0)
small = {"sample_size": 8, "in_channels": 4, "out_channels": 4, "pos_embed_max_size": 8}
small |= {"num_layers": 2, "attention_head_dim": 8, "num_attention_heads": 2}
small |= {"joint_attention_dim": 8, "caption_projection_dim": 16, "pooled_projection_dim": 8}
model = SD3Transformer2DModel(**small).eval()
for parameter in model.parameters():
    torch.nn.init.normal_(parameter, std=0.2)
inputs = torch.randn(1, 4, 8, 8), torch.randn(1, 3, 8), torch.randn(1, 8), torch.tensor([500.0])
config = LoraConfig(target_modules=["to_q", "to_k", "to_v"], init_lora_weights=False)


@torch.no_grad()
def change():
    before = model(*inputs).sample
    model.add_adapter(config, "a")
    after = model(*inputs).sample
    model.delete_adapters("a")
    return ((after - before).norm() / before.norm()).item()


plain = change()
model.fuse_qkv_projections()
fused = change()
print(f"relative change by the LoRA: {plain:.2f}; with fused projections: {fused:.2f}")
assert plain > 0.01 and fused < 1e-5
EOF
