"""The README.md of an adapter's folder."""

from __future__ import annotations

from shiva_dit.adapter.module import AdapterModule
from shiva_dit.saved_folder import CARD_START, CONFIG_FILE


def model_card(adapter: AdapterModule) -> str:
    """The folder's README.md: front matter for the Hub, use, and what is known of the adapter."""
    config = adapter.config
    base = f"base_model: {config.base_model}\n" if config.base_model else ""
    scales = adapter.trained_for_guidance
    guidance = "" if scales is None else f" and guidance {scales[0]:g} to {scales[1]:g}"
    kept = config.reference_keep_ratio
    references = "" if kept is None else f" Of the references' tokens {kept:.0%} are kept beside."
    return f"""{CARD_START}{base}tags:
- shiva-dit
- token-pruning
---

# Shiva adapter for {config.base_model or config.base_model_class}

Each block of the transformer runs on a learned part of the image tokens: {config.keep_ratio:.0%}
on average over the sampler's steps and the blocks that are pruned. Trained for the density of
{adapter.schedule.law.name} steps{guidance}. Backbone in training: {config.backbone}.{references}

```python
import shiva_dit

shiva_dit.apply(pipe, "this/repository")
```

The schedule and the way it was trained are in `{CONFIG_FILE}`.
"""
