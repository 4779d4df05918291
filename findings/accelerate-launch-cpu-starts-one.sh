#!/bin/sh
# Guess: `accelerate launch --cpu --num_processes 2 script.py` starts the script twice.
# Found: Once, as an ordinary process without RANK and WORLD_SIZE, and no line says that the number
# was not followed; the exit status is 0. `torchrun --nproc-per-node=2` starts two.
# Versions: torch 2.13.0, accelerate 1.15.0.
# Output:
#   accelerate launch: ['rank None of None']
#   torchrun: ['rank 0 of 2', 'rank 1 of 2']
set -eu
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
trap 'exit 1' INT TERM
python3 -m venv "$dir"
"$dir/bin/pip" install -q --no-compile torch==2.13.0
"$dir/bin/pip" install -q --no-compile accelerate==1.15.0
cat > "$dir/script.py" <<'EOF'
import os

print("rank", os.environ.get("RANK"), "of", os.environ.get("WORLD_SIZE"), flush=True)
EOF
"$dir/bin/python" - "$dir" <<'EOF'
import os
import subprocess
import sys

folder = sys.argv[1]
clean = {name: value for name, value in os.environ.items() if not name.startswith("ACCELERATE_")}


def said(*command):
    done = subprocess.run(
        [f"{folder}/bin/{command[0]}", *command[1:], f"{folder}/script.py"],
        capture_output=True, text=True, check=True, env={**clean, "HF_HOME": folder},
    )
    assert "num_processes" not in done.stderr
    return sorted(line for line in done.stdout.splitlines() if line.startswith("rank"))


once = said("accelerate", "launch", "--cpu", "--num_processes", "2")
twice = said("torchrun", "--standalone", "--nproc-per-node=2")
print("accelerate launch:", once)
print("torchrun:", twice)
assert once == ["rank None of None"]
assert twice == ["rank 0 of 2", "rank 1 of 2"]
EOF
