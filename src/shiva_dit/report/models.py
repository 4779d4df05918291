"""Tables of models: those that are served, and those that can't be."""

from __future__ import annotations

from shiva_dit.api.supported import supported
from shiva_dit.models.families.refused import OUT_OF_SCOPE, REFUSED
from shiva_dit.report.layout import markdown_rows


def models_table() -> str:
    """The supported models, as Markdown."""
    rows = [["model", "class", "guidance", "context of the router", "learned by"]]
    for model in supported():
        name = f"`{model.model_class}`"
        rows.append([model.name, name, model.guidance, model.context, model.learned_by])
    return markdown_rows(rows)


def refused_table() -> str:
    """All other transformer classes of diffusers, and why they aren't served, as Markdown."""
    rows = [["class", "", "why not"]]
    rows += [[f"`{name}`", "can't be served", why] for name, why in REFUSED.items()]
    rows += [[f"`{name}`", "out of scope", why] for name, why in OUT_OF_SCOPE.items()]
    return markdown_rows(rows)
