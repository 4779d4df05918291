"""Recipes: TOML and overrides to frozen dataclasses, strictly, and back."""

import dataclasses
from pathlib import Path
from typing import Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st
from jaxtyping import TypeCheckError

from shiva_dit.adapter import ShivaConfig
from shiva_dit.config import (
    finite_number,
    from_dict,
    load_recipe,
    to_dict,
    whole_number,
    with_overrides,
)
from shiva_dit.training.recipe import TrainConfig
from shiva_dit.training.settings import OptimizerConfig, RouterConfig
from tests import tiny


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Inner:
    rate: float = 0.5
    kind: Literal["paper", "residual"] = "residual"

    def __post_init__(self) -> None:
        if not 0 < self.rate <= 1:
            raise ValueError(f"rate must lie in (0, 1], got {self.rate}.")


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Outer:
    steps: int
    name: str = "digits"
    fast: bool = False
    folder: Path = Path("runs")
    target: float | None = None
    taus: tuple[float, ...] = (0.2, 0.02)
    inner: Inner = dataclasses.field(default_factory=Inner)


RECIPE = """
steps = 7
folder = "runs/first"
taus = [1, 0.5]

[inner]
rate = 0.25
kind = "paper"
"""


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "recipe.toml"
    path.write_text(RECIPE, encoding="utf-8")
    return path


# --- reading ----------------------------------------------------------------------------------


def test_a_recipe_becomes_a_config_with_defaults_and_right_types(recipe: Path):
    config = load_recipe(Outer, recipe)
    assert config == Outer(
        steps=7,
        folder=Path("runs/first"),
        taus=(1.0, 0.5),
        inner=Inner(rate=0.25, kind="paper"),
    )
    assert all(type(tau) is float for tau in config.taus)
    assert isinstance(config.folder, Path)


def test_overrides_win_over_the_file(recipe: Path):
    config = load_recipe(
        Outer,
        recipe,
        ["steps=9", "inner.rate=1", "name=big run", "fast=true", "target=0.4", "taus=[0.1]"],
    )
    assert config == Outer(
        steps=9,
        name="big run",
        fast=True,
        folder=Path("runs/first"),
        target=0.4,
        taus=(0.1,),
        inner=Inner(rate=1.0, kind="paper"),
    )


def test_a_recipe_like_another_lies_over_it(recipe: Path):
    over = recipe.parent / "over.toml"
    over.write_text('like = "recipe.toml"\ntaus = [0.1]\ninner = { rate = 0.5 }\n')
    last = recipe.parent / "last.toml"
    side = recipe.parent / "side.toml"
    side.write_text('name = "side"\nfast = true\n')
    last.write_text('like = ["over.toml", "side.toml"]\nname = "scenes"\n')
    assert load_recipe(Outer, last, ["steps=9"]) == Outer(
        steps=9,
        name="scenes",
        fast=True,
        folder=Path("runs/first"),
        taus=(0.1,),  # a list is replaced, a table merged
        inner=Inner(rate=0.5, kind="paper"),
    )


def test_recipes_that_are_like_nothing_or_themselves_are_refused(recipe: Path):
    one, two = recipe.parent / "one.toml", recipe.parent / "two.toml"
    one.write_text('like = "two.toml"')
    with pytest.raises(ValueError, match=r'no recipe .*two.toml, which .*one.toml is "like"'):
        load_recipe(Outer, one)
    two.write_text('like = "one.toml"')
    with pytest.raises(ValueError, match="which is like itself in the end"):
        load_recipe(Outer, one)
    one.write_text("like = 3")
    with pytest.raises(ValueError, match="like must name one recipe or a list of them, got 3"):
        load_recipe(Outer, one)


def test_a_missing_recipe_is_named(tmp_path: Path):
    with pytest.raises(ValueError, match=r"there is no recipe .*nowhere\.toml"):
        load_recipe(Outer, tmp_path / "nowhere.toml")


def test_a_file_that_is_not_toml_is_named(tmp_path: Path):
    path = tmp_path / "broken.toml"
    path.write_text("steps = = 3", encoding="utf-8")
    with pytest.raises(ValueError, match=r"broken\.toml is not TOML: .*line 1"):
        load_recipe(Outer, path)


# --- strictness -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"steps": 1, "stepz": 2}, r"unknown key 'stepz'; did you mean 'steps'\? Known: steps,"),
        ({"steps": 1, "zzzzzz": 2}, r"unknown key 'zzzzzz'; Known: steps, name"),
        ({"steps": 1, "inner": {"rat": 0.1}}, r"inner: unknown key 'rat'; did you mean 'rate'\?"),
        ({}, r"'steps' is missing"),
        ({"steps": "many"}, r"steps: expected int, got 'many'"),
        ({"steps": 1.5}, r"steps: expected int, got 1.5"),
        ({"steps": True}, r"steps: expected int, got True"),
        ({"steps": None}, r"steps: expected int, got None"),
        ({"steps": 1, "fast": 1}, r"fast: expected bool, got 1"),
        ({"steps": 1, "fast": "yes"}, r"fast: expected bool, got 'yes'"),
        ({"steps": 1, "name": 3}, r"name: expected str, got 3"),
        ({"steps": 1, "folder": 3}, r"folder: expected Path, got 3"),
        ({"steps": 1, "target": "high"}, r"target: expected float, got 'high'"),
        ({"steps": 1, "target": True}, r"target: expected float, got True"),
        ({"steps": 1, "taus": 0.1}, r"taus: expected a list, got 0.1"),
        ({"steps": 1, "taus": [0.1, "x"]}, r"taus\[1\]: expected float, got 'x'"),
        ({"steps": 1, "inner": 3}, r"inner: expected a table, got 3"),
        ({"steps": 1, "inner": {"rate": 2.0}}, r"inner: rate must lie in \(0, 1\], got 2.0"),
        (
            {"steps": 1, "inner": {"kind": "both"}},
            r"inner.kind: expected one of 'paper', 'residual', got 'both'",
        ),
    ],
)
def test_what_does_not_fit_is_an_error_that_says_where(data: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        from_dict(Outer, data)


def test_errors_name_the_recipe(recipe: Path):
    with pytest.raises(ValueError, match=r"recipe\.toml: unknown key 'nam'; did you mean 'name'"):
        load_recipe(Outer, recipe, ["nam=x"])
    with pytest.raises(ValueError, match=r"recipe\.toml\.inner: rate must lie in"):
        load_recipe(Outer, recipe, ["inner.rate=0.0"])


def test_none_is_taken_where_it_is_allowed():
    assert from_dict(Outer, {"steps": 1, "target": None}).target is None
    assert from_dict(Outer, {"steps": 1, "target": 1}).target == 1.0


# --- overrides --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1", 1),
        ("0.5", 0.5),
        ("1e-3", 1e-3),
        ("true", True),
        ("[1, 2]", [1, 2]),
        ('"quoted"', "quoted"),
        ("bare", "bare"),
        ("a/b.toml", "a/b.toml"),
        ("x=y", "x=y"),
        (" spaced ", "spaced"),
        ("", ""),
    ],
)
def test_values_of_overrides_are_toml_or_bare_strings(text: str, value: Any):
    result = with_overrides({}, [f"key={text}"])["key"]
    assert result == value
    assert type(result) is type(value)


def test_overrides_make_tables_and_leave_the_data_alone():
    data = {"a": {"b": {"c": 1}, "d": 2}}
    result = with_overrides(data, ["a.b.c=5", "a.e=6", "f.g=7"])
    assert result == {"a": {"b": {"c": 5}, "d": 2, "e": 6}, "f": {"g": 7}}
    assert data == {"a": {"b": {"c": 1}, "d": 2}}


def test_later_overrides_win():
    assert with_overrides({"a": 0}, ["a=1", "a=2"]) == {"a": 2}


@pytest.mark.parametrize("override", ["steps", "=3", " =3"])
def test_an_override_is_key_equals_value(override: str):
    with pytest.raises(ValueError, match=r"expected key=value or table\.key=value"):
        with_overrides({}, [override])


def test_a_value_is_no_table():
    with pytest.raises(ValueError, match=r"'a\.b=1': 'a' is a value, not a table"):
        with_overrides({"a": 3}, ["a.b=1"])


# --- and back ---------------------------------------------------------------------------------

configs = st.builds(
    Outer,
    steps=st.integers(-(10**9), 10**9),
    name=st.text(max_size=8),
    fast=st.booleans(),
    folder=st.sampled_from([Path("runs"), Path("/tmp/a b"), Path("x/y.z")]),
    target=st.none() | st.floats(allow_nan=False, allow_infinity=False),
    taus=st.lists(st.floats(allow_nan=False, allow_infinity=False), max_size=4).map(tuple),
    inner=st.builds(
        Inner,
        rate=st.floats(0, 1, exclude_min=True),
        kind=st.sampled_from(["paper", "residual"]),
    ),
)


@given(configs)
def test_a_config_comes_back_from_plain_data(config):
    data = to_dict(config)
    assert type(data["taus"]) is list
    assert type(data["folder"]) is str
    assert type(data["inner"]) is dict
    assert from_dict(Outer, data) == config


# --- numbers ----------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [True, 1.5, 2.0, "3", None, float("nan")])
def test_a_whole_number_is_an_int(value: Any):
    with pytest.raises(ValueError, match="multiple: expected int, got "):
        whole_number("multiple", value, least=1)


def test_a_whole_number_lies_in_its_range():
    assert whole_number("steps", 3, least=1, most=3) == 3
    with pytest.raises(ValueError, match="steps must be at least 1, got 0"):
        whole_number("steps", 0, least=1)
    with pytest.raises(ValueError, match=r"steps must be at most 9, got 1000\d*\.\.\.\d*000\."):
        whole_number("steps", 10**100, most=9)


@pytest.mark.parametrize("value", [float("nan"), float("-inf"), 10**400, True, "1", None])
def test_a_finite_number_is_one(value: Any):
    with pytest.raises(ValueError, match="t: expected "):
        finite_number("t", value)
    assert finite_number("t", 2) == 2.0


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ShivaConfig.for_model(tiny.sd3(), lora_rank=2.0), "lora_rank: expected int"),
        (lambda: ShivaConfig.for_model(tiny.sd3(), lora_rank=True), "lora_rank: expected int"),
        (lambda: ShivaConfig.for_model(tiny.sd3(), multiple=1.5), "multiple: expected int"),
        (lambda: ShivaConfig.for_model(tiny.sd3(), keep_ratio=float("nan")), "finite number"),
        (lambda: TrainConfig(batch_size=4.0), "batch_size: expected int"),
        (lambda: TrainConfig(joint_steps=True), "joint_steps: expected int"),
        (lambda: TrainConfig(seed=-1), "seed must be at least 0"),
        (lambda: TrainConfig(backbone="qlora"), "expected one of 'frozen'"),
        (lambda: OptimizerConfig(router=float("inf")), "router: expected a finite number"),
        (lambda: RouterConfig(tau_rank=(0.2, "x")), r"tau_rank\[1\]: expected float"),
    ],
)
def test_configs_check_types_wherever_they_are_made(make: Any, message: str):
    try:
        with pytest.raises(ValueError, match=message):
            make()
    except TypeCheckError:  # where annotations are enforced, as in most tests, they come first
        assert "expected" in message


def test_a_byte_order_mark_is_no_part_of_a_recipe(recipe: Path) -> None:
    plain = load_recipe(Outer, recipe)
    recipe.write_bytes(b"\xef\xbb\xbf" + recipe.read_bytes())
    assert load_recipe(Outer, recipe) == plain


@pytest.mark.parametrize("name", ["./three.toml", "sub/../three.toml", "link.toml"])
def test_a_recipe_like_itself_by_another_name_is_refused(name: str, tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    three = tmp_path / "three.toml"
    (tmp_path / "link.toml").symlink_to(three)
    three.write_text(f'like = "{name}"')
    with pytest.raises(ValueError, match="which is like itself in the end"):
        load_recipe(Outer, three)
