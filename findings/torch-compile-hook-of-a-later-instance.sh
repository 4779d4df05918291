#!/bin/sh
# Guess: Blocks compiled one by one run the hooks that each had when it was compiled.
# Found: A block whose submodule has a forward hook runs without it where another instance of the
# class, without one, was compiled first. Absence of hooks isn't guarded
# (torch._dynamo.config.skip_nnmodule_hook_guards), and code compiled for one instance serves all of
# its class. No hook is added after compiling here; hooks that differ only in their data come out
# right, and so does everything with the setting off.
# Versions: torch 2.13.0.
# Output:
#   hook on block 0: eager, compiled = [10.0, 0.0] [10.0, 0.0]
#   hook on block 1: eager, compiled = [0.0, 10.0] [0.0, 0.0]
set -eu
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
trap 'exit 1' INT TERM
python3 -m venv "$dir"
"$dir/bin/pip" install -q --no-compile torch==2.13.0
"$dir/bin/python" - <<'EOF'
import torch
from torch import nn


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Identity()

    def forward(self, x):
        return self.inner(x) * 1


def values(hooked):
    torch._dynamo.reset()
    blocks = [Block(), Block()]
    blocks[hooked].inner.register_forward_hook(lambda module, args, output: output + 10)
    eager = [block(torch.zeros(1)).item() for block in blocks]
    for block in blocks:
        block.compile(fullgraph=True, backend="eager")
    return eager, [block(torch.zeros(1)).item() for block in blocks]


for hooked in (0, 1):
    print(f"hook on block {hooked}: eager, compiled =", *values(hooked))
assert values(0) == ([10, 0], [10, 0])
assert values(1) == ([0, 10], [0, 0])
EOF
