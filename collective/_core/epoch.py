"""What lives for one epoch of a group."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable

    from collective._core.agreement import Agreement, Calls
    from collective._core.mailbox import Mailbox
    from collective._core.pipeline import Pending, Pipeline
    from collective.abc import DataPlane


class Epoch:
    """What lives for one epoch of a group: after it, nothing of it is delivered."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.next_place = 0
        self.pending: dict[int, Pending] = {}
        self.tasks: set[asyncio.Task[Any]] = set()
        self.fault: Callable[[], Exception] | None = None
        self.mismatch: tuple[int, Calls] | None = None
        self.on_drained: Callable[[], None] | None = None
        """Set where the epoch is broken from a place on, and what came before it still completes."""
        self.on_end: list[Callable[[str], None]] = []
        self.agreement: Agreement
        self.mailbox: Mailbox
        self.plane: DataPlane
        self.pipeline: Pipeline

    def forget(self, pending: Pending) -> None:
        """Drop a collective that is done."""
        self.pending.pop(pending.place, None)
        if not self.pending and self.on_drained is not None:
            self.on_drained()

    def take_from(self, place: int) -> list[Pending]:
        """Take out what is pending at a place and after it."""
        return [self.pending.pop(number) for number in sorted(self.pending) if number >= place]

    def end(self, error: Callable[[], Exception], why: str) -> None:
        """Fail all that is pending, each with an error of its own, and end the groups split from this one."""
        self.on_drained = None
        self.agreement.end()
        self.pipeline.clear()
        pending, self.pending = self.pending, {}
        for entry in pending.values():
            entry.fail(error())
        self.mailbox.end(error)
        for task in self.tasks:
            task.cancel()
        callbacks, self.on_end = self.on_end, []
        for callback in callbacks:
            callback(why)
