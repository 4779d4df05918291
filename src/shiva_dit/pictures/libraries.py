"""Scores by others' packages, which the extra "eval" brings: Inception's features, and LPIPS."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from shiva_dit.pictures.scorers import Columns
from shiva_dit.provenance import file_digest

INCEPTION = ("pt_inception-2015-12-05-6726825d.pth", "6726825d")
ALEXNET = ("alexnet-owt-7be5be79.pth", "7be5be79")
"""The published files, and how their SHA-256 begin: the packages unpickle them, which may run what
they hold, so no other is given to them."""


def need(package: str) -> None:
    """Check that a package of the extra "eval" is there, and the torchvision that it needs.

    Raises:
        ValueError: If not; says how to install them.
    """
    for name in (package, "torchvision"):
        if find_spec(name) is None:
            raise ValueError(
                f"{name} is not installed, and this score needs it: pip install 'shiva-dit[eval]'. "
                "Install torchvision from where torch came from: it must be of the same build."
            )


class Inception:
    """Features of torch-fidelity's Inception, as FID and KID were published with.

    Args:
        source: The file of its weights; None fetches them.
        device: Where it runs.

    Raises:
        ValueError: If the package or the file isn't there.
    """

    name = "inception"

    def __init__(self, source: str | None, device: torch.device | str) -> None:
        need("torch_fidelity")
        from torch_fidelity.feature_extractor_inceptionv3 import (  # type: ignore[import-not-found]  # noqa: PLC0415
            FeatureExtractorInceptionV3,
        )

        if source is not None:
            self.sha256 = published(Path(source), INCEPTION, "--inception")
        self._model: Any = FeatureExtractorInceptionV3(
            "inception-v3-compat", ["2048"], feature_extractor_weights_path=source
        )
        if source is None:
            self.sha256 = file_digest(Path(torch.hub.get_dir()) / "checkpoints" / _fetched())
        self._model.to(device).eval()
        self._device = device
        self.about: dict[str, Any] = {"source": source or "fetched", "layer": "2048"}

    def notes(self, texts: Sequence[str] | None) -> list[str]:
        """None."""
        del texts
        return []

    @torch.no_grad()
    def measure(self, images: Sequence[Tensor], texts: Sequence[str] | None) -> Columns:
        """Features of 2,048 numbers; it scales pictures to 299 x 299 by itself."""
        del texts
        found: dict[int, Tensor] = {}
        for shape in dict.fromkeys(image.shape for image in images):
            places = [i for i, image in enumerate(images) if image.shape == shape]
            stacked = torch.stack([images[i] for i in places]).to(self._device)
            found |= dict(zip(places, self._model(stacked)[0].double(), strict=True))
        return {"inception": torch.stack([found[i] for i in range(len(images))])}


def _fetched() -> str:
    from torch_fidelity.feature_extractor_inceptionv3 import (  # type: ignore[import-not-found]  # noqa: PLC0415
        URL_INCEPTION_V3,
    )

    return URL_INCEPTION_V3.rpartition("/")[2]


class Lpips:
    """LPIPS by AlexNet (version 0.1), the least perceptual distance being 0.

    Args:
        source: The file of torchvision's AlexNet; None fetches it.
        device: Where it runs.

    Raises:
        ValueError: If the package or the file isn't there.
    """

    def __init__(self, source: str | None, device: torch.device | str) -> None:
        need("lpips")
        import lpips  # type: ignore[import-not-found]  # noqa: PLC0415

        if source is None:
            path = Path(torch.hub.get_dir()) / "checkpoints" / ALEXNET[0]
            self._model: Any = lpips.LPIPS(net="alex", verbose=False)
            self.sha256 = file_digest(path)
        else:
            self.sha256 = published(Path(source), ALEXNET, "--lpips")
            with _hub_of(Path(source)):
                self._model = lpips.LPIPS(net="alex", verbose=False)
        self._model.to(device).eval()
        self._device = device

    @torch.no_grad()
    def distances(
        self, images: Float[Tensor, "N C H W"], truth: Float[Tensor, "N C H W"]
    ) -> Float[Tensor, " N"]:
        """Of each picture in [-1, 1] to its twin."""
        pairs = (side.float().to(self._device) for side in (images, truth))
        return self._model(*pairs).flatten().double().cpu()


def published(path: Path, known: tuple[str, str], option: str) -> str:
    """SHA-256 of a published file of weights.

    Raises:
        ValueError: If it isn't there, or is another.
    """
    name, begins = known
    if not path.is_file():
        raise ValueError(f"{option}: there is no file {path}: it is known as {name}.")
    digest = file_digest(path)
    if not digest.startswith(begins):
        raise ValueError(
            f"{path} is not the published {name}: its SHA-256 begins with {digest[:8]}, expected "
            f"{begins}. Others aren't read, since reading such a file may run what it holds."
        )
    return digest


@contextmanager
def _hub_of(file: Path) -> Iterator[None]:
    """Within: torch's hub holds a file, and so fetches none."""
    before = torch.hub.get_dir()
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder) / "checkpoints"
        place.mkdir()
        (place / ALEXNET[0]).symlink_to(file.resolve())
        torch.hub.set_dir(folder)
        with contextlib.ExitStack() as stack:
            stack.callback(torch.hub.set_dir, before)
            yield
