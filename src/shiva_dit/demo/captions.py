"""Captions of the demo tasks to embeddings, exactly and without a text model."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor


class CaptionEncoder:
    """One-hot words and places: the backbone's own linear layer learns the embedding.

    A caption "a handwritten seven" becomes one row per word, the word's one-hot beside that of its
    place; rows past its end are zero. The pooled embedding is the bag of words. The empty caption
    is all zeros and stands for "no caption" in guidance and caption dropout.

    Args:
        vocabulary: All words that may occur.
        max_words: Longest caption, in words.
        separator: A word that parts phrases ("and"). Where one is given, the row of a word also
            holds the bag of words of its phrase, as a text model would let a word know its
            context: which colour goes with which place is then read off one row.
    """

    def __init__(
        self, vocabulary: Sequence[str], max_words: int, separator: str | None = None
    ) -> None:
        self.vocabulary = tuple(vocabulary)
        self.max_words = max_words
        self.separator = separator
        self._index = {word: i for i, word in enumerate(self.vocabulary)}

    @property
    def embed_dim(self) -> int:
        """Width of a word's embedding: vocabulary, places, and the phrase's words if there are."""
        phrase = 0 if self.separator is None else len(self.vocabulary)
        return len(self.vocabulary) + self.max_words + phrase

    @property
    def pooled_dim(self) -> int:
        """Width of the pooled embedding: the vocabulary."""
        return len(self.vocabulary)

    def __call__(
        self, captions: Sequence[str]
    ) -> tuple[Float[Tensor, "B T E"], Float[Tensor, "B P"]]:
        """Embeddings per word and pooled, for a list of captions.

        Raises:
            ValueError: If a caption has an unknown word or too many words.
        """
        embeds = torch.zeros(len(captions), self.max_words, self.embed_dim)
        one = self.embed_dim**0.5  # a row then has mean square about 1, as linear layers like it
        for row, caption in enumerate(captions):
            words = caption.split()
            if len(words) > self.max_words:
                raise ValueError(
                    f"caption {caption!r} has {len(words)} words, at most {self.max_words} fit."
                )
            for place, word in enumerate(words):
                if word not in self._index:
                    raise ValueError(
                        f"caption {caption!r}: unknown word {word!r}; known are "
                        f"{', '.join(self.vocabulary)}."
                    )
                embeds[row, place, self._index[word]] = one
                embeds[row, place, self.pooled_dim + place] = one
            if self.separator is not None:
                self._add_phrases(embeds[row], words)
        return embeds, embeds[..., : self.pooled_dim].sum(1)

    def _add_phrases(self, rows: Float[Tensor, "T E"], words: Sequence[str]) -> None:
        """Let the words of each phrase share the sum of their one-hots."""
        start = 0
        own, shared = rows[:, : self.pooled_dim], rows[:, -self.pooled_dim :]
        for end, word in enumerate([*words, self.separator]):
            if word == self.separator:
                shared[start:end] = own[start:end].sum(0)
                start = end + 1
