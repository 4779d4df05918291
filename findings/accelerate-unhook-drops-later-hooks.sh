#!/bin/sh
# Guess: Removing accelerate's hooks leaves a diffusers hook that was added later.
# Found: The forward from before accelerate is put back, and the diffusers hook no longer runs,
# though still listed. Both replace module.forward; removing accelerate's puts back what accelerate
# had found there.
# Versions: torch 2.13.0, accelerate 1.15.0, diffusers 0.42.1.
# Output:
#   11.0 -> 1.0, though diffusers still lists ['plus']
set -eu
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
trap 'exit 1' INT TERM
python3 -m venv "$dir"
"$dir/bin/pip" install -q --no-compile torch==2.13.0
"$dir/bin/pip" install -q --no-compile accelerate==1.15.0 diffusers==0.42.1
"$dir/bin/python" - <<'EOF'
import torch
from accelerate import cpu_offload
from accelerate.hooks import remove_hook_from_submodules
from diffusers.hooks import HookRegistry, ModelHook
from torch import nn


class Plus(ModelHook):
    def post_forward(self, module, output):
        return output + 10


model = nn.Sequential(nn.Linear(1, 1, bias=False))
nn.init.constant_(model[0].weight, 1)
cpu_offload(model, execution_device=torch.device("cpu"))
registry = HookRegistry.check_if_exists_or_initialize(model[0])
registry.register_hook(Plus(), "plus")
x = torch.ones(1, 1)
before = model(x).item()
remove_hook_from_submodules(model)
after = model(x).item()
print(f"{before} -> {after}, though diffusers still lists", list(registry.hooks))
assert (before, after) == (11, 1) and "plus" in registry.hooks
EOF
