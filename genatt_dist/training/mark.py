"""What the main thread of a rank is doing now, for the threads that watch over it."""

from __future__ import annotations

from collections.abc import Callable

from genatt_dist.training.signs import SET_UP, UPDATE


class Mark:
    """What this rank's main thread is doing; other threads read it. step: the update under way, from 1.

    section: names the section of an update that it is in, where `operation` is None.
    """

    def __init__(self, section: Callable[[], str] = str) -> None:
        self.step, self.epoch, self.turn, self.section = 1, 0, 0, section
        self.operation: str | None = SET_UP

    def at(self, operation: str | None) -> None:
        """From here on it is in `operation` (None: an update), or in its next part."""
        self.operation, self.turn = operation, self.turn + 1

    @property
    def done(self) -> int:
        """Updates that are complete."""
        return self.step - (self.operation is None or self.operation == SET_UP)

    @property
    def now(self) -> tuple[str, int, int, int]:
        """Operation (of signs.OPERATIONS), step, epoch and turn: another one when something has moved."""
        operation = self.operation
        return UPDATE[self.section()] if operation is None else operation, self.step, self.epoch, self.turn
