"""What a handle knows of its actor."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

from actors._protocol import port

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from actors._caller import Connection
    from actors._interface import Interface
    from collective.types import Address, Credential


_CLOSED_KEPT = 10_000
_closed: dict[str, None] = {}
"""Uids of actors that are known here to have shut down in good order, the last so many."""


def note_closed(uids: Iterable[str]) -> None:
    """Take note that actors have shut down in good order: who calls them later shall hear so."""
    _closed.update(dict.fromkeys(uids))
    while len(_closed) > _CLOSED_KEPT:
        del _closed[next(iter(_closed))]


@dataclass(frozen=True)
class Target:
    """One incarnation of an actor, as callers see it. Picklable.

    :param uid: unique to this incarnation; its calls are taken at port `calls/<uid>`.
    :param credential: opens that port, and nothing else.
    :param epoch: which incarnation of the gang.
    :param native: returns the runtime's own handle (under ray the Ray actor); None where it has none. Picklable.
    """

    address: Address
    gang: str
    role: str
    rank: int
    uid: str
    credential: Credential
    interface: Interface
    epoch: int = 0
    native: Callable[[], Any] | None = field(default=None, repr=False)

    @cached_property
    def port(self) -> str:
        """Where its calls are taken."""
        return port(self.uid)

    @property
    def has_closed(self) -> bool:
        """Whether it is known here to have shut down in good order."""
        return self.uid in _closed

    @cached_property
    def key(self) -> str:
        """What callers in one process share a connection by."""
        return f"{self.uid}@{self.address.endpoint} as {self.credential.name}"

    @cached_property
    def route(self) -> list[Callable[[], Connection | None]]:
        """A weak reference to the connection that the last call took: finding it anew costs microseconds."""
        return [lambda: None]

    def __str__(self) -> str:
        return f"{self.role}[{self.rank}]"

    def __reduce__(self) -> tuple[object, ...]:
        # Without the cached properties.
        return Target, (
            self.address,
            self.gang,
            self.role,
            self.rank,
            self.uid,
            self.credential,
            self.interface,
            self.epoch,
            self.native,
        )
