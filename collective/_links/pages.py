"""Mapping memory files by hand.

Python's mmap keeps a descriptor of its own, which costs one for each mapping, and which a forked child cannot close.
Knows nothing of numpy, which processes without arrays do not import.
"""

from __future__ import annotations

import ctypes
import os
import weakref
from enum import Enum
from pickle import PickleBuffer
from typing import Final

PAGE: Final = os.sysconf("SC_PAGE_SIZE")

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


def map_file(descriptor: int, nbytes: int, access: Access, *, start: int = 0) -> int:
    """Map a file and return the address; the descriptor may be closed then. Raises: OSError."""
    protection, flags = access.value
    return _mmap(None, nbytes, protection, flags, descriptor, start)


def memory_of(descriptor: int, nbytes: int) -> memoryview:
    """Map a file to read and write; it is unmapped when this and all views of it are released. Raises: OSError."""
    address = map_file(descriptor, nbytes, Access.WRITE)
    owner = (ctypes.c_uint8 * nbytes).from_address(address)
    weakref.finalize(owner, unmap, address, nbytes).atexit = False
    return PickleBuffer(owner).raw()


def unmap(address: int, nbytes: int) -> None:
    """Unmap what `map_file` mapped."""
    _libc.munmap(address, nbytes)


def copy_aside(address: int, nbytes: int) -> int:
    """Return the address of a private copy of memory. Raises: OSError."""
    copy = _mmap(None, nbytes, Access.PRIVATE.value[0], _MAP_PRIVATE | _MAP_ANONYMOUS, -1, 0)
    ctypes.memmove(copy, address, nbytes)
    return copy


def clear(address: int, nbytes: int) -> None:
    """Put private memory, all zeros, in the place of a mapping. Raises: OSError."""
    _mmap(address, nbytes, Access.PRIVATE.value[0], _MAP_PRIVATE | _MAP_ANONYMOUS | _MAP_FIXED, -1, 0)


def move(source: int, nbytes: int, target: int) -> None:
    """Move a mapping to an address, in the place of what is there."""
    _libc.mremap(source, nbytes, nbytes, _MREMAP_MAYMOVE | _MREMAP_FIXED, target)


def round_up(nbytes: int) -> int:
    """Round up to whole pages."""
    return -(-nbytes // PAGE) * PAGE


def _mmap(address: int | None, nbytes: int, protection: int, flags: int, descriptor: int, start: int) -> int:
    mapped: int | None = _libc.mmap(address, nbytes, protection, flags, descriptor, start)
    if mapped is None or mapped == _FAILED:
        error = ctypes.get_errno()
        raise OSError(error, os.strerror(error))
    return mapped
