"""The saved artefact: a folder with `config.json` and safetensors, strict and versioned."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from shiva_dit.config import check_types, from_dict, to_dict, whole_number
from shiva_dit.core.schedule import Schedule
from shiva_dit.methods.shiva import ShivaSelector
from shiva_dit.models.backbone import first_not_finite
from shiva_dit.models.counted import model_widths
from shiva_dit.models.families import model_spec
from shiva_dit.modules.context import CONTEXT_INPUTS, check_groups
from shiva_dit.modules.policy import AdaptiveRatioPolicy
from shiva_dit.modules.router import ShivaRouter
from shiva_dit.modules.updates import RejectedUpdates
from shiva_dit.ownership import locked_folder
from shiva_dit.provenance import data_digest, load_tensors
from shiva_dit.saved_folder import (
    BACKBONE_FILE,
    CARD_START,
    CLASS_NAME,
    CONFIG_FILE,
    LORA_FILE,
    WEIGHTS_FILE,
    WEIGHTS_FILES,
    Header,
    commit,
    plain_config,
    read_header,
    weights_file,
)
from shiva_dit.saved_folder import CARD_FILE as CARD_FILE

logger = logging.getLogger("shiva_dit")

FORMAT_VERSION = 1
MOST_BINS, MOST_BLOCKS, LARGEST_SIZE = 10_000, 10_000, 2**40
TUNED_DTYPES = ("F16", "BF16", "F32", "F64")
"""What a tuned backbone may be saved in, in safetensors' words."""
_GROUP = re.compile(r"\.groups\.(\d{1,9})\.")

FAR_BELOW, FAR_ABOVE = 0.04, 0.15
"""How far a mean keep ratio may lie outside of what was trained for without a warning. Measured on
the shipped adapters for 0.4: the error is twice as large at 0.35, least at 0.5, and at 0.6 larger
than there again."""

BackboneKind = Literal["frozen", "lora", "dora", "full"]
RejectedKind = Literal["identity", "low_rank"]


@dataclass(frozen=True, kw_only=True, slots=True)
class ShivaConfig:
    """What an adapter is for and how it is built."""

    base_model_class: str
    """Class of the transformer, e.g. "SD3Transformer2DModel"."""
    num_blocks: int
    """L, blocks of the transformer."""
    width: int
    """D, width of its image tokens."""
    time_dim: int
    """Width of its time embedding."""
    context_dim: int
    """Width of its pooled text or class embedding."""
    num_groups: int
    """G, routers with weights of their own, each for adjacent blocks."""
    hidden: int = 64
    """d', width of the routers."""
    normalize_inputs: bool = True
    """Whether the router layer-normalises its inputs."""
    router_inputs: tuple[str, ...] = CONTEXT_INPUTS
    """What the router reads beside the token: "time", "context", "layer"."""
    full_blocks: tuple[int, ...] = (0,)
    """Blocks that are never pruned."""
    keep_ratio: float = 0.6
    """Target of the mean keep ratio over the sampler's steps and prunable blocks, in (0, 1)."""
    multiple: int | None = None
    """The number of tokens kept is a multiple of this, or all; as `Schedule.for_tokens` sees fit by
    default."""
    select_every: int = 1
    """So many prunable blocks in a row share the scores of their first."""
    num_bins: int = 64
    """Time bins of the schedule, at most `MOST_BINS`."""
    rejected: RejectedKind = "identity"
    """What a token gets from a block that leaves it out: "identity", nothing, or "low_rank", a
    learned update (`RejectedUpdates`)."""
    rejected_rank: int = 16
    """Rank of that update."""
    base_model: str | None = None
    """Hub id or name of the backbone that the adapter was trained on."""
    backbone: BackboneKind = "frozen"
    """What training did to the backbone, and so which weights come along."""
    lora_rank: int = 32
    """Rank, for "lora" and "dora"."""

    def __post_init__(self) -> None:
        check_types(self)
        for name in (
            "num_blocks",
            "width",
            "time_dim",
            "context_dim",
            "num_groups",
            "hidden",
            "num_bins",
            "lora_rank",
            "rejected_rank",
            "select_every",
        ):
            most = {"num_bins": MOST_BINS, "num_blocks": MOST_BLOCKS}.get(name, LARGEST_SIZE)
            whole_number(name, getattr(self, name), least=1, most=most)
        if not 0.0 < self.keep_ratio < 1.0:
            raise ValueError(f"keep_ratio must lie in (0, 1), got {self.keep_ratio}.")
        if self.multiple is not None:
            whole_number("multiple", self.multiple, least=1)
        for block in self.full_blocks:
            if not 0 <= block < self.num_blocks:
                raise ValueError(f"full_blocks: there is no block {block} among {self.num_blocks}.")

    @classmethod
    def for_model(cls, model: nn.Module, **options: Any) -> ShivaConfig:
        """The config for a model, widths read off it; pairs of blocks share a router.

        Args:
            model: A supported transformer.
            **options: Any other field.
        """
        spec = model_spec(model)
        widths = model_widths(model)
        pairs = (widths.num_blocks + 1) // 2  # the last block is alone where L is odd
        return cls(
            base_model_class=spec.model_class,
            num_blocks=widths.num_blocks,
            width=widths.width,
            time_dim=widths.time_dim,
            context_dim=widths.context_dim,
            **{"num_groups": pairs, "full_blocks": (0, *spec.full_blocks(model)), **options},
        )


class ShivaAdapter(nn.Module):
    """Router, policy and schedule for one model; saved as a folder, shared on the Hub.

    Args:
        config: What it is for and how it is built.
        schedule: Keep ratios over time and depth; uniform at the target by default.
    """

    def __init__(self, config: ShivaConfig, schedule: Schedule | None = None) -> None:
        super().__init__()
        self.config = config
        self.router = ShivaRouter(
            config.width,
            config.time_dim,
            config.context_dim,
            config.num_blocks,
            config.num_groups,
            config.hidden,
            config.normalize_inputs,
            config.router_inputs,
        )
        self.policy = AdaptiveRatioPolicy(config.num_blocks, config.keep_ratio, config.full_blocks)
        self.updates: RejectedUpdates | None = None
        if config.rejected == "low_rank":
            self.updates = RejectedUpdates(
                config.width,
                config.time_dim,
                config.context_dim,
                config.num_blocks,
                config.num_groups,
                config.rejected_rank,
            )
        self.schedule = schedule or Schedule.uniform(
            config.keep_ratio, num_blocks=config.num_blocks, full_blocks=config.full_blocks
        )
        self.backbone_weights: dict[str, Tensor] = {}
        """Tuned weights of the backbone: the whole state ("full") or LoRA's ("lora", "dora")."""
        self.training_record: dict[str, Any] = {}
        """How it was trained: recipe, steps, provenance. Plain data."""

    def selector(self) -> ShivaSelector:
        """The router as a selection method; shares its weights."""
        return ShivaSelector(self.router)

    @property
    def trained_for(self) -> tuple[float, float]:
        """Mean keep ratios, lowest and highest, that it was trained for."""
        found: Any = self.training_record  # of any form: it is said to be plain data, no more
        for key in ("recipe", "policy", "target_range"):
            found = found.get(key) if isinstance(found, Mapping) else None
        if not isinstance(found, (list, tuple)) or list(map(type, found)) != [float, float]:
            return self.config.keep_ratio, self.config.keep_ratio
        return found[0], found[1]

    def warn_if_far(self, schedule: Schedule) -> None:
        """Log a warning if a schedule's mean lies far from what the adapter was trained for.

        All tokens of a frozen backbone are no reason: that is the model itself.
        """
        mean, (low, high) = schedule.mean_keep_ratio, self.trained_for
        is_bare = self.config.backbone == "frozen" and mean == 1.0
        if low - FAR_BELOW <= mean <= high + FAR_ABOVE or is_bare:
            return
        trained = f"{low:g}" if low == high else f"{low:g} to {high:g}"
        logger.warning(
            "shiva_dit: the adapter was trained for a mean keep ratio of %s and is asked for %.3g: "
            "%s Train one for that ratio, or for a range (policy.target_range).",
            trained,
            mean,
            "pictures soon get much worse below what was trained for."
            if mean < low
            else "so much more than what was trained for costs time and gains little or nothing.",
        )

    def check_fits(self, model: nn.Module) -> None:
        """Raise unless this adapter was made for models of this class, depth and width.

        Raises:
            ValueError: Names what is wrong and what would be right.
        """
        spec = model_spec(model)
        widths, config = model_widths(model), self.config
        if spec.model_class != config.base_model_class:
            raise ValueError(
                f"the adapter is for {config.base_model_class}, the model is a {spec.model_class}."
            )
        for name in ("num_blocks", "width", "time_dim", "context_dim"):
            expected, found = getattr(config, name), getattr(widths, name)
            if expected != found:
                raise ValueError(
                    f"the adapter is for {name} = {expected}"
                    + (f" ({config.base_model})" if config.base_model else "")
                    + f", the model has {name} = {found}: it was trained on another backbone."
                )

    # --- saving -----------------------------------------------------------------------------

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the adapter into a folder, over an earlier one if it holds one.

        At every instant the folder holds the earlier adapter or this one, whole, whatever breaks
        the saving off: new weights lie beside the old until `config.json`, which names them by
        their digests, is replaced; then they take the old ones' names. Two saves of the same
        adapter are equal to the byte. Weights of the earlier adapter that this one doesn't have
        are removed, other files are left alone.

        Raises:
            ValueError: If the config promises a tuned backbone that the adapter doesn't hold, or
                the other way round; if the folder holds something else under our files' names.
            OSError: If it can't be written.
        """
        folder = Path(folder)
        kind = self.config.backbone
        if bool(self.backbone_weights) != (kind != "frozen"):
            raise ValueError(
                f"the config says backbone = {kind!r}, the adapter holds "
                f"{len(self.backbone_weights)} tensors of a tuned backbone: set "
                "adapter.backbone_weights, or the config's backbone, before saving."
            )
        data = {
            "_class_name": CLASS_NAME,
            "format_version": FORMAT_VERSION,
            "config": to_dict(self.config),
            "schedule": json.loads(self.schedule.to_json()),
            "training": self.training_record,
        }
        data_digest(data)  # what can't be written is refused before anything is
        files = {WEIGHTS_FILE: self.state_dict()}
        if self.backbone_weights:
            name = BACKBONE_FILE if kind == "full" else LORA_FILE
            files[name] = self.backbone_weights
        folder.mkdir(parents=True, exist_ok=True)
        with locked_folder(folder):
            writers = {name: self._writer(name, state) for name, state in files.items()}
            commit(folder, data, writers, model_card(self))

    def _writer(self, name: str, state: Mapping[str, Tensor]) -> Callable[[Path], None]:
        """What writes a weights file, the same to the byte each time."""

        def write(path: Path) -> None:
            tensors = {key: state[key].detach().cpu().contiguous() for key in sorted(state)}
            # One entry each: safetensors writes several in an order that changes by chance.
            metadata = {"format": "pt"}
            if name == LORA_FILE:
                metadata = {"lora_adapter_metadata": _lora_file_metadata(self.config, tensors)}
            save_file(tensors, path, metadata=metadata)

        return write

    def push_to_hub(self, repo_id: str, *, private: bool = False, token: str | None = None) -> str:
        """Save and upload to the Hugging Face Hub; returns the address of the repository."""
        import tempfile  # noqa: PLC0415

        from huggingface_hub import HfApi  # noqa: PLC0415

        api = HfApi(token=token)
        url = api.create_repo(repo_id, private=private, exist_ok=True)
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder)
            api.upload_folder(
                repo_id=repo_id, folder_path=folder, delete_patterns=list(WEIGHTS_FILES)
            )
        return str(url)

    # --- loading ----------------------------------------------------------------------------

    @classmethod
    def from_pretrained(
        cls, source: str | Path, *, revision: str | None = None, token: str | None = None
    ) -> ShivaAdapter:
        """An adapter from a folder or a Hub id, everything checked.

        Args:
            source: A folder that `save_pretrained` wrote, or "user/name" on the Hub.
            revision: Branch, tag or commit on the Hub.
            token: For private repositories.

        Raises:
            ValueError: If there is no such folder, or a file is missing, truncated, altered, or
                belongs to something else. The error names the file and the reason.
        """
        folder = _local_folder(source, revision, token)
        with locked_folder(folder, shared=True):
            return cls._read(folder, _read_config(folder))

    @classmethod
    def _read(cls, folder: Path, data: Mapping[str, Any]) -> ShivaAdapter:
        """The adapter that a folder's checked config describes."""
        where = str(folder / CONFIG_FILE)
        config = from_dict(ShivaConfig, data["config"], where=where)
        schedule = _read_schedule(data["schedule"], config, where)
        path = weights_file(folder, WEIGHTS_FILE, data["files"])
        header = read_header(path)
        try:
            _check_sizes(config, header, folder / WEIGHTS_FILE)
            with torch.device("meta"):  # nothing is allocated for sizes that no file has
                adapter = cls(config, schedule)
        except (ValueError, RuntimeError) as error:  # torch: a tensor of more than 2^63 bytes
            raise ValueError(f"{where}: {error}") from error
        tuned = None
        if config.backbone != "frozen":
            name = BACKBONE_FILE if config.backbone == "full" else LORA_FILE
            tuned = weights_file(folder, name, data["files"])
            _check_tuned(config, read_header(tuned), folder / name)
        _load_strictly(adapter, load_tensors(path), folder)
        if tuned is not None:
            adapter.backbone_weights = load_tensors(tuned)
            broken = first_not_finite(adapter.backbone_weights)
            if broken is not None:
                raise ValueError(f"{tuned}: {broken} holds values that are not finite.")
        adapter.training_record = data["training"]
        return adapter.eval()


def lora_metadata(config: ShivaConfig) -> dict[str, Any]:
    """PEFT's settings of the backbone's LoRA or DoRA (rank = alpha)."""
    return {
        "r": config.lora_rank,
        "lora_alpha": config.lora_rank,
        "use_dora": config.backbone == "dora",
    }


def _lora_file_metadata(config: ShivaConfig, weights: Mapping[str, Tensor]) -> str:
    """What diffusers' `load_lora_weights` reads: PEFT's settings, under the component's name."""
    layers = sorted({name.split(".lora_")[0] for name in weights})
    component = layers[0].partition(".")[0]
    settings = {
        **lora_metadata(config),
        "target_modules": [layer.removeprefix(f"{component}.") for layer in layers],
    }
    return json.dumps({f"{component}.{k}": v for k, v in settings.items()}, sort_keys=True)


def _local_folder(source: str | Path, revision: str | None, token: str | None) -> Path:
    folder = Path(source)
    if folder.is_dir():
        return folder
    name = str(source)
    if folder.is_absolute() or name.startswith(".") or name.count("/") != 1:
        raise ValueError(f"{name} is neither a folder nor a Hub id like user/name.")
    from huggingface_hub import snapshot_download  # noqa: PLC0415
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError  # noqa: PLC0415

    try:
        found = snapshot_download(
            name, revision=revision, token=token, allow_patterns=[CONFIG_FILE, *WEIGHTS_FILES]
        )
    except (HfHubHTTPError, LocalEntryNotFoundError) as error:
        raise ValueError(
            f"there is no folder {name} here, and the Hub gave no such repository: {error}"
        ) from error
    return Path(found)


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG_FILE
    data = plain_config(folder)
    if data is None:
        raise ValueError(f"{folder} holds no {CONFIG_FILE}: it is not an adapter's folder.")
    found = data.get("_class_name") if isinstance(data, dict) else None
    if found != CLASS_NAME:
        raise ValueError(f"{path} describes {found or 'something else'}, not a {CLASS_NAME}.")
    version = data.get("format_version")
    if type(version) is not int or version != FORMAT_VERSION:
        raise ValueError(
            f"{path} has format version {version}, this shiva-dit reads {FORMAT_VERSION}: "
            "upgrade shiva-dit, or train the adapter again."
        )
    for key in ("config", "schedule", "files", "training"):
        if not isinstance(data.get(key), dict):
            raise ValueError(f"{path} is damaged: {key!r} is missing.")
    if data.pop("digest", None) != data_digest(data):
        raise ValueError(
            f"{path} was altered after it was written (its digest differs). For other ratios pass "
            "schedule= or keep_ratio= to shiva_dit.apply; for anything else save the adapter again."
        )
    return data


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
        single = ShivaAdapter(replace(config, num_groups=1)).state_dict()

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


def _load_strictly(adapter: ShivaAdapter, state: dict[str, Tensor], folder: Path) -> None:
    """Give an adapter its weights, whose names and shapes have been checked."""
    own = adapter.state_dict()
    for name, value in state.items():
        if value.dtype != own[name].dtype:
            raise ValueError(
                f"{folder / WEIGHTS_FILE}: {name} is {value.dtype}, "
                f"an adapter is {own[name].dtype}."
            )
        if not torch.isfinite(value).all():
            raise ValueError(f"{folder / WEIGHTS_FILE}: {name} holds values that are not finite.")
    # Tensors of a file begin anywhere in its memory, and kernels round by how theirs is aligned: in
    # memory of their own they give what the saved adapter gave, to the bit.
    adapter.load_state_dict({name: value.clone() for name, value in state.items()}, assign=True)
    adapter.requires_grad_(True)


def model_card(adapter: ShivaAdapter) -> str:
    """The folder's README.md: front matter for the Hub, use, and what is known of the adapter."""
    config = adapter.config
    base = f"base_model: {config.base_model}\n" if config.base_model else ""
    return f"""{CARD_START}{base}tags:
- shiva-dit
- token-pruning
---

# Shiva adapter for {config.base_model or config.base_model_class}

Each block of the transformer runs on a learned part of the image tokens: {config.keep_ratio:.0%}
on average over the sampler's steps and the blocks that are pruned. Trained for the density of
{adapter.schedule.law.name} steps. Backbone in training: {config.backbone}.

```python
import shiva_dit

shiva_dit.apply(pipe, "this/repository")
```

The schedule and the way it was trained are in `{CONFIG_FILE}`.
"""
