"""Adapters on the Hugging Face Hub."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path

from shiva_dit.saved_folder import ALL_WEIGHTS, CONFIG_FILE


def local_folder(source: str | Path, revision: str | None, token: str | None) -> Path:
    """A folder as it is, or a repository of the Hub, downloaded.

    Raises:
        ValueError: If there is neither.
    """
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
            name, revision=revision, token=token, allow_patterns=[CONFIG_FILE, *ALL_WEIGHTS]
        )
    except (HfHubHTTPError, LocalEntryNotFoundError) as error:
        raise ValueError(
            f"there is no folder {name} here, and the Hub gave no such repository: {error}"
        ) from error
    return Path(found)


def push(save: Callable[[str], object], repo_id: str, *, private: bool, token: str | None) -> str:
    """Upload what fills a folder; returns the address of the repository."""
    from huggingface_hub import HfApi  # noqa: PLC0415

    api = HfApi(token=token)
    url = api.create_repo(repo_id, private=private, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        save(folder)
        api.upload_folder(repo_id=repo_id, folder_path=folder, delete_patterns=list(ALL_WEIGHTS))
    return str(url)
