#!/bin/sh
# Guess: `fuse_qkv_projections` fuses the projections of the transformers that have it, or says that
# it can't.
# Found: Both happen, and a third: Flux is fused, PRX raises an AttributeError from within (it has
# one layer for queries, keys and values from the start), and Qwen-Image returns without a word and
# without having fused anything. So do CogView3-Plus, HunyuanVideo and HunyuanImage.
# Versions: torch 2.13.0, diffusers 0.42.1.
# Output:
#   FluxTransformer2DModel: 2 fused layers
#   QwenImageTransformer2DModel: 0 fused layers
#   PRXTransformer2DModel: AttributeError: 'PRXAttention' object has no attribute 'to_q'
set -eu
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
trap 'exit 1' INT TERM
python3 -m venv "$dir"
"$dir/bin/pip" install -q --no-compile torch==2.13.0
"$dir/bin/pip" install -q --no-compile diffusers==0.42.1 transformers==5.23.0 accelerate==1.15.0
"$dir/bin/python" - <<'EOF'
from diffusers import FluxTransformer2DModel, PRXTransformer2DModel, QwenImageTransformer2DModel

small = {"num_layers": 1, "attention_head_dim": 16, "num_attention_heads": 2}
flux = FluxTransformer2DModel(
    **small,
    num_single_layers=1,
    in_channels=4,
    joint_attention_dim=8,
    pooled_projection_dim=8,
    axes_dims_rope=(4, 4, 8),
)
qwen = QwenImageTransformer2DModel(
    **small, in_channels=16, out_channels=4, joint_attention_dim=8, axes_dims_rope=(4, 6, 6)
)
prx = PRXTransformer2DModel(
    in_channels=4, context_in_dim=8, hidden_size=32, num_heads=2, depth=1, axes_dim=[8, 8]
)
found = {}
for model in (flux, qwen, prx):
    try:
        model.fuse_qkv_projections()
        fused = [name for name, _ in model.named_modules() if name.endswith("attn.to_qkv")]
        found[type(model).__name__] = f"{len(fused)} fused layers"
    except AttributeError as error:
        found[type(model).__name__] = f"AttributeError: {error}"
for name, what in found.items():
    print(f"{name}: {what}")
assert list(found.values()) == [
    "2 fused layers",
    "0 fused layers",
    "AttributeError: 'PRXAttention' object has no attribute 'to_q'",
]
EOF
