"""The family that docs/new-model.md shows is as it is served: ten minutes' work, no arithmetic."""

from __future__ import annotations

import re
from pathlib import Path

from shiva_dit.models.families import videos

PAGE = Path(__file__).parents[1] / "docs" / "new-model.md"


def code() -> list[str]:
    """Lines of the page's example, without indents."""
    match = re.search(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    assert match is not None
    return [line.strip() for line in match[1].splitlines() if line.strip()]


def test_a_family_is_25_lines_at_most_and_no_arithmetic() -> None:
    lines = [line for line in code() if not re.match(r"import|from", line)]
    assert 15 <= len(lines) <= 25
    assert not any(re.search(r" [-+*/]{1,2} ", line) for line in lines)


def test_it_is_served_as_it_stands_there() -> None:
    served = Path(videos.__file__).read_text(encoding="utf-8").splitlines()
    own = {line.strip() for line in served}
    named = "BLOCK = BlockSpec(", "MODEL = ModelSpec("
    lines = [line for line in code() if line not in named and not re.match(r"import|from", line)]
    assert [line for line in lines if line not in own] == []
