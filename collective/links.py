"""Links between processes: where they begin and end, and how to open them.

    endpoint = await open_endpoint(host=default_host())
    endpoint.grant(Credential("gang", key))
    endpoint.serve("calls", on_channel)
    ...
    link = await loop_endpoint().connect(endpoint.address, Credential("gang", key))
    channel = link.open("calls")
    await channel.send(b"header", [buffer])

Buffers above 64 KiB that pass a link of the kind "shm" arrive as read-only views of the sender's memory. `private`
turns one into memory to write; `allocate` gives memory that is sent without a copy.

The contracts are those of `collective.abc`: Endpoint, Link and Channel.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from collective._links.hosts import boot_id, default_host

if TYPE_CHECKING:
    from collections.abc import Container, Sequence
    from typing import Any

    from collective._links.arena import Block
    from collective.abc import Endpoint
    from collective.types import ArenaStatistics

__all__ = [
    "allocate",
    "arena_statistics",
    "boot_id",
    "default_host",
    "loop_endpoint",
    "open_endpoint",
    "private",
    "snapshot",
]


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


def allocate(nbytes: int) -> Block:
    """Return writable memory, `Block.memory`, that links of the kind "shm" send without copying it.

    Whatever lies in it, sent any number of times and to any processes of this host, is read there in place: so it must
    not be changed until they have let go, or they see the change. It is freed when the last view of it is gone here,
    and what each receiver made of it there; a receiver that dies has let go. Its contents are undefined at first.

    Raises:
        MemoryError: GANGLINE_ARENA_BYTES (by default an eighth of the memory, at most 1 GiB) are in use.
    """
    from collective._links.arena import arena

    return arena().allocate(nbytes)


def private(buffer: memoryview) -> memoryview:
    """Return writable memory with the contents of a received buffer, for the caller alone.

    It is the buffer itself where that is writable, else the same pages mapped privately, so that a write copies its
    page. Drop the buffer afterwards or keep it: the sender's memory is given back when both are gone.
    """
    from collective._links import borrowing

    return borrowing.private(buffer)


def snapshot(buffers: list[Any], lent: Container[int] = (), *, must: bool = False, shared: bool = True) -> bool:
    """Replace each flat buffer that somebody else could change by a copy, in the list; return whether that was done.

    For who sends later than now. What nobody else refers to is not copied, nor memory of blocks, nor what is received
    from others and read in place. Large copies lie in the arena, so that any number of receivers read them there.

    :param lent: places of buffers whose owners promised not to change them.
    :param must: copy even where more than GANGLINE_ARENA_BYTES of copies would then be waiting to be sent. Who need
        not waits until nothing of its own waits any more, and must then.
    :param shared: whether some receiver may read the arena; else the memory is plain.
    """
    from collective._links import snapshots

    return snapshots.snapshot(buffers, lent, must=must, shared=shared)


def arena_statistics() -> ArenaStatistics:
    """Return what this process has of shared memory for others to read, and who uses it."""
    from collective._links.arena import arena

    return arena().statistics()
