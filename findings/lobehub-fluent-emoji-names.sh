#!/bin/sh
# Guess: In a package of emoji pictures named by their code points each emoji is one file, and its
# name has the emoji's code points, joined by hyphens.
# Found: Of @lobehub/fluent-emoji-3d's 3,391 pictures 16 emoji have two files, which differ: with
# leading zeros and without, or with U+FE0F and without. The flags of England, Scotland and Wales
# join their tags by underscores, and the tag that ends them (U+E007F) is missing.
# Versions: @lobehub/fluent-emoji-3d 1.1.0.
# Output:
#   3391 pictures, 16 emoji twice, of these 0 with the same bytes
#   ['0023-fe0f-20e3', '23-fe0f-20e3'] ['1f441-200d-1f5e8', '1f441-fe0f-200d-1f5e8-fe0f']
#   ['1f3f4-e0067_e0062_e0065_e006e_e0067', '1f3f4-e0067_e0062_e0073_e0063_e0074',
#    '1f3f4-e0067_e0062_e0077_e006c_e0073']
set -eu
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
trap 'exit 1' INT TERM
(cd "$dir" && npm pack --silent @lobehub/fluent-emoji-3d@1.1.0 > /dev/null)
python3 - "$dir"/*.tgz <<'EOF'
import collections
import hashlib
import sys
import tarfile
from pathlib import Path

files = {}
with tarfile.open(sys.argv[1]) as tar:
    for member in tar:
        if member.name.endswith(".webp"):
            files[Path(member.name).stem] = hashlib.sha256(tar.extractfile(member).read()).digest()


def points(name):
    found = [int(part, 16) for part in name.replace("_", "-").split("-")]
    return tuple(point for point in found if point != 0xFE0F)


emoji = collections.defaultdict(list)
for name in sorted(files):
    emoji[points(name)].append(name)
twice = [names for names in emoji.values() if len(names) > 1]
same = sum(files[first] == files[second] for first, second in twice)
print(f"{len(files)} pictures, {len(twice)} emoji twice, of these {same} with the same bytes")
print(twice[0], next(names for names in twice if names[0].startswith("1f441")))
flags = [name for name in sorted(files) if "_" in name]
print(flags)
assert (len(files), len(twice), same) == (3391, 16, 0)
assert len(flags) == 3 and all(points(name)[-1] != 0xE007F for name in flags)
EOF
