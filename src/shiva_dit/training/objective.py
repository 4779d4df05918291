"""What is minimised: flow matching, and distillation of normalised features (Eq. 14, 31)."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor


def interpolate(
    clean: Float[Tensor, "B C H W"], noise: Float[Tensor, "B C H W"], t: Float[Tensor, " B"]
) -> Float[Tensor, "B C H W"]:
    """The straight path of flow matching: `(1 - t) x0 + t e`, with t in [0, 1] and 1 = noise."""
    t = t.view(-1, 1, 1, 1)
    return (1.0 - t) * clean + t * noise


def flow_matching_loss(
    prediction: Float[Tensor, "B C H W"],
    clean: Float[Tensor, "B C H W"],
    noise: Float[Tensor, "B C H W"],
) -> Float[Tensor, ""]:
    """Mean squared error of the predicted velocity against `e - x0` (L_diff of Eq. 14)."""
    return F.mse_loss(prediction.float(), (noise - clean).float())


def distillation_loss(
    student: Sequence[Float[Tensor, "B N D"]], teacher: Sequence[Float[Tensor, "B N D"]]
) -> Float[Tensor, ""]:
    """Normalised feature distillation (Eq. 31).

    Squared distance of layer-normalised features, averaged over elements and layers: a mean where
    the equation has a sum, so that one weight serves models of every width and depth.

    Args:
        student: Features of the pruned model, one tensor per distilled layer.
        teacher: Features of the unpruned model at the same layers.

    Returns:
        A scalar in [0, 4].
    """
    if not student or len(student) != len(teacher):
        raise ValueError(
            f"distillation needs as many teacher as student layers, at least one; got "
            f"{len(teacher)} and {len(student)}."
        )
    terms = [
        F.mse_loss(_normalise(ours), _normalise(theirs.detach()))
        for ours, theirs in zip(student, teacher, strict=True)
    ]
    return sum(terms[1:], terms[0]) / len(terms)


def _normalise(x: Float[Tensor, "B N D"]) -> Float[Tensor, "B N D"]:
    return F.layer_norm(x.float(), x.shape[-1:])
