#!/bin/sh
# Guess: What `pipe.encode_prompt(prompt)` gives, passed back as `prompt_embeds`, makes the picture
# of `pipe(prompt)`: both have the same defaults.
# Found: In many pipelines they don't. Wan's encode 226 tokens where a call encodes 512, Qwen-Image's
# 1024 for 512, JoyImage-Edit's 1024 for 4096; PixArt, Lumina, Latte and Allegro clean a caption only
# in a call. Embeddings that were made ahead are then others than the pipeline's own.
# Versions: torch 2.13.0, diffusers 0.42.1, transformers 5.23.0.
# Output:
#   WanPipeline max_sequence_length 226 512
#   QwenImagePipeline max_sequence_length 1024 512
#   JoyImageEditPipeline max_sequence_length 1024 4096
#   PixArtSigmaPipeline clean_caption False True
#   LuminaPipeline clean_caption False True
#   StableDiffusion3Pipeline max_sequence_length 256 256
set -eu
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
trap 'exit 1' INT TERM
python3 -m venv "$dir"
"$dir/bin/pip" install -q --no-compile torch==2.13.0
"$dir/bin/pip" install -q --no-compile diffusers==0.42.1 transformers==5.23.0
"$dir/bin/python" - <<'EOF'
import inspect

import diffusers

expected = {
    "WanPipeline": ("max_sequence_length", 226, 512),
    "QwenImagePipeline": ("max_sequence_length", 1024, 512),
    "JoyImageEditPipeline": ("max_sequence_length", 1024, 4096),
    "PixArtSigmaPipeline": ("clean_caption", False, True),
    "LuminaPipeline": ("clean_caption", False, True),
    "StableDiffusion3Pipeline": ("max_sequence_length", 256, 256),
}
for name, (argument, encoded, called) in expected.items():
    cls = getattr(diffusers, name)
    found = [
        inspect.signature(method).parameters[argument].default
        for method in (cls.encode_prompt, cls.__call__)
    ]
    print(name, argument, *found)
    assert found == [encoded, called]
EOF
