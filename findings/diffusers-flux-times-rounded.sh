#!/bin/sh
# Guess: A Flux transformer in bfloat16 tells a float32 timestep apart from its neighbours.
# Found: It rounds time to bfloat16 first: 1000 times become 500, off by up to 3 of 1000. The
# caller's float32 doesn't help, since the model converts the timestep to the dtype of its tokens.
# Versions: torch 2.13.0, diffusers 0.42.1.
# Output:
#   500 of 1000 times are left, off by up to 3.0
#   955 -> 952.0, 990 -> 988.0
set -eu
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
trap 'exit 1' INT TERM
python3 -m venv "$dir"
"$dir/bin/pip" install -q --no-compile torch==2.13.0
"$dir/bin/pip" install -q --no-compile diffusers==0.42.1
"$dir/bin/python" - <<'EOF'
import torch
from diffusers import FluxTransformer2DModel

small = {"num_layers": 1, "num_single_layers": 1, "attention_head_dim": 8, "in_channels": 4}
small |= {"num_attention_heads": 1, "joint_attention_dim": 8, "pooled_projection_dim": 8}
flux = FluxTransformer2DModel(axes_dims_rope=(2, 2, 4), **small).to(torch.bfloat16)
received = []
flux.time_text_embed.register_forward_pre_hook(lambda _, args: received.append(args[0].item()))
inputs = {
    "hidden_states": torch.zeros(1, 4, 4, dtype=torch.bfloat16),
    "encoder_hidden_states": torch.zeros(1, 3, 8, dtype=torch.bfloat16),
    "pooled_projections": torch.zeros(1, 8, dtype=torch.bfloat16),
    "img_ids": torch.zeros(4, 3),
    "txt_ids": torch.zeros(3, 3),
}
with torch.no_grad():
    for time in range(1, 1001):
        flux(**inputs, timestep=torch.tensor([time / 1000]))
worst = max(abs(got - time) for time, got in enumerate(received, 1))
print(f"{len(set(received))} of 1000 times are left, off by up to {worst}")
print(f"955 -> {received[954]}, 990 -> {received[989]}")
assert len(set(received)) == 500 and worst == 3
assert (received[954], received[989]) == (952, 988)
EOF
