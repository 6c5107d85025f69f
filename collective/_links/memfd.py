"""Memory files as descriptors: how they are made, and what of one that comes from elsewhere can be relied on.

A memfd, not a named segment: the kernel frees it when the last process is gone, whatever killed them.
"""

from __future__ import annotations

import fcntl
import os
from typing import Final

_SIZE: Final = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW
SEALS: Final = _SIZE | fcntl.F_SEAL_SEAL
"""What a memory file that comes from elsewhere must have: nobody can change its size under who has mapped it."""


def create(name: str, nbytes: int, *, contents: bytes = b"", final: bool = True) -> int:
    """Return the descriptor of a new memory file, of zeros after `contents`, whose size nobody can change.

    Pages that are never written take no memory.

    :param final: add no more seals.

    Raises:
        OSError: this kernel or sandbox has no memfds, or there are no descriptors left.
    """
    descriptor = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.ftruncate(descriptor, nbytes)
        os.pwrite(descriptor, contents, 0)
        fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, SEALS if final else _SIZE)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def is_sealed(descriptor: int, nbytes: int) -> bool:
    """Whether a descriptor is of a memory file of that size, which nobody can change any more."""
    try:
        seals = fcntl.fcntl(descriptor, fcntl.F_GET_SEALS)
    except OSError:  # no memory file
        return False
    return seals & SEALS == SEALS and os.fstat(descriptor).st_size == nbytes
