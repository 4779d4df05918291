#!/bin/sh
# Guess: `always_call=True` calls a forward hook whatever forward raises.
# Found: Not for KeyboardInterrupt and SystemExit, so a hook that cleans up is skipped by Ctrl-C.
# The documentation says "regardless of whether an exception is raised"; only subclasses of
# Exception count.
# Versions: torch 2.13.0.
# Output:
#   {'ValueError': 1, 'KeyboardInterrupt': 0, 'SystemExit': 0}
set -eu
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
trap 'exit 1' INT TERM
python3 -m venv "$dir"
"$dir/bin/pip" install -q --no-compile torch==2.13.0
"$dir/bin/python" - <<'EOF'
import torch
from torch import nn


class Raises(nn.Module):
    def __init__(self, error):
        super().__init__()
        self.error = error

    def forward(self, x):
        raise self.error


calls = {}
for error in (ValueError, KeyboardInterrupt, SystemExit):
    module, seen = Raises(error), []
    module.register_forward_hook(lambda *_: seen.append(1), always_call=True)
    try:
        module(torch.zeros(1))
    except BaseException as raised:
        calls[type(raised).__name__] = len(seen)
print(calls)
assert calls == {"ValueError": 1, "KeyboardInterrupt": 0, "SystemExit": 0}
EOF
