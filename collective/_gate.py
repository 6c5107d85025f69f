"""Stopping: what makes sure that nothing gets at a caller's memory any more once its operation has failed.

Whoever reads or writes a caller's memory from a thread, or step by step, goes through a Gate; who fails the operation
shuts it first. The gate of an operation is shut by its Work, that of a data plane when it is abandoned.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any, Final

from collective import tensors

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from types import TracebackType

    import numpy as np

PIECE: Final = 1 << 20
"""Bytes that are moved at a time, so that shutting a gate waits for a fraction of a millisecond."""


class Stopped(Exception):
    """An operation has failed meanwhile. For whoever carries it out, never for its caller."""


class Gate:
    """Lets what moves data through until it is shut; once `shut` has returned, nothing behind it is read or written.

    Entering it gives whether it is open, and holds off `shut` until it is left; one thread at a time is inside.
    """

    __slots__ = ("_lock", "_open", "stops")

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._open = True
        self.stops: set[Callable[[], object]] = set()
        """What stops those that move data on the loop: `shut` calls each."""

    @property
    def is_open(self) -> bool:
        """Whether `shut` has not been called."""
        return self._open

    def __enter__(self) -> bool:
        self._lock.acquire()
        return self._open

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._lock.release()

    def check(self) -> None:
        """Raise Stopped where it is shut: what was read through it may not be whole, and is for nobody."""
        if not self._open:
            raise Stopped

    def write(self, target: np.ndarray, write_piece: Callable[[slice], object]) -> None:
        """Have a one-dimensional array written piece by piece, as far as the gate is open."""
        step = max(1, PIECE // max(1, target.itemsize))  # There are dtypes of no bytes.
        for start in range(0, target.size, step):
            with self as is_open:
                if not is_open:
                    return
                write_piece(slice(start, start + step))

    def copy(self, target: np.ndarray, source: np.ndarray) -> None:
        """Copy between one-dimensional arrays of one dtype and length, as far as the gate is open."""

        def copy_piece(piece: slice) -> None:
            target[piece] = source[piece]

        self.write(target, copy_piece)

    def fill(self, out: Any, array: np.ndarray) -> None:
        """Do what `tensors.fill` does, as far as the gate is open."""
        for target, source in _pieces(out, array.reshape(tensors.shape_of(out))):
            with self as is_open:
                if not is_open:
                    return
                tensors.fill(target, source)

    def shut(self) -> None:
        """Let nothing through any more. On the loop, where something is in `stops`; idempotent."""
        self._open = False  # before waiting: who moves much takes the lock again and again, and would always be first
        with self._lock:
            pass
        while self.stops:
            self.stops.pop()()


class Guarded:
    """Something that has a caller's memory, and a gate before it, which is made when it is first asked for."""

    _gate: Gate | None = None

    @property
    def gate(self) -> Gate:
        """What every thread has to go through."""
        return self._gate or self.__dict__.setdefault("_gate", Gate())

    def stop(self) -> None:
        """Leave the caller's memory alone: once this has returned, nothing is read or written there."""
        self.gate.shut()


def _pieces(out: Any, array: np.ndarray) -> Iterator[tuple[Any, np.ndarray]]:
    """Yield views of small parts of two arrays of one shape."""
    if array.nbytes <= PIECE or not array.ndim:
        yield out, array
        return
    row = array.nbytes // len(array)
    if row > PIECE and array.ndim > 1:
        for number in range(len(array)):
            yield from _pieces(out[number], array[number])
        return
    step = max(1, PIECE // row)
    for start in range(0, len(array), step):
        yield out[start : start + step], array[start : start + step]
