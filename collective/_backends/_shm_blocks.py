"""Memory that a member may put tensors in for the others to read in place, in the same file as the group's slots.

Behind the slots the file goes on with a wide span for each member, of which only what is touched takes memory. A member
takes blocks of its own span and tells the others, with an operation, where in the file its tensor lies; they map that
part when they first need it. So no descriptor has to follow a block.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import weakref
from collections import deque
from typing import TYPE_CHECKING, Final

import numpy as np

from collective._links import forks
from collective.errors import BackendError

if TYPE_CHECKING:
    from collections.abc import Callable

SPAN: Final = 1 << 38
"""Bytes of the file that each member has for its blocks."""
_PAGE: Final = mmap.PAGESIZE
_KEPT: Final = 256 << 20
"""Bytes of unused blocks that stay warm; the memory of more is given back."""
_MAPPINGS: Final = 64
"""Parts of the others' spans that stay mapped."""

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long)
_libc.munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
_libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
_PROT_READ, _PROT_WRITE = 1, 2
_MAP_SHARED, _MAP_PRIVATE, _MAP_FIXED, _MAP_ANONYMOUS = 0x01, 0x02, 0x10, 0x20
_MADV_REMOVE: Final = 9


def map_shared(fd: int, offset: int, nbytes: int, *, writable: bool = True) -> tuple[int, np.ndarray]:
    """Map a part of a file by hand, and return its address and bytes; it is unmapped when the last array of it goes.

    Python's mmap keeps a descriptor of its own, which a forked child could not close, and a child that holds it keeps
    the memory.
    """
    address = _libc.mmap(None, nbytes, _PROT_READ | (_PROT_WRITE if writable else 0), _MAP_SHARED, fd, offset)
    if address in (None, ctypes.c_void_p(-1).value):
        error = ctypes.get_errno()
        raise OSError(error, os.strerror(error))
    return address, _array(address, nbytes, lambda: _libc.munmap(address, nbytes))


def unshare(address: int, nbytes: int) -> None:
    """Put private zeros where shared memory is mapped: in a forked child, whose arrays may still point there."""
    flags = _MAP_PRIVATE | _MAP_FIXED | _MAP_ANONYMOUS
    _libc.mmap(address, nbytes, _PROT_READ | _PROT_WRITE, flags, -1, 0)


def _array(address: int, nbytes: int, on_end: Callable[[], object]) -> np.ndarray:
    """Return the bytes at an address, and call back when the last array of them is gone."""
    owner = (ctypes.c_uint8 * nbytes).from_address(address)
    # Not at exit: a daemon thread may still be at work there.
    weakref.finalize(owner, on_end).atexit = False
    return np.ctypeslib.as_array(owner)


class _Block:
    """A part of this member's span, mapped for as long as this object lives."""

    def __init__(self, fd: int, offset: int, nbytes: int) -> None:
        self.offset = offset
        self.nbytes = nbytes
        self.cold = True
        self.address, self._mapping = map_shared(fd, offset, nbytes)


class Blocks:
    """One member's blocks, and its view of the others'.

    :param memory: descriptor of the file; kept until `close`.
    :param start: where the first member's span begins.
    """

    def __init__(self, memory: int, *, start: int, rank: int, size: int) -> None:
        self._memory = memory
        self._start = start
        self._rank = rank
        self._size = size
        self._used = 0
        self._taken: dict[int, _Block] = {}
        """Blocks that arrays of this process lie in, by address."""
        self._free: dict[int, list[_Block]] = {}
        self._returned: deque[_Block] = deque()
        self._mapped: dict[tuple[int, int, int], tuple[int, np.ndarray]] = {}
        forks.hold(self)

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
            block = _Block(self._memory, self._start + self._rank * SPAN + self._used, length)
            self._used += length
        block.cold = False
        self._taken[block.address] = block
        # A finalizer may run anywhere, in the middle of these methods too: it only appends.
        return _array(block.address, length, lambda: self._returned.append(block))[:nbytes]

    def offset_of(self, array: np.ndarray) -> int | None:
        """Return where in the file an array of contiguous bytes lies, or None where it does not."""
        if not self._taken:
            return None
        first = array.ctypes.data
        for block in list(self._taken.values()):  # another thread may take one meanwhile
            if block.address <= first and first + array.nbytes <= block.address + block.nbytes:
                return block.offset + first - block.address
        return None

    def view(self, rank: int, offset: int, nbytes: int) -> np.ndarray:
        """Return bytes of another member's block. Raises: BackendError, where they are not in its span."""
        span = self._start + rank * SPAN
        if not (0 <= rank < self._size and span <= offset and offset + nbytes <= span + SPAN):
            raise BackendError(f"shm: rank {rank} says that its tensor lies at {offset}, outside of its memory")
        first = offset - offset % _PAGE
        key = (rank, first, _pages(offset + nbytes - first))
        mapped = self._mapped.pop(key, None) or map_shared(self._memory, first, key[2], writable=False)
        self._mapped[key] = mapped  # the latest goes last
        if len(self._mapped) > _MAPPINGS:
            del self._mapped[next(iter(self._mapped))]
        return mapped[1][offset - first : offset - first + nbytes]

    def close(self) -> None:
        """Close the descriptor. The memory of a block goes with its last array. Idempotent."""
        forks.release(self)
        memory, self._memory = self._memory, -1
        if memory >= 0:
            os.close(memory)
        self._free.clear()
        self._taken.clear()
        self._mapped.clear()

    def drop(self) -> None:
        """Let go in a forked child."""
        os.close(self._memory)
        self._memory = -1
        blocks = [*self._taken.values(), *self._returned, *(block for free in self._free.values() for block in free)]
        for block in blocks:
            unshare(block.address, block.nbytes)
        for (_, _, nbytes), (address, _) in self._mapped.items():
            unshare(address, nbytes)

    def _collect(self) -> None:
        """Take back the blocks whose arrays are gone."""
        while self._returned:
            block = self._returned.popleft()
            if self._taken.pop(block.address, None) is not None:
                self._free.setdefault(block.nbytes, []).append(block)
        kept = 0
        for free in self._free.values():
            for block in free:
                kept += 0 if block.cold else block.nbytes
                if kept > _KEPT and not block.cold:
                    block.cold = _libc.madvise(block.address, block.nbytes, _MADV_REMOVE) == 0


def _size_class(nbytes: int) -> int:
    """Round up to one of eight sizes an octave, so that a block that was given back fits the next of about its size."""
    step = max(_PAGE, 1 << max(0, nbytes.bit_length() - 4))
    return max(_PAGE, -(-nbytes // step) * step)


def _pages(nbytes: int) -> int:
    """Round up to whole pages."""
    return -(-nbytes // _PAGE) * _PAGE
