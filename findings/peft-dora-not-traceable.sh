#!/bin/sh
# Guess: A DoRA layer compiles like a LoRA layer.
# Found: With fullgraph=True DoRA can't be traced, LoRA can. Dynamo stops at a call of
# str.startswith.
# Versions: torch 2.13.0, peft 0.21.2, transformers 5.23.0, accelerate 1.15.0.
# Output:
#   {'lora': 'compiled', 'dora': ['Unsupported method call', '  Explanation: Dynamo does not know
#       how to trace method `startswith` of class `str`']}
set -eu
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
trap 'exit 1' INT TERM
python3 -m venv "$dir"
"$dir/bin/pip" install -q --no-compile torch==2.13.0
"$dir/bin/pip" install -q --no-compile peft==0.21.2 transformers==5.23.0 accelerate==1.15.0
"$dir/bin/python" - <<'EOF'
import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import nn

results = {}
for use_dora in (False, True):
    model = nn.Sequential(nn.Linear(2, 2))
    config = LoraConfig(r=1, target_modules=["0"], use_dora=use_dora)
    inject_adapter_in_model(config, model, "a")
    model.compile(fullgraph=True, backend="eager")
    try:
        model(torch.ones(1, 2))
        results["dora" if use_dora else "lora"] = "compiled"
    except torch._dynamo.exc.Unsupported as error:
        results["dora" if use_dora else "lora"] = str(error).splitlines()[:2]
print(results)
assert results["lora"] == "compiled" and results["dora"] != "compiled"
EOF
