"""What `make matrix` ran last is what the tests ask of every class today."""

import importlib
from pathlib import Path

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


def test_the_samples_of_all_properties_hold_every_class() -> None:
    of_all = [n for n, many in properties().items() if many == len(families.FAMILIES)]
    assert {matrix.lot(name.partition("::")[2]) for name in of_all} == set(range(matrix.SHARE))
