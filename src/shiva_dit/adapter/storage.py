"""An adapter's folder: `config.json` and safetensors, strict and versioned."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors.torch import save_file
from torch import Tensor

from shiva_dit.adapter.budgets import budgets_of
from shiva_dit.adapter.config import ShivaConfig, lora_metadata
from shiva_dit.adapter.module import AdapterModule, Parts, named_parts
from shiva_dit.adapter.parts import Grouping
from shiva_dit.config import from_dict, to_dict
from shiva_dit.core.schedule import Schedule
from shiva_dit.models.backbone import first_not_finite
from shiva_dit.modules.context import check_groups
from shiva_dit.ownership import locked_folder
from shiva_dit.provenance import data_digest, load_tensors
from shiva_dit.saved_folder import (
    CLASS_NAME,
    CONFIG_FILE,
    LORA_FILE,
    Header,
    commit,
    plain_config,
    read_header,
    weights_file,
    weights_files,
)

A = TypeVar("A", bound=AdapterModule)

FORMAT_VERSION, VERSION_WITH_PARTS = 1, 2
"""An adapter without parts is written as the first versions of the package read it."""
TUNED_DTYPES = ("F16", "BF16", "F32", "F64")
"""What a tuned backbone may be saved in, in safetensors' words."""
_GROUP = re.compile(r"\.groups\.(\d{1,9})\.")


def write(adapter: AdapterModule, folder: Path, card: str) -> None:
    """Write an adapter into a folder (`ShivaAdapter.save_pretrained`).

    Args:
        adapter: What is saved.
        folder: Made if it isn't there.
        card: The folder's README.md.
    """
    data: dict[str, Any] = {
        "_class_name": CLASS_NAME,
        "format_version": FORMAT_VERSION if adapter.parts is None else VERSION_WITH_PARTS,
    }
    writers: dict[str, Callable[[Path], None]] = {}
    said = {}
    for name, part in named_parts(adapter):
        said[name] = _said(part, name)
        writers |= _writers(part, name)
    data |= said.pop(None)
    if adapter.parts is not None:
        data["parts"] = {**to_dict(adapter.parts.grouping), "others": said}
    data_digest(data)  # what can't be written is refused before anything is
    folder.mkdir(parents=True, exist_ok=True)
    with locked_folder(folder):
        commit(folder, data, writers, card)


def files_of(adapter: AdapterModule) -> tuple[str, ...]:
    """Names of all its weights files."""
    parts = named_parts(adapter)
    return tuple(n for name, part in parts for n in weights_files(part.config.backbone, name))


def _said(part: AdapterModule, name: str | None) -> dict[str, Any]:
    """What the config says of a part."""
    kind = part.config.backbone
    if bool(part.backbone_weights) != (kind != "frozen"):
        raise ValueError(
            f"the config{_of(name)} says backbone = {kind!r}, the adapter holds "
            f"{len(part.backbone_weights)} tensors of a tuned backbone: set "
            "adapter.backbone_weights, or the config's backbone, before saving."
        )
    return {
        "config": to_dict(part.config),
        "schedule": json.loads(part.schedule.to_json()),
        "training": part.training_record,
    }


def _of(name: str | None) -> str:
    """Of which part, for errors."""
    return "" if name is None else f" of {name}"


def _writers(part: AdapterModule, name: str | None) -> dict[str, Callable[[Path], None]]:
    """By name of the file, what writes a part's weights."""
    states = (part.state_dict(), part.backbone_weights)
    own, files = weights_files(part.config.backbone), weights_files(part.config.backbone, name)
    return {
        file: _writer(part.config, kind, state)
        for file, kind, state in zip(files, own, states, strict=False)
    }


def _writer(config: ShivaConfig, name: str, state: Mapping[str, Tensor]) -> Callable[[Path], None]:
    """What writes a weights file, the same to the byte each time."""

    def write_file(path: Path) -> None:
        tensors = {key: state[key].detach().cpu().contiguous() for key in sorted(state)}
        # One entry each: safetensors writes several in an order that changes by chance.
        metadata = {"format": "pt"}
        if name == LORA_FILE:
            metadata = {"lora_adapter_metadata": _lora_file_metadata(config, tensors)}
        save_file(tensors, path, metadata=metadata)

    return write_file


def read(folder: Path, kind: type[A]) -> A:
    """An adapter from a folder, everything checked (`ShivaAdapter.from_pretrained`)."""
    with locked_folder(folder, shared=True):
        return _read(folder, kind, _read_config(folder))


def _read(folder: Path, kind: type[A], data: Mapping[str, Any]) -> A:
    """The adapter that a folder's checked config describes."""
    adapter = _read_part(folder, kind, data, data["files"])
    if data["format_version"] == VERSION_WITH_PARTS:
        where = f"{folder / CONFIG_FILE}.parts"
        said = dict(data["parts"])
        others = said.pop("others", None)
        if not isinstance(others, dict):
            raise ValueError(f"{where}: 'others' is missing.")
        grouping = from_dict(Grouping, said, where=where)
        try:
            grouping.check_names(others)  # before any becomes a path
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from error
        for name, part in others.items():
            _check_part(part, f"{where}.others.{name}")
        read_ones = {
            name: _read_part(folder, kind, others[name], data["files"], name)
            for name in sorted(others, key=grouping.place)
        }
        adapter.parts = _parts(adapter, grouping, read_ones, where)
    return adapter


def _parts(adapter: A, grouping: Grouping, others: Mapping[str, A], where: str) -> Parts:
    """What belongs to an adapter, checked against what it is said to be."""
    if grouping.kind == "experts":
        return Parts(grouping=grouping, others=others)
    try:
        found = budgets_of(adapter, list(others.values()))
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
    names = [found.grouping.first, *found.others]
    if sorted(names) != sorted((grouping.first, *others)):
        raise ValueError(f"{where}: by their keep ratios the parts would be {', '.join(names)}.")
    return found


def _read_part(
    folder: Path,
    kind: type[A],
    said: Mapping[str, Any],
    digests: Mapping[str, Any],
    name: str | None = None,
) -> A:
    """One part: the first, whose name is None, or another."""
    where = str(folder / CONFIG_FILE) + ("" if name is None else f".parts.others.{name}")
    config = from_dict(ShivaConfig, said["config"], where=where)
    schedule = _read_schedule(said["schedule"], config, where)
    files = weights_files(config.backbone, name)
    path = weights_file(folder, files[0], digests)
    header = read_header(path)
    try:
        _check_sizes(config, header, folder / files[0])
        with torch.device("meta"):  # nothing is allocated for sizes that no file has
            adapter = kind(config, schedule)
    except (ValueError, RuntimeError) as error:  # torch: a tensor of more than 2^63 bytes
        raise ValueError(f"{where}: {error}") from error
    tuned = None
    if config.backbone != "frozen":
        tuned = weights_file(folder, files[1], digests)
        _check_tuned(config, read_header(tuned), folder / files[1])
    _load_strictly(adapter, load_tensors(path), folder / files[0])
    if tuned is not None:
        adapter.backbone_weights = load_tensors(tuned)
        broken = first_not_finite(adapter.backbone_weights)
        if broken is not None:
            raise ValueError(f"{tuned}: {broken} holds values that are not finite.")
    adapter.training_record = said["training"]
    return adapter.eval()


def _lora_file_metadata(config: ShivaConfig, weights: Mapping[str, Tensor]) -> str:
    """What diffusers' `load_lora_weights` reads: PEFT's settings, under the component's name."""
    layers = sorted({name.split(".lora_")[0] for name in weights})
    component = layers[0].partition(".")[0]
    settings = {
        **lora_metadata(config),
        "target_modules": [layer.removeprefix(f"{component}.") for layer in layers],
    }
    return json.dumps({f"{component}.{k}": v for k, v in settings.items()}, sort_keys=True)


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG_FILE
    data = plain_config(folder)
    if data is None:
        raise ValueError(f"{folder} holds no {CONFIG_FILE}: it is not an adapter's folder.")
    found = data.get("_class_name") if isinstance(data, dict) else None
    if found != CLASS_NAME:
        raise ValueError(f"{path} describes {found or 'something else'}, not a {CLASS_NAME}.")
    version = data.get("format_version")
    if type(version) is not int or version not in (FORMAT_VERSION, VERSION_WITH_PARTS):
        raise ValueError(
            f"{path} has format version {version}, this shiva-dit reads {FORMAT_VERSION} and "
            f"{VERSION_WITH_PARTS}: "
            "upgrade shiva-dit, or train the adapter again."
        )
    _check_part(data, str(path))
    for key in ("files", *(("parts",) if version == VERSION_WITH_PARTS else ())):
        if not isinstance(data.get(key), dict):
            raise ValueError(f"{path} is damaged: {key!r} is missing.")
    if data.pop("digest", None) != data_digest(data):
        raise ValueError(
            f"{path} was altered after it was written (its digest differs). For other ratios pass "
            "schedule= or keep_ratio= to shiva_dit.apply; for anything else save the adapter again."
        )
    return data


def _check_part(said: Any, where: str) -> None:
    """Raise unless a part of a config has its tables."""
    for key in ("config", "schedule", "training"):
        if not isinstance(said, dict) or not isinstance(said.get(key), dict):
            raise ValueError(f"{where} is damaged: {key!r} is missing.")


def _read_schedule(data: dict[str, Any], config: ShivaConfig, where: str) -> Schedule:
    full = data.get("full_blocks")
    if isinstance(full, list) and len(full) > config.num_blocks:
        raise ValueError(f"{where}: full_blocks of the schedule are more than there are blocks.")
    try:
        schedule = Schedule.from_json(json.dumps(data))
    except (ValueError, OverflowError) as error:
        raise ValueError(f"{where}: {error}") from error
    for name in ("num_blocks", "full_blocks"):
        ours, theirs = getattr(config, name), getattr(schedule, name)
        if ours != theirs:
            raise ValueError(f"{where}: {name} is {ours}, in the schedule {theirs}.")
    return schedule


def _check_sizes(config: ShivaConfig, header: Header, path: Path) -> None:
    """Compare all names and shapes of a file with what the config asks for, building one group.

    Groups are alike: the cost is the file's, however many the config asks for.
    """
    check_groups(config.num_blocks, config.num_groups)
    with torch.device("meta"):
        single = AdapterModule(replace(config, num_groups=1)).state_dict()

    def asked() -> Iterator[str]:
        yield from (name for name in single if not _GROUP.search(name))
        for group in range(config.num_groups):
            for name in single:
                if _GROUP.search(name):
                    yield _GROUP.sub(f".groups.{group}.", name)

    def unknown(name: str) -> bool:
        found = _GROUP.search(name)
        too_high = found is not None and int(found[1]) >= config.num_groups
        return too_high or _GROUP.sub(".groups.0.", name) not in single

    missing = list(islice((name for name in asked() if name not in header), 3))
    unexpected = list(islice((name for name in sorted(header) if unknown(name)), 3))
    if missing or unexpected:
        raise ValueError(
            f"{path} doesn't fit its config: missing {missing}, unexpected {unexpected}."
        )
    for name, (_, shape) in header.items():
        expected = tuple(single[_GROUP.sub(".groups.0.", name)].shape)
        if shape != expected:
            raise ValueError(f"{path}: {name} has shape {shape}, the config asks for {expected}.")


def _check_tuned(config: ShivaConfig, header: Header, path: Path) -> None:
    """What a tuned backbone's file can't be, whatever the model."""
    if not header:
        raise ValueError(f"{path} holds no tensor, the config says {config.backbone!r}.")
    for name, (dtype, shape) in header.items():
        if dtype not in TUNED_DTYPES:
            raise ValueError(
                f"{path}: {name} is {dtype}, a tuned backbone's weights are one of "
                f"{', '.join(TUNED_DTYPES)}."
            )
        if config.backbone == "full":
            continue
        axis = {"lora_A": 0, "lora_B": 1}.get(name.split(".")[-2] if "." in name else "")
        if axis is not None and (len(shape) < 2 or shape[axis] != config.lora_rank):
            raise ValueError(
                f"{path}: {name} has shape {shape}, the config says lora_rank = {config.lora_rank}."
            )


def _load_strictly(adapter: AdapterModule, state: dict[str, Tensor], path: Path) -> None:
    """Give an adapter its weights, whose names and shapes have been checked."""
    own = adapter.state_dict()
    for name, value in state.items():
        if value.dtype != own[name].dtype:
            raise ValueError(f"{path}: {name} is {value.dtype}, an adapter is {own[name].dtype}.")
        if not torch.isfinite(value).all():
            raise ValueError(f"{path}: {name} holds values that are not finite.")
    # Tensors of a file begin anywhere in its memory, and kernels round by how theirs is aligned: in
    # memory of their own they give what the saved adapter gave, to the bit.
    adapter.load_state_dict({name: value.clone() for name, value in state.items()}, assign=True)
    adapter.requires_grad_(True)
