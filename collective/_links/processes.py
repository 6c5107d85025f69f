"""The processes at the other ends of links: one pidfd for each, however many links of a loop lead there."""

from __future__ import annotations

import os
import select
from typing import TYPE_CHECKING

from collective._links import forks

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable

_watched: dict[tuple[asyncio.AbstractEventLoop, int], _Process] = {}
os.register_at_fork(after_in_child=_watched.clear)


class Watch:
    """One link's eye on the process at its other end.

    :ivar descriptor: its pidfd, which others use as well; -1 once closed.
    """

    def __init__(self, process: _Process, on_end: Callable[[], None]) -> None:
        self.descriptor = process.descriptor
        self._process = process
        self._on_end = on_end
        process.watches.add(self)

    def close(self) -> None:
        """Look no more; the last one closes the descriptor. Idempotent; callable when the loop is closed."""
        if self.descriptor >= 0:
            self.descriptor = -1
            self._process.watches.discard(self)
            self._process.let_go()

    def tell(self) -> None:
        """The process has ended."""
        if self.descriptor >= 0:
            self._on_end()


class _Process:
    def __init__(self, loop: asyncio.AbstractEventLoop, pid: int) -> None:
        self.descriptor = os.pidfd_open(pid)
        self.watches: set[Watch] = set()
        self._key = (loop, pid)
        self._reading = True
        forks.hold(self)
        loop.add_reader(self.descriptor, self._ended)
        _watched[self._key] = self

    def let_go(self) -> None:
        if not self.watches and self.descriptor >= 0:
            descriptor = self._leave()
            forks.release(self)
            os.close(descriptor)

    def drop(self) -> None:
        """Close the descriptor in a forked child."""
        os.close(self.descriptor)
        self.descriptor = -1

    @property
    def ended(self) -> bool:
        """Whether the process is dead, though the loop may not have heard of it yet: its number may be another's."""
        return has_ended(self.descriptor)

    def _leave(self) -> int:
        loop, _ = self._key
        if _watched.get(self._key) is self:
            del _watched[self._key]
        if self._reading and not loop.is_closed():
            loop.remove_reader(self.descriptor)
        self._reading = False
        descriptor, self.descriptor = self.descriptor, -1
        return descriptor

    def _ended(self) -> None:
        loop, _ = self._key
        loop.remove_reader(self.descriptor)  # An end stays readable for ever.
        self._reading = False
        if _watched.get(self._key) is self:
            del _watched[self._key]
        for watch in tuple(self.watches):
            loop.call_soon(watch.tell)


def watch(pid: int, loop: asyncio.AbstractEventLoop, on_end: Callable[[], None]) -> Watch:
    """Have `on_end` called on the loop when a process ends.

    Raises:
        ProcessLookupError: it has ended.
        OSError: this kernel or sandbox has no pidfds, or there are no descriptors left.
    """
    process = _watched.get((loop, pid))
    if process is None or process.ended:
        process = _Process(loop, pid)
    return Watch(process, on_end)


def has_ended(descriptor: int) -> bool:
    """Whether the process of a pidfd has."""
    poll = select.poll()  # Not select(), which takes no descriptor beyond 1023.
    poll.register(descriptor, select.POLLIN)
    return bool(poll.poll(0))
