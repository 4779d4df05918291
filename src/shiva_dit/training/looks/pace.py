"""How long a run takes, and how long it will."""

from __future__ import annotations

import statistics
from collections import deque
from collections.abc import Callable

RECENT = 50
"""Steps that an estimate is from."""


class Pace:
    """Measures steps and looks.

    An estimate is from the median of the last steps: a laptop that slept, a slow save or a run that
    was stopped for a night don't count.

    Args:
        clock: Gives seconds.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self.clock = clock
        self.seconds = 0.0
        """That the run took so far, over all of its sessions."""
        self._steps: deque[float] = deque(maxlen=RECENT)
        self._looks: deque[float] = deque(maxlen=RECENT)
        self._last = clock()

    def begin(self) -> None:
        """A session begins: what was before doesn't count."""
        self._last = self.clock()

    def step(self) -> None:
        """A step is done."""
        self._steps.append(self._passed())

    def look(self) -> None:
        """A look is done."""
        self._looks.append(self._passed())

    def rest(self) -> None:
        """What else is done (saving) counts for what the run took, and not for its steps."""
        self._passed()

    def _passed(self) -> float:
        now = self.clock()
        passed, self._last = now - self._last, now
        self.seconds += passed
        return passed

    def left(self, steps: int, looks: int) -> float:
        """Seconds that so many steps and looks will take; asked for within a look.

        The first is as long as it has taken until now.

        >>> clock = iter([0.0, 2.0, 4.0, 5.0])
        >>> pace = Pace(lambda: next(clock))
        >>> pace.step(), pace.step(), pace.look()
        (None, None, None)
        >>> pace.left(10, 3)
        23.0
        """
        each = statistics.median(self._steps) if self._steps else 0.0
        look = statistics.median(self._looks) if self._looks else self.clock() - self._last
        return steps * each + looks * look
