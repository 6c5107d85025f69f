"""The directories of unix sockets: how they are made, and how those of processes that were killed are swept.

What listens on a unix socket has a directory of its own, of mode 0700, with the socket `s` in it. Who ends removes it;
who is killed cannot. The kernel closes the sockets of a process that ends, however it ends, so that a socket on which
nobody listens is one that nobody will: it is swept by whoever listens next. That needs no lock, no descriptor, and no
process ids, which mean nothing in another container and are used again.
"""

from __future__ import annotations

import contextlib
import os
import socket
import stat
import tempfile
import time
from pathlib import Path
from typing import Final

from collective._links.hosts import boot_id

_PREFIX: Final = "gangline-"
"""Begins the names of these directories, and of those that a gang keeps its own together in."""
_SOCKET, _NEW = "s", "n"
_OLD: Final = 3600.0
"""Seconds after which a directory without a socket is not being made any more."""
_PATH: Final = 107
"""Most bytes of a unix socket's path (Linux, sun_path)."""


def listen(parent: str | None, backlog: int) -> tuple[socket.socket, str]:
    """Listen on a unix socket in a new directory; return the socket and its path.

    :param parent: where to make the directory; by default with the temporary files.

    Raises: ValueError, OSError.
    """
    parent = parent or tempfile.gettempdir()
    _sweep_beside(parent)
    directory = tempfile.mkdtemp(prefix=_own_prefix(), dir=parent)  # Mode 0700.
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        path = os.path.join(directory, _SOCKET)
        if len(os.fsencode(path)) > _PATH:
            raise ValueError(f"the path of the unix socket {path!r} is too long; choose another directory=")
        # It gets its name when it listens: one that was bound and does not listen yet looks like one left behind.
        new = os.path.join(directory, _NEW)
        listener.bind(new)
        listener.listen(backlog)
        os.rename(new, path)
    except BaseException:
        listener.close()
        remove(os.path.join(directory, _SOCKET))
        raise
    return listener, path


def remove(path: str) -> None:
    """Remove a socket that `listen` made, and its directory, as far as they are there."""
    directory = os.path.dirname(path)
    for name in (_SOCKET, _NEW):
        with contextlib.suppress(FileNotFoundError):
            os.unlink(os.path.join(directory, name))
    with contextlib.suppress(OSError):  # Another one has removed it with all around it, or has put something there.
        os.rmdir(directory)


def _own_prefix() -> str:
    """Return how names begin of directories whose sockets this kernel would know: others may share the file system."""
    return f"{_PREFIX}{boot_id()[:6]}-"


def _sweep_beside(parent: str) -> None:
    """Sweep the directories in `parent`; where that is one that a gang keeps its own in, also those of other gangs."""
    if os.path.basename(os.path.normpath(parent)).startswith(_PREFIX):
        parent = os.path.dirname(os.path.abspath(parent))
    try:
        names = [name for name in os.listdir(parent) if name.startswith(_PREFIX)]
    except OSError:  # One may make directories there, and not see those of others; or there are no descriptors left.
        return
    living = _listening() if names else set()
    for name in names:
        _sweep(os.path.join(parent, name), living)


def _sweep(directory: str, living: set[str]) -> None:
    """Remove a directory in which nobody listens any more. What else looks unlike one of these is left alone."""
    with contextlib.suppress(OSError):  # Another one sweeps, or it is not ours to look at: there is nothing to do here.
        found = os.lstat(directory)
        if directory in living or not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid():
            return
        names = os.listdir(directory)
        if names == [_SOCKET] and os.path.basename(directory).startswith(_own_prefix()):
            path = os.path.join(directory, _SOCKET)
            if not _is_dead(path):
                return
            os.unlink(path)
        elif names and all(name.startswith(_PREFIX) for name in names):
            for name in names:
                _sweep(os.path.join(directory, name), living)
        elif time.time() - found.st_mtime < _OLD or names not in ([], [_NEW]):
            return
        elif names:
            os.unlink(os.path.join(directory, _NEW))
        os.rmdir(directory)  # Refused where anything is left.


def _listening() -> set[str]:
    """Return directories that need not be asked about, as far as the kernel tells: of sockets of this namespace."""
    try:
        lines = Path("/proc/net/unix").read_bytes().splitlines()
    except OSError:
        return set()
    paths = (os.fsdecode(fields[7]) for line in lines if len(fields := line.split(maxsplit=7)) == 8)
    return {os.path.dirname(path) for path in paths}


def _is_dead(path: str) -> bool:
    """Whether a socket is one on which nobody listens."""
    if not stat.S_ISSOCK(os.lstat(path).st_mode):
        return False
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.setblocking(False)
        try:
            probe.connect(path)
        except ConnectionRefusedError:
            return True
        except OSError:  # It listens and is busy, or nobody knows.
            return False
    return False
