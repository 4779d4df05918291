"""Properties asked of every model class or pipeline: `make check` runs a sample, `make matrix` all.

`python -m tests.matrix` is what `make matrix` runs: it writes two records into results/, of what
held and of what every class did beside other software. `python -m tests.matrix beside` writes the
second alone.
"""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import sys
import zlib
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest

from shiva_dit.provenance import hardware_name, provenance, write_json
from shiva_dit.report.documents import render
from tests import families

RESULTS = Path(__file__).parents[1] / "results"
PAGE = Path(__file__).parents[1] / "docs" / "beside.md"
"""Where the record of other software is shown."""
SHARE, SHARE_BESIDE = 6, 40
"""Of so many cells one is in a sample; the second where some cells are always in it."""
PROPERTIES: dict[str, int] = {}
"""Of every property whose module was imported, how many classes or pipelines it is asked of."""
BY_LOT: set[str] = set()
"""Those of which no cell is in its sample always."""

BESIDE = "beside"
"""What a test's report calls the software that it tried, and the record of it."""
SOFTWARE: dict[str, str] = {
    "FirstBlockCache": "diffusers",
    "MagCache": "diffusers",
    "SeaCache": "diffusers",
    "TaylorSeer": "diffusers",
    "Pyramid Attention Broadcast": "diffusers",
    "FasterCache": "diffusers",
    "cache-dit": "cache-dit",
    "torchao int8": "torchao",
    "torchao fp8": "torchao",
    "quanto int8": "optimum-quanto",
    "SDNQ int8": "sdnq",
    "bitsandbytes nf4": "bitsandbytes",
    "Nunchaku Lite": "diffusers",
    "GGUF Q8_0": "gguf",
    "single file": "diffusers",
    **dict.fromkeys(("attention: native", "attention: _native_math", "attention: flex"), "torch"),
    **{f"attention: {name}": "diffusers" for name in ("sage", "flash", "_flash_3")},
}
"""What is tried beside an adapter, and the package that it comes from."""

Mark = Callable[[Any], Any]


def sampled(
    arguments: str,
    among: Iterable[Any] = families.FAMILIES,
    always: Callable[[Any], bool] = lambda value: False,
) -> Mark:
    """`pytest.mark.parametrize` over model classes, a sample of them outside of `make matrix`.

    Properties have different samples, so that every class has its part in some.

    Args:
        arguments: What the test calls the class, or several values of a cell.
        among: Those that the property is asked of; strings, or tuples of them.
        always: Says which are in the sample whatever falls to their lot; beside such, those that
            are in it by lot are slow.
    """
    cells = tuple(among)
    by_lot: Any = ()
    share = SHARE
    if any(map(always, cells)):
        by_lot, share = pytest.mark.slow, SHARE_BESIDE

    def put(test: Any) -> Any:
        name = f"{test.__module__.rpartition('.')[2]}::{test.__name__}"
        PROPERTIES[name] = len(cells)
        if share == SHARE:
            BY_LOT.add(name)
        values = []
        for place, cell in enumerate(cells):
            each = (cell,) if isinstance(cell, str) else cell
            marks: Any = pytest.mark.matrix
            if always(cell):
                marks = ()
            elif place % share == lot(test.__name__, share):
                marks = by_lot
            values.append(pytest.param(*each, id="-".join(each), marks=marks))
        return pytest.mark.sampled(pytest.mark.parametrize(arguments, values)(test))

    return put


def lot(test: str, share: int = SHARE) -> int:
    """Which of every so many cells a test's sample holds."""
    return zlib.crc32(test.encode()) % share


class Outcomes:
    """A plugin that counts what became of every property's cells."""

    def __init__(self) -> None:
        self.found: dict[str, Counter[str]] = {}
        self.tried: dict[str, dict[str, str]] = {}
        """By software: what a family did beside it."""
        self.classes: dict[str, str] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Count a cell once: when it ran, or by the step that failed or was skipped."""
        if report.when == "call" or report.outcome != "passed":
            name = report.nodeid.partition("[")[0].removeprefix("tests/").replace(".py", "")
            self.found.setdefault(name, Counter())[report.outcome] += 1
        if report.when == "call" and report.outcome == "passed":
            for key, told in report.user_properties:
                if key == BESIDE:
                    software, of_class, family, status = told
                    self.tried.setdefault(software, {})[family] = status
                    self.classes[family] = of_class

    def beside(self) -> dict[str, Any]:
        """The record of other software: what, from which package at which version, by family."""
        tried = {}
        for software, cells in self.tried.items():
            package = SOFTWARE[software]
            version = importlib.metadata.version(package)
            tried[software] = {"package": package, "version": version, "families": cells}
        return {"what": BESIDE, "tried": tried, "classes": self.classes}


def newest(what: str = "matrix") -> dict[str, Any]:
    """The committed record."""
    path = max(RESULTS.glob(f"{what}--*.json"), key=lambda path: path.stem.rpartition("--")[2])
    return json.loads(path.read_text(encoding="utf-8"))


def write(record: dict[str, Any]) -> Path:
    """Into results/, with where it came from."""
    record["provenance"] = provenance()
    stamp = datetime.date.today().isoformat()
    hardware = hardware_name(record["provenance"])
    path = RESULTS / f"{record['what']}--{hardware}--{stamp}.json"
    write_json(path, record)
    sys.stdout.write(f"{path}\n")
    return path


def page(record: str) -> str:
    """docs/beside.md with the tables of a record, by the name of its file."""
    text = PAGE.read_text(encoding="utf-8")
    start, end = "<!-- beside -->\n", "<!-- end beside -->"
    head, tail = text.split(start)[0], text.split(end)[1]
    tables = "\n\n".join(
        f"<!-- table {kind}: ../results/{record} -->\n<!-- end table -->"
        for kind in (BESIDE, f"{BESIDE}_classes")
    )
    return render(f"{head}{start}{tables}\n{end}{tail}", PAGE.parent)


def main() -> int:
    """Run all cells on two processes, and write the records if the run was whole."""
    outcomes, given = Outcomes(), sys.argv[1:]
    of_beside = given == [BESIDE]
    if of_beside:
        given = [str(path) for path in sorted(Path(__file__).parent.glob("test_beside_*.py"))]
    status = pytest.main(["-n", "2", "-m", "sampled or matrix", *given], plugins=[outcomes])
    whole = status in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED)
    if not whole or (given and not of_beside):
        return int(status)
    properties = {name: dict(found) for name, found in outcomes.found.items()}
    if not of_beside:
        kinds = list(families.FAMILIES)
        write({"what": "matrix", "properties": properties, "families": kinds})
    if status == pytest.ExitCode.OK:
        PAGE.write_text(page(write(outcomes.beside()).name), encoding="utf-8")
    return int(status)


if __name__ == "__main__":
    sys.exit(main())
