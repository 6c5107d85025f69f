"""The memory of a process that actors have for themselves: its heap stays warm, what it has read of others goes."""

from __future__ import annotations

import ctypes
import mmap
import os
from pathlib import Path
from typing import Final

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
"""What mallopt calls them (malloc.h)."""
_LARGEST: Final = 32 << 20
"""Bytes below which an array lies in the heap: the most that malloc goes up to by itself, once such a one was freed."""
_KEPT: Final = 2 * _LARGEST
"""Free bytes at the heap's end that go back to the system only where there are more; twice that, as malloc has it."""
_SET_BY_USER: Final = ("GLIBC_TUNABLES", "MALLOC_TRIM_THRESHOLD_", "MALLOC_TOP_PAD_", "MALLOC_MMAP_THRESHOLD_")


def keep_warm() -> None:
    """Have this process use the memory of freed arrays again instead of handing it back to the system each time.

    By default malloc hands back twice the largest array that was freed: who makes several arrays in each step, and
    drops them, touches fresh pages in each, which takes longer than filling them (measured: 0.7 us for each 4 KiB).
    Does nothing where the user has set this, or where the C library has no such options.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None and not any(name in os.environ for name in _SET_BY_USER):
        mallopt(_MMAP_THRESHOLD, _LARGEST)
        mallopt(_TRIM_THRESHOLD, _KEPT)


def forget_pages(*, of_file: str) -> None:
    """Let go of the pages that this process has read of shared mappings of a file; they can be read again.

    :param of_file: how the file's name starts.
    """
    madvise = ctypes.CDLL(None, use_errno=True).madvise
    for line in Path("/proc/self/maps").read_text().splitlines():
        # address range, permissions ("s": shared), offset, device, inode, path: proc(5)
        span, permissions, _, _, _, *path = line.split(maxsplit=5)
        if path and Path(path[0]).name.startswith(of_file) and permissions.endswith("s"):
            start, end = (int(address, 16) for address in span.split("-"))
            if madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), mmap.MADV_DONTNEED):
                raise OSError(ctypes.get_errno(), f"madvise of {path[0]}")
