#!/bin/sh
# Guess: n steps of the default flow-matching Euler scheduler are n useful steps.
# Found: The last goes from sigma 0.001 to 0, so n steps are n - 1; with own sigmas they aren't. The
# default grid runs to the smallest training sigma and 0 is appended.
# Versions: torch 2.13.0, diffusers 0.42.1.
# Output:
#   two steps: [1.0, 0.001, 0.0]; with sigmas=[1, 1/2]: [1.0, 0.5, 0.0]
set -eu
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
trap 'exit 1' INT TERM
python3 -m venv "$dir"
"$dir/bin/pip" install -q --no-compile torch==2.13.0
"$dir/bin/pip" install -q --no-compile diffusers==0.42.1
"$dir/bin/python" - <<'EOF'
from diffusers import FlowMatchEulerDiscreteScheduler

scheduler = FlowMatchEulerDiscreteScheduler()
scheduler.set_timesteps(2)
default = [round(sigma, 4) for sigma in scheduler.sigmas.tolist()]
scheduler.set_timesteps(sigmas=[1, 1 / 2])
own = scheduler.sigmas.tolist()
print(f"two steps: {default}; with sigmas=[1, 1/2]: {own}")
assert default == [1, 0.001, 0] and own == [1, 0.5, 0]
EOF
