"""Links over unix sockets and TCP."""

from __future__ import annotations

import socket
from dataclasses import replace
from typing import TYPE_CHECKING, ClassVar

from collective._links.listening import BACKLOG, LocalKind, SocketKind, dial_error, new_socket
from collective._links.options import tune_dial
from collective._links.stream import StreamCarrier

if TYPE_CHECKING:
    from collections.abc import Callable

    from collective._links.carrier import Carrier
    from collective.types import Address


class UnixKind(LocalKind):
    """A unix socket."""

    name: ClassVar[str] = "unix"

    def listen(self, accept: Callable[[Carrier], None], address: Address) -> Address:
        return replace(address, host=self._host, unix=self._listen_locally(accept))

    def _path(self, address: Address) -> str | None:
        return address.unix


class TcpKind(SocketKind):
    """A TCP port of one interface."""

    name: ClassVar[str] = "tcp"

    def __init__(self, *, host: str, interface: str) -> None:
        super().__init__()
        self._host = host
        self._interface = interface

    def listen(self, accept: Callable[[Carrier], None], address: Address) -> Address:
        family = socket.AF_INET6 if ":" in self._interface else socket.AF_INET
        listener = socket.socket(family, socket.SOCK_STREAM)
        try:
            listener.bind((self._interface, 0))
            listener.listen(BACKLOG)
            self._serve(listener, accept)
        except BaseException:
            listener.close()
            raise
        return replace(address, host=self._host, tcp=(self._interface, listener.getsockname()[1]))

    def reaches(self, address: Address) -> bool:
        return address.tcp is not None

    async def dial(self, address: Address) -> StreamCarrier:
        assert address.tcp is not None
        host, port = address.tcp
        where = f"tcp {host}:{port}"
        sock = new_socket(socket.AF_INET6 if ":" in host else socket.AF_INET, where)
        try:
            sock.setblocking(False)
            tune_dial(sock)
            await self._loop.sock_connect(sock, (host, port))
            return StreamCarrier(sock, where)
        except OSError as error:
            sock.close()
            raise dial_error(error, where) from error
        except BaseException:
            sock.close()
            raise
