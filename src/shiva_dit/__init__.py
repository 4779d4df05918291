"""Learned token selection for diffusion transformers, under an exact and static budget.

Importing this package imports neither torch nor diffusers; a name's first use does.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from shiva_dit.adapter import ShivaAdapter, ShivaConfig
    from shiva_dit.api.apply import apply
    from shiva_dit.api.state import compile, correct, cuda_graphs, disabled, guided, remove, steps
    from shiva_dit.api.summary import summary
    from shiva_dit.api.supported import supported
    from shiva_dit.core.schedule import Schedule
    from shiva_dit.methods.ibtm import IBTM
    from shiva_dit.methods.refresh import Refresh
    from shiva_dit.methods.sdtm import SDTM
    from shiva_dit.methods.tofu import ToFu
    from shiva_dit.methods.toma import ToMA
    from shiva_dit.methods.tomesd import ToMeSD
    from shiva_dit.models.reducing import attach_reducer

__version__ = "0.1.0"
__all__ = [
    "IBTM",
    "SDTM",
    "Refresh",
    "Schedule",
    "ShivaAdapter",
    "ShivaConfig",
    "ToFu",
    "ToMA",
    "ToMeSD",
    "apply",
    "attach_reducer",
    "compile",
    "correct",
    "cuda_graphs",
    "disabled",
    "guided",
    "remove",
    "steps",
    "summary",
    "supported",
]

_HOMES = {
    "IBTM": "shiva_dit.methods.ibtm",
    "Refresh": "shiva_dit.methods.refresh",
    "SDTM": "shiva_dit.methods.sdtm",
    "Schedule": "shiva_dit.core.schedule",
    "ShivaAdapter": "shiva_dit.adapter",
    "ShivaConfig": "shiva_dit.adapter",
    "ToFu": "shiva_dit.methods.tofu",
    "ToMA": "shiva_dit.methods.toma",
    "ToMeSD": "shiva_dit.methods.tomesd",
    "apply": "shiva_dit.api.apply",
    "attach_reducer": "shiva_dit.models.reducing",
    "summary": "shiva_dit.api.summary",
    "supported": "shiva_dit.api.supported",
    **dict.fromkeys(
        ("compile", "correct", "cuda_graphs", "disabled", "guided", "remove", "steps"),
        "shiva_dit.api.state",
    ),
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'shiva_dit' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
