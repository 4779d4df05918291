"""The README.md of an adapter's folder."""

from __future__ import annotations

from shiva_dit.adapter.module import AdapterModule
from shiva_dit.saved_folder import CARD_START, CONFIG_FILE


def model_card(adapter: AdapterModule) -> str:
    """The folder's README.md: front matter for the Hub, use, and what is known of the adapter."""
    config = adapter.config
    base = f"base_model: {config.base_model}\n" if config.base_model else ""
    return f"""{CARD_START}{base}tags:
- shiva-dit
- token-pruning
---

# Shiva adapter for {config.base_model or config.base_model_class}

{_about(adapter)}

```python
import shiva_dit

shiva_dit.apply(pipe, "this/repository")
```

The schedule and the way it was trained are in `{CONFIG_FILE}`.
"""


def _about(adapter: AdapterModule) -> str:
    """What it does: of each part, where there are several."""
    blocks = "Each block of the transformer runs on a learned part of the image tokens:"
    if adapter.parts is None:
        return f"{blocks} {_kept(adapter)}"
    parts, grouping = adapter.parts, adapter.parts.grouping
    named = {grouping.first: adapter, **parts.others}
    lines = [f"- {name}: " + _kept(part).replace("\n", " ") for name, part in named.items()]
    if grouping.kind == "budgets":
        low, high = adapter.trained_for
        intro = (
            f"For mean keep ratios from {low:g} to {high:g}, as `apply(..., keep_ratio=...)` asks: "
            f"weights between those that were trained. Without one it is {grouping.first}. {blocks}"
        )
        return "\n".join([intro, "", *lines])
    at = grouping.boundary_ratio
    meet = "" if at is None else f", which meet at `boundary_ratio = {at:g}`"
    intro = f'For both transformers of the pipeline, "high" for the noisy steps{meet}. {blocks}'
    return "\n".join([intro, "", *lines])


def _kept(part: AdapterModule) -> str:
    """Of one part: how much it keeps, and how it was trained."""
    scales = part.trained_for_guidance
    guidance = "" if scales is None else f" and guidance {scales[0]:g} to {scales[1]:g}"
    kept = part.config.reference_keep_ratio
    references = "" if kept is None else f" Of the references' tokens {kept:.0%} are kept beside."
    return (
        f"{part.config.keep_ratio:.0%}\non average over the sampler's steps and the blocks that "
        f"are pruned. Trained for the density of\n{part.schedule.law.name} steps{guidance}. "
        f"Backbone in training: {part.config.backbone}.{references}"
    )
