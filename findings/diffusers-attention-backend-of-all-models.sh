#!/bin/sh
# Guess: `model.set_attention_backend(name)` is about that model, and `reset_attention_backend` undoes it.
# Found: The name becomes the process's default as well: every other model that has none of its own
# runs by it from then on, made before or after, and the reset leaves the default as it is.
# Versions: torch 2.13.0, diffusers 0.42.1.
# Output:
#   {'native'} {'under SDPBackend.MATH'} {'under SDPBackend.MATH'} {'under SDPBackend.MATH'}
#   (another model before and after, the model after its reset, a new one)
set -eu
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
trap 'exit 1' INT TERM
python3 -m venv "$dir"
"$dir/bin/pip" install -q --no-compile torch==2.13.0
"$dir/bin/pip" install -q --no-compile diffusers==0.42.1
"$dir/bin/python" - <<'EOF'
import torch
from diffusers import WanTransformer3DModel
from torch.nn import functional

plain = functional.scaled_dot_product_attention


def model():
    return WanTransformer3DModel(
        patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=12, in_channels=4,
        out_channels=4, text_dim=8, freq_dim=8, ffn_dim=16, num_layers=1,
    ).eval()


def runs_by(model):
    """What the attention of one forward found switched on."""
    found = set()

    def watched(*args, **kwargs):
        only_math = not torch.backends.cuda.flash_sdp_enabled()
        found.add("under SDPBackend.MATH" if only_math else "native")
        return plain(*args, **kwargs)

    functional.scaled_dot_product_attention = watched
    with torch.no_grad():
        model(
            hidden_states=torch.zeros(1, 4, 1, 4, 4),
            timestep=torch.zeros(1),
            encoder_hidden_states=torch.zeros(1, 3, 8),
        )
    functional.scaled_dot_product_attention = plain
    return found


one, other = model(), model()
before = runs_by(other)
one.set_attention_backend("_native_math")
afterwards = runs_by(other)
one.reset_attention_backend()
reset = runs_by(one)
print(before, afterwards, reset, runs_by(model()))
assert before == {"native"}
assert afterwards == reset == runs_by(model()) == {"under SDPBackend.MATH"}
EOF
