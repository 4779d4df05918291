"""What an adapter is for and how it is built."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

from shiva_dit.config import check_types, whole_number
from shiva_dit.models.counted import model_widths
from shiva_dit.models.families import model_spec
from shiva_dit.models.references import check_has_references, check_reference_ratio
from shiva_dit.modules.context import CONTEXT_INPUTS

MOST_BINS, MOST_BLOCKS, LARGEST_SIZE = 10_000, 10_000, 2**40
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
    target_range: tuple[float, float] | None = None
    """Mean keep ratios, lowest and highest in (0, 1), that it is trained for, if more than one: its
    policy then has a shape of its own for each."""
    reference_keep_ratio: float | None = None
    """Share kept of the tokens of references (pictures to go by, clean frames) in every prunable
    block, in (0, 1], or 0 for frames: they then have a budget of their own, the router reads which
    role a token has, and all that is said of tokens elsewhere is of the target's. None: all share
    one budget, and clean frames are refused."""
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
        low, high = self.target_range or (0.1, 0.9)
        if not 0.0 < low < high < 1.0:
            raise ValueError(f"target_range must rise within (0, 1), got {self.target_range}.")
        if self.reference_keep_ratio is not None:
            check_reference_ratio(self.reference_keep_ratio)
        if self.multiple is not None:
            whole_number("multiple", self.multiple, least=1)
        for block in self.full_blocks:
            if not 0 <= block < self.num_blocks:
                raise ValueError(f"full_blocks: there is no block {block} among {self.num_blocks}.")

    @property
    def num_roles(self) -> int:
        """Roles of tokens that the router tells apart."""
        return 1 if self.reference_keep_ratio is None else 2

    @classmethod
    def for_model(cls, model: nn.Module, **options: Any) -> ShivaConfig:
        """The config for a model, widths read off it; pairs of blocks share a router.

        Args:
            model: A supported transformer.
            **options: Any other field.

        Raises:
            ValueError: If a field lies outside its range, or the model has no references to give a
                budget to.
        """
        spec = model_spec(model)
        share = options.get("reference_keep_ratio")
        if share is not None:
            check_has_references(model, spec, share)
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


def lora_metadata(config: ShivaConfig) -> dict[str, Any]:
    """PEFT's settings of the backbone's LoRA or DoRA (rank = alpha)."""
    return {
        "r": config.lora_rank,
        "lora_alpha": config.lora_rank,
        "use_dora": config.backbone == "dora",
    }
