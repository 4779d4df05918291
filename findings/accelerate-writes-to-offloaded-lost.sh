#!/bin/sh
# Guess: Changing the parameters of an offloaded model in place changes the model, or raises.
# Found: Neither: they are placeholders on the meta device, and the stored weights stay.
# load_state_dict answers that all keys matched and changes nothing either; it does warn.
# Versions: torch 2.13.0, accelerate 1.15.0.
# Output:
#   at first, times 5, loaded 9: [1.0, 1.0, 1.0] <All keys matched successfully>
set -eu
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
trap 'exit 1' INT TERM
python3 -m venv "$dir"
"$dir/bin/pip" install -q --no-compile torch==2.13.0
"$dir/bin/pip" install -q --no-compile accelerate==1.15.0
"$dir/bin/python" - <<'EOF'
import warnings

import torch
from accelerate import cpu_offload
from torch import nn

warnings.simplefilter("ignore")  # load_state_dict at least warns
model = nn.Sequential(nn.Linear(1, 1, bias=False))
nn.init.constant_(model[0].weight, 1)
cpu_offload(model, execution_device=torch.device("cpu"))
x = torch.ones(1, 1)
outputs = [model(x).item()]
with torch.no_grad():
    for parameter in model.parameters():
        parameter.mul_(5)
outputs.append(model(x).item())
answer = model.load_state_dict({"0.weight": torch.full((1, 1), 9.0)})
outputs.append(model(x).item())
print("at first, times 5, loaded 9:", outputs, answer)
assert outputs == [1, 1, 1] and not answer.missing_keys
EOF
