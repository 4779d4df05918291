#!/bin/sh
# Guess: `set_shift(3)` gives the same steps as `shift=3`.
# Found: Other sigmas: with `shift=3` the smallest sigma is shifted twice. The constructor takes
# sigma_min from the shifted table, and set_timesteps shifts what it spans from there once more.
# Versions: torch 2.13.0, diffusers 0.42.1.
# Output:
#   shift=3: [1.0, 0.8577, 0.6022, 0.0089, 0.0]; set_shift(3): [1.0, 0.8573, 0.6007, 0.003, 0.0]
set -eu
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
trap 'exit 1' INT TERM
python3 -m venv "$dir"
"$dir/bin/pip" install -q --no-compile torch==2.13.0
"$dir/bin/pip" install -q --no-compile diffusers==0.42.1
"$dir/bin/python" - <<'EOF'
from diffusers import FlowMatchEulerDiscreteScheduler


def sigmas(scheduler):
    scheduler.set_timesteps(4)
    return [round(sigma, 4) for sigma in scheduler.sigmas.tolist()]


built = FlowMatchEulerDiscreteScheduler(shift=3.0)
told = FlowMatchEulerDiscreteScheduler()
told.set_shift(3.0)
assert built.shift == told.shift == 3
print(f"shift=3: {sigmas(built)}; set_shift(3): {sigmas(told)}")
assert sigmas(built) == [1, 0.8577, 0.6022, 0.0089, 0]
assert sigmas(told) == [1, 0.8573, 0.6007, 0.003, 0]
EOF
