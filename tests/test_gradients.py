"""Gates teach routers and policy: the backbone's gradient is that of its own forward."""

from typing import Any, get_args

import pytest
import torch
from torch import Tensor, nn

from shiva_dit.core.estimators import EstimatorConfig, RejectedUpdate
from shiva_dit.methods.gates import SelectionGates
from shiva_dit.models.attach import attach
from shiva_dit.models.attachment import Attachment
from shiva_dit.models.counted import model_widths
from shiva_dit.models.families import model_spec
from shiva_dit.models.gating import GatedForward
from tests import families, tiny
from tests.matrix import sampled

ESTIMATORS = [
    EstimatorConfig(kind="paper"),
    *(EstimatorConfig(rejected=kind) for kind in get_args(RejectedUpdate)),
    EstimatorConfig(kv_gate=True),
]
COUNTS = [families.TOKENS, 40, 12, families.TOKENS]
SOME = ("flux", "wan", "pixart-alpha", "dit", "lumina2")
"""Double and single blocks, a video, none with a time embedder for all blocks, labels."""


def case(name: str) -> tuple[Any, dict[str, Any]]:
    if name in tiny.KINDS:
        return tiny.sd3(name), tiny.inputs()
    return families.made(name), families.arguments(name)


def gradients(
    attachment: Attachment, arguments: dict[str, Any], estimator: EstimatorConfig | None
) -> tuple[dict[str, Tensor], dict[int, Tensor]]:
    """Of all that the forward depends on, and the tokens chosen; None: a forward without gates.

    A block that keeps all its tokens is gathered and scattered in both.
    """
    model, spec = attachment.model, attachment.spec
    num_tokens = families.TOKENS
    width = model_widths(model).width
    batch = len(arguments[spec.sample])
    counts = [
        k if block in attachment.schedule.prunable_blocks else num_tokens
        for block, k in enumerate([*COUNTS, *[num_tokens] * 9][: attachment.schedule.num_blocks])
    ]
    soft_k = torch.tensor(20.0, requires_grad=True)

    def gates(block: int) -> SelectionGates | None:
        if estimator is None:
            return None
        seed = torch.Generator().manual_seed(block)
        return SelectionGates(
            config=estimator,
            tau_rank=0.2,
            tau_select=0.1,
            soft_k=soft_k,
            teacher_update=torch.randn(batch, num_tokens, width, generator=seed),
        )

    found: dict[int, Tensor] = {}
    attachment.forwards.observer = lambda block, tokens: found.update({block: tokens})
    attachment.forwards.always_select = True
    for module in (model, *attachment.learned):
        module.zero_grad()
    with attachment.forwards.gated(GatedForward(counts=counts, gates=gates)):
        output = families.run(model, arguments)
    weights = torch.linspace(-1, 1, output.numel()).view_as(output)
    (output * weights).mean().backward()
    attachment.forwards.observer = None
    named = dict(model.named_parameters())
    if attachment.updates is not None:
        named |= {f"updates.{n}": p for n, p in attachment.updates.named_parameters()}
    taught = any(p.grad is not None for p in attachment.selector.parameters())
    assert taught == (estimator is not None)  # else the comparison is of nothing with nothing
    assert (soft_k.grad is not None) == (estimator is not None)
    return {n: p.grad.clone() for n, p in named.items() if p.grad is not None}, found


def assert_equal(
    found: dict[str, Tensor], expected: dict[str, Tensor], relative: float = 1e-5
) -> None:
    """All gradients, to rounding.

    A gate changes in which order autograd adds up the gradients of what is used twice: a sum of a
    few terms in another order differs by a few times 6e-8 of the largest. What leaked was 1e-2.
    """
    assert found.keys() == expected.keys()
    whole = torch.stack([value.norm() for value in expected.values()]).norm()
    for name, value in expected.items():
        off = float((found[name] - value).norm())
        assert off <= relative * float(value.norm()) + 1e-7 * float(whole), name


def attached(model: nn.Module, **options: Any) -> Attachment:
    adapter = tiny.adapter(model, families.schedule(model, [COUNTS[:4]]), **options)
    return attach(
        model, adapter.selector(), adapter.schedule, updates=adapter.updates, gate_values=True
    )


@pytest.mark.parametrize("name", [*tiny.KINDS, *SOME])
@pytest.mark.parametrize("rejected", ["identity", "low_rank"])
def test_no_estimator_changes_a_gradient_of_the_backbone(name: str, rejected: str) -> None:
    """Also of embedders of time, text and labels, and of what rejected tokens get."""
    model, arguments = case(name)
    attachment = attached(model, rejected=rejected)
    expected, chosen = gradients(attachment, arguments, None)
    for estimator in ESTIMATORS:
        if estimator.needs_value_gate and not any(h.spec.value_modules for h in attachment.hooks):
            continue
        found, again = gradients(attachment, arguments, estimator)
        assert all(torch.equal(again[block], tokens) for block, tokens in chosen.items())
        assert_equal(found, expected)


@sampled("name")
def test_no_gate_changes_a_gradient_of_any_family(name: str) -> None:
    model, arguments = case(name)
    attachment = attached(model)
    expected, _ = gradients(attachment, arguments, None)
    embedder = model_spec(model).time_embedder
    if embedder is not None:
        assert any(key.startswith(embedder) for key in expected)
    for estimator in (EstimatorConfig(kind="paper"), EstimatorConfig(rejected="ridge")):
        assert_equal(gradients(attachment, arguments, estimator)[0], expected)
