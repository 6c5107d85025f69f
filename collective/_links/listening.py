"""What listens on a socket, and dials unix sockets: the base of every kind that goes beyond this process."""

from __future__ import annotations

import asyncio
import os
import socket
from abc import abstractmethod
from typing import TYPE_CHECKING

from collective._links import directories, forks
from collective._links.carrier import Carrier, Kind
from collective._links.stream import StreamCarrier, cause_of
from collective.errors import LinkBroken

if TYPE_CHECKING:
    from collections.abc import Callable

    from collective.types import Address

BACKLOG = 1024
_ACCEPTS = 32
"""Connections that one callback accepts before it lets the loop go on."""


class SocketKind(Kind):
    """A listening socket."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._socket: socket.socket | None = None
        self._accept: Callable[[Carrier], None]
        self._pause: asyncio.TimerHandle | None = None

    def _serve(self, listener: socket.socket, accept: Callable[[Carrier], None]) -> None:
        listener.setblocking(False)
        self._socket, self._accept = listener, accept
        forks.hold(self)
        self._resume()

    def _resume(self) -> None:
        if self._socket is not None:
            self._loop.add_reader(self._socket.fileno(), self._acceptable)

    def _acceptable(self) -> None:
        for _ in range(_ACCEPTS):
            if self._socket is None:
                return
            try:
                connection, _ = self._socket.accept()
            except (BlockingIOError, InterruptedError, ConnectionAbortedError):
                return
            except OSError:
                # Out of descriptors or memory. The connection stays in the backlog: look again when some may be free.
                self._loop.remove_reader(self._socket.fileno())
                self._pause = self._loop.call_later(0.1, self._resume)
                return
            self._accept(self._carrier(connection, f"a dialer over {self.name}", dialed=False))

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

    def drop(self) -> None:
        """Close the listener in a forked child."""
        if self._socket is not None:
            os.close(self._socket.detach())


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
        self._serve(listener, accept)
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
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
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
            raise LinkBroken(f"{where}: {cause_of(error)}") from error
        except BaseException:
            sock.close()
            raise

    def close(self) -> None:
        super().close()
        file, self._file = self._file, None
        if file is not None:
            directories.remove(file)
