"""Descriptors that come over a unix socket beside its bytes."""

from __future__ import annotations

import array
import os
import socket
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

_SIZE = array.array("i").itemsize


def receive(sock: socket.socket, count: int, most: int) -> tuple[bytes, list[int]]:
    """Read up to `count` bytes, and the descriptors that came with them, which no process that is started inherits.

    Where this process is at its limit of descriptors, the kernel drops those that do not fit (MSG_CTRUNC), and says
    nothing else: fewer come than were sent, perhaps none.

    :param most: descriptors there is room for; one more may come, where the kernel rounds up.

    Raises: OSError; BlockingIOError where nothing has come.
    """
    room = socket.CMSG_SPACE(most * _SIZE)
    data, messages, _, _ = sock.recvmsg(count, room, socket.MSG_CMSG_CLOEXEC)
    descriptors = array.array("i")
    for level, kind, said in messages:
        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
            descriptors.frombytes(said[: len(said) - len(said) % _SIZE])
    return data, list(descriptors)


def close_all(descriptors: Iterable[int]) -> None:
    """Close descriptors."""
    for descriptor in descriptors:
        os.close(descriptor)
