"""What listens on a socket, and dials unix sockets: the base of every kind that goes beyond this process."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import socket
from abc import abstractmethod
from typing import TYPE_CHECKING

from collective._links import directories, forks
from collective._links.carrier import Carrier, Kind
from collective._links.stream import StreamCarrier, cause_of
from collective.errors import LinkBroken, OutOfResources

if TYPE_CHECKING:
    from collections.abc import Callable

    from collective.types import Address

BACKLOG = 1024
_ACCEPTS = 32
"""Connections that one callback accepts before it lets the loop go on."""
_PAUSE = 0.1
"""Seconds after which it is tried again what there were no descriptors for."""


class SocketKind(Kind):
    """A listening socket, and a descriptor that is kept in reserve: with that a dialer is told that there is none."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._reserve = -1
        self._socket: socket.socket | None = None
        self._accept: Callable[[Carrier], None]
        self._pause: asyncio.TimerHandle | None = None

    def _serve(self, listener: socket.socket, accept: Callable[[Carrier], None]) -> None:
        listener.setblocking(False)
        self._reserve = os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)
        self._socket, self._accept = listener, accept
        forks.hold(self)
        self._resume()

    def _resume(self) -> None:
        if self._socket is None:
            return
        if self._reserve < 0:
            with contextlib.suppress(OSError):  # Still none: dialers wait until there are, or can be told.
                self._reserve = os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)
        self._loop.add_reader(self._socket.fileno(), self._acceptable)

    def _acceptable(self) -> None:
        for _ in range(_ACCEPTS):
            if self._socket is None:
                return
            try:
                connection, _ = self._socket.accept()
            except (BlockingIOError, InterruptedError, ConnectionAbortedError):
                return
            except OSError as error:
                # The connection stays in the backlog, if it cannot be told: look again when there may be some free.
                if error.errno in (errno.EMFILE, errno.ENFILE):
                    self._accept_last(self._socket)
                self._loop.remove_reader(self._socket.fileno())
                self._pause = self._loop.call_later(_PAUSE, self._resume)
                return
            self._take(connection)

    def _accept_last(self, listener: socket.socket) -> None:
        """Accept a connection with the descriptor in reserve, to tell its dialer that there are no more."""
        if self._reserve < 0:
            return
        os.close(self._reserve)
        self._reserve = -1
        with contextlib.suppress(OSError):  # Somebody else has taken it.
            self._take(listener.accept()[0], last=True)

    def _take(self, connection: socket.socket, *, last: bool = False) -> None:
        carrier = self._carrier(connection, f"a dialer over {self.name}", dialed=False)
        carrier.last = last
        self._accept(carrier)

    def _carrier(self, sock: socket.socket, where: str, *, dialed: bool) -> StreamCarrier:
        return StreamCarrier(sock, where)

    @abstractmethod
    async def dial(self, address: Address) -> StreamCarrier: ...

    def close(self) -> None:
        listener, self._socket = self._socket, None
        if listener is None:
            return
        forks.release(self)
        if self._pause is not None:
            self._pause.cancel()
        if not self._loop.is_closed():
            self._loop.remove_reader(listener.fileno())
        listener.close()
        self._drop_reserve()

    def drop(self) -> None:
        """Close the listener in a forked child."""
        if self._socket is not None:
            os.close(self._socket.detach())
            self._drop_reserve()

    def _drop_reserve(self) -> None:
        reserve, self._reserve = self._reserve, -1
        if reserve >= 0:
            os.close(reserve)


class LocalKind(SocketKind):
    """A unix socket in a directory that only this user can enter."""

    def __init__(self, *, host: str, directory: str | None) -> None:
        super().__init__()
        self._host = host
        self._parent = directory
        self._file: str | None = None

    def _listen_locally(self, accept: Callable[[Carrier], None]) -> str:
        """Listen, and return the path of the socket. Raises: ValueError, OSError."""
        listener, self._file = directories.listen(self._parent, BACKLOG)
        try:
            self._serve(listener, accept)
        except BaseException:
            listener.close()
            self.close()
            raise
        return self._file

    @abstractmethod
    def _path(self, address: Address) -> str | None:
        """Return the path to dial, where the address has one."""

    def reaches(self, address: Address) -> bool:
        return bool(self._path(address) and address.host and address.host == self._host)

    async def dial(self, address: Address) -> StreamCarrier:
        path = self._path(address)
        assert path is not None
        where = f"unix socket {path}"
        sock = new_socket(socket.AF_UNIX, where)
        try:
            sock.setblocking(False)
            while True:
                try:
                    sock.connect(path)
                    return self._carrier(sock, where, dialed=True)
                except BlockingIOError:
                    # The backlog is full, and the kernel has no event for its end. The caller's timeout bounds this.
                    await asyncio.sleep(0.01)
        except OSError as error:
            sock.close()
            raise dial_error(error, where) from error
        except BaseException:
            sock.close()
            raise

    def close(self) -> None:
        super().close()
        file, self._file = self._file, None
        if file is not None:
            directories.remove(file)


def new_socket(family: int, where: str) -> socket.socket:
    """Return a stream socket to dial with. Raises: OutOfResources."""
    try:
        return socket.socket(family, socket.SOCK_STREAM)
    except OSError as error:
        raise dial_error(error, where) from error


def dial_error(error: OSError, where: str) -> Exception:
    """Return what an error of the system means for who dials."""
    exhausted = OutOfResources.of(error, f"this process ({os.getpid()})", f"connect to {where}")
    return exhausted or LinkBroken(f"{where}: {cause_of(error)}")
