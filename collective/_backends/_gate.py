"""Writing into callers' memory from threads, in a way that can be stopped."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Callable

    import numpy as np

_PIECE: Final = 1 << 20
"""Bytes written under the lock at a time, so that shutting the gate waits for a fraction of a millisecond."""


class Gate:
    """Lets writes into callers' memory through until it is shut; once `shut` has returned, nothing is written."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._open = True

    @property
    def is_open(self) -> bool:
        """Whether `shut` has not been called."""
        return self._open

    def write(self, target: np.ndarray, write_piece: Callable[[slice], object]) -> None:
        """Have a one-dimensional array written piece by piece, as far as the gate is open."""
        step = max(1, _PIECE // target.itemsize)
        for start in range(0, target.size, step):
            with self._lock:
                if not self._open:
                    return
                write_piece(slice(start, start + step))

    def copy(self, target: np.ndarray, source: np.ndarray) -> None:
        """Copy between one-dimensional arrays of one dtype and length, as far as the gate is open."""

        def copy_piece(piece: slice) -> None:
            target[piece] = source[piece]

        self.write(target, copy_piece)

    def shut(self) -> None:
        """Let no later write through. Idempotent."""
        with self._lock:
            self._open = False
