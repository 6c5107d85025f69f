"""One ProcessGroupGloo: how its members meet, what it moves, how it is ended. Imports torch: do so off the loop."""

from __future__ import annotations

import os
import re
import socket
import struct
import sys
import threading
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import torch
from torch import distributed

from collective import _torch_pickling  # noqa: F401  # with torch, not when there may be no descriptor to read it
from collective.errors import BackendError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from collective._backends._gloo_board import Board

_CONNECT: Final = timedelta(hours=1)
"""For connecting to members that have all published their addresses. On a machine with far more to run than processors
it may take long; whoever gives up severs, and a member that dies is told by its link."""
_LEAST: Final = 60.0
"""Seconds that an operation has at least, in which all members take part once they have agreed on it."""
_GLOO_WAITS: Final = 5
"""How many times the timeout that it is given Gloo waits for a connection (gloo/transport/tcp/pair.h, waitUntil)."""
_GLANCE: Final = 1.0
"""Seconds for a connection to this process itself."""
_SLOWEST: Final = 4e6
"""Bytes a second that a transfer must reach, beside the group's timeout."""


class Mesh:
    """One process group, which moves bytes between staging arrays that are its own.

    What is pending in it cannot be interrupted: `abort` leaves it pending, and the destructor waits for it. Cutting the
    connection ends it, unless that happens in the middle of a payload: then Gloo never wakes the waiter
    (gloo/transport/tcp/pair.cc, signalException). So `sever` comes after a while of grace, and every operation has a
    timeout.
    """

    def __init__(self, board: Board, rank: int, size: int, *, interface: str, timeout: float) -> None:
        self._board = board
        self._rank, self._size = rank, size
        self._interface = interface
        self._timeout = _CONNECT.total_seconds()
        self._timeout_then = max(timeout, _LEAST)
        self._store = _BoardStore(board)  # the process group does not keep the Python part of it alive
        self._group: Any = None
        self._sockets: list[socket.socket] | None = None

    def connect(self) -> None:
        """Meet the others; blocks for that long. Raises: BackendError."""
        gloo: Any = distributed.ProcessGroupGloo
        options = gloo._Options()
        options._timeout = _CONNECT / _GLOO_WAITS
        ones = [1] * self._size
        try:
            options._devices = [_device(self._interface)]
            self._group = gloo(self._store, self._rank, self._size, options)
            # The constructor returns while connections are still being made; this, when all of them are there.
            self.exchange(np.empty(self._size, np.uint8), np.zeros(self._size, np.uint8), ones, ones).wait()
        except RuntimeError as error:
            self._group = None  # at once, since the error keeps this object
            raise translate(error) from error
        finally:
            del options  # likewise: they hold the device, with its descriptors
        self._timeout = self._timeout_then
        self._sockets = _connections(self._board.addresses())

    def exchange(
        self, received: np.ndarray, sent: np.ndarray, received_sizes: Sequence[int], sent_sizes: Sequence[int]
    ) -> distributed.Work:
        """Issue the transfer of consecutive parts of `sent`, one to each rank, into consecutive parts of `received`."""
        options = distributed.AllToAllOptions()
        options.timeout = self._patience(received.nbytes + sent.nbytes)
        work: distributed.Work = self._group.alltoall_base(
            torch.from_numpy(received), torch.from_numpy(sent), list(received_sizes), list(sent_sizes), options
        )
        return work

    def broadcast(self, array: np.ndarray, root: int) -> distributed.Work:
        """Issue a broadcast of bytes."""
        options = distributed.BroadcastOptions()
        options.rootRank = root
        options.timeout = self._patience(array.nbytes)
        work: distributed.Work = self._group.broadcast([torch.from_numpy(array)], options)
        return work

    def sever(self) -> None:
        """Cut the connections, so that what waits for a member that never comes to it fails, here and there.

        In any thread. While `connect` is at work, it cuts what there is by now: call it again until that has ended.
        """
        if self._sockets is not None:
            _cut(self._sockets)
            return
        if self._store.published:
            _answer(self._store.published, self._size)
        connections = _connections(self._board.addresses())
        _cut(connections)
        for connection in connections:
            connection.close()

    def close(self) -> None:
        """Let go of the process group, after what is pending."""
        self._group = None
        for connection in self._sockets or ():
            # Gloo sets it to reset connections, which would take from the others what they have not read yet.
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 0, 0))
            connection.close()

    def _patience(self, nbytes: int) -> timedelta:
        return timedelta(seconds=self._timeout + nbytes / _SLOWEST)


def when_done(works: Sequence[distributed.Work], call: Callable[[Exception | None], None]) -> None:
    """Call once all of them have ended, on one of Gloo's threads, with the error of one that failed or None."""
    lock = threading.Lock()
    left = len(works)
    failure: Exception | None = None

    def one_done(future: Any) -> None:
        nonlocal left, failure
        ours: Exception | None = None
        try:
            future.value()
        except RuntimeError as error:
            ours = translate(error)
        with lock:
            failure = failure or ours
            left -= 1
            if left:
                return
        call(failure)

    for work in works:
        work.get_future().add_done_callback(one_done)


def translate(error: RuntimeError) -> BackendError:
    """Return an error of Gloo's as this package's, without the place in its source that the message starts with."""
    ours = BackendError("gloo: " + re.sub(r"^\[[^\]]*\]\s*", "", str(error)))
    ours.__cause__ = error
    return ours


class _BoardStore(distributed.Store):  # type: ignore[name-defined,misc]
    """The Store through which Gloo's members publish where they listen. It uses these three methods of it."""

    def __init__(self, board: Board) -> None:
        super().__init__()
        self._board = board
        self.published = b""
        """What this member published, which holds the address that it listens on."""

    def set(self, key: str, value: bytes | str) -> None:
        self.published = value.encode() if isinstance(value, str) else bytes(value)
        self._board.publish(key, self.published)

    def get(self, key: str) -> bytes:
        return self._board.wait(key)

    def wait(self, keys: list[str], timeout: timedelta | None = None) -> None:
        # Not bounded by Gloo's timeout: importing torch alone may take a slow member long, and `Board.close` ends it.
        for key in keys:
            self._board.wait(key)


def _device(interface: str) -> Any:
    """Return the device to listen on: torch's own variable goes first, then where others reach this host."""
    create: Any = distributed.ProcessGroupGloo.create_device
    name = os.environ.get("GLOO_SOCKET_IFNAME", "").split(",")[0]
    return create(interface=name, lazy_init=False) if name else create(hostname=interface, lazy_init=False)


def _cut(connections: Sequence[socket.socket]) -> None:
    for connection in connections:
        try:
            connection.shutdown(socket.SHUT_RDWR)
        except OSError:  # cut already
            continue


def _answer(published: bytes, size: int) -> None:
    """Connect to the device of this process that listens at an address as each other member would, and leave again.

    Gloo waits minutes for a member to connect, and nothing else ends that. A member says first which pair of this one
    it connects to (gloo/transport/tcp/listener.cc); the device of a group numbers them from 0, by rank.
    """
    places = set()
    for ours in _sockets():
        with ours:
            if _kernel_form(ours.family, *ours.getsockname()) in published:
                places.add((ours.family, ours.getsockname()))
    for family, place in places:
        for number in range(size):
            with socket.socket(family, socket.SOCK_STREAM) as caller:
                caller.settimeout(_GLANCE)
                try:
                    caller.connect(place)
                    caller.sendall(struct.pack("q", number))
                except OSError:  # it does not listen any more, or another group of this process was cut meanwhile
                    continue


def _connections(addresses: Sequence[bytes]) -> list[socket.socket]:
    """Return duplicates of this process's connections that have one of these addresses at an end.

    What Gloo publishes holds the socket address that it listens on, as the kernel writes it; each device has its own.
    """
    found = []
    for connection in _sockets():
        if any(end in address for end in _ends(connection) for address in addresses):
            found.append(connection)
        else:
            connection.close()
    return found


def _sockets() -> Iterator[socket.socket]:
    """Return duplicates of this process's internet sockets, which are the caller's to close."""
    for descriptor in os.listdir("/proc/self/fd"):
        try:
            duplicate = os.dup(int(descriptor))
        except OSError:  # closed meanwhile
            continue
        try:
            connection = socket.socket(fileno=duplicate)
        except OSError:  # no socket
            os.close(duplicate)
            continue
        if connection.family in (socket.AF_INET, socket.AF_INET6):
            yield connection
        else:
            connection.close()


def _ends(connection: socket.socket) -> list[bytes]:
    """Return both addresses of a connection; none of a socket that is not connected."""
    try:
        return [_kernel_form(connection.family, *end) for end in (connection.getsockname(), connection.getpeername())]
    except OSError:  # not connected
        return []


def _kernel_form(family: int, host: str, port: int, flow: int = 0, scope: int = 0) -> bytes:
    """Return what a sockaddr begins with: family, port, an IPv6 address's flow, address."""
    flow_bytes = flow.to_bytes(4, "big") if family == socket.AF_INET6 else b""
    address = socket.inet_pton(family, host.partition("%")[0])
    return family.to_bytes(2, sys.byteorder) + port.to_bytes(2, "big") + flow_bytes + address
