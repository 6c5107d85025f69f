"""Which ports an endpoint serves, to whom, and the channels that wait for one to be served."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

    from collective._links.channel import MuxChannel
    from collective._links.mux import Mux
    from collective.abc import Channel
    from collective.types import Credential

MOST_WAITING = 1024
"""Channels of one link that may wait for their ports."""
_MOST_UNSERVED = 1 << 16
"""Ports that an endpoint remembers to have stopped serving, the latest; their number must not grow for ever."""


class Ports:
    """The ports and the grants of one endpoint."""

    def __init__(self) -> None:
        self._grants: dict[str, tuple[Credential | None, tuple[str, ...]]] = {}
        self._served: dict[str, Callable[[Channel], None]] = {}
        self._unserved: dict[str, None] = {}
        self._waiting: dict[str, list[MuxChannel]] = {}

    def grant(self, credential: Credential, prefixes: tuple[str, ...]) -> None:
        """Let who proves `credential` open ports that begin so."""
        self._grants[credential.name] = (credential, prefixes)

    def revoke(self, credential: Credential) -> None:
        """Forget a grant, where it is not of another key by now."""
        if self.granted(credential.name) == credential:
            del self._grants[credential.name]

    def granted(self, name: str) -> Credential | None:
        """Return the credential of that name."""
        grant = self._grants.get(name)
        return grant and grant[0]

    def serve(self, port: str, on_channel: Callable[[Channel], None]) -> None:
        """Hand channels to `on_channel`."""
        self._served[port] = on_channel
        self._unserved.pop(port, None)
        for channel in self._waiting.pop(port, ()):
            channel.mux.waiting -= 1
            self._hand_over(channel, on_channel)

    def unserve(self, port: str) -> None:
        """Refuse channels from now on, and those that wait."""
        self._served.pop(port, None)
        self._unserved[port] = None
        if len(self._unserved) > _MOST_UNSERVED:
            del self._unserved[next(iter(self._unserved))]
        for channel in self._waiting.pop(port, ()):
            channel.mux.waiting -= 1
            channel.refuse(f"port {port!r} is no longer served")

    def opened(self, mux: Mux, channel: MuxChannel) -> None:
        """Take a channel that the other end opened."""
        port = channel.port
        granted, prefixes = self._grants.get(mux.credential, (None, ()))
        handler = self._served.get(port)
        # Who was dialed with another key of that name has proved that other one.
        if granted != mux.proven or not port.startswith(prefixes):
            channel.refuse(f"port {port!r} is not granted to credential {mux.credential!r}")
        elif handler is not None:
            self._hand_over(channel, handler)
        elif port in self._unserved:
            channel.refuse(f"port {port!r} is no longer served")
        elif mux.waiting >= MOST_WAITING:
            channel.refuse(f"port {port!r} is not served yet, and {MOST_WAITING} channels wait for ports already")
        else:
            mux.waiting += 1
            self._waiting.setdefault(port, []).append(channel)

    def link_ended(self, mux: Mux) -> None:
        """Forget the channels of a link that wait."""
        if not mux.waiting:
            return
        mux.waiting = 0
        for port, channels in list(self._waiting.items()):
            left = [channel for channel in channels if channel.mux is not mux]
            if left:
                self._waiting[port] = left
            else:
                del self._waiting[port]

    def _hand_over(self, channel: MuxChannel, handler: Callable[[Channel], None]) -> None:
        try:
            handler(channel)
        except Exception as error:
            channel.report(error, "the callback that serves its port failed")
            channel.close()
