"""Links between processes: where they begin and end, and how to open them.

    endpoint = await open_endpoint(host=default_host())
    endpoint.grant(Credential("gang", key))
    endpoint.serve("calls", on_channel)
    ...
    link = await loop_endpoint().connect(endpoint.address, Credential("gang", key))
    channel = link.open("calls")
    await channel.send(b"header", [buffer])

The contracts are those of `collective.abc`: Endpoint, Link and Channel.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from collective._links.hosts import default_host

if TYPE_CHECKING:
    from collections.abc import Sequence

    from collective.abc import Endpoint

__all__ = ["default_host", "loop_endpoint", "open_endpoint"]


async def open_endpoint(
    *,
    kinds: Sequence[str] = ("unix", "tcp"),
    host: str = "",
    directory: str | None = None,
    interface: str = "127.0.0.1",
) -> Endpoint:
    """Open an endpoint on the running loop; whoever opens it closes it.

    Any endpoint can dial: over memory where both ends have the kind "memory" (or this one has no kinds) and share
    the loop, else over shared memory or a unix socket where both are on one host, else over TCP.

    :param kinds: what it listens on, of "memory", "shm", "unix" and "tcp"; none for an endpoint that only dials.
    :param host: names the host; shared memory and unix sockets only between equal ones. By default `default_host()`.
    :param directory: where to make the private directories of unix sockets; by default with the temporary files.
    :param interface: the address to listen on and to announce for TCP.

    Raises:
        ValueError: a kind that does not exist, or a directory whose path is too long for a unix socket.
        OSError: listening failed.
    """
    from collective._links.endpoint import LinkEndpoint

    return LinkEndpoint(kinds=tuple(kinds), host=host or default_host(), directory=directory, interface=interface)


def loop_endpoint() -> Endpoint:
    """Return the running loop's own endpoint, which only dials; made on first use, closed when the loop ends.

    Raises:
        RuntimeError: no loop is running.
    """
    from collective._links import loops

    return loops.loop_endpoint()
