"""Memory files, and their mappings, which are made by hand.

Python's mmap keeps a descriptor of its own, which a forked child could not close, and a child that holds it keeps the
memory. A mapping made here is an array; it is unmapped when the last array of it goes.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import weakref
from enum import Enum
from typing import Final

import numpy as np

from collective._links import forks, memfd

PAGE: Final = os.sysconf("SC_PAGE_SIZE")
_SEAL_FUTURE_WRITE: Final = 0x10
"""No new mapping can write to the file (Linux 5.1; fcntl.h). Those that there are can."""

_PROT_READ, _PROT_WRITE = 1, 2
_MAP_SHARED, _MAP_PRIVATE, _MAP_FIXED, _MAP_ANONYMOUS = 0x01, 0x02, 0x10, 0x20
_MREMAP_MAYMOVE, _MREMAP_FIXED = 1, 2
_FAILED: Final = ctypes.c_void_p(-1).value

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long)
_libc.munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
_libc.mremap.restype = ctypes.c_void_p
_libc.mremap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t, ctypes.c_int, ctypes.c_void_p)


class Access(Enum):
    """What a mapping is for: its protection and its kind."""

    WRITE = (_PROT_READ | _PROT_WRITE, _MAP_SHARED)
    READ = (_PROT_READ, _MAP_SHARED)
    PRIVATE = (_PROT_READ | _PROT_WRITE, _MAP_PRIVATE)
    """To read and write; a write copies its page for the writer alone."""


class Pages:
    """Where a mapping is. A forked child gets memory of its own in its place, since arrays may still point there."""

    __slots__ = ("_kept", "_keys", "address", "nbytes")

    def __init__(self, address: int, nbytes: int) -> None:
        self.address = address
        self.nbytes = nbytes
        self._kept: dict[int, tuple[int, int]] = {}
        self._keys = 0

    def keep(self, start: int, stop: int) -> int:
        """Have a forked child find these bytes as they are, instead of zeros, until `let_go` of the key returned."""
        self._keys += 1
        self._kept[self._keys] = (start, stop)
        return self._keys

    def let_go(self, key: int) -> None:
        """Take back a `keep`."""
        self._kept.pop(key, None)

    def drop(self) -> None:
        """In a forked child: put private memory in the mapping's place, with a copy of what is to be kept."""
        copies = []
        for start, stop in self._ranges():
            copy = _mmap(None, stop - start, Access.PRIVATE.value[0], _MAP_PRIVATE | _MAP_ANONYMOUS, -1, 0)
            if copy is None:
                return  # No memory for that: better the parent's memory, and right contents, than zeros.
            ctypes.memmove(copy, self.address + start, stop - start)
            copies.append((copy, start, stop - start))
        flags = _MAP_PRIVATE | _MAP_ANONYMOUS | _MAP_FIXED
        _mmap(self.address, self.nbytes, Access.PRIVATE.value[0], flags, -1, 0)
        for copy, start, nbytes in copies:
            _libc.mremap(copy, nbytes, nbytes, _MREMAP_MAYMOVE | _MREMAP_FIXED, self.address + start)

    def _ranges(self) -> list[tuple[int, int]]:
        """Return what is kept, in whole pages, without overlaps."""
        ranges: list[tuple[int, int]] = []
        for start, stop in sorted(self._kept.values()):
            first, last = start // PAGE * PAGE, min(round_up(stop), round_up(self.nbytes))
            if ranges and first <= ranges[-1][1]:
                ranges[-1] = (ranges[-1][0], max(last, ranges[-1][1]))
            else:
                ranges.append((first, last))
        return ranges


class MemoryFile:
    """A descriptor of a memory file. Closed with this object; a forked child closes its copy."""

    __slots__ = ("__weakref__", "_descriptor", "nbytes")

    def __init__(self, descriptor: int, nbytes: int) -> None:
        self.nbytes = nbytes
        self._descriptor = _Descriptor(descriptor)
        weakref.finalize(self, self._descriptor.close).atexit = False

    @property
    def descriptor(self) -> int:
        """The descriptor; -1 where it is closed."""
        return self._descriptor.number

    def close(self) -> None:
        """Close the descriptor. Mappings stay. Idempotent."""
        self._descriptor.close()

    def map(
        self, access: Access, *, start: int = 0, nbytes: int = 0, holding: object = None
    ) -> tuple[np.ndarray, Pages]:
        """Return an array of the file's bytes, all by default, and where it is mapped.

        :param start: where to begin, a multiple of PAGE.
        :param holding: is kept alive as long as the mapping.

        Raises: OSError.
        """
        return map_memory(self._descriptor.number, nbytes or self.nbytes, access, start=start, holding=holding)


class _Descriptor:
    """A descriptor that forked children close."""

    __slots__ = ("number",)

    def __init__(self, number: int) -> None:
        self.number = number
        forks.hold(self)

    def close(self) -> None:
        number, self.number = self.number, -1
        if number >= 0:
            forks.release(self)
            os.close(number)

    drop = close


def create(name: str, nbytes: int) -> MemoryFile:
    """Make a memory file whose size nobody can change. Raises: OSError."""
    return MemoryFile(memfd.create(name, nbytes, final=False), nbytes)


def forbid_writing(file: MemoryFile) -> None:
    """Let nobody map a file for writing from now on, where the kernel can, and add no more seals."""
    try:
        fcntl.fcntl(file.descriptor, fcntl.F_ADD_SEALS, _SEAL_FUTURE_WRITE | fcntl.F_SEAL_SEAL)
    except OSError:
        fcntl.fcntl(file.descriptor, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SEAL)


def map_memory(
    descriptor: int, nbytes: int, access: Access, *, start: int = 0, holding: object = None
) -> tuple[np.ndarray, Pages]:
    """Map a file, as `MemoryFile.map` does; the descriptor may be closed then. Raises: OSError."""
    protection, flags = access.value
    address = _mmap(None, nbytes, protection, flags, descriptor, start)
    if address is None:
        error = ctypes.get_errno()
        raise OSError(error, os.strerror(error))
    owner = (ctypes.c_uint8 * nbytes).from_address(address)
    pages = Pages(address, nbytes)
    forks.hold(pages)
    # Not at exit: a daemon thread may still be at work there.
    weakref.finalize(owner, _unmap, pages, holding).atexit = False
    array = np.ctypeslib.as_array(owner)
    if access is Access.READ:
        array.flags.writeable = False
    return array, pages


def round_up(nbytes: int) -> int:
    """Round up to whole pages."""
    return -(-nbytes // PAGE) * PAGE


def _unmap(pages: Pages, holding: object) -> None:
    forks.release(pages)
    _libc.munmap(pages.address, pages.nbytes)


def _mmap(address: int | None, nbytes: int, protection: int, flags: int, descriptor: int, start: int) -> int | None:
    """Return where it was mapped, or None."""
    mapped: int | None = _libc.mmap(address, nbytes, protection, flags, descriptor, start)
    return None if mapped == _FAILED else mapped
