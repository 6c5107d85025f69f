"""Where collectives run that others than the members call: a group of the same members beside theirs."""

from __future__ import annotations

import asyncio
from contextvars import Context
from typing import TYPE_CHECKING

from collective.errors import GroupBroken, GroupClosed

if TYPE_CHECKING:
    from collections.abc import Callable

    from collective._core.engine import Engine


class Companions:
    """One member's part in the companions of one epoch, of which one follows another that broke: its generations.

    All members open the same one, since rank 0 chooses it.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._generation = 0
        self._opening: asyncio.Task[Engine] | None = None
        self._spoiled = False
        """Some member has none of this generation, or a broken one."""
        self._ended: Callable[[], Exception] | None = None

    def choose(self) -> int:
        """Return the generation to use next: a new one where the last has broken, on any member."""
        anew = self._spoiled or self._is_lost()
        self._spoiled = False
        return self._generation + anew

    def spoil(self) -> None:
        """A member cannot use this generation."""
        self._spoiled = True

    def open(self, generation: int) -> None:
        """Form the companion of a generation, unless that has begun; all members do."""
        if self._opening is not None and generation == self._generation:
            return
        self._close()
        self._generation = generation
        # In a context of its own: it is nobody's call, whose end would break it.
        self._opening = self._engine.loop.create_task(self._form(generation), context=Context())
        self._opening.add_done_callback(_look_at)

    async def current(self) -> Engine:
        """Return the companion, once it is formed.

        Raises:
            What its forming raised, or what broke it.
        """
        opening = self._opening
        assert opening is not None, "it was opened"
        await asyncio.wait([opening])
        if opening.cancelled():
            raise GroupClosed(self._engine.name, "a collective over references")
        companion = opening.result()
        if companion.current.fault is not None:
            raise companion.current.fault()
        return companion

    def end(self, error: Callable[[], Exception]) -> None:
        """The epoch has ended: what is pending raises `error()`."""
        self._ended = error
        self._close()

    async def _form(self, generation: int) -> Engine:
        companion = self._engine.companion(generation)
        await companion.open()
        return companion

    def _is_lost(self) -> bool:
        opening = self._opening
        if opening is None or not opening.done():
            return False
        return opening.cancelled() or opening.exception() is not None or opening.result().fault() is not None

    def _close(self) -> None:
        """End the companion, also one that is being formed."""
        opening, self._opening = self._opening, None
        if opening is None:
            return
        opening.cancel()
        opening.add_done_callback(self._on_closed)
        if opening.done():  # at once, and not in a moment
            self._on_closed(opening)

    def _on_closed(self, opening: asyncio.Task[Engine]) -> None:
        if not opening.cancelled() and opening.exception() is None:
            opening.result().faults.end_with(self._ended or self._superseded)

    def _superseded(self) -> Exception:
        return GroupBroken(self._engine.name, "its collectives over references have begun anew", "call it again")


def _look_at(task: asyncio.Task[Engine]) -> None:
    """See how a companion's forming ended, also where no call of this member asks."""
    if not task.cancelled():
        task.exception()
