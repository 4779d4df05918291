"""An adapter that is saved as a folder and shared on the Hub."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from shiva_dit.adapter import budgets
from shiva_dit.adapter.card import model_card
from shiva_dit.adapter.hub import local_folder, push
from shiva_dit.adapter.module import AdapterModule, Parts
from shiva_dit.adapter.parts import EXPERTS, Grouping
from shiva_dit.adapter.storage import read, write


class ShivaAdapter(AdapterModule):
    """Router, policy and schedule for one model; saved as a folder, shared on the Hub.

    Args:
        config: What it is for and how it is built.
        schedule: Keep ratios over time and depth; uniform at the target by default.
    """

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
        write(self, Path(folder), model_card(self))

    def push_to_hub(self, repo_id: str, *, private: bool = False, token: str | None = None) -> str:
        """Save and upload to the Hugging Face Hub; returns the address of the repository."""
        return push(self.save_pretrained, repo_id, private=private, token=token)

    @classmethod
    def of_experts(
        cls,
        high: ShivaAdapter | str | Path,
        low: ShivaAdapter | str | Path,
        *,
        boundary_ratio: float | None = None,
    ) -> ShivaAdapter:
        """One adapter of those of a pipeline's two transformers (Wan 2.2): one folder, one `apply`.

        Args:
            high: For `transformer`, which takes the noisy steps; an adapter or its folder.
            low: For `transformer_2`, which takes the others.
            boundary_ratio: Where they meet, in (0, 1), as in the pipeline's config: where it is
                another, `apply` warns. By default what their training recorded, if it did.

        Returns:
            The high one with the low one as its part; weights are shared with both, not copied.

        Raises:
            ValueError: If they are for different classes, were trained for other experts or for
                other boundaries, or hold parts themselves; if `boundary_ratio` is none.
        """
        given = [
            one if isinstance(one, ShivaAdapter) else cls.from_pretrained(one)
            for one in (high, low)
        ]
        grouping = _experts(given[0], given[1], boundary_ratio)
        made = given[0].without_parts()
        made.parts = Parts(grouping=grouping, others={"low": given[1]})
        return made

    def part(self, name: str) -> ShivaAdapter:
        """One part of an adapter of several, such as "high" or "low" of `of_experts`.

        Raises:
            ValueError: If there is no such part.
        """
        own = None if self.parts is None else self.parts.grouping.first
        others = {} if self.parts is None else self.parts.others
        if name == own:
            return self.without_parts()
        if name not in others:
            known = ", ".join([own, *others]) if own is not None else "none"
            raise ValueError(f"the adapter has no part {name!r}; its parts: {known}.")
        return others[name]  # type: ignore[return-value]

    def without_parts(self) -> ShivaAdapter:
        """A twin of this adapter without its other parts; weights are shared, not copied."""
        with torch.device("meta"):
            made = ShivaAdapter(self.config, self.schedule)
        made.load_state_dict(self.state_dict(), assign=True)
        made.backbone_weights = self.backbone_weights
        made.training_record = self.training_record
        return made.train(self.training)

    @classmethod
    def of_budgets(cls, adapter: ShivaAdapter, *others: ShivaAdapter) -> ShivaAdapter:
        """One adapter of several, each trained for a keep ratio of its own.

        It is saved as one folder. `shiva_dit.apply(pipe, it, keep_ratio=...)` takes the one that
        was trained for that ratio, or weights between those of its neighbours (`at`).

        Args:
            adapter: What is taken where no keep ratio is asked for.
            *others: For other keep ratios, trained from one adapter with it (the recipe's
                `start`), so that there is a way between their weights.

        Returns:
            The first with the others as its parts; weights are shared with all, not copied.

        Raises:
            ValueError: If they differ in anything but keep ratio and weights.
        """
        made = adapter.without_parts()
        made.parts = budgets.budgets_of(adapter, others)
        return made

    def at(self, keep_ratio: float) -> ShivaAdapter:
        """The adapter for a mean keep ratio in (0, 1]; itself where it is joined of no others.

        Raises:
            ValueError: Between two DoRAs, or if the ratio lies outside its range.
        """
        if not 0.0 < keep_ratio <= 1.0:
            raise ValueError(f"keep_ratio must lie in (0, 1], got {keep_ratio}: the share KEPT.")
        others: Any = self.budgets
        return budgets.at((self.without_parts(), *others), keep_ratio) if others else self

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
        return read(local_folder(source, revision, token), cls)


def _experts(
    high: AdapterModule, low: AdapterModule, boundary_ratio: float | None = None
) -> Grouping:
    """How two adapters are a pipeline's two experts.

    Args:
        high: For the noisy steps.
        low: For the others.
        boundary_ratio: As in the pipeline's config; what their training recorded by default.

    Raises:
        ValueError: If they can't be.
    """
    classes = [one.config.base_model_class for one in (high, low)]
    if classes[0] != classes[1]:
        raise ValueError(f"two experts are of one class, got {' and '.join(classes)}.")
    known = {} if boundary_ratio is None else {"boundary_ratio=": boundary_ratio}
    for name, one in zip(EXPERTS, (high, low), strict=True):
        trained = one.trained_expert
        if trained is None:
            continue
        expert, boundary = trained
        if expert != name:
            raise ValueError(f"the adapter given for {name!r} was trained for {expert!r}.")
        if boundary is not None:
            known[name] = boundary
    if len(set(known.values())) > 1:
        said = ", ".join(f"{name}: {value:g}" for name, value in known.items())
        raise ValueError(f"the experts don't meet at one boundary_ratio ({said}).")
    return Grouping(kind="experts", first="high", boundary_ratio=next(iter(known.values()), None))
