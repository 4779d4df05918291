"""An adapter that is saved as a folder and shared on the Hub."""

from __future__ import annotations

from pathlib import Path

from shiva_dit.adapter.card import model_card
from shiva_dit.adapter.hub import local_folder, push
from shiva_dit.adapter.module import AdapterModule
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
