#!/bin/sh
# Guess: `fuse_lora(lora_scale=0.5)` then `unfuse_lora()` changes nothing, and a second time does
# the same.
# Found: The scale stays on the LoRA: 0.5, then 0.25, then 0.125. After unfusing, the LoRA that
# remains runs at the lower strength, too.
# Versions: torch 2.13.0, peft 0.21.2, transformers 5.23.0, accelerate 1.15.0, diffusers 0.42.1.
# Output:
#   strength of the LoRA in the weights, fused three times: [0.5, 0.25, 0.125] left: {'a': 0.125}
set -eu
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
trap 'exit 1' INT TERM
python3 -m venv "$dir"
"$dir/bin/pip" install -q --no-compile torch==2.13.0
"$dir/bin/pip" install -q --no-compile peft==0.21.2 transformers==5.23.0 accelerate==1.15.0 diffusers==0.42.1
"$dir/bin/python" - <<'EOF'
from diffusers import SD3Transformer2DModel
from peft import LoraConfig

small = {"num_layers": 1, "num_attention_heads": 1, "attention_head_dim": 8}
model = SD3Transformer2DModel(caption_projection_dim=8, **small)
model.add_adapter(LoraConfig(target_modules=["to_q"], init_lora_weights=False), "a")
layer = model.transformer_blocks[0].attn.to_q
bare = layer.base_layer.weight.detach().clone()
update = layer.get_delta_weight("a")
strengths = []
for _ in range(3):
    model.fuse_lora(lora_scale=0.5)
    strengths.append(round(((layer.base_layer.weight - bare).norm() / update.norm()).item(), 4))
    model.unfuse_lora()
print("strength of the LoRA in the weights, fused three times:", strengths, "left:", layer.scaling)
assert strengths == [0.5, 0.25, 0.125] and layer.scaling["a"] == 0.125
EOF
