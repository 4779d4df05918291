"""What is minimised: flow matching, and distillation of normalised features (Eq. 14, 31)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor


def interpolate(
    clean: Float[Tensor, "B ..."], noise: Float[Tensor, "B ..."], t: Float[Tensor, " B"]
) -> Float[Tensor, "B ..."]:
    """The straight path of flow matching: `(1 - t) x0 + t e`, with t in [0, 1] and 1 = noise."""
    t = t.view(-1, *[1] * (clean.ndim - 1))
    return (1.0 - t) * clean + t * noise


def squared_error(
    ours: Float[Tensor, "B ..."],
    theirs: Float[Tensor, "B ..."],
    weights: Float[Tensor, " B"] | None = None,
) -> Float[Tensor, ""]:
    """Mean squared error in float32, each sample by its weight (1 by default)."""
    error = F.mse_loss(ours.float(), theirs.float(), reduction="none").flatten(1).mean(1)  # (B,)
    return error.mean() if weights is None else (weights * error).mean()


def drift(
    ours: Float[Tensor, "P ..."],
    theirs: Float[Tensor, "P ..."],
    samples: int,
    times: int,
    weights: Float[Tensor, " P"] | None = None,
) -> Float[Tensor, ""]:
    r"""M times the squared error of the mean over each sample's M times.

    .. math:: M \, \| \tfrac{1}{M} \sum_m (\hat v_m - v_m) \|^2

    Errors that differ from time to time count as in `squared_error`, those that all times share M
    times as much: a picture is off by their sum along the path.

    Args:
        ours: P predictions: halves, in each the first time of all samples first.
        theirs: What they should be.
        samples: B.
        times: M.
        weights: Of each prediction; 1 by default.

    >>> drift(torch.tensor([[1.0], [1.0]]), torch.zeros(2, 1), 1, 2)
    tensor(2.)
    >>> drift(torch.tensor([[1.0], [-1.0]]), torch.zeros(2, 1), 1, 2)
    tensor(0.)
    """
    off = ours.float() - theirs.float()
    if weights is not None:
        off = off * weights.sqrt().view(-1, *[1] * (off.ndim - 1))
    return times * off.unflatten(0, (-1, times, samples)).mean(1).square().mean()


def error_and_drift(
    ours: Float[Tensor, "P ..."],
    theirs: Float[Tensor, "P ..."],
    samples: int,
    times: int,
    weight: float,
    weights: Float[Tensor, " P"] | None = None,
) -> Float[Tensor, ""]:
    """`squared_error`, and so many times the `drift`; their arguments."""
    off = squared_error(ours, theirs, weights)
    return off + weight * drift(ours, theirs, samples, times, weights) if weight else off


def denoising_loss(
    prediction: Float[Tensor, "B ..."],
    target: Float[Tensor, "B ..."],
    weights: Float[Tensor, " B"] | None = None,
) -> Float[Tensor, ""]:
    """Mean squared error of a prediction (L_diff of Eq. 14).

    Args:
        prediction: Of the model; with twice the channels (dim 1) where it learned the variance
            too, which the second half then is.
        target: Velocity, noise or clean samples, as the model's path has it.
        weights: Weight of each sample; 1 by default.
    """
    if prediction.shape[1] == 2 * target.shape[1]:
        prediction = prediction.chunk(2, dim=1)[0]
    return squared_error(prediction, target, weights)


def logit_normal_density(t: Float[Tensor, " B"]) -> Float[Tensor, " B"]:
    r"""Density at t of a variable whose logit is N(0, 1); its mean over uniform t is 1.

    .. math:: \exp(-\mathrm{logit}(t)^2 / 2) / (\sqrt{2 \pi}\, t (1 - t))

    >>> logit_normal_density(torch.tensor([0.1, 0.5, 0.9]))
    tensor([0.3966, 1.5958, 0.3966])
    """
    inner = t.clamp(1e-6, 1 - 1e-6)
    return torch.exp(-0.5 * torch.logit(inner).square()) / (
        math.sqrt(2 * math.pi) * inner * (1 - inner)
    )


def distillation_loss(
    student: Sequence[Float[Tensor, "B N D"]],
    teacher: Sequence[Float[Tensor, "B N D"]],
    weights: Float[Tensor, " B"] | None = None,
) -> Float[Tensor, ""]:
    """Normalised feature distillation (Eq. 31).

    Squared distance of layer-normalised features, averaged over elements and layers: a mean where
    the equation has a sum, so that one weight serves models of every width and depth.

    Args:
        student: Features of the pruned model, one tensor per distilled layer.
        teacher: Features of the unpruned model at the same layers.
        weights: Weight of each sample; 1 by default.

    Returns:
        A scalar in [0, 4].
    """
    if not student or len(student) != len(teacher):
        raise ValueError(
            f"distillation needs as many teacher as student layers, at least one; got "
            f"{len(teacher)} and {len(student)}."
        )
    terms = [
        squared_error(_normalise(ours), _normalise(theirs.detach()), weights)
        for ours, theirs in zip(student, teacher, strict=True)
    ]
    return sum(terms[1:], terms[0]) / len(terms)


def _normalise(x: Float[Tensor, "B N D"]) -> Float[Tensor, "B N D"]:
    return F.layer_norm(x.float(), x.shape[-1:])
