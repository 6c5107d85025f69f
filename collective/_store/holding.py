"""What one endpoint holds: of its own store, and over links of others'.

A Hold is one entry that refs of this endpoint refer to. The owner counts the endpoint as a holder from the Hold's first
ref until its last is gone here, whichever thread lets go of it.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from collective._store.tie import Tie
from collective._store.wire import TOKEN
from collective.freight import name_of

if TYPE_CHECKING:
    from collections.abc import Callable

    from collective._store.sources import Hold, Source
    from collective._store.wire import Where
    from collective.abc import Endpoint


class Pin:
    """A ref on its way to another endpoint, counted here until it has arrived.

    :ivar keeper: what keeps the entry for a hold of which its owner may not have heard yet.
    """

    __slots__ = ("_on_end", "hold", "keeper", "number")

    def __init__(self, hold: Hold, number: int, on_end: Callable[[Pin], None]) -> None:
        self.hold: Hold | None = hold
        self.keeper: Any = None
        self.number = number
        self._on_end = on_end

    @property
    def live(self) -> bool:
        """Whether it is counted."""
        return self.hold is not None

    def end(self) -> None:
        """Stop counting it. Idempotent."""
        hold, self.hold = self.hold, None
        self.keeper = None
        if hold is not None:
            hold.source.holder.pins.pop(self.number, None)
            self._on_end(self)


class Holder:
    """All that one endpoint holds, and the refs that it has sent and that have not arrived.

    :ivar name: how owners name it to people.
    """

    def __init__(self, endpoint: Endpoint) -> None:
        self.endpoint = endpoint
        self.id = endpoint.address.endpoint.encode()
        self.name = name_of(endpoint)
        self.pins: dict[int, Pin] = {}
        self._sources: dict[str, Source] = {}

    def attach(self, source: Source) -> None:
        """Take a store of the endpoint's own."""
        self._sources[source.where.uid] = source

    def detach(self, source: Source) -> None:
        """Forget the endpoint's own store, which is closed; refs that are there keep it."""
        self._sources.pop(source.where.uid, None)

    def source(self, where: Where) -> Source:
        """Return a store as this endpoint sees it."""
        found = self._sources.get(where.uid)
        if found is None:
            found = self._sources[where.uid] = Tie(self, where, lambda: self._forget(where.uid))
        return found

    def pin(self, hold: Hold, on_end: Callable[[Pin], None]) -> tuple[Pin, bytes]:
        """Count a ref that is sent; return the token that goes with it."""
        # Whoever knew it could end the pin, by telling the owner that the ref has arrived.
        number = int.from_bytes(os.urandom(8))
        pin = self.pins[number] = Pin(hold, number, on_end)
        if hold.source.lost:  # Nobody would ever tell of its arrival.
            pin.end()
        return pin, TOKEN.pack(self.id, number)

    def taken(self, number: int) -> None:
        """The receiver of a ref holds it."""
        pin = self.pins.get(number)
        if pin is not None:
            pin.end()

    def lose(self, source: Source) -> None:
        """A store is gone, and nobody will tell of its refs."""
        for pin in [pin for pin in self.pins.values() if pin.hold is not None and pin.hold.source is source]:
            pin.end()

    def _forget(self, uid: str) -> None:
        self._sources.pop(uid, None)


def holder_of(endpoint: Endpoint) -> Holder:
    """Return the Holder of an endpoint, which lives as long as that."""
    table: dict[str, Any] = endpoint.__dict__
    found = table.get("_gangline_holder")
    if found is None:
        found = table["_gangline_holder"] = Holder(endpoint)
    assert isinstance(found, Holder)
    return found
