#!/bin/sh
# Guess: `save_pretrained` of a model with a LoRA on it can be loaded, or loading fails.
# Found: It loads without an error; the layers that had the LoRA lie on the meta device. The base
# weights were saved under PEFT's names. Loading warns that the missing ones are "newly
# initialized", which they aren't: they hold nothing.
# Versions: torch 2.13.0, peft 0.21.2, transformers 5.23.0, accelerate 1.15.0, diffusers 0.42.1.
# Output:
#   loaded without an error; on the meta device: ['transformer_blocks.0.attn.to_q.weight',
#       'transformer_blocks.0.attn.to_q.bias']
set -eu
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
trap 'exit 1' INT TERM
python3 -m venv "$dir"
"$dir/bin/pip" install -q --no-compile torch==2.13.0
"$dir/bin/pip" install -q --no-compile peft==0.21.2 transformers==5.23.0 accelerate==1.15.0 diffusers==0.42.1
"$dir/bin/python" - <<'EOF'
import tempfile

from diffusers import SD3Transformer2DModel
from peft import LoraConfig

small = {"num_layers": 1, "num_attention_heads": 1, "attention_head_dim": 8}
model = SD3Transformer2DModel(caption_projection_dim=8, **small)
model.add_adapter(LoraConfig(target_modules=["to_q"]), "a")
with tempfile.TemporaryDirectory() as folder:
    model.save_pretrained(folder)
    loaded = SD3Transformer2DModel.from_pretrained(folder)
meta = [name for name, parameter in loaded.named_parameters() if parameter.is_meta]
print("loaded without an error; on the meta device:", meta)
assert meta == [f"transformer_blocks.0.attn.to_q.{name}" for name in ("weight", "bias")]
EOF
