#!/bin/sh
# Guess: A layer whose weight lies on the meta device raises when it is called with a CPU tensor.
# Found: nn.Linear without bias returns a CPU tensor of uninitialised numbers; with bias it raises.
# So weights that were never loaded, or were offloaded without a hook to fetch them, can go
# unnoticed. The numbers differ from run to run and aren't shown.
# Versions: torch 2.13.0.
# Output:
#   without bias: cpu (2, 3)
#   with bias: Tensor on device meta is not on the expected device cpu!
set -eu
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
trap 'exit 1' INT TERM
python3 -m venv "$dir"
"$dir/bin/pip" install -q --no-compile torch==2.13.0
"$dir/bin/python" - <<'EOF'
import torch
from torch import nn

x = torch.ones(2, 4)
output = nn.Linear(4, 3, bias=False, device="meta")(x)
print("without bias:", output.device, tuple(output.shape))
refused = False
try:
    nn.Linear(4, 3, bias=True, device="meta")(x)
except RuntimeError as error:
    refused = True
    print("with bias:", error)
assert output.device.type == "cpu" and refused
EOF
