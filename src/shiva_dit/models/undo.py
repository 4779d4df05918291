"""Several steps that happen whole or not at all."""

from __future__ import annotations

from collections.abc import Callable

Step = Callable[[], object]


class Undo:
    """What takes back the steps that were made, last first.

    A step's inverse is noted before the step is made, so that one which breaks off halfway is
    taken back as well: inverses find out what there is to do.
    """

    def __init__(self) -> None:
        self._steps: list[Step] = []

    def add(self, inverse: Step) -> None:
        """Note how the next step is taken back."""
        self._steps.append(inverse)

    def run(self) -> None:
        """Take all steps back.

        One that fails doesn't keep the others from being taken back, and is tried once more when
        these are.

        Raises:
            BaseException: The first failure, at the end.
        """
        steps, self._steps = self._steps[::-1], []
        first: BaseException | None = None
        again: list[Step] = []
        for step in steps:
            try:
                step()
            except BaseException as error:
                first = first or error
                again.append(step)
        for step in again:
            try:
                step()
            except BaseException as error:
                if error is not first:
                    raise error from first
                raise
        if first is not None:
            raise first
