"""Memory that a member may put tensors in for the others to read in place, in the same file as the group's slots.

Behind the slots the file goes on with a wide span for each member, of which only what is touched takes memory. A member
takes blocks of its own span and tells the others, with an operation, where in the file its tensor lies; they map that
part when they first need it. So no descriptor has to follow a block.
"""

from __future__ import annotations

import ctypes
import weakref
from collections import deque
from typing import Final

import numpy as np

from collective._links.mapping import PAGE, Access, MemoryFile, round_up
from collective.errors import BackendError

SPAN: Final = 1 << 38
"""Bytes of the file that each member has for its blocks."""
_KEPT: Final = 256 << 20
"""Bytes of unused blocks that stay warm; the memory of more is given back."""
_MAPPINGS: Final = 64
"""Parts of the others' spans that stay mapped."""
_MADV_REMOVE: Final = 9

_libc = ctypes.CDLL(None, use_errno=True)
_libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)


class _Taken(np.ndarray):
    """The memory of a block; who looks at any of it keeps the block taken."""


class _Block:
    """A part of this member's span, mapped for as long as this object lives."""

    def __init__(self, file: MemoryFile, offset: int, nbytes: int) -> None:
        self.offset = offset
        self.nbytes = nbytes
        self.cold = True
        self.array, self.pages = file.map(Access.WRITE, start=offset, nbytes=nbytes)

    def cool(self) -> None:
        """Give the memory back, where that is possible; what is read there then is zeros."""
        self.cold = _libc.madvise(self.pages.address, self.nbytes, _MADV_REMOVE) == 0


class Blocks:
    """One member's blocks, and its view of the others'.

    :param start: where in the file the first member's span begins.
    """

    def __init__(self, file: MemoryFile, *, start: int, rank: int, size: int) -> None:
        self._file = file
        self._start = start
        self._rank = rank
        self._size = size
        self._used = 0
        self._taken: dict[int, _Block] = {}
        """Blocks that arrays of this process lie in, by address."""
        self._free: dict[int, list[_Block]] = {}
        self._returned: deque[_Block] = deque()
        self._mapped: dict[tuple[int, int], np.ndarray] = {}

    def take(self, nbytes: int) -> np.ndarray:
        """Return new memory of so many bytes, of any content, that the others can read in place.

        Raises: MemoryError, where the span is used up.
        """
        self._collect()
        length = _size_class(nbytes)
        free = self._free.get(length)
        if free:
            block = free.pop()
        elif self._used + length > SPAN:
            raise MemoryError(f"this member's arrays in shared memory take {self._used} bytes of {SPAN}")
        else:
            block = _Block(self._file, self._start + self._rank * SPAN + self._used, length)
            self._used += length
        block.cold = False
        self._taken[block.pages.address] = block
        taken = block.array.view(_Taken)
        key = block.pages.keep(0, nbytes)
        weakref.finalize(taken, self._take_back, block, key).atexit = False
        return np.frombuffer(taken.data, np.uint8, nbytes)

    def offset_of(self, array: np.ndarray) -> int | None:
        """Return where in the file an array of contiguous bytes lies, or None where it does not."""
        if not self._taken:
            return None
        first = array.ctypes.data
        for block in list(self._taken.values()):  # another thread may take one meanwhile
            address = block.pages.address
            if address <= first and first + array.nbytes <= address + block.nbytes:
                return block.offset + first - address
        return None

    def view(self, rank: int, offset: int, nbytes: int) -> np.ndarray:
        """Return bytes of another member's block. Raises: BackendError, where they are not in its span."""
        span = self._start + rank * SPAN
        if not (0 <= rank < self._size and span <= offset and offset + nbytes <= span + SPAN):
            raise BackendError(f"shm: rank {rank} says that its tensor lies at {offset}, outside of its memory")
        first = offset - offset % PAGE
        key = (first, round_up(offset + nbytes - first))
        mapped = self._mapped.pop(key, None)
        if mapped is None:
            mapped, _ = self._file.map(Access.READ, start=first, nbytes=key[1])
        self._mapped[key] = mapped  # the latest goes last
        if len(self._mapped) > _MAPPINGS:
            del self._mapped[next(iter(self._mapped))]
        return mapped[offset - first : offset - first + nbytes]

    def close(self) -> None:
        """Take and show no more. The memory of a block goes with its last array. Idempotent."""
        self._file.close()
        self._free.clear()
        self._taken.clear()
        self._mapped.clear()

    def _take_back(self, block: _Block, key: int) -> None:
        """Note that a block's arrays are gone. This is a finalizer: in any thread, in the middle of anything."""
        block.pages.let_go(key)
        self._returned.append(block)

    def _collect(self) -> None:
        """Take back the blocks whose arrays are gone."""
        while self._returned:
            block = self._returned.popleft()
            if self._taken.pop(block.pages.address, None) is not None:
                self._free.setdefault(block.nbytes, []).append(block)
        warm = [block for free in self._free.values() for block in free if not block.cold]
        kept = 0
        for block in warm:
            kept += block.nbytes
            if kept > _KEPT:
                block.cool()


def _size_class(nbytes: int) -> int:
    """Round up to one of eight sizes an octave, so that a block that was given back fits the next of about its size."""
    step = max(PAGE, 1 << max(0, nbytes.bit_length() - 4))
    return max(PAGE, -(-nbytes // step) * step)
