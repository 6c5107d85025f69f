"""How the members of a group go from one epoch to the next, together."""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING, Any

from collective._core.pipeline import LIBRARY_GRACE
from collective._core.rounds import Rounds
from collective.errors import BackendError, CollectiveError, CollectiveTimeout, GroupClosed

if TYPE_CHECKING:
    from collections.abc import Callable

    from collective._core.engine import Engine


class Resets:
    """One member's part in forming a group and in its resets."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._rounds = Rounds(engine.rank, engine.size, loop=engine.loop, post=engine.fabric.post)
        self._running: asyncio.Task[None] | None = None
        self._loss: asyncio.Future[None] = engine.loop.create_future()
        self.joined = False
        """Whether this member has come to the last point of opening the group, from where the others go on."""

    async def open(self, *, patient: bool = False) -> None:
        """Open the current epoch: all members do. Where it is `patient` the group's timeout bounds nothing."""
        engine = self._engine
        try:
            await engine.current.plane.open()
        except BackendError:
            if engine.current.fault is None:
                # The loss of a peer explains it better, and may be told a moment later.
                await asyncio.wait([self._loss], timeout=LIBRARY_GRACE)
            engine.faults.raise_lost()
            self._raise_fault()
            raise
        self._raise_fault()
        self.joined = True
        await self._join("open", within=None if patient else engine.timeout)
        engine.current.begin()

    async def reset(self) -> None:
        """Drop what is pending and start a new epoch; callers while one is under way join it."""
        task = self._running
        if task is None:
            task = self._running = self._engine.fabric.spawn(self._reset())
            task.add_done_callback(self._ended)
        try:
            await asyncio.shield(task)
        except asyncio.CancelledError:
            if task.cancelled():
                outlived = self._engine.faults.outlived
                raise GroupClosed(self._engine.name, "reset()") if outlived is None else outlived() from None
            raise

    async def reset_everywhere(self) -> None:
        """Have every member reset, and return once all have. Does nothing where the group is not broken."""
        engine = self._engine
        if engine.current.fault is None and self._running is None:
            return
        engine.faults.raise_lost()
        target = engine.current.number + (engine.current.fault is not None)
        engine.faults.flood(("reset!", target))
        await self._reset_to(target)

    def hear(self, src: int, message: tuple[Any, ...]) -> None:
        """Take a ("round" | "reset!", ...) message."""
        kind = message[0]
        if kind == "round":
            self._rounds.hear(message)
        else:
            self._engine.faults.flood(message, src)
            self._engine.fabric.spawn(self._reset_for_another(message[1]))

    def fail(self, error: Callable[[], Exception]) -> None:
        """Raise an error in whoever waits for the others."""
        self._rounds.fail(error)

    def lose(self, error: Callable[[], Exception]) -> None:
        """A member has died: wait for nobody any more."""
        if not self._loss.done():
            self._loss.set_result(None)
        self._rounds.fail(error)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._running = None
        if not task.cancelled():
            task.exception()  # whoever awaits reset() is told

    async def _reset(self) -> None:
        engine = self._engine
        engine.end_epoch(f"{engine.me} called reset()")
        await self._join("reset", within=engine.timeout)
        engine.start_epoch()
        try:
            await self.open()
        except CollectiveError as error:
            engine.break_everywhere(f"it could not be opened again on {engine.me}: {error}")
            raise

    async def _reset_to(self, target: int) -> None:
        while self._engine.current.number < target or self._running is not None:
            await self.reset()

    async def _reset_for_another(self, target: int) -> None:
        with contextlib.suppress(CollectiveError):  # the asking member's own reset raises the same
            await self._reset_to(target)

    def _raise_fault(self) -> None:
        """Raise what has ended the epoch while it was being opened."""
        fault = self._engine.fault()
        if fault is not None:
            raise fault

    async def _join(self, phase: str, *, within: float | None) -> None:
        """Wait until every member has come to this point."""
        engine = self._engine
        number = engine.current.number
        engine.faults.raise_lost()
        if engine.faults.outlived is not None:
            raise engine.faults.outlived()
        try:
            async with asyncio.timeout(within):
                await self._rounds.join(phase, number)
        except TimeoutError:
            missing = [engine.name_of(rank) for rank in self._rounds.missing(phase, number)]
            raise CollectiveTimeout(engine.name, f"{phase}() of epoch {number}", engine.timeout, missing) from None
