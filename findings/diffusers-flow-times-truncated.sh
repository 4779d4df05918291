#!/bin/sh
# Guess: The timestep that a flow model gets is 1000 sigma, whatever the scheduler.
# Found: DPM-Solver with flow sigmas truncates it to whole numbers, Euler doesn't. Truncated, not
# rounded: 749.62 becomes 749.
# Versions: torch 2.13.0, diffusers 0.42.1.
# Output:
#   FlowMatchEulerDiscreteScheduler 1000 sigma [1000.0, 923.34, 818.92, 668.33, 432.23, 8.93]
#       timesteps [1000.0, 923.34, 818.92, 668.33, 432.23, 8.93]
#   DPMSolverMultistepScheduler 1000 sigma [999.67, 937.15, 856.78, 749.62, 599.64, 374.72]
#       timesteps [999, 937, 856, 749, 599, 374]
set -eu
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
trap 'exit 1' INT TERM
python3 -m venv "$dir"
"$dir/bin/pip" install -q --no-compile torch==2.13.0
"$dir/bin/pip" install -q --no-compile diffusers==0.42.1
"$dir/bin/python" - <<'EOF'
from diffusers import DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler

options = {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "flow_shift": 3.0}
found = []
euler, dpm = FlowMatchEulerDiscreteScheduler(shift=3.0), DPMSolverMultistepScheduler(**options)
for scheduler in (euler, dpm):
    scheduler.set_timesteps(6)
    exact = [round(1000 * sigma, 2) for sigma in scheduler.sigmas[:-1].tolist()]
    times = [round(time, 2) for time in scheduler.timesteps.tolist()]
    found.append((exact, times))
    print(type(scheduler).__name__, "1000 sigma", exact, "timesteps", times)
assert found[0][0] == found[0][1]
assert found[1][0] == [999.67, 937.15, 856.78, 749.62, 599.64, 374.72]
assert found[1][1] == [999, 937, 856, 749, 599, 374]
EOF
