"""Memory that is used again while it is warm: touching fresh pages costs more than copying into known ones."""

from __future__ import annotations

import threading

import numpy as np

from collective._links.arena import arena
from collective.abc import LARGE

_SMALL = 64 << 10
"""Bytes below which the allocator's own reuse is as good."""


class Pool:
    """Arrays of bytes that nobody uses now, at most `limit` bytes of them.

    :param shared: whether links of shared memory are about, which send what `arena` gives without copying it.

    Measured with streams of some 100 MiB on two cores: with fresh memory for each they ran at half the speed.
    """

    def __init__(self, limit: int, *, shared: bool = False) -> None:
        self.shared = shared
        self._limit = limit
        self._free: dict[int, list[np.ndarray]] = {}
        self._held = 0
        self._lock = threading.Lock()

    def take(self, nbytes: int) -> np.ndarray:
        """Return so many bytes of any value; they are the caller's until it gives them back, if it does."""
        with self._lock:
            free = self._free.get(nbytes)
            if free:
                self._held -= nbytes
                return free.pop()
        return np.empty(nbytes, np.uint8)

    def give(self, memory: np.ndarray) -> None:
        """Take back what `take` returned and nobody uses any more. May be called on any thread, at any moment."""
        # The garbage collector may call this inside any of these methods: what cannot be kept just then is freed.
        if _SMALL <= memory.nbytes <= self._limit and self._lock.acquire(blocking=False):
            try:
                self._keep(memory)
            finally:
                self._lock.release()

    def _keep(self, memory: np.ndarray) -> None:
        while self._held + memory.nbytes > self._limit:
            # Sizes that were asked for first, and maybe not lately, make room.
            size, others = next(iter(self._free.items()))
            if others:
                others.pop()
                self._held -= size
            else:
                del self._free[size]
        self._held += memory.nbytes
        self._free.setdefault(memory.nbytes, []).append(memory)

    def arena(self, nbytes: int) -> np.ndarray | None:
        """Return so many bytes that links of shared memory do not copy, and that no one gives back; None without."""
        if not self.shared or nbytes <= LARGE:
            return None
        try:
            return np.frombuffer(arena().allocate(nbytes).memory, np.uint8)
        except MemoryError:  # its limit is reached: other memory does as well, and is copied
            return None

    def lend(self, nbytes: int) -> np.ndarray:
        """Return so many bytes, which come back by themselves once nobody has a view of them any more."""
        return np.empty(nbytes, np.uint8) if nbytes < _SMALL else np.asarray(_Lease(self, self.take(nbytes)))

    def clear(self) -> None:
        """Hold nothing, now and later."""
        with self._lock:
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
