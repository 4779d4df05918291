#!/bin/sh
# Guess: FlopCounterMode counts scaled_dot_product_attention.
# Found: On the CPU its default kernel counts as 0, without a warning; only the math backend is
# counted. FLOPs of a transformer that are counted on the CPU lack the products of attention.
# Versions: torch 2.13.0.
# Output:
#   default 0, math 524288, by hand 524288
set -eu
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
trap 'exit 1' INT TERM
python3 -m venv "$dir"
"$dir/bin/pip" install -q --no-compile torch==2.13.0
"$dir/bin/python" - <<'EOF'
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.flop_counter import FlopCounterMode

q = torch.randn(1, 2, 64, 16)


def counted():
    with FlopCounterMode(display=False) as counter:
        scaled_dot_product_attention(q, q, q)
    return counter.get_total_flops()


default = counted()
with sdpa_kernel(SDPBackend.MATH):
    math = counted()
print(f"default {default}, math {math}, by hand {2 * 2 * 2 * 64 * 64 * 16}")
assert (default, math) == (0, 524288)
EOF
