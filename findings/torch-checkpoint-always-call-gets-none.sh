#!/bin/sh
# Guess: `always_call=True` shows a hook output None only where forward failed.
# Found: Without a failure, too: recomputing a checkpointed module in backward breaks off early, by
# an exception. Recomputation ends once it has what backward needs. Plain forward hooks aren't
# called for a module that it ended in.
# Versions: torch 2.13.0.
# Output:
#   {'always': ['Tensor', 'NoneType'], 'plain': ['Tensor']}
set -eu
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
trap 'exit 1' INT TERM
python3 -m venv "$dir"
"$dir/bin/pip" install -q --no-compile torch==2.13.0
"$dir/bin/python" - <<'EOF'
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

seen = {"always": [], "plain": []}
module = nn.Sequential(nn.Linear(1, 1), nn.Sigmoid())
module.register_forward_hook(
    lambda module, args, output: seen["always"].append(type(output).__name__), always_call=True
)
module.register_forward_hook(
    lambda module, args, output: seen["plain"].append(type(output).__name__)
)
result = checkpoint(module, torch.ones(1, 1, requires_grad=True), use_reentrant=False)
result.sum().backward()
print(seen)
assert seen == {"always": ["Tensor", "NoneType"], "plain": ["Tensor"]}
EOF
