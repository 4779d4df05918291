"""Arithmetic of image quality: distances between sets of features, on torch alone."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor

PEAK = 4.0
"""Square of the range of pictures in [-1, 1]."""
LARGEST_PSNR = 100.0
"""dB that stand for equal pictures."""
SSIM_WINDOW, SSIM_SIGMA = 11, 1.5


def frechet_distance(features: Float[Tensor, "N F"], reference: Float[Tensor, "M F"]) -> float:
    r"""Frechet distance between two Gaussians fitted to features, computed in float64.

    .. math:: \|\mu_1-\mu_2\|^2 + \mathrm{tr}\,(C_1 + C_2 - 2 (C_1 C_2)^{1/2})

    It is biased upwards for small sets: compare only distances of equal N, and print the distance
    of two real sets of that size (the floor) beside them.

    Args:
        features: Features of the images that are judged; N at least 2.
        reference: Features of real images; M at least 2.

    Returns:
        A distance, at least 0, in squared units of the features.

    >>> x = torch.randn(64, 4, generator=torch.Generator().manual_seed(0))
    >>> abs(round(frechet_distance(x, x + 1.0), 4))
    4.0
    """
    check_counts(features, reference)
    mean_x, cov_x = moments(features)
    mean_y, cov_y = moments(reference)
    # The eigenvalues of C1 C2 are those of the symmetric C1^(1/2) C2 C1^(1/2).
    values, vectors = torch.linalg.eigh(cov_x)
    root = vectors * values.clamp_min(0).sqrt() @ vectors.T
    cross = torch.linalg.eigvalsh(root @ cov_y @ root).clamp_min(0).sqrt().sum()
    shift = (mean_x - mean_y).square().sum()
    return max(0.0, float(shift + cov_x.trace() + cov_y.trace() - 2.0 * cross))  # -1e-6 by rounding


def kernel_distance(features: Float[Tensor, "N F"], reference: Float[Tensor, "M F"]) -> float:
    r"""Squared maximum mean discrepancy with the cubic kernel (KID), unbiased, in float64.

    .. math:: k(x, y) = (\langle x, y \rangle / F + 1)^3

    Args:
        features: Features of the images that are judged; N at least 2.
        reference: Features of real images; M at least 2.

    Returns:
        An estimate whose expectation is 0 for equal distributions, whatever N and M; it can be
        negative.

    >>> x = torch.arange(6.0).view(3, 2)
    >>> kernel_distance(x + 2.0, x) > kernel_distance(x + 1.0, x)
    True
    """
    check_counts(features, reference)
    x, y = features.double(), reference.double()

    def kernel(a: Tensor, b: Tensor) -> Tensor:
        return (a @ b.T / a.shape[1] + 1.0).pow(3)

    def within(a: Tensor) -> Tensor:
        values = kernel(a, a)
        return (values.sum() - values.trace()) / (len(a) * (len(a) - 1))

    return float(within(x) + within(y) - 2.0 * kernel(x, y).mean())


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


def squared_errors(
    images: Float[Tensor, "N C H W"], truth: Float[Tensor, "N C H W"]
) -> Float[Tensor, " N"]:
    """Mean squared error of each picture, its values cut to what a viewer shows, float64."""
    off = images.double().clamp(-1, 1) - truth.double().clamp(-1, 1)
    return off.square().flatten(1).mean(1)


def decibels(errors: Float[Tensor, " N"]) -> float:
    """PSNR of a set of pictures in [-1, 1] by their squared errors.

    >>> round(decibels(torch.tensor([0.04, 0.04])), 4)
    20.0
    """
    error = float(errors.mean())
    return min(LARGEST_PSNR, 10.0 * math.log10(PEAK / error)) if error else LARGEST_PSNR


def ssim(
    images: Float[Tensor, "N C H W"], reference: Float[Tensor, "N C H W"]
) -> Float[Tensor, " N"]:
    r"""Structural similarity of each picture to its twin, in float64 (Wang et al. 2004).

    .. math:: \frac{(2 \mu_x \mu_y + c_1)(2 \sigma_{xy} + c_2)}
              {(\mu_x^2 + \mu_y^2 + c_1)(\sigma_x^2 + \sigma_y^2 + c_2)}

    Means are of a Gaussian window of 11 x 11 pixels and sigma 1.5, then of all places where it fits
    and of the channels: scikit-image's with `gaussian_weights=True, use_sample_covariance=False`.

    Args:
        images: Pictures of at least 11 x 11 pixels.
        reference: The same pictures as they should be.
        data_range: R, the range of the values; c1 = (0.01 R)^2 and c2 = (0.03 R)^2.

    Returns:
        In [-1, 1]; 1 for equal pictures.

    >>> x = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    >>> round(float(ssim(x, x)), 6)
    1.0
    """
    if min(images.shape[-2:]) < SSIM_WINDOW:
        raise ValueError(
            f"SSIM needs pictures of at least {SSIM_WINDOW} x {SSIM_WINDOW} pixels, got "
            f"{images.shape[-1]} x {images.shape[-2]}."
        )
    shown = (side.double().clamp(-1, 1) + 1.0 for side in (images, reference))
    x, y = (side.flatten(0, 1)[:, None] for side in shown)  # (N C, 1, H, W)
    places = torch.arange(SSIM_WINDOW, dtype=torch.float64, device=x.device) - SSIM_WINDOW // 2
    taps = torch.exp(-places.square() / (2 * SSIM_SIGMA**2))
    taps = taps / taps.sum()

    def mean(values: Tensor) -> Tensor:
        rows = torch.nn.functional.conv2d(values, taps.view(1, 1, -1, 1))
        return torch.nn.functional.conv2d(rows, taps.view(1, 1, 1, -1))

    mean_x, mean_y = mean(x), mean(y)
    var_x, var_y = mean(x * x) - mean_x**2, mean(y * y) - mean_y**2
    both = mean(x * y) - mean_x * mean_y
    c1, c2 = 0.02**2, 0.06**2
    likeness = (2 * mean_x * mean_y + c1) * (2 * both + c2)
    likeness = likeness / ((mean_x**2 + mean_y**2 + c1) * (var_x + var_y + c2))
    return likeness.flatten(1).mean(1).view(len(images), -1).mean(1)


def check_counts(features: Tensor, reference: Tensor) -> None:
    """Raise a ValueError for sets that have no distance."""
    if min(len(features), len(reference)) < 2:
        raise ValueError(
            f"a distance needs at least 2 samples in each set, got {len(features)} and "
            f"{len(reference)}."
        )


def moments(features: Float[Tensor, "N F"]) -> tuple[Float[Tensor, " F"], Float[Tensor, "F F"]]:
    """Mean and covariance, in float64."""
    x = features.double()
    return x.mean(0), torch.cov(x.T).reshape(x.shape[1], x.shape[1])
