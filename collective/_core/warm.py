"""Memory that is used again while it is warm: touching fresh pages costs more than copying into known ones."""

from __future__ import annotations

import numpy as np

_SMALL = 64 << 10
"""Bytes below which the allocator's own reuse is as good."""


class Pool:
    """Arrays of bytes that nobody uses now, at most `limit` bytes of them.

    Measured with streams of some 100 MiB on two cores: with fresh memory for each they ran at half the speed.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._free: dict[int, list[np.ndarray]] = {}
        self._held = 0

    def take(self, nbytes: int) -> np.ndarray:
        """Return so many bytes of any value; they are the caller's until it gives them back, if it does."""
        free = self._free.get(nbytes)
        if not free:
            return np.empty(nbytes, np.uint8)
        self._held -= nbytes
        return free.pop()

    def give(self, memory: np.ndarray) -> None:
        """Take back what `take` returned and nobody uses any more. May be called on any thread."""
        nbytes = memory.nbytes
        if nbytes < _SMALL or nbytes > self._limit:
            return
        while self._held + nbytes > self._limit and self._free:
            # Sizes that were asked for before, and not lately, make room.
            size = next(iter(self._free))
            others = self._free[size]
            if not others:
                del self._free[size]
                continue
            others.pop()
            self._held -= size
        self._held += nbytes
        self._free.setdefault(nbytes, []).append(memory)

    def lend(self, nbytes: int) -> np.ndarray:
        """Return so many bytes, which come back by themselves once nobody has a view of them any more."""
        return np.empty(nbytes, np.uint8) if nbytes < _SMALL else np.asarray(_Lease(self, self.take(nbytes)))

    def clear(self) -> None:
        """Hold nothing, now and later."""
        self._limit = 0
        self._free.clear()
        self._held = 0


class _Lease:
    """What an array that was lent, and every view of it, keeps alive."""

    __slots__ = ("__array_interface__", "_memory", "_pool")

    def __init__(self, pool: Pool, memory: np.ndarray) -> None:
        self._pool = pool
        self._memory = memory
        self.__array_interface__ = memory.__array_interface__

    def __del__(self) -> None:
        self._pool.give(self._memory)
