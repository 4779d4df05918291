"""Who may write: one process at a time, told by locks that end with their process."""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import platform
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

if sys.platform == "win32":
    fcntl = None
else:
    import fcntl

OWNER_FILE = ".owner.json"
"""Lies in a folder while a process works on it; one that was killed leaves it, without its lock."""


def lock(handle: int, *, wait: bool, shared: bool = False) -> bool:
    """Lock an open file or folder until it is closed or this process ends.

    Where the system has no such locks (Windows, some network file systems) nothing is locked, and
    nobody is kept out.

    Args:
        handle: Of the open file or folder.
        wait: Whether to wait for another that holds it.
        shared: Whether others may share it, as readers do.

    Returns:
        False if another holds it and `wait` is false.
    """
    if fcntl is None:
        return True
    kind = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
    try:
        fcntl.flock(handle, kind if wait else kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # the file system knows no locks
        return True
    return True


@contextmanager
def locked_folder(folder: Path, *, shared: bool = False) -> Iterator[None]:
    """Within: others that ask for the same folder wait, save readers for readers (`shared`).

    It leaves no file behind.
    """
    if fcntl is None:
        yield
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        lock(handle, wait=True, shared=shared)
        yield
    finally:
        os.close(handle)


def check_folder(folder: Path) -> None:
    """Check, before any work, that a folder is there or can be made.

    Raises:
        ValueError: If it or a folder above it is a file or a broken link, or may not be written to.
    """
    whole = folder.absolute()
    found = next((path for path in (whole, *whole.parents) if os.path.lexists(path)), whole)
    if not found.is_dir():
        what = "is a file, not a folder" if found.exists() else "is a link that leads nowhere"
        raise ValueError(f"{found} {what}: choose another place for what is written.")
    if not os.access(found, os.W_OK | os.X_OK):
        raise ValueError(f"{found} may not be written to: choose another place, or allow it.")


@contextmanager
def owned(folder: Path) -> Iterator[None]:
    """Within: the folder, which is made if needed, belongs to this process alone.

    Raises:
        ValueError: If it belongs to another that is going on; the error says to which. If it can't
            be made (`check_folder`).
    """
    check_folder(folder)
    is_new = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / OWNER_FILE
    file = open_locked(path, wait=False)
    if file is None:
        raise ValueError(
            f"{folder} belongs to another run that is going on{_owner(path)}: let it end or stop "
            "it, or take another folder."
        )
    with file:
        try:
            about = {
                "pid": os.getpid(),
                "host": platform.node(),
                "since": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
            }
            file.truncate(0)
            file.write(json.dumps(about, sort_keys=True).encode())
            file.flush()
            yield
        finally:
            path.unlink(missing_ok=True)
            if is_new:
                with contextlib.suppress(OSError):  # it holds something, as it should
                    folder.rmdir()


def open_locked(path: Path, *, wait: bool) -> BinaryIO | None:
    """Open a file for writing, made if needed, and lock it until it is closed.

    Args:
        path: The file. Who holds its lock may rename or remove it.
        wait: Whether to wait for another that holds it.

    Returns:
        The file; None if another holds it and `wait` is false.
    """
    if fcntl is None:  # Windows renames no open file
        return Path(os.devnull).open("ab")
    while True:
        file = path.open("ab")
        try:
            if not lock(file.fileno(), wait=wait):
                file.close()
                return None
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(file.fileno()), path.stat()):
                    return file
        except BaseException:
            file.close()
            raise
        file.close()  # its holder renamed or removed it meanwhile


def _owner(path: Path) -> str:
    try:
        about = json.loads(path.read_text(encoding="utf-8"))
        return f" (process {about['pid']} on {about['host']}, since {about['since']})"
    except (OSError, ValueError, KeyError, TypeError):
        return ""  # it has just begun, and hasn't said yet
