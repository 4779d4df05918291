"""Arithmetic of image quality: distances between sets of features, on torch alone."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor


def frechet_distance(features: Float[Tensor, "N F"], reference: Float[Tensor, "M F"]) -> float:
    r"""Frechet distance between two Gaussians fitted to features, computed in float64.

    .. math:: \|\mu_1-\mu_2\|^2 + \mathrm{tr}\,(C_1 + C_2 - 2 (C_1 C_2)^{1/2})

    It is biased upwards for small sets: compare only distances of equal N, and print the distance
    of two real sets of that size (the floor) beside them.

    Args:
        features: Features of the images that are judged; N at least 2.
        reference: Features of real images; M at least 2.

    Returns:
        A distance, at least 0 up to rounding, in squared units of the features.

    >>> x = torch.randn(64, 4, generator=torch.Generator().manual_seed(0))
    >>> abs(round(frechet_distance(x, x + 1.0), 4))
    4.0
    """
    if min(len(features), len(reference)) < 2:
        raise ValueError(
            f"a covariance needs at least 2 samples in each set, got {len(features)} and "
            f"{len(reference)}."
        )
    mean_x, cov_x = _moments(features)
    mean_y, cov_y = _moments(reference)
    # The eigenvalues of C1 C2 are those of the symmetric C1^(1/2) C2 C1^(1/2).
    values, vectors = torch.linalg.eigh(cov_x)
    root = vectors * values.clamp_min(0).sqrt() @ vectors.T
    cross = torch.linalg.eigvalsh(root @ cov_y @ root).clamp_min(0).sqrt().sum()
    shift = (mean_x - mean_y).square().sum()
    return float(shift + cov_x.trace() + cov_y.trace() - 2.0 * cross)


def psnr(
    images: Float[Tensor, "N C H W"], reference: Float[Tensor, "N C H W"], data_range: float = 2.0
) -> float:
    r"""Peak signal-to-noise ratio of pictures to their twins, over the whole set, in dB.

    .. math:: 10 \log_{10} (R^2 / \mathrm{MSE})

    Args:
        images: Pictures in [-1, 1]; values outside are clipped, as a viewer would.
        reference: The same pictures as they should be.
        data_range: R, the range of the values.

    Returns:
        Decibels; infinite for equal pictures.

    >>> round(psnr(torch.zeros(1, 1, 2, 2), torch.full((1, 1, 2, 2), 0.2)), 2)
    20.0
    """
    difference = images.double().clamp(-1, 1) - reference.double().clamp(-1, 1)
    error = float(difference.square().mean())
    return 10.0 * math.log10(data_range**2 / error) if error else math.inf


def _moments(features: Float[Tensor, "N F"]) -> tuple[Float[Tensor, " F"], Float[Tensor, "F F"]]:
    x = features.double()
    return x.mean(0), torch.cov(x.T).reshape(x.shape[1], x.shape[1])
