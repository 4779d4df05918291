"""What can go wrong, in one line; what isn't here is a bug."""

from __future__ import annotations

import errno
import sys

EXTRAS = {
    **dict.fromkeys(("accelerate", "peft", "transformers"), "train"),
    **dict.fromkeys(("sklearn", "matplotlib", "PIL"), "demo"),
}
"""Which extra brings a module along."""
FORESEEN = (ValueError, FloatingPointError, OSError, ImportError, MemoryError, RuntimeError)
"""What a caller or a machine can bring about; `foreseen` looks closer at the last three."""
AT_PATHS = {
    errno.EISDIR: "is a folder where a file is expected: name a file",
    errno.EEXIST: "is, or lies below, a file where a folder is expected: choose another place",
    errno.ENOTDIR: "is, or lies below, a file where a folder is expected: choose another place",
    errno.ENOENT: "is not there: check the path",
    errno.ELOOP: "is a loop of links: remove it, or choose another place",
    errno.EACCES: "may not be read or written: allow it, or choose another place",
    errno.ENAMETOOLONG: "has too long a name: choose a shorter one",
}
"""What is wrong with the path that an `OSError` names, and what to do."""


def foreseen(error: Exception) -> str | None:
    """What to say of an error that isn't a bug; None of one that is."""
    if isinstance(error, OSError) and error.filename is not None and error.errno in AT_PATHS:
        return f"{error.filename} {AT_PATHS[error.errno]}."
    if isinstance(error, (ValueError, FloatingPointError, OSError)):
        return str(error)
    if isinstance(error, ImportError):
        name = (error.name or "").partition(".")[0]
        if name in EXTRAS:
            extra = EXTRAS[name]
            return f"{name} is not installed, and this needs it: pip install 'shiva-dit[{extra}]'"
        return None if error.name else str(error)  # libraries name what they lack
    if isinstance(error, MemoryError) or is_torchs_memory_error(error):
        return (
            f"out of memory ({str(error).partition('. ')[0] or 'of the machine'}): use a smaller "
            "batch or size, fewer workers, or gradient_checkpointing=true in training."
        )
    return None


def is_torchs_memory_error(error: Exception) -> bool:
    """Whether torch ran out of memory."""
    torch = sys.modules.get("torch")
    if torch is None or not isinstance(error, RuntimeError):
        return False
    # On a CPU it is a plain RuntimeError.
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)
