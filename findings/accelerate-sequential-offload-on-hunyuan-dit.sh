#!/bin/sh
# Guess: A transformer of diffusers that runs whole runs under accelerate's sequential offloading
# too (`cpu_offload`, what a pipeline's `enable_sequential_cpu_offload` calls).
# Found: HunyuanDiT2DModel doesn't, even with the processor as execution device: its pooling of text
# passes the weights of its layers to a function instead of calling the layers, so that no hook
# brings them from the meta device. DiT, offloaded likewise, gives the same as before.
# Versions: torch 2.13.0, diffusers 0.42.1, accelerate 1.15.0.
# Output:
#   DiTTransformer2DModel: the same
#   HunyuanDiT2DModel: RuntimeError: Tensor on device meta is not on the expected device cpu!
set -eu
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
trap 'exit 1' INT TERM
python3 -m venv "$dir"
"$dir/bin/pip" install -q --no-compile torch==2.13.0
"$dir/bin/pip" install -q --no-compile diffusers==0.42.1 transformers==5.23.0 accelerate==1.15.0
"$dir/bin/python" - <<'EOF'
import torch
from accelerate import cpu_offload
from diffusers import DiTTransformer2DModel, HunyuanDiT2DModel

dit = DiTTransformer2DModel(
    num_attention_heads=2,
    attention_head_dim=16,
    in_channels=4,
    out_channels=4,
    num_layers=2,
    sample_size=8,
    num_embeds_ada_norm=10,
)
hunyuan = HunyuanDiT2DModel(
    num_attention_heads=2,
    attention_head_dim=16,
    in_channels=4,
    patch_size=2,
    sample_size=8,
    hidden_size=32,
    num_layers=2,
    cross_attention_dim=24,
    cross_attention_dim_t5=16,
    pooled_projection_dim=20,
    text_len=3,
    text_len_t5=4,
    use_style_cond_and_image_meta_size=False,
)
torch.manual_seed(0)
image, t = torch.randn(1, 4, 8, 8), torch.tensor([5.0])
angles = torch.randn(16, 16)
given = {
    dit: {"timestep": t, "class_labels": torch.tensor([1])},
    hunyuan: {
        "timestep": t,
        "encoder_hidden_states": torch.randn(1, 3, 24),
        "text_embedding_mask": torch.ones(1, 3, dtype=torch.long),
        "encoder_hidden_states_t5": torch.randn(1, 4, 16),
        "text_embedding_mask_t5": torch.ones(1, 4, dtype=torch.long),
        "image_meta_size": None,
        "style": None,
        "image_rotary_emb": (angles.cos(), angles.sin()),
    },
}
found = {}
for model, arguments in given.items():
    with torch.no_grad():
        before = model.eval()(image, **arguments).sample
        cpu_offload(model, torch.device("cpu"), offload_buffers=True)
        try:
            same = torch.equal(model(image, **arguments).sample, before)
            found[type(model).__name__] = "the same" if same else "something else"
        except RuntimeError as error:
            found[type(model).__name__] = f"RuntimeError: {error}"
for name, what in found.items():
    print(f"{name}: {what}")
assert list(found.values()) == [
    "the same",
    "RuntimeError: Tensor on device meta is not on the expected device cpu!",
]
EOF
