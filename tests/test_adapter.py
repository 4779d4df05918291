"""The saved artefact: exact round trips, reproducible bytes, and a reason for every refusal."""

import ast
import inspect
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from huggingface_hub.errors import LocalEntryNotFoundError
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import shiva_dit
from shiva_dit.adapter import ShivaAdapter, ShivaConfig
from shiva_dit.core.schedule import Schedule
from shiva_dit.saved_folder import (
    ALL_WEIGHTS,
    BACKBONE_FILE,
    CARD_FILE,
    CONFIG_FILE,
    LORA_FILE,
    WEIGHTS_FILE,
)
from tests import tiny

KINDS_OF_BACKBONE = ("frozen", "lora", "dora", "full")
SOURCES = Path(shiva_dit.__file__).parent

backbones = pytest.mark.parametrize("backbone", KINDS_OF_BACKBONE)


def awkward_schedule() -> Schedule:
    """Ratios that no short decimal holds."""
    generator = torch.Generator().manual_seed(0)
    ratios = 0.05 + 0.9 * torch.rand(5, 4, generator=generator, dtype=torch.float64)
    ratios[:, 0] = 1.0
    return Schedule.from_ratios(ratios.tolist())


def make(backbone: str = "frozen", **options: Any) -> ShivaAdapter:
    made = tiny.adapter(
        tiny.sd3(),
        awkward_schedule(),
        backbone=backbone,
        lora_rank=tiny.LORA_RANK,
        base_model="me/tiny",
        **options,
    )
    tiny.randomize(made.policy, seed=2)
    made.backbone_weights, _ = tiny.tuned(backbone)
    made.training_record = {"steps": 12, "recipe": {"seed": 3, "rates": [0.1, 1e-7]}}
    return made


def same(a: ShivaAdapter, b: ShivaAdapter) -> bool:
    def equal(x: dict[str, torch.Tensor], y: dict[str, torch.Tensor]) -> bool:
        return x.keys() == y.keys() and all(
            torch.equal(x[n], y[n]) and x[n].dtype == y[n].dtype for n in x
        )

    return (
        a.config == b.config
        and a.schedule == b.schedule
        and a.training_record == b.training_record
        and equal(a.state_dict(), b.state_dict())
        and equal(a.backbone_weights, b.backbone_weights)
    )


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


# --- round trip -----------------------------------------------------------------------------


@pytest.mark.parametrize("rejected", ["identity", "low_rank"])
@backbones
def test_a_round_trip_is_exact(backbone: str, rejected: Any, tmp_path: Path) -> None:
    made = make(backbone, rejected=rejected)
    made.save_pretrained(tmp_path)
    loaded = ShivaAdapter.from_pretrained(tmp_path)
    assert same(loaded, made)
    assert not loaded.training
    files = {CONFIG_FILE, WEIGHTS_FILE, CARD_FILE}
    files |= {"frozen": set(), "full": {BACKBONE_FILE}}.get(backbone, {LORA_FILE})
    assert set(bytes_of(tmp_path)) == files

    model, twin = tiny.sd3(), tiny.sd3()
    shiva_dit.apply(model, made)
    shiva_dit.apply(twin, str(tmp_path))
    assert torch.equal(tiny.run(model, tiny.inputs()), tiny.run(twin, tiny.inputs()))


@backbones
def test_two_saves_are_equal_to_the_byte(backbone: str, tmp_path: Path) -> None:
    folders = [tmp_path / str(i) for i in range(8)]
    made = make(backbone)
    for folder in folders[:6]:  # what depends on chance needs more than two tries to show
        made.save_pretrained(folder)
    make(backbone).save_pretrained(folders[6])
    ShivaAdapter.from_pretrained(folders[0]).save_pretrained(folders[7])
    first = bytes_of(folders[0])
    for folder in folders[1:]:
        assert bytes_of(folder) == first


def test_saving_again_replaces(tmp_path: Path) -> None:
    make().save_pretrained(tmp_path / "a")
    other = make()
    tiny.randomize(other, seed=4)
    other.save_pretrained(tmp_path / "a")
    other.save_pretrained(tmp_path / "b")
    assert bytes_of(tmp_path / "a") == bytes_of(tmp_path / "b")


def test_saving_another_kind_leaves_no_weights_of_the_first(tmp_path: Path) -> None:
    for kind in ("lora", "frozen", "full", "frozen"):
        make(kind).save_pretrained(tmp_path / "one")
        make(kind).save_pretrained(tmp_path / kind)
        assert bytes_of(tmp_path / "one") == bytes_of(tmp_path / kind)


def test_what_json_cannot_hold_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    make().save_pretrained(tmp_path)
    good = bytes_of(tmp_path)
    other = make()
    tiny.randomize(other, seed=4)
    other.training_record["loss"] = float("nan")
    with pytest.raises(ValueError, match="not JSON compliant"):
        other.save_pretrained(tmp_path)
    assert bytes_of(tmp_path) == good


def test_an_interrupted_save_is_no_adapter_and_leaves_no_half_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(tensors: Any, path: Path, **_: Any) -> None:
        Path(path).write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr("shiva_dit.adapter.storage.save_file", fail)
    with pytest.raises(OSError, match="disk full"):
        make().save_pretrained(tmp_path)
    assert bytes_of(tmp_path) == {}
    with pytest.raises(ValueError, match=r"holds no config\.json"):
        ShivaAdapter.from_pretrained(tmp_path)


def test_the_config_is_readable_and_ratios_do_not_depend_on_resolution(tmp_path: Path) -> None:
    make().save_pretrained(tmp_path)
    data = json.loads((tmp_path / CONFIG_FILE).read_text())
    assert data["_class_name"] == "ShivaAdapter"
    assert data["format_version"] == 1
    assert data["config"]["base_model_class"] == "SD3Transformer2DModel"
    assert data["config"]["backbone"] == "frozen"
    assert data["schedule"]["ratios"] == [list(row) for row in awkward_schedule().ratios]
    assert data["training"]["steps"] == 12


def test_the_card_names_the_base_model(tmp_path: Path) -> None:
    make().save_pretrained(tmp_path)
    card = (tmp_path / CARD_FILE).read_text(encoding="utf-8")
    assert card.startswith(
        "---\nlibrary_name: diffusers\nbase_model: me/tiny\ntags:\n- shiva-dit\n"
    )
    assert "60% on average" in " ".join(card.split())


@pytest.mark.parametrize("backbone", ["lora", "dora"])
def test_diffusers_pipelines_load_the_lora_file_by_themselves(
    backbone: str, tmp_path: Path
) -> None:
    made = make(backbone)
    made.save_pretrained(tmp_path)
    ours, theirs = tiny.sd3(), tiny.sd3()
    bare = tiny.run(ours, tiny.inputs())
    shiva_dit.apply(ours, made, keep_ratio=1.0)
    tiny.pipeline(theirs).load_lora_weights(str(tmp_path))
    output = tiny.run(theirs, tiny.inputs())
    found = tiny.run(ours, tiny.inputs())
    # PEFT's layers round otherwise than weights with a LoRA in them. Measured: 1e-6.
    assert (output - found).norm() <= 1e-5 * output.norm()
    assert (output - bare).norm() > 0.01 * output.norm()


@pytest.mark.parametrize("backbone", KINDS_OF_BACKBONE)
def test_a_backbone_that_is_promised_must_be_there(backbone: str, tmp_path: Path) -> None:
    made = make(backbone)
    made.backbone_weights = {} if made.backbone_weights else {"proj_out.bias": torch.zeros(1)}
    with pytest.raises(ValueError, match=rf"config says backbone = '{backbone}', .* tensors"):
        made.save_pretrained(tmp_path)
    assert bytes_of(tmp_path) == {}


# --- refusals -------------------------------------------------------------------------------


def refused(folder: Path, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ShivaAdapter.from_pretrained(folder)


@backbones
@pytest.mark.parametrize("damage", ["truncated", "altered", "swapped", "empty"])
def test_damaged_weights_are_refused(backbone: str, damage: str, tmp_path: Path) -> None:
    make(backbone).save_pretrained(tmp_path)
    for path in sorted(tmp_path.glob("*.safetensors")):
        good = path.read_bytes()
        if damage == "truncated":
            path.write_bytes(good[:-1])
        elif damage == "altered":
            path.write_bytes(good[:-2] + bytes([good[-2] ^ 1]) + good[-1:])
        elif damage == "swapped":
            with safe_open(path, "pt") as file:
                metadata = file.metadata()
            save_file({k: v + 1 for k, v in load_file(path).items()}, path, metadata=metadata)
        else:
            path.write_bytes(b"")
        refused(tmp_path, rf"{path.name} is not the file .*SHA-256.*truncated or was altered")
        path.write_bytes(good)
    assert same(ShivaAdapter.from_pretrained(tmp_path), make(backbone))


@backbones
def test_missing_weights_are_refused(backbone: str, tmp_path: Path) -> None:
    make(backbone).save_pretrained(tmp_path)
    for path in sorted(tmp_path.glob("*.safetensors")):
        good = path.read_bytes()
        path.unlink()
        refused(tmp_path, f"{path.name} is missing: the adapter is incomplete")
        path.write_bytes(good)
        files = json.loads((tmp_path / CONFIG_FILE).read_text())["files"]
        tiny.edit_config(tmp_path, files={k: v for k, v in files.items() if k != path.name})
        refused(tmp_path, f"config.json doesn't list {path.name}")
        tiny.edit_config(tmp_path, files=files)


def test_what_is_not_an_adapters_folder_is_refused(tmp_path: Path) -> None:
    refused(tmp_path, r"holds no config\.json: it is not an adapter's folder")
    tiny.sd3().save_pretrained(tmp_path)
    refused(tmp_path, "describes SD3Transformer2DModel, not a ShivaAdapter")
    for text, found in (("[]", "something else"), ("{}", "something else"), ("3", "something")):
        (tmp_path / CONFIG_FILE).write_text(text)
        refused(tmp_path, f"describes {found}")


@pytest.mark.parametrize(
    "changes",
    [
        {"schedule": {"full_blocks": [0], "ratios": [[1.0, 0.1, 0.1, 0.1]]}},
        {"training": {"steps": 13}},
        {"more": 1},
        {"digest": None},
    ],
)
def test_an_altered_config_is_refused(changes: dict[str, Any], tmp_path: Path) -> None:
    make().save_pretrained(tmp_path)
    tiny.edit_config(tmp_path, sign=False, **changes)
    refused(tmp_path, r"config\.json was altered after it was written .*pass schedule= or keep_ra")


def test_weights_of_another_dtype_are_refused(tmp_path: Path) -> None:
    make().to(torch.bfloat16).save_pretrained(tmp_path)
    refused(tmp_path, r"bfloat16, an adapter is torch\.float32")


def test_a_config_of_absurd_size_is_refused_and_not_allocated(tmp_path: Path) -> None:
    make().save_pretrained(tmp_path)
    config = json.loads((tmp_path / CONFIG_FILE).read_text())["config"]
    tiny.edit_config(tmp_path, config={**config, "width": 10**12})
    refused(tmp_path, r"project_tokens\.weight has shape \(8, 32\), the config asks for")


def test_a_truncated_or_binary_config_is_refused(tmp_path: Path) -> None:
    make().save_pretrained(tmp_path)
    path = tmp_path / CONFIG_FILE
    good = path.read_bytes()
    for text in (good[: len(good) // 2], b"", b"\xff\xfe\x00"):
        path.write_bytes(text)
        refused(tmp_path, r"config\.json is damaged")


@pytest.mark.parametrize("version", [0, 3, "1", None])
def test_another_format_version_is_refused(version: Any, tmp_path: Path) -> None:
    make().save_pretrained(tmp_path)
    tiny.edit_config(tmp_path, format_version=version)
    refused(tmp_path, rf"has format version {version}, this shiva-dit reads 1 and 2: upgrade")


@pytest.mark.parametrize("key", ["config", "schedule", "files", "training"])
@pytest.mark.parametrize("value", [None, []])
def test_a_missing_part_of_the_config_is_refused(key: str, value: Any, tmp_path: Path) -> None:
    make().save_pretrained(tmp_path)
    tiny.edit_config(tmp_path, **{key: value})
    refused(tmp_path, f"config.json is damaged: '{key}' is missing")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"widht": 32}, "unknown key 'widht'; did you mean 'width'"),
        ({"width": "32"}, "width: expected int, got '32'"),
        ({"width": 0}, "width must be at least 1, got 0"),
        ({"num_groups": 5}, r"num_groups must lie between 1 and the number of blocks, 4, got 5"),
        ({"keep_ratio": 1.5}, r"keep_ratio must lie in \(0, 1\), got 1.5"),
        ({"keep_ratio": 0}, r"keep_ratio must lie in \(0, 1\), got 0"),
        ({"full_blocks": [4]}, "full_blocks: there is no block 4 among 4"),
        ({"multiple": 0}, "multiple must be at least 1, got 0"),
        ({"lora_rank": 0}, "lora_rank must be at least 1, got 0"),
        ({"backbone": "qlora"}, "expected one of 'frozen', 'lora', 'dora', 'full', got 'qlora'"),
        ({"num_blocks": 8}, "num_blocks is 8, in the schedule 4"),
        ({"width": 48}, r"project_tokens.weight has shape \(8, 32\), the config asks for \(8, 48"),
        ({"num_groups": 4}, r"doesn't fit its config: missing \['router.groups.2"),
        ({"num_groups": 1}, r"doesn't fit its config: .*unexpected \['router.groups.1"),
    ],
)  # fmt: skip
def test_a_config_that_is_wrong_or_another_adapters_is_refused(
    changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    make().save_pretrained(tmp_path)
    config = json.loads((tmp_path / CONFIG_FILE).read_text())["config"]
    tiny.edit_config(tmp_path, config={**config, **changes})
    refused(tmp_path, message)


def test_a_missing_field_of_the_config_is_refused(tmp_path: Path) -> None:
    make().save_pretrained(tmp_path)
    config = json.loads((tmp_path / CONFIG_FILE).read_text())["config"]
    del config["width"]
    tiny.edit_config(tmp_path, config=config)
    refused(tmp_path, r"config\.json: 'width' is missing")


@pytest.mark.parametrize(
    ("schedule", "message"),
    [
        ({"ratios": [[1.0, 0.0, 0.5, 0.5]], "full_blocks": [0]}, r"\(0, 1\], got 0.0"),
        ({"ratios": [[1.0, 1.5, 0.5, 0.5]], "full_blocks": [0]}, r"\(0, 1\], got 1.5"),
        ({"ratios": [[1.0, 0.5, 0.5], [1.0]], "full_blocks": [0]}, "one ratio per block"),
        ({"ratios": [[0.5, 0.5, 0.5, 0.5]], "full_blocks": [0]}, "its ratios must be 1"),
        ({"ratios": [], "full_blocks": [0]}, "at least one time bin"),
        ({"ratios": 3, "full_blocks": [0]}, "not a schedule"),
        ({"ratios": [[1.0] * 4]}, '"full_blocks" and "ratios"'),
    ],
)
def test_a_schedule_that_is_wrong_is_refused_with_its_file(
    schedule: dict[str, Any], message: str, tmp_path: Path
) -> None:
    make().save_pretrained(tmp_path)
    tiny.edit_config(tmp_path, schedule=schedule)
    refused(tmp_path, rf"config\.json: .*{message}")


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_weights_that_are_not_finite_are_refused(value: float, tmp_path: Path) -> None:
    made = make()
    with torch.no_grad():
        made.router.layer_embedding.weight[1, 2] = value
    made.save_pretrained(tmp_path)
    refused(tmp_path, r"router\.layer_embedding\.weight holds values that are not finite")


def test_what_only_looks_like_safetensors_is_refused(tmp_path: Path) -> None:
    """The digest fits, the content doesn't: written by something else."""
    import hashlib  # noqa: PLC0415

    make().save_pretrained(tmp_path)
    content = b"PK\x03\x04 a zip, as torch.save writes"
    (tmp_path / WEIGHTS_FILE).write_bytes(content)
    tiny.edit_config(tmp_path, files={WEIGHTS_FILE: hashlib.sha256(content).hexdigest()})
    refused(tmp_path, rf"{WEIGHTS_FILE} is not a safetensors file")


@pytest.mark.slow
def test_lies_are_refused_before_the_process_grows(tmp_path: Path) -> None:
    """Numbers that no tensor bounds, headers, nesting, strings: the cases are in `hostile.py`."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.hostile", str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = {path.stem: json.loads(path.read_text()) for path in tmp_path.glob("*.json")}
    assert len(found) > 25
    assert found.pop("good")[1] is None
    for name, (growth, said) in found.items():
        assert said is not None, name
        assert str(tmp_path / name) in said, (name, said)  # the file, that is
        assert len(said) < 1500, name
        assert growth < 64, (name, growth)


@pytest.mark.parametrize("source", ["nowhere", "a/b/c", "./me/adapter", "/me/adapter"])
def test_what_is_neither_a_folder_nor_a_hub_id_is_refused(source: str) -> None:
    with pytest.raises(ValueError, match=f"{source} is neither a folder nor a Hub id like user/na"):
        ShivaAdapter.from_pretrained(source)


# --- the Hub --------------------------------------------------------------------------------


def test_push_to_hub_uploads_what_save_writes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[tuple[str, dict[str, Any]]] = []
    uploaded: dict[str, bytes] = {}

    class FakeApi:
        def __init__(self, token: str | None = None) -> None:
            calls.append(("token", {"token": token}))

        def create_repo(self, repo_id: str, **options: Any) -> str:
            calls.append((repo_id, options))
            return f"https://huggingface.co/{repo_id}"

        def upload_folder(self, *, repo_id: str, folder_path: str, **options: Any) -> None:
            calls.append((repo_id, options))
            uploaded.update(bytes_of(Path(folder_path)))

    real = huggingface_hub.HfApi
    monkeypatch.setattr(huggingface_hub, "HfApi", FakeApi)
    made = make("lora")
    url = made.push_to_hub("me/adapter", private=True, token="secret")
    assert url == "https://huggingface.co/me/adapter"
    assert calls == [
        ("token", {"token": "secret"}),
        ("me/adapter", {"private": True, "exist_ok": True}),
        # Weights of an earlier adapter that this one doesn't have go.
        ("me/adapter", {"delete_patterns": list(ALL_WEIGHTS)}),
    ]
    for method, (_, options) in zip((real.create_repo, real.upload_folder), calls[1:], strict=True):
        assert set(options) <= set(inspect.signature(method).parameters)
    made.save_pretrained(tmp_path)
    assert uploaded == bytes_of(tmp_path)


def test_a_hub_id_is_downloaded_and_checked_like_a_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = make("dora")
    made.save_pretrained(tmp_path)
    calls: list[Any] = []

    def download(repo_id: str, **options: Any) -> str:
        patterns = options.pop("allow_patterns")
        calls.append((repo_id, options, set(patterns)))
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    loaded = ShivaAdapter.from_pretrained("me/adapter", revision="v1", token="secret")
    assert same(loaded, made)
    names = {CONFIG_FILE, *ALL_WEIGHTS}
    assert calls == [("me/adapter", {"revision": "v1", "token": "secret"}, names)]

    model = tiny.sd3()
    shiva_dit.apply(model, "me/adapter", revision="v2")
    assert calls[1] == ("me/adapter", {"revision": "v2", "token": None}, names)
    (tmp_path / WEIGHTS_FILE).write_bytes(b"")
    refused(Path("me/adapter"), "truncated or was altered")


def test_a_folder_that_is_not_there_and_no_hub_says_both(monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*_: Any, **__: Any) -> str:
        raise LocalEntryNotFoundError("no connection")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", unreachable)
    with pytest.raises(ValueError, match=r"no folder runs/digits40 here, and the Hub .*connection"):
        ShivaAdapter.from_pretrained("runs/digits40")


# --- configs --------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", tiny.KINDS)
def test_a_config_reads_its_widths_off_the_model(kind: str) -> None:
    config = ShivaConfig.for_model(tiny.sd3(kind, num_layers=6), hidden=16)
    assert config == ShivaConfig(
        base_model_class="SD3Transformer2DModel",
        num_blocks=6,
        width=32,
        time_dim=32,
        context_dim=20,
        num_groups=3,
        hidden=16,
    )
    assert ShivaConfig.for_model(tiny.sd3(num_layers=3)).num_groups == 2
    assert ShivaConfig.for_model(tiny.sd3(num_layers=6), num_groups=2).num_groups == 2


def test_without_a_schedule_the_target_is_kept_everywhere() -> None:
    made = ShivaAdapter(ShivaConfig.for_model(tiny.sd3(), keep_ratio=0.4, full_blocks=(0, 3)))
    assert made.schedule == Schedule.uniform(0.4, num_blocks=4, full_blocks=(0, 3))


# --- never pickle ---------------------------------------------------------------------------


def unsafe_uses(tree: ast.AST) -> list[str]:
    """Ways to unpickle: the modules that do, torch.load and torch.save, and numpy's switch."""
    banned = {"pickle", "_pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [a.name for a in node.names if a.name.partition(".")[0] in banned]
        elif isinstance(node, ast.ImportFrom):
            module = node.module or ""
            from_torch = module == "torch" and {a.name for a in node.names} & {"load", "save"}
            if module.partition(".")[0] in banned or from_torch:
                found.append(module)
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            if node.value.id == "torch" and node.attr in ("load", "save"):
                found.append(f"torch.{node.attr}")
        elif isinstance(node, ast.keyword) and node.arg in ("allow_pickle", "weights_only"):
            found.append(node.arg)
    return found


def test_nothing_is_pickled() -> None:
    paths = sorted(SOURCES.rglob("*.py"))
    assert len(paths) > 20
    for path in paths:
        assert unsafe_uses(ast.parse(path.read_text(encoding="utf-8"))) == [], path


@pytest.mark.parametrize(
    "code",
    [
        "import pickle",
        "from torch import load",
        "import torch\ntorch.load('x')",
        "import numpy as np\nnp.load('x', allow_pickle=True)",
    ],
)
def test_the_search_for_pickles_finds_them(code: str) -> None:
    assert len(unsafe_uses(ast.parse(code))) == 1


@pytest.mark.parametrize(
    ("asked", "warns"),
    [(0.25, True), (0.35, True), (0.38, False), (0.4, False), (0.5, False), (0.6, True)],
)
@pytest.mark.parametrize("by", ["keep_ratio", "schedule"])
def test_moving_an_adapter_far_from_what_it_was_trained_for_warns(
    asked: float, warns: bool, by: str, caplog: pytest.LogCaptureFixture
) -> None:
    model = tiny.sd3()
    adapter = tiny.adapter(model, keep_ratio=0.4)
    assert adapter.trained_for == (0.4, 0.4)
    schedule = Schedule.uniform(asked, num_blocks=tiny.NUM_LAYERS)
    options: dict[str, Any] = {by: asked if by == "keep_ratio" else schedule}
    shiva_dit.apply(model, adapter, **options)
    said = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert [f"ratio of 0.4 and is asked for {asked:g}" in line for line in said] == [True] * warns


def test_card_and_adapter_say_which_guidance_it_was_trained_for(tmp_path: Path) -> None:
    adapter = tiny.adapter(tiny.sd3())
    assert adapter.trained_for_guidance is None
    adapter.training_record = {"recipe": {"guidance": [1.0, 7.0]}}
    adapter.save_pretrained(tmp_path)
    assert ShivaAdapter.from_pretrained(tmp_path).trained_for_guidance == (1.0, 7.0)
    card = " ".join((tmp_path / CARD_FILE).read_text(encoding="utf-8").split())
    assert "steps and guidance 1 to 7." in card
    adapter.training_record = {"recipe": {"guidance": "often"}}
    assert adapter.trained_for_guidance is None


def test_what_was_trained_for_a_range_may_move_in_it(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = tiny.sd3()
    adapter = tiny.adapter(model, keep_ratio=0.5, target_range=(0.3, 0.8))
    adapter.save_pretrained(tmp_path)
    loaded = ShivaAdapter.from_pretrained(tmp_path)
    assert loaded.trained_for == (0.3, 0.8)
    older = tiny.adapter(tiny.sd3(), keep_ratio=0.5)
    older.training_record = {"recipe": {"policy": {"target_range": [0.3, 0.8]}}}
    assert older.trained_for == (0.3, 0.8)
    for wrong in ((0.8, 0.3), (0.3, 1.2), (0.0, 0.5)):
        with pytest.raises(ValueError, match=r"target_range must rise within \(0, 1\)"):
            tiny.adapter(tiny.sd3(), target_range=wrong)
    for asked in (0.3, 0.5, 0.8, 1.0):  # all tokens of a frozen backbone are the model itself
        shiva_dit.apply(model, loaded, keep_ratio=asked)
    shiva_dit.apply(model, loaded)
    assert not [record for record in caplog.records if record.levelname == "WARNING"]
    shiva_dit.apply(model, loaded, keep_ratio=0.2)
    assert "of 0.3 to 0.8 and is asked for 0.2" in caplog.text
