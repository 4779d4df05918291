#!/bin/sh
# Guess: A deep copy of a model with a diffusers hook is a model of its own.
# Found: The copy computes with the original's weights; with an accelerate hook it doesn't. The
# hook's closure holds the forward of the original. It concerns averages of weights, and every
# feature that is built on these hooks.
# Versions: torch 2.13.0, accelerate 1.15.0, diffusers 0.42.1.
# Output:
#   copy with weight 5 of a layer with weight 1: diffusers hook, accelerate hook = 1.0 5.0
set -eu
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
trap 'exit 1' INT TERM
python3 -m venv "$dir"
"$dir/bin/pip" install -q --no-compile torch==2.13.0
"$dir/bin/pip" install -q --no-compile accelerate==1.15.0 diffusers==0.42.1
"$dir/bin/python" - <<'EOF'
import copy

import torch
from accelerate.hooks import ModelHook as AccelerateHook
from accelerate.hooks import add_hook_to_module
from diffusers.hooks import HookRegistry, ModelHook
from torch import nn


def copied(hook):
    model = nn.Linear(1, 1, bias=False)
    nn.init.constant_(model.weight, 1)
    hook(model)
    twin = copy.deepcopy(model)
    nn.init.constant_(twin.weight, 5)
    return twin(torch.ones(1, 1)).item()


def diffusers_hook(model):
    HookRegistry.check_if_exists_or_initialize(model).register_hook(ModelHook(), "nothing")


outputs = copied(diffusers_hook), copied(lambda model: add_hook_to_module(model, AccelerateHook()))
print("copy with weight 5 of a layer with weight 1: diffusers hook, accelerate hook =", *outputs)
assert outputs == (1, 5)
EOF
