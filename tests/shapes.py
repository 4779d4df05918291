"""Annotations are enforced at run time: jaxtyping, which is slow, looks at those with shapes alone.

Types of other functions are checked by beartype itself, with the same error.
"""

import inspect
import re
from collections.abc import Callable
from typing import Any

import jaxtyping
from beartype import BeartypeConf, beartype

SHAPED = re.compile(r"\b(Float|Int|Bool|Shaped|Complex|Num|Real|Inexact|UInt|Integer)\w*\[")
real = jaxtyping.jaxtyped
checked: Any = beartype(conf=BeartypeConf(violation_type=jaxtyping.TypeCheckError))


def has_shapes(function: Callable[..., Any]) -> bool:
    """Whether an annotation names a shape."""
    return any(SHAPED.search(str(each)) for each in inspect.get_annotations(function).values())


def jaxtyped(*, typechecker: Any) -> Callable[[Any], Any]:
    """As jaxtyping's own, which its option of pytest puts on all functions and classes."""

    def decorate(made: Any) -> Any:
        # beartype resolves names of local functions when these are called, also what tests replace.
        is_local = "<locals>" in made.__qualname__
        if inspect.isfunction(made) and not is_local and not has_shapes(made):
            return checked(made)
        return real(typechecker=typechecker)(made)

    return decorate


jaxtyping.jaxtyped = jaxtyped
