"""What documents name is there: files, code, options, settings, commands, messages, hooks.

`python -m tests.test_documents` says how many words each page has.
"""

from __future__ import annotations

import argparse
import ast
import builtins
import dataclasses
import importlib
import importlib.util
import inspect
import pkgutil
import re
import shlex
import sys
import textwrap
import typing
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch

import shiva_dit
from shiva_dit.benchmark.config import BenchmarkConfig
from shiva_dit.cli import command_line
from shiva_dit.config import from_dict, load_recipe, with_overrides
from shiva_dit.demo.train_base import BaseTraining
from shiva_dit.experiments.compare import Comparison
from shiva_dit.inspection import FlipConfig
from shiva_dit.models.neighbours import BLOCK_CACHES, REFUSED
from shiva_dit.training.recipe import TrainConfig
from tests import running, tiny

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "src" / "shiva_dit"
DOCUMENTS = [ROOT / "README.md", *sorted(ROOT.glob("docs/**/*.md"))]
CONFIGS = (TrainConfig, Comparison, BaseTraining, FlipConfig, BenchmarkConfig)

MADE_LATER = ("runs/", "quickstart/", ".venv")
"""Beginnings of paths that commands make."""

# Spans that are neither of this package nor of diffusers, torch or Python, and what they are.
ELSEWHERE = {
    "--jaxtyping-packages": "jaxtyping's option of pytest",
    "# (B, k, D)": "how a shape is written",
    "# noqa: PLC0415": "ruff's",
    "F821 Undefined name": "ruff's",
    "F821": "ruff's",
    "ruff check": "ruff's",
    "ruff format --check": "ruff's",
    "xfail(strict=True)": "pytest's",
    "pag_scale=0": "of diffusers' pipelines",
    "mixed dtype": "torch's",
    "aot_eager": "torch's",
    "huggingface_hub": "a package",
    "num_": "how names begin",
    "Args": "a heading of docstrings",
    "Returns": "a heading of docstrings",
    "Raises": "a heading of docstrings",
    "assert": "Python's",
    "except Exception": "Python's",
    "except BaseException": "Python's",
    "pip install torch": "pip's",
    "nohup": "of every shell",
    "hf auth login": "the Hub's",
    "PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu": "pip's",
    "CheckpointError: A different number of tensors was saved": "torch's",
    "from __future__ import annotations": "Python's",
    "<what>--<hardware>--<date>.json": "a pattern of names",
    "utils.py": "said not to be there",
}


# --- reading --------------------------------------------------------------------------------------


def spans(document: Path) -> list[str]:
    """What stands in backticks within the text, each once."""
    text = re.sub(r"^```.*?^```", "", document.read_text(encoding="utf-8"), flags=re.S | re.M)
    return list(dict.fromkeys(" ".join(span.split()) for span in re.findall(r"`([^`]+)`", text)))


def blocks(document: Path, language: str) -> list[str]:
    text = document.read_text(encoding="utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```", text, flags=re.S | re.M)


@cache
def paths() -> frozenset[str]:
    """Every file and folder of the repository that isn't hidden."""
    found = [ROOT / ".ci" / "run"]
    for top in (p for p in ROOT.iterdir() if not p.name.startswith(".")):
        found += [top, *top.rglob("*")]
    return frozenset(path.relative_to(ROOT).as_posix() for path in found)


@cache
def sources() -> tuple[ast.Module, ...]:
    return tuple(ast.parse(p.read_text(encoding="utf-8")) for p in sorted(PACKAGE.rglob("*.py")))


@cache
def words() -> frozenset[str]:
    """What the package defines, imports or spells out, and the words of its settings."""
    found: set[str] = set()
    for name in ("pyproject.toml", "Makefile", "tests/conftest.py"):
        found |= set(re.findall(r"[\w-]+", (ROOT / name).read_text(encoding="utf-8")))
    for node in (node for tree in sources() for node in ast.walk(tree)):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            found.add(node.name)
        elif isinstance(node, ast.arg):
            found.add(node.arg)
        elif isinstance(node, ast.alias):
            found |= {node.name, node.asname or node.name}
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            found.add(node.id)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            found.add(node.attr)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            found.add(node.value)
    return frozenset(found)


def plain(text: str) -> str:
    """A message without what differs from one to the next: numbers, names in quotes, owners."""
    text = re.sub(r"'[\w.-]+'|\.{3}|\d+(\.\d+)?|\b\w+(?='s )", "\0", text)
    return re.sub(r"\0+", "\0", text)


@cache
def messages() -> tuple[str, ...]:
    """All texts of the package, as `plain` leaves them."""
    found = []
    for node in (node for tree in sources() for node in ast.walk(tree)):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            found.append(plain(node.value))
        elif isinstance(node, ast.JoinedStr):
            parts = [p.value if isinstance(p, ast.Constant) else "\0" for p in node.values]
            found.append(plain("".join(map(str, parts))))
    return tuple(found)


# --- what a name may be ---------------------------------------------------------------------------


@cache
def package_index() -> dict[str, Any]:
    """Classes and functions of the package by their names, and its modules."""
    found: dict[str, Any] = {}
    for info in pkgutil.walk_packages([str(PACKAGE)], "shiva_dit."):
        module = importlib.import_module(info.name)
        found.setdefault(info.name.rpartition(".")[2], module)
        own = {n: v for n, v in vars(module).items() if getattr(v, "__module__", "") == info.name}
        found |= own
    return found


def modular_pipelines() -> Iterator[Any]:
    """Their modules that hold the blocks which call a model."""
    for kind, _, _ in running.served_denoisers().values():
        yield sys.modules[kind.__module__]


@cache
def neighbours() -> tuple[Any, ...]:
    """What documents speak of that others made: pipelines, models, tensors, modules."""
    model = tiny.sd3("dual")
    return (
        diffusers.StableDiffusion3Pipeline,
        diffusers.FluxTransformer2DModel,
        *(type(module) for module in model.modules()),
        *model.modules(),
        diffusers,
        diffusers.hooks,
        *modular_pipelines(),
        torch.Tensor,
        torch,
        torch.nn,
        torch.autograd,
        builtins,
    )


def has(value: Any, name: str) -> bool:
    """Whether an object, or an instance of a class, has an attribute."""
    if hasattr(value, name) or name in getattr(value, "__dataclass_fields__", ()):
        return True
    if inspect.ismodule(value):
        return member(value, name) is not None
    if not inspect.isclass(value) or not value.__module__.startswith("shiva_dit"):
        return False
    tree = ast.parse(textwrap.dedent(inspect.getsource(value)))
    return any(isinstance(n, ast.Attribute) and n.attr == name for n in ast.walk(tree))


def member(value: Any, name: str) -> Any:
    """The attribute itself, if it can be told; a submodule is imported."""
    if inspect.ismodule(value) and not hasattr(value, name):
        try:
            return importlib.import_module(f"{value.__name__}.{name}")
        except ModuleNotFoundError:
            return None
    return getattr(value, name, None)


def wrong_in(tree: ast.AST) -> Iterator[str]:
    """Names that nothing has: in `Class.method(argument=...)` and the like."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            yield from wrong_keywords(node)
        elif isinstance(node, ast.Attribute):
            owner = resolved(node.value)
            there = known_somewhere(node.attr) if owner is None else has(owner, node.attr)
            yield from () if there else (ast.unparse(node),)
        elif isinstance(node, ast.Name) and not known_somewhere(node.id):
            yield node.id
        elif isinstance(node, ast.Import):
            yield from (a.name for a in node.names if importlib.util.find_spec(a.name) is None)


def wrong_keywords(call: ast.Call) -> Iterator[str]:
    """Arguments by name that the function doesn't take."""
    called = resolved(call.func)
    takes = {} if called is None else inspect.signature(called).parameters
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in takes.values()):
        return
    for keyword in call.keywords:
        if keyword.arg not in (words() if called is None else takes):
            yield f"{ast.unparse(call.func)}({keyword.arg}=)"


def resolved(node: ast.AST) -> Any:
    """What an expression is in the package; None where that can't be told."""
    if isinstance(node, ast.Attribute):
        owner = resolved(node.value)
        return None if owner is None else member(owner, node.attr)
    if not isinstance(node, ast.Name):
        return None
    if node.id in ("shiva_dit", "torch"):
        return importlib.import_module(node.id)
    return getattr(shiva_dit, node.id, None) or package_index().get(node.id)


def known_somewhere(name: str) -> bool:
    if len(name) == 1 or name in words() or name in package_index():  # letters are the paper's
        return True
    return any(hasattr(value, name) for value in neighbours())


# --- what a span may be ---------------------------------------------------------------------------


@cache
def parsers() -> dict[str, argparse.ArgumentParser]:
    """The command line's parsers by command."""
    actions = command_line._parser()._actions
    (commands,) = (a for a in actions if isinstance(a, argparse._SubParsersAction))
    return dict(commands.choices)


def wrong_command(text: str) -> str | None:
    """What the command line, or the recipe that it names, says against a command."""
    given = shlex.split(text, comments=True)[1:]
    if len(given) == 1:
        return None if given[0] in parsers() else f"there is no command {given[0]}"
    try:
        parsed = command_line._parse(given)
        if given[0] in ("train", "compare"):
            kind = TrainConfig if given[0] == "train" else Comparison
            load_recipe(kind, ROOT / parsed.recipe, parsed.overrides)
        elif given[0] == "inspect":
            from_dict(FlipConfig, with_overrides({}, parsed.overrides))
    except (SystemExit, ValueError) as error:
        return f"refused: {error}"
    return None


def wrong_option(text: str) -> str | None:
    name = text.split()[0]
    known = {o for p in parsers().values() for action in p._actions for o in action.option_strings}
    return None if name in known else f"no command has {name}"


def wrong_target(text: str) -> str | None:
    target = text.split()[1]
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    return None if f"\n{target}:" in makefile else f"there is no target {target}"


def wrong_module(text: str) -> str | None:
    found = importlib.util.find_spec(text.split()[2])
    return None if found else "there is no such module"


def wrong_test(text: str) -> str | None:
    start = f"def {text.removesuffix('...')}"
    tests = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "tests").glob("*.py"))
    return None if start in tests else "no test begins so"


def wrong_rule(text: str) -> str | None:
    rules = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    wrong = [rule for rule in text.split() if f'"{rule}"' not in rules]
    return f"pyproject.toml doesn't name {wrong}" if wrong else None


def wrong_path(text: str) -> str | None:
    """A path from the root, or its end; or the name of a file that the package writes."""
    path = text.rstrip("/")
    end = path if path.startswith("-") else f"/{path}"  # "-scenes.toml": another ending
    there = any(f"/{known}".endswith(end) for known in paths())
    return None if there or text.startswith(MADE_LATER) or text in words() else "no such file"


def fields_of(kind: Any) -> dict[str, Any]:
    return typing.get_type_hints(kind) if dataclasses.is_dataclass(kind) else {}


def wrong_setting(text: str) -> str | None:
    """`a.b = value` must be a field of a config, `name=value` a field or an argument."""
    name = text.partition("=")[0].strip()
    kinds: list[Any] = list(CONFIGS)
    if "." not in name:
        return None if name in words() else f"nothing takes {name}"
    for part in name.split("."):
        hints = [fields_of(kind)[part] for kind in kinds if part in fields_of(kind)]
        kinds = [kind for hint in hints for kind in (hint, *typing.get_args(hint))]
    return None if hints else f"no config has {name}"


def wrong_code(text: str) -> str | None:
    wrong = [name for node in ast.parse(text).body for name in wrong_in(node)]
    return f"unknown: {', '.join(wrong)}" if wrong else None


def wrong_message(text: str) -> str | None:
    return None if any(plain(text) in known for known in messages()) else "nothing says this"


def is_code(text: str) -> bool:
    try:
        return bool(ast.parse(text).body)
    except SyntaxError:
        return False


CONFIG_NAMES = {name for kind in CONFIGS for name, hint in fields_of(kind).items()
                if any(map(dataclasses.is_dataclass, (hint, *typing.get_args(hint))))}  # fmt: skip
KINDS: tuple[tuple[str, Callable[[str], str | None]], ...] = (
    (r"shiva-dit \w", wrong_command),
    (r"make \w", wrong_target),
    (r"python -m ", wrong_module),
    (r"test_\w+\.\.\.$", wrong_test),
    (r"[A-Z]+\d{3,}( [A-Z]+\d+)*$|[A-Z]+( [A-Z]+\d*)+$", wrong_rule),
    (r"--\w", wrong_option),
    (r"[\w.\-]*/[\w./\-]*$|[\w.\-]+\.(py|md|toml|jsonl?|txt|sh|png)$|\.\w+$", wrong_path),
    (rf"({'|'.join(sorted(CONFIG_NAMES))})\.[a-z_.]+( ?=|$)", wrong_setting),
    (r"[a-z_]+ ?=", wrong_setting),
)


def wrong(text: str) -> str | None:
    """Why what stands in backticks isn't so; None where it is."""
    if text in ELSEWHERE or text in words():
        return None
    for pattern, check in KINDS:
        if re.match(pattern, text):
            return check(text)
    return wrong_code(text) if is_code(text) else wrong_message(text)


# --- the tests ------------------------------------------------------------------------------------

every = pytest.mark.parametrize("document", DOCUMENTS, ids=lambda p: p.relative_to(ROOT).as_posix())


def prose_words(document: Path) -> int:
    """Words to read: no code, tables, formulas or pictures, nothing that a command writes."""
    text = document.read_text(encoding="utf-8")
    for made in (
        r"^```.*?^```",
        r"<!-- (?P<made>[a-z]+)\b.*?<!-- end (?P=made) -->",
        r"\$\$.*?\$\$",
    ):
        text = re.sub(made, "", text, flags=re.S | re.M)
    text = re.sub(r"^( *\||!\[).*$|<!--.*?-->", "", text, flags=re.M)
    return sum(any(map(str.isalnum, word)) for word in text.split())


def prose() -> str:
    """Words by page, a line each, and their sum in the last."""
    found = {path.relative_to(ROOT).as_posix(): prose_words(path) for path in DOCUMENTS}
    found["in all"] = sum(found.values())
    return "\n".join(f"{words:6d} {page}" for page, words in found.items())


def test_the_documents_can_be_read_in_an_hour() -> None:
    """But for the pages on methods and their frontier, which grow with each of them, and on other
    software, which one reads where one uses it."""
    apart = ("methods.md", "frontier.md", "comfyui.md", "engines.md", "export.md", "beside.md")
    read = [path for path in DOCUMENTS if path.name not in apart]
    assert sum(map(prose_words, read)) <= 12_400, prose()


@every
def test_what_stands_in_backticks_is_there(document: Path) -> None:
    found = {span: wrong(span) for span in spans(document)}
    assert {span: reason for span, reason in found.items() if reason} == {}


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("models/attache.py", "no such file"),
        ("benchmarks/cpu.sh", "no such file"),
        ("shiva_dit.aply(pipe)", "unknown: shiva_dit.aply"),
        ("shiva_dit.apply(pipe, keep_ration=0.5)", r"unknown: shiva_dit.apply\(keep_ration=\)"),
        ("shiva_dit.inspection.flip", "unknown"),
        ("BlockHook.backward_twice", "unknown"),
        ("_guidance_is_on", "unknown"),
        ("fuse_all_projections()", "unknown"),
        ("--resumee", "no command has --resumee"),
        ("shiva-dit train recipes/digits.toml --resumee", "refused"),
        ("shiva-dit train recipes/digits.toml keep_ration=0.5", "did you mean 'keep_ratio'"),
        ("shiva-dit trian", "no command trian"),
        ("estimator.kv_gates=false", "no config has estimator.kv_gates"),
        ("policy.adaptiv", "no config has policy.adaptiv"),
        ("make tests", "no target tests"),
        ("python -m tests.test_nothing", "no such module"),
        ("guidance halves need an odd batch", "nothing says this"),
    ],
)
def test_what_is_not_there_is_noticed(text: str, reason: str) -> None:
    found = wrong(text)
    assert found is not None
    assert re.search(reason, found)


@every
def test_commands_in_blocks_are_taken(document: Path) -> None:
    lines = [
        line.strip()
        for block in blocks(document, "bash")
        for line in block.replace("\\\n", " ").splitlines()
    ]
    ours = [line for line in lines if re.match(r"(\.venv/bin/)?shiva-dit ", line)]
    assert {line: wrong_command(line) for line in ours if wrong_command(line)} == {}


@every
def test_code_in_blocks_names_what_there_is(document: Path) -> None:
    """Imports from the package, and what is taken from it."""
    for block in blocks(document, "python"):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom) and str(node.module).startswith("shiva_dit"):
                module = importlib.import_module(str(node.module))
                assert all(hasattr(module, alias.name) for alias in node.names), node.module
            elif isinstance(node, ast.Call) and "shiva_dit" in ast.unparse(node.func):
                assert list(wrong_in(node.func)) == []


def anchors(document: Path) -> set[str]:
    """As GitHub makes them of headings."""
    heads = re.findall(r"^#+ (.*)$", document.read_text(encoding="utf-8"), flags=re.M)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


@every
def test_links_lead_somewhere(document: Path) -> None:
    text = re.sub(r"^```.*?^```", "", document.read_text(encoding="utf-8"), flags=re.S | re.M)
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"\w+://", link):
            continue
        path, _, anchor = link.partition("#")
        target = document.parent / path if path else document
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


def test_the_pitfalls_name_the_hooks_that_are_refused() -> None:
    text = " ".join((ROOT / "docs" / "pitfalls.md").read_text(encoding="utf-8").split())
    refused = re.search(r"Refused, at `apply` and at every forward [^:]*: (.*?)\.", text)
    assert refused is not None
    assert set(re.split(r", | and ", refused[1])) == set(REFUSED.values())
    caches = re.search(r"Blocks under (.*?) aren't compiled", text)
    assert caches is not None
    assert set(re.split(r", | or ", caches[1])) == set(BLOCK_CACHES.values())


if __name__ == "__main__":
    sys.stdout.write(f"{prose()}\n")
