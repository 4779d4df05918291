"""Attachments on models: put on, exchanged, paused, taken off; whole or not at all."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Protocol, runtime_checkable

from torch import nn

from shiva_dit.core.schedule import Schedule
from shiva_dit.methods.base import Selector
from shiva_dit.models.attachment import HOOK_NAME, Attachment
from shiva_dit.models.block_hook import BlockHook
from shiva_dit.models.families import model_spec
from shiva_dit.models.turns import Turns, turns_of
from shiva_dit.models.undo import Undo
from shiva_dit.modules.updates import RejectedUpdates


@runtime_checkable
class OnModel(Protocol):
    """What can be taken off a model and put back."""

    model: nn.Module
    turns: Turns

    def put_back(self) -> None:
        """As it was."""

    def detach(self) -> None:
        """Leave no trace."""


def attach(
    model: nn.Module,
    selector: Selector,
    schedule: Schedule,
    *,
    updates: RejectedUpdates | None = None,
    multiple: int | None = None,
    segments: int | None = None,
    select_every: int = 1,
    reference_keep_ratio: float | None = None,
    gate_values: bool = False,
    freeze: bool = False,
) -> Attachment:
    """Put a selector on a model, in place of an earlier one.

    Args:
        model: A supported transformer.
        selector: Scores the tokens of each block; any device.
        schedule: Keep ratios for the model's blocks.
        updates: What rejected tokens get; None: nothing.
        multiple: k is a multiple of this.
        segments: At most so many different rows over time.
        select_every: So many prunable blocks in a row share their first one's scores.
        reference_keep_ratio: Share kept of the tokens of references in every prunable block, in
            (0, 1], or 0 for clean frames: a budget of their own. None: they have none.
        gate_values: Whether value projections pass through the gates (training with the KV gate).
        freeze: Whether weights of the selector and the updates are the attachment's own and never
            change.

    Raises:
        ValueError: If the model is not supported or the schedule is another model's.
    """
    attachment = Attachment(
        model,
        selector,
        schedule,
        updates=updates,
        multiple=multiple,
        segments=segments,
        select_every=select_every,
        reference_keep_ratio=reference_keep_ratio,
        gate_values=gate_values,
        freeze=freeze,
    )
    exchange([attachment])
    return attachment


def attachment_of(model: nn.Module) -> Attachment | None:
    """The attachment of a model, or None."""
    blocks = model_spec(model).blocks(model)
    registry = getattr(blocks[0], "_diffusers_hook", None) if blocks else None
    hook = None if registry is None else registry.get_hook(HOOK_NAME)
    owner = hook.owner if isinstance(hook, BlockHook) else None
    return owner if isinstance(owner, Attachment) else None


def exchange(new: Sequence[Attachment], gone: Sequence[Attachment] = ()) -> None:
    """Attachments in the place of those that are on their models: whole or not at all.

    Args:
        new: What is put on.
        gone: What is taken off other models meanwhile.

    Raises:
        RuntimeError: If an old one can't be taken off.
        ValueError: If a new one can't be put on.
    """
    with ExitStack() as switches:
        for attachment in sorted((*new, *gone), key=_place_in_turn):
            switches.enter_context(attachment.turns.switch())
        undo = Undo()
        try:
            for attachment in gone:
                undo.add(attachment.put_back)
                attachment.detach()
            for attachment in new:
                old = attachment_of(attachment.model)
                if old is not None:
                    undo.add(old.put_back)
                    old.detach()
                undo.add(attachment.detach)
                attachment.put_on()
        except BaseException:
            undo.run()
            raise


def _place_in_turn(attachment: OnModel) -> int:
    """All take the turns of several models in one order, lest two wait for each other."""
    return id(attachment.model)


def detach_all(attachments: Sequence[OnModel]) -> None:
    """Take attachments and reducers off: all of them, or none.

    Raises:
        RuntimeError: If one can't be taken off.
    """
    undo = Undo()
    with ExitStack() as switches:
        for attachment in sorted(attachments, key=_place_in_turn):
            switches.enter_context(attachment.turns.switch())
        try:
            for attachment in attachments:
                undo.add(attachment.put_back)
                attachment.detach()
        except BaseException:
            undo.run()
            raise


@contextmanager
def paused(model: nn.Module) -> Iterator[None]:
    """Within: the model itself. Those that overlap last until the last one ends.

    What is attached meanwhile is off until then.
    """
    turns = turns_of(model)
    with turns.switch():
        on = attachment_of(model)
        if on is not None and not turns.pauses:
            on.was_enabled = on.enabled
            on.enable(False)
        turns.pauses += 1
    try:
        yield
    finally:
        with turns.switch(interruptible=False):
            turns.pauses -= 1
            on = attachment_of(model)
            if on is not None and not turns.pauses:
                on.enable(on.was_enabled)
