#!/bin/sh
# Guess: `recompile_limit` counts how often one module is compiled anew.
# Found: It counts over all instances of a class: with fullgraph=True the ninth that differs in a
# constant fails, though each was compiled once. The cache belongs to the code of forward, which the
# instances share, also where every instance has a compile() of its own.
# Versions: torch 2.13.0.
# Output:
#   8 of 12 ran, then: FailOnRecompileLimitHit
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
    def __init__(self, name):
        super().__init__()
        self.name = name

    def forward(self, x):
        return x + len(self.name)


blocks = [Block("x" * i) for i in range(12)]
done = 0
try:
    for block in blocks:
        block.compile(fullgraph=True, backend="eager")
        block(torch.ones(1))  # each of them is compiled once, for one input
        done += 1
except torch._dynamo.exc.FailOnRecompileLimitHit as error:
    print(done, "of 12 ran, then:", type(error).__name__)
assert done == torch._dynamo.config.recompile_limit == 8
EOF
