#!/bin/sh
# Guess: `unfuse_qkv_projections` undoes `fuse_qkv_projections`.
# Found: SD3 keeps the fused weights in its state dict and says fused_projections; Flux doesn't. The
# output is right in both; memory and saved files aren't what they were.
# Versions: torch 2.13.0, diffusers 0.42.1.
# Output:
#   SD3Transformer2DModel fused_projections True left:
#       ['transformer_blocks.0.attn.to_added_qkv.bias',
#       'transformer_blocks.0.attn.to_added_qkv.weight', 'transformer_blocks.0.attn.to_qkv.bias',
#       'transformer_blocks.0.attn.to_qkv.weight']
#   FluxTransformer2DModel fused_projections False left: []
set -eu
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
trap 'exit 1' INT TERM
python3 -m venv "$dir"
"$dir/bin/pip" install -q --no-compile torch==2.13.0
"$dir/bin/pip" install -q --no-compile diffusers==0.42.1
"$dir/bin/python" - <<'EOF'
from diffusers import FluxTransformer2DModel, SD3Transformer2DModel

small = {"num_layers": 1, "num_attention_heads": 1, "attention_head_dim": 8}
sd3 = SD3Transformer2DModel(caption_projection_dim=8, **small)
flux = FluxTransformer2DModel(num_single_layers=1, axes_dims_rope=(2, 2, 4), **small)
found = {}
for model in (sd3, flux):
    before = set(model.state_dict())
    model.fuse_qkv_projections()
    model.unfuse_qkv_projections()
    left = sorted(set(model.state_dict()) - before)
    attention = model.transformer_blocks[0].attn
    found[type(model).__name__] = left, attention.fused_projections
    print(type(model).__name__, "fused_projections", attention.fused_projections, "left:", left)
left, fused = found["SD3Transformer2DModel"]
assert fused and "transformer_blocks.0.attn.to_qkv.weight" in left
assert found["FluxTransformer2DModel"] == ([], False)
EOF
