"""The saved artefact: a folder with `config.json` and safetensors, strict and versioned."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from shiva_dit.config import from_dict, to_dict
from shiva_dit.core.schedule import Schedule
from shiva_dit.methods.shiva import ShivaSelector
from shiva_dit.models.families import model_spec
from shiva_dit.modules.context import CONTEXT_INPUTS
from shiva_dit.modules.policy import AdaptiveRatioPolicy
from shiva_dit.modules.router import ShivaRouter
from shiva_dit.modules.updates import RejectedUpdates
from shiva_dit.provenance import file_digest, write_atomically, write_json

FORMAT_VERSION = 1
CLASS_NAME = "ShivaAdapter"
CONFIG_FILE = "config.json"
WEIGHTS_FILE = "diffusion_pytorch_model.safetensors"
LORA_FILE = "pytorch_lora_weights.safetensors"
BACKBONE_FILE = "tuned_backbone.safetensors"
CARD_FILE = "README.md"
WEIGHTS_FILES = (WEIGHTS_FILE, LORA_FILE, BACKBONE_FILE)

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
    """G, routers with weights of their own; a divisor of `num_blocks`."""
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
    """Time bins of the schedule."""
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
        for name in (
            "num_blocks",
            "width",
            "time_dim",
            "context_dim",
            "hidden",
            "num_bins",
            "lora_rank",
            "rejected_rank",
        ):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}.")
        if not 0.0 < self.keep_ratio < 1.0:
            raise ValueError(f"keep_ratio must lie in (0, 1), got {self.keep_ratio}.")
        if self.multiple is not None and self.multiple < 1:
            raise ValueError(f"multiple must be at least 1, got {self.multiple}.")
        if self.select_every < 1:
            raise ValueError(f"select_every must be at least 1, got {self.select_every}.")
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
        dims = spec.dims(model)
        pairs = dims.num_blocks // 2 if dims.num_blocks % 2 == 0 else dims.num_blocks
        return cls(
            base_model_class=spec.model_class,
            num_blocks=dims.num_blocks,
            width=dims.width,
            time_dim=dims.time_dim,
            context_dim=dims.context_dim,
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

    def check_fits(self, model: nn.Module) -> None:
        """Raise unless this adapter was made for models of this class, depth and width.

        Raises:
            ValueError: Names what is wrong and what would be right.
        """
        spec = model_spec(model)
        dims, config = spec.dims(model), self.config
        if spec.model_class != config.base_model_class:
            raise ValueError(
                f"the adapter is for {config.base_model_class}, the model is a {spec.model_class}."
            )
        for name in ("num_blocks", "width", "time_dim", "context_dim"):
            expected, found = getattr(config, name), getattr(dims, name)
            if expected != found:
                raise ValueError(
                    f"the adapter is for {name} = {expected}"
                    + (f" ({config.base_model})" if config.base_model else "")
                    + f", the model has {name} = {found}: it was trained on another backbone."
                )

    # --- saving -----------------------------------------------------------------------------

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the adapter into a folder: each file whole or not at all, the config last.

        Two saves of the same adapter are equal to the byte. Weights of an earlier adapter in the
        folder that this one doesn't have are removed.

        Raises:
            ValueError: If the config promises a tuned backbone that the adapter doesn't hold, or
                the other way round.
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
        _digest(data)  # what can't be written is refused before anything is
        files = {WEIGHTS_FILE: self.state_dict()}
        if self.backbone_weights:
            name = BACKBONE_FILE if kind == "full" else LORA_FILE
            files[name] = self.backbone_weights
        digests = {}
        for name, state in files.items():
            tensors = {key: state[key].detach().cpu().contiguous() for key in sorted(state)}
            # One entry each: safetensors writes several in an order that changes by chance.
            metadata = {"format": "pt"}
            if name == LORA_FILE:
                metadata = {"lora_adapter_metadata": _lora_file_metadata(self.config, tensors)}
            write_atomically(
                folder / name,
                lambda path, t=tensors, m=metadata: save_file(t, path, metadata=m),
            )
            digests[name] = file_digest(folder / name)
        data["files"] = digests
        write_json(folder / CONFIG_FILE, {**data, "digest": _digest(data)})
        card = model_card(self)
        write_atomically(folder / CARD_FILE, lambda path: path.write_text(card, encoding="utf-8"))
        for name in WEIGHTS_FILES:
            if name not in files:
                (folder / name).unlink(missing_ok=True)

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
        data = _read_config(folder)
        where = str(folder / CONFIG_FILE)
        config = from_dict(ShivaConfig, data["config"], where=where)
        try:
            schedule = Schedule.from_json(json.dumps(data["schedule"]))
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from error
        for name in ("num_blocks", "full_blocks"):
            ours, theirs = getattr(config, name), getattr(schedule, name)
            if ours != theirs:
                raise ValueError(f"{where}: {name} is {ours}, in the schedule {theirs}.")
        with torch.device("meta"):  # nothing is allocated for sizes that no file has
            adapter = cls(config, schedule)
        _load_strictly(adapter, _read_weights(folder, WEIGHTS_FILE, data["files"]), folder)
        if config.backbone != "frozen":
            name = BACKBONE_FILE if config.backbone == "full" else LORA_FILE
            adapter.backbone_weights = _read_weights(folder, name, data["files"])
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
    if not path.is_file():
        raise ValueError(f"{folder} holds no {CONFIG_FILE}: it is not an adapter's folder.")
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is damaged: {error}.") from error
    found = data.get("_class_name") if isinstance(data, dict) else None
    if found != CLASS_NAME:
        raise ValueError(f"{path} describes {found or 'something else'}, not a {CLASS_NAME}.")
    version = data.get("format_version")
    if version != FORMAT_VERSION:
        raise ValueError(
            f"{path} has format version {version}, this shiva-dit reads {FORMAT_VERSION}: "
            "upgrade shiva-dit, or train the adapter again."
        )
    for key in ("config", "schedule", "files", "training"):
        if not isinstance(data.get(key), dict):
            raise ValueError(f"{path} is damaged: {key!r} is missing.")
    if data.pop("digest", None) != _digest(data):
        raise ValueError(
            f"{path} was altered after it was written (its digest differs). For other ratios pass "
            "schedule= or keep_ratio= to shiva_dit.apply; for anything else save the adapter again."
        )
    return data


def _read_weights(folder: Path, name: str, digests: Mapping[str, str]) -> dict[str, Tensor]:
    path = folder / name
    if not path.is_file():
        raise ValueError(f"{path} is missing: the adapter is incomplete, fetch it again.")
    if name not in digests:
        raise ValueError(
            f"{folder / CONFIG_FILE} doesn't list {name}: the two don't belong together."
        )
    if file_digest(path) != digests[name]:
        raise ValueError(
            f"{path} is not the file that {CONFIG_FILE} was written with (its SHA-256 differs): "
            "it is truncated or was altered. Fetch or train the adapter again."
        )
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path} is not a safetensors file: {error}.") from error


def _load_strictly(adapter: ShivaAdapter, state: dict[str, Tensor], folder: Path) -> None:
    own = adapter.state_dict()
    missing, unexpected = sorted(own.keys() - state.keys()), sorted(state.keys() - own.keys())
    if missing or unexpected:
        raise ValueError(
            f"{folder / WEIGHTS_FILE} doesn't fit its config: missing {missing[:3]}, "
            f"unexpected {unexpected[:3]}."
        )
    for name, value in state.items():
        if value.shape != own[name].shape:
            raise ValueError(
                f"{folder / WEIGHTS_FILE}: {name} has shape {tuple(value.shape)}, the config asks "
                f"for {tuple(own[name].shape)}."
            )
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


def _digest(data: Mapping[str, Any]) -> str:
    """SHA-256 of plain data, whatever the layout of the file that holds it."""
    text = json.dumps(data, sort_keys=True, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def model_card(adapter: ShivaAdapter) -> str:
    """The folder's README.md: front matter for the Hub, use, and what is known of the adapter."""
    config = adapter.config
    base = f"base_model: {config.base_model}\n" if config.base_model else ""
    return f"""---
library_name: diffusers
{base}tags:
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
