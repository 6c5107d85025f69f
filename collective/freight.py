"""How references to tensors travel in the frames of a layer that sends pickles over links.

Such a layer pickles between `start_leaving` and `stop_leaving`, which collects the refs that are met; the pickle holds
only their places in that list. A frame carries it beside the refs' own table, `Freight.ship(refs).table`. The receiver
calls `unload` at once when the frame comes, whether or not it is ever read, and unpickles after `start_arriving`; the
reader of a stream does so as it takes an item, and for what it has not taken when it leaves. So a ref has arrived where
its frame has, and a frame that is dropped unread gives its refs up as any ref that goes out of use. What an owner sends
has the elements with it, or where they lie, so that its receiver need not ask for them.

Until the receiver has told the owner that it holds a ref, the sender's count stands, and then the owner tells the
sender. Where a frame will never arrive, the sender's layer says so: `Shipment.lost`, `Freight.lose`.
"""

from __future__ import annotations

import os
import pickle
import threading
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Sequence

    from collective._store.refs import TensorRef
    from collective.abc import Endpoint, Link


_NAME = "_gangline_name"
_LUGGAGE = 32 << 10
"""Bytes of elements in one frame, which stays so small that it needs not wait."""
_MOST_PARTS = 16
"""Blocks of one entry that are lent with a ref; the table of the refs has to fit into the frame too."""


class _Frame(threading.local):
    """The frame that this thread is pickling or unpickling."""

    leaving: list[TensorRef] | None = None
    arrived: Sequence[TensorRef] = ()


_frame = _Frame()


class Ref:
    """What every ref is. Awaitable, and a value all the same."""

    __slots__ = ()


class Pinned(Protocol):
    """One ref of one frame, which its sender counts."""

    @property
    def live(self) -> bool:
        """Whether it is counted."""
        ...

    def end(self) -> None:
        """Stop counting it. Idempotent."""
        ...


class Freight:
    """The refs that frames between two endpoints carry, until each has arrived. Belongs to a loop.

    :ivar link: what the frames go by, once there is one.
    """

    def __init__(self) -> None:
        self.link: Link | None = None
        self._pins: set[Pinned] = set()
        self._lost = False

    def ship(self, refs: Sequence[TensorRef]) -> Shipment:
        """Count refs for one frame to one receiver; the owner's own have their elements with them, where it can be."""
        records, pins = [], []
        luggage = Luggage(None if self._lost else self.link)
        for ref in refs:
            pin, record = ref._ship(self._ended, luggage)
            pins.append(pin)
            records.append(record)
            if self._lost:
                pin.end()
            elif pin.live:
                self._pins.add(pin)
        return Shipment(pickle.dumps(records, pickle.HIGHEST_PROTOCOL), pins, luggage)

    def lose(self) -> None:
        """The link has ended: what has not arrived never will, nor what somebody sends who has not heard of it."""
        self._lost = True
        for pin in list(self._pins):
            pin.end()

    def _ended(self, pin: Pinned) -> None:
        self._pins.discard(pin)


class Luggage:
    """Elements that go in a frame with the refs that lead to them: few as they are, of more only where they lie."""

    def __init__(self, link: Link | None) -> None:
        # Within a process refs lead to the owner's own memory, as the store hands it over.
        self._link = link if link is not None and link.kind != "memory" else None
        self._room = _LUGGAGE if self._link is not None else 0
        self._lent: list[tuple[int, ...]] = []

    def pack(self, parts: Sequence[memoryview]) -> list[bytes | tuple[int, ...]] | None:
        """Return what stands for memory of the store in the frame; None where the receiver has to ask for it."""
        link = self._link
        if link is None or len(parts) > _MOST_PARTS:
            return None
        small = sum(part.nbytes for part in parts if part.nbytes <= _LUGGAGE)
        if small > self._room:
            return None
        packed: list[bytes | tuple[int, ...]] = []
        begun = len(self._lent)
        for part in parts:
            if part.nbytes <= _LUGGAGE:
                packed.append(bytes(part))
                continue
            lent = link.lend(part)
            if lent is None:
                self._take_back(begun)
                return None
            self._lent.append(lent)
            packed.append(lent)
        self._room -= small
        return packed

    def lost(self) -> None:
        """The frame was not sent, or will not arrive."""
        self._take_back(0)

    def _take_back(self, begun: int) -> None:
        while len(self._lent) > begun:
            assert self._link is not None
            self._link.take_back(self._lent.pop())


class Shipment:
    """The refs of one frame."""

    def __init__(self, table: bytes, pins: Sequence[Pinned], luggage: Luggage) -> None:
        self.table = table
        self._pins = pins
        self._luggage = luggage

    def lost(self) -> None:
        """The frame was not sent, or will not arrive."""
        for pin in self._pins:
            pin.end()
        self._luggage.lost()


def unload(table: bytes | memoryview, endpoint: Endpoint, link: Link | None = None) -> list[TensorRef]:
    """Take the refs of a frame that has come by a link; they are held by `endpoint` from now on."""
    return [arrive(record, endpoint, link) for arrive, record in pickle.loads(table)]


def start_leaving() -> list[TensorRef]:
    """Collect the refs that this thread pickles until `stop_leaving`. Clear the list before a second attempt."""
    refs: list[TensorRef] = []
    _frame.leaving = refs
    return refs


def stop_leaving() -> None:
    """End what `start_leaving` began."""
    _frame.leaving = None


def is_leaving() -> bool:
    """Whether this thread is between the two."""
    return _frame.leaving is not None


def name_endpoint(endpoint: Endpoint, name: str) -> None:
    """Have owners of refs know this endpoint by a name."""
    endpoint.__dict__[_NAME] = name


def name_of(endpoint: Endpoint) -> str:
    """Return the name of an endpoint; where it was given none, that of its process."""
    return str(endpoint.__dict__.get(_NAME) or f"process {os.getpid()}")


def start_arriving(refs: Sequence[TensorRef]) -> None:
    """Have what this thread unpickles until `stop_arriving` find these refs in their places."""
    _frame.arrived = refs


def stop_arriving() -> None:
    """End what `start_arriving` began."""
    _frame.arrived = ()


def reduce_ref(ref: TensorRef) -> tuple[object, ...]:
    """Pickle a ref into the frame that is being made.

    Raises:
        PicklingError: none is.
    """
    refs = _frame.leaving
    if refs is None:
        raise pickle.PicklingError(
            f"{ref!r} can be pickled in arguments, results and stream items of Gangline's calls alone, where its "
            "owner learns who holds it; anywhere else pickle ref.lease(seconds)"
        )
    refs.append(ref)
    return _take, (len(refs) - 1,)


def _take(place: int) -> TensorRef:
    return _frame.arrived[place]
