"""The kinds of links by name. Nowhere else is an implementation mentioned."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collective._links.carrier import Kind


def make_kind(name: str, *, host: str, directory: str | None, interface: str) -> Kind:
    """Return the kind "memory", "shm", "unix" or "tcp". Raises: ValueError."""
    if name == "memory":
        from collective._links.memory import MemoryKind

        return MemoryKind()
    if name == "shm":
        from collective._links.shm import ShmKind

        return ShmKind(host=host, directory=directory)
    if name == "unix":
        from collective._links.sockets import UnixKind

        return UnixKind(host=host, directory=directory)
    if name == "tcp":
        from collective._links.sockets import TcpKind

        return TcpKind(host=host, interface=interface)
    raise ValueError(f"{name!r} is no kind of link; there are {', '.join(map(repr, KINDS))}")


KINDS = ("memory", "shm", "unix", "tcp")
"""All there are; the first that reaches an address is taken."""
