"""How much a store may hold: who has no room waits for it, first come first served."""

from __future__ import annotations

import asyncio
import sys
from collections import deque
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

_DEADLINE = getattr(asyncio.Timeout, "_on_timeout", None)
"""What cancels a task at its `asyncio.timeout`. Were it to go by another name, `StoreFull` would be told as the context
of the CancelledError that then comes out, and asyncio would make a TimeoutError of that."""


class Room:
    """Bytes of a limit. Belongs to one loop."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.used = 0
        self._line: deque[tuple[int, _Wait]] = deque()

    @property
    def waiting(self) -> int:
        """How many wait."""
        return len(self._line)

    def take_now(self, nbytes: int) -> bool:
        """Take bytes if they are there and nobody waits."""
        if self._line or self.used + nbytes > self.limit:
            return False
        self.used += nbytes
        return True

    async def take(self, nbytes: int, full: Callable[[], Exception]) -> None:
        """Take bytes, waiting for them in line. `full` makes the error that ends the wait at the caller's deadline."""
        if self.take_now(nbytes):
            return
        wait = _Wait(loop=asyncio.get_running_loop())
        place = nbytes, wait
        self._line.append(place)
        try:
            await wait
        except asyncio.CancelledError as cancelled:
            error = full()
            if wait.granted:
                self.used -= nbytes
            elif place in self._line:
                self._line.remove(place)
            self._grant()
            if wait.at_deadline:
                raise error from None
            cancelled.__cause__ = error
            raise

    def give_back(self, nbytes: int) -> None:
        """Make room."""
        self.used -= nbytes
        self._grant()

    def close(self, error: Exception) -> None:
        """Let everybody who waits fail."""
        for _, wait in self._line:
            if not wait.done():
                wait.set_exception(error)
        self._line.clear()

    def _grant(self) -> None:
        while self._line and self.used + self._line[0][0] <= self.limit:
            nbytes, wait = self._line.popleft()
            self.used += nbytes
            wait.granted = True
            if not wait.done():
                wait.set_result(None)


class _Wait(asyncio.Future[None]):
    """A future that knows whether it was a deadline that cancelled it.

    asyncio tells a task only that it is cancelled; its `timeout` makes a TimeoutError of that where it comes out, when
    nobody can say any more what was waited for. An exception that is raised instead passes through.
    """

    granted = False
    at_deadline = False

    def cancel(self, msg: object = None) -> bool:
        frame = sys._getframe(1)
        code = getattr(_DEADLINE, "__code__", None)
        for _ in range(4):
            if frame is None or code is None:
                break
            if frame.f_code is code:
                self.at_deadline = True
                break
            frame = frame.f_back  # type: ignore[assignment]
        return super().cancel(msg)
