"""Memory files, and their mappings as arrays: unmapped when the last array goes, and nothing of a forked child's."""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import os
import weakref
from typing import Final

import numpy as np

from collective._links import forks, memfd, pages
from collective._links.pages import PAGE, Access, round_up

__all__ = ["PAGE", "Access", "MemoryFile", "Pages", "create", "forbid_writing", "map_memory", "round_up"]

_SEAL_FUTURE_WRITE: Final = 0x10
"""No new mapping can write to the file (Linux 5.1; fcntl.h). Those that there are can."""


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
        with contextlib.suppress(OSError):  # No memory: better the parent's memory, and right contents, than zeros.
            kept = [
                (pages.copy_aside(self.address + start, stop - start), start, stop - start)
                for start, stop in self._ranges()
            ]
            pages.clear(self.address, self.nbytes)
            for copy, start, nbytes in kept:
                pages.move(copy, nbytes, self.address + start)

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
    address = pages.map_file(descriptor, nbytes, access, start=start)
    owner = (ctypes.c_uint8 * nbytes).from_address(address)
    where = Pages(address, nbytes)
    forks.hold(where)
    # Not at exit: a daemon thread may still be at work there.
    weakref.finalize(owner, _unmap, where, holding).atexit = False
    array = np.ctypeslib.as_array(owner)
    if access is Access.READ:
        array.flags.writeable = False
    return array, where


def _unmap(where: Pages, holding: object) -> None:
    forks.release(where)
    pages.unmap(where.address, where.nbytes)
