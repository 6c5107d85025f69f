"""How references to tensors travel in the frames of a layer that sends pickles over links.

Such a layer pickles between `start_leaving` and `stop_leaving`, which collects the refs that are met; the pickle holds
only their places in that list. A frame carries it beside the refs' own table, `Freight.ship(refs).table`. The receiver
calls `unload` at once when the frame comes, whether or not it is ever read, and unpickles within `arrived`. So a ref
has arrived where its frame has, and a frame that is dropped unread gives its refs up as any ref that goes out of use.

Until the receiver has told the owner that it holds a ref, the sender's count stands, and then the owner tells the
sender. Where a frame will never arrive, the sender's layer says so: `Shipment.lost`, `Freight.lose`.
"""

from __future__ import annotations

import os
import pickle
import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from collective._store.refs import TensorRef
    from collective.abc import Endpoint


_NAME = "_gangline_name"


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
    """The refs that frames between two endpoints carry, until each has arrived. Belongs to a loop."""

    def __init__(self) -> None:
        self._pins: set[Pinned] = set()

    def ship(self, refs: Sequence[TensorRef]) -> Shipment:
        """Count refs for one frame to one receiver."""
        records, pins = [], []
        for ref in refs:
            pin, record = ref._ship(self._ended)
            pins.append(pin)
            records.append(record)
        self._pins.update(pin for pin in pins if pin.live)
        return Shipment(pickle.dumps(records, pickle.HIGHEST_PROTOCOL), pins)

    def lose(self) -> None:
        """The link has ended: what has not arrived never will."""
        for pin in list(self._pins):
            pin.end()

    def _ended(self, pin: Pinned) -> None:
        self._pins.discard(pin)


class Shipment:
    """The refs of one frame."""

    def __init__(self, table: bytes, pins: Sequence[Pinned]) -> None:
        self.table = table
        self._pins = pins

    def lost(self) -> None:
        """The frame was not sent, or will not arrive."""
        for pin in self._pins:
            pin.end()


def unload(table: bytes | memoryview, endpoint: Endpoint) -> list[TensorRef]:
    """Take the refs of a frame that has come; they are held by `endpoint` from now on."""
    return [arrive(record, endpoint) for arrive, record in pickle.loads(table)]


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


@contextmanager
def arrived(refs: Sequence[TensorRef]) -> Iterator[None]:
    """Have what this thread unpickles meanwhile find these refs in their places."""
    _frame.arrived = refs
    try:
        yield
    finally:
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
