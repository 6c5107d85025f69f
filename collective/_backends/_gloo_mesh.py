"""One ProcessGroupGloo, how its members meet, and how it is ended. Imports torch: only `gloo` imports this, off the loop."""

from __future__ import annotations

import os
import re
import socket
import threading
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import torch
from torch import distributed

from collective.errors import BackendError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from collective._backends._gloo_board import Board

_CONNECT: Final = timedelta(seconds=60)
"""For connecting to members that have all published their addresses."""
_STALL: Final = timedelta(minutes=30)
"""How long a transfer may make no progress. Members that died are noticed otherwise, long before."""
_BYTE: Final = torch.uint8


class Mesh:
    """One process group, which moves bytes between staging arrays that are its own.

    Its destructor waits for what is pending: `sever` first.
    """

    def __init__(self, board: Board, rank: int, size: int, interface: str) -> None:
        """Meet the others; blocks for that long. Raises: BackendError."""
        options = distributed.ProcessGroupGloo._Options()
        options._timeout = _CONNECT
        try:
            options._devices = [_device(interface)]
            self._group = distributed.ProcessGroupGloo(_BoardStore(board), rank, size, options)
            self._group.set_timeout(_STALL)  # type: ignore[attr-defined]
        except RuntimeError as error:
            raise BackendError(f"gloo: cannot connect the members: {describe(error)}") from error
        self._sockets = _connections(board.addresses())

    def exchange(
        self, received: np.ndarray, sent: np.ndarray, received_sizes: Sequence[int], sent_sizes: Sequence[int]
    ) -> distributed.Work:
        """Issue the transfer of consecutive parts of `sent`, one to each rank, into consecutive parts of `received`."""
        return self._group.alltoall_base(
            torch.from_numpy(received), torch.from_numpy(sent), list(received_sizes), list(sent_sizes)
        )

    def broadcast(self, array: np.ndarray, root: int) -> distributed.Work:
        """Issue a broadcast of bytes."""
        return self._group.broadcast(torch.from_numpy(array), root)

    def sever(self) -> None:
        """Cut the connections, so that what is pending fails at once, here and on the others.

        Gloo has no way to do that: `abort` leaves it pending, and the destructor waits for it.
        """
        for connection in self._sockets:
            try:
                connection.shutdown(socket.SHUT_RDWR)
            except OSError:  # the other end has gone: the connection is cut
                continue

    def close(self) -> None:
        """Let go of the process group, after what is pending."""
        del self._group
        for connection in self._sockets:
            connection.close()


def when_done(works: Sequence[distributed.Work], call: Callable[[str | None], None]) -> None:
    """Call once all of them have ended, on one of Gloo's threads, with the reason why one failed or None."""
    lock = threading.Lock()
    left = len(works)
    failed: str | None = None

    def one_done(future: Any) -> None:
        nonlocal left, failed
        try:
            future.value()
            reason = None
        except RuntimeError as error:
            reason = describe(error)
        with lock:
            failed = failed or reason
            left -= 1
            last = left == 0
        if last:
            call(failed)

    for work in works:
        work.get_future().add_done_callback(one_done)


def describe(error: BaseException) -> str:
    """Return the message of an error of Gloo's without the place in its source that it starts with."""
    return re.sub(r"^\[[^\]]*\]\s*", "", str(error))


class _BoardStore(distributed.Store):
    """The Store through which Gloo's members publish where they listen. It uses these three methods of it."""

    def __init__(self, board: Board) -> None:
        super().__init__()
        self._board = board

    def set(self, key: str, value: bytes | str) -> None:  # type: ignore[override]
        self._board.publish(key, value.encode() if isinstance(value, str) else bytes(value))

    def get(self, key: str) -> bytes:
        return self._board.wait(key)

    def wait(self, keys: list[str], timeout: timedelta | None = None) -> None:  # type: ignore[override]
        # Not bounded by Gloo's timeout: importing torch alone may take a slow member long, and `Board.close` ends it.
        for key in keys:
            self._board.wait(key)


def _device(interface: str) -> Any:
    """Return the device to listen on: torch's own variable goes first, then the address that this member is reached at."""
    create = distributed.ProcessGroupGloo.create_device
    name = os.environ.get("GLOO_SOCKET_IFNAME", "").split(",")[0]
    return create(interface=name, lazy_init=False) if name else create(hostname=interface, lazy_init=False)


def _connections(addresses: Sequence[bytes]) -> list[socket.socket]:
    """Return duplicates of this process's connections that have one of these addresses at an end.

    What Gloo publishes holds the socket address that it listens on, as the kernel writes it; each device has its own.
    """
    found = []
    for descriptor in os.listdir("/proc/self/fd"):
        try:
            connection = socket.socket(fileno=os.dup(int(descriptor)))
        except OSError:  # no socket, or closed meanwhile
            continue
        try:
            ends = [_kernel_form(end) for end in (connection.getsockname(), connection.getpeername())]
        except OSError:  # not connected
            ends = []
        if any(end and end in address for end in ends for address in addresses):
            found.append(connection)
        else:
            connection.close()
    return found


def _kernel_form(address: Any) -> bytes:
    """Return an internet address as the first bytes of a sockaddr, or nothing for another one."""
    if not isinstance(address, tuple) or len(address) not in (2, 4):
        return b""
    host, port = address[0].partition("%")[0], address[1].to_bytes(2, "big")
    if len(address) == 2:
        return socket.AF_INET.to_bytes(2, "little") + port + socket.inet_pton(socket.AF_INET, host)
    flow = address[2].to_bytes(4, "big")
    return socket.AF_INET6.to_bytes(2, "little") + port + flow + socket.inet_pton(socket.AF_INET6, host)
