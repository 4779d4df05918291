#!/bin/sh
# Guess: A scheduler given its own sigmas and timesteps back has the same steps.
# Found: Sigmas are shifted again, timesteps are not, so that the two no longer belong together. No
# warning appears when both are passed.
# Versions: torch 2.13.0, diffusers 0.42.1.
# Output:
#   sigmas [1.0, 0.8577, 0.6022, 0.0089, 0.0]
#   given back [1.0, 0.9476, 0.8195, 0.0263, 0.0]
#   timesteps then [1000.0, 857.7, 602.2, 8.9]
set -eu
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
trap 'exit 1' INT TERM
python3 -m venv "$dir"
"$dir/bin/pip" install -q --no-compile torch==2.13.0
"$dir/bin/pip" install -q --no-compile diffusers==0.42.1
"$dir/bin/python" - <<'EOF'
from diffusers import FlowMatchEulerDiscreteScheduler

scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
scheduler.set_timesteps(4)
sigmas, times = scheduler.sigmas.tolist(), scheduler.timesteps.tolist()
scheduler.set_timesteps(sigmas=sigmas[:-1], timesteps=times)  # the final 0 is appended again
again = scheduler.sigmas.tolist()
print("sigmas", [round(sigma, 4) for sigma in sigmas])
print("given back", [round(sigma, 4) for sigma in again])
print("timesteps then", [round(time, 1) for time in scheduler.timesteps.tolist()])
assert [round(sigma, 4) for sigma in again] == [1, 0.9476, 0.8195, 0.0263, 0]
assert scheduler.timesteps.tolist() == times
EOF
