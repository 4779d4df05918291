#!/bin/sh
# Guess: `AutoModel.load_config(folder, subfolder="transformer")` reads the same file whatever was
# loaded before.
# Found: Until `AutoModel.from_pretrained` has run in the process it reads the part's config.json;
# afterwards it gives the pipeline's index instead, without a word, since that call leaves the class
# looking for model_index.json, for good.
# Versions: torch 2.13.0, diffusers 0.42.1.
# Output:
#   before: UNet2DModel
#   after: DDPMPipeline
set -eu
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
trap 'exit 1' INT TERM
python3 -m venv "$dir"
"$dir/bin/pip" install -q --no-compile torch==2.13.0
"$dir/bin/pip" install -q --no-compile diffusers==0.42.1
cd "$dir"
"$dir/bin/python" - <<'EOF'
from diffusers import AutoModel, DDPMPipeline, DDPMScheduler, UNet2DModel

unet = UNet2DModel(
    sample_size=8,
    block_out_channels=(8,),
    down_block_types=("DownBlock2D",),
    up_block_types=("UpBlock2D",),
    norm_num_groups=4,
)
DDPMPipeline(unet, DDPMScheduler()).save_pretrained("pipe")


def read() -> str:
    return AutoModel.load_config("pipe", subfolder="unet")["_class_name"]


before = read()
AutoModel.from_pretrained("pipe", subfolder="unet")
after = read()
print(f"before: {before}")
print(f"after: {after}")
assert (before, after) == ("UNet2DModel", "DDPMPipeline")
EOF
