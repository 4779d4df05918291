#!/bin/sh
# Guess: From one seed, the first n of more normal numbers are those of randn(n).
# Found: On the CPU not below 16, and up to the last 16 differ where the size is no multiple of 16.
# Numbers are made in batches of 16; a size under 16 takes another path, and for a size that is no
# multiple of 16 the last 16 are drawn again. So what one sample gets as noise can depend on the
# size of the batch.
# Versions: torch 2.13.0.
# Output:
#   randn(n) equals randn(32)[:n]: {8: False, 15: False, 16: True}
#   first 16 of 20 differ from randn(16) at: [4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15]
set -eu
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
trap 'exit 1' INT TERM
python3 -m venv "$dir"
"$dir/bin/pip" install -q --no-compile torch==2.13.0
"$dir/bin/python" - <<'EOF'
import torch


def noise(n):
    return torch.randn(n, generator=torch.Generator().manual_seed(0))


whole = {n: torch.equal(noise(n), noise(32)[:n]) for n in (8, 15, 16)}
print("randn(n) equals randn(32)[:n]:", whole)
changed = (noise(20)[:16] != noise(16)).nonzero().flatten().tolist()
print("first 16 of 20 differ from randn(16) at:", changed)
assert whole == {8: False, 15: False, 16: True} and changed == list(range(4, 16))
EOF
