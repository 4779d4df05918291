"""What `make matrix` ran last is what the tests ask of every class today."""

import importlib
import importlib.metadata
from pathlib import Path
from typing import Any

import pytest

from shiva_dit.report.beside import STATUSES, beside_classes_table, beside_table
from tests import families, matrix


def properties() -> dict[str, int]:
    """Of all test modules."""
    for path in Path(__file__).parent.glob("test_*.py"):
        if "@sampled(" in path.read_text(encoding="utf-8"):
            importlib.import_module(f"tests.{path.stem}")
    return matrix.PROPERTIES


def test_the_record_is_of_all_properties_and_classes_and_all_held() -> None:
    """Else run `make matrix` anew."""
    record = matrix.newest()
    assert record["families"] == list(families.FAMILIES)
    assert properties().keys() <= record["properties"].keys()
    for name, outcomes in record["properties"].items():
        assert outcomes.keys() == {"passed"}, name
        assert outcomes["passed"] % properties().get(name, 1) == 0, name


def test_the_record_of_other_software_is_of_all_of_it_and_is_shown() -> None:
    """Likewise; `python -m tests.matrix beside` runs that part alone."""
    record = matrix.newest(matrix.BESIDE)
    assert record["tried"].keys() == matrix.SOFTWARE.keys()
    for software, tried in record["tried"].items():
        assert tried["version"], software
        assert set(tried["families"].values()) <= STATUSES.keys()
    assert set(record["tried"]["MagCache"]["families"]) == set(families.FAMILIES)
    name = max(path.name for path in matrix.RESULTS.glob("beside--*.json"))
    assert f"results/{name}" in matrix.PAGE.read_text(encoding="utf-8")


def test_the_samples_of_all_properties_hold_every_class() -> None:
    every = len(families.FAMILIES)
    of_all = [n for n, many in properties().items() if many == every and n in matrix.BY_LOT]
    assert {matrix.lot(name.partition("::")[2]) for name in of_all} == set(range(matrix.SHARE))


def test_what_classes_did_beside_other_software_is_told_by_class() -> None:
    outcomes = matrix.Outcomes()
    for family, status in (("flux", "works"), ("flux-dev", "refused"), ("sd3", "not offered")):
        name = "SD3Transformer2DModel" if family == "sd3" else "FluxTransformer2DModel"
        told = (matrix.BESIDE, ["MagCache", name, family, status])
        outcomes.pytest_runtest_logreport(report("call", "passed", told))
    outcomes.pytest_runtest_logreport(report("call", "failed", told))
    record = outcomes.beside()
    version = importlib.metadata.version("diffusers")
    assert record["tried"]["MagCache"]["version"] == version
    assert outcomes.found == {"test_x::test_y": {"passed": 3, "failed": 1}}
    assert beside_table(record).splitlines()[2:] == [
        f"| MagCache | diffusers {version} | 1 |  | 1 |  | 1 |  |"
    ]
    assert beside_classes_table(record).splitlines() == [
        "|  | MagCache |",
        "| --- | --- |",
        "| `FluxTransformer2DModel` | ✓ R |",
        "| `SD3Transformer2DModel` | - |",
    ]


def report(when: Any, outcome: Any, *properties: Any) -> pytest.TestReport:
    name = "tests/test_x.py::test_y[z]"
    where = ("tests/test_x.py", 1, "test_y")
    return pytest.TestReport(name, where, {}, outcome, None, when, user_properties=list(properties))
