"""Agree, then issue, where the data plane itself can show what each member says (contract 2): in shared memory, mostly.

Each collective begins with an exchange of cards, which say its place and the digest of its record, and carry its meta.
Where all cards fit, it is agreed, and no message has been sent. Where two do not, or a call failed its own checks, the
place is disputed: a word of that goes through the group, and everyone says over links what it called there, so that
the verdict names all of it (`agreement`).
"""

from __future__ import annotations

import math
import pickle
import struct
from collections import deque
from functools import partial
from time import perf_counter
from typing import TYPE_CHECKING, Any, Final

from collective._core import tree
from collective._core.agreement import Announcing

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable

    from collective._core.agreement import Agreement, Briefs, Metas, Record
    from collective.abc import AnnouncingPlane

_TURN: Final = 1e-3
"""Seconds after which what still waits is left to the loop's next turn."""
_HEAD: Final = 24
"""Bytes of a card that must be equal on all: the digest and the place."""
_BODY: Final = struct.Struct("<I?")
"""The length of the meta, and whether there is a brief; then both."""
_SAID: Final = _HEAD + _BODY.size


class Cards(Announcing):
    """Announces by cards; `Agreement` settles the disputes.

    The exchange of a collective comes after the one before it was issued to the data plane (`issued`), so that the
    data plane's operations have one order on all members.

    :param on_failure: called with a place whose exchange failed.
    """

    shows_briefs = True

    def __init__(
        self,
        rank: int,
        size: int,
        *,
        loop: asyncio.AbstractEventLoop,
        plane: AnnouncingPlane,
        disputes: Agreement,
        post: Callable[[int, tuple[Any, ...]], None],
        on_agreed: Callable[[int, Metas, Briefs], None],
        on_failure: Callable[[int, BaseException], None],
    ) -> None:
        self._neighbours = tree.neighbours(rank, size)
        self._loop = loop
        self._plane = plane
        self._disputes = disputes
        self._post = post
        self._on_agreed = on_agreed
        self._on_failure = on_failure
        self._said: dict[int, tuple[Record, Any, bytes | None]] = {}
        self._queue: deque[int] = deque()
        self._disputed: set[int] = set()
        self._busy = False
        """Whether a collective is under way that is yet to be issued."""
        self._pumping = False
        self._limit: float = math.inf
        """The first place that this member does not exchange: its call there failed, or the epoch has ended."""

    def announce(self, place: int, record: Record, meta: Any = None, brief: bytes | None = None) -> None:
        self._said[place] = (record, meta, brief)
        if record.failed:
            self._limit = min(self._limit, place)
            self._dispute(place)
        elif place in self._disputed:
            self._disputes.announce(place, record, meta)
        elif place < self._limit:
            self._queue.append(place)
            self._pump()

    def issued(self, place: int) -> None:
        # The next one may go on.
        self._said.pop(place, None)
        self._busy = False
        self._pump()

    def hear(self, message: tuple[Any, ...]) -> None:
        if message[0] == "dispute":
            self._dispute(message[1])
        else:
            self._disputes.hear(message)

    def end(self) -> None:
        self._limit = -1
        self._queue.clear()
        self._said.clear()
        self._disputes.end()

    def _pump(self) -> None:
        # Issuing one may lead here again, from within.
        if self._pumping:
            return
        self._pumping = True
        try:
            end = 0.0
            while self._queue and not self._busy:
                if not end:
                    end = perf_counter() + _TURN
                elif perf_counter() > end:
                    self._loop.call_soon(self._pump)
                    return
                self._exchange(self._queue.popleft())
        finally:
            self._pumping = False

    def _exchange(self, place: int) -> None:
        self._busy = True
        record, meta, brief = self._said[place]
        head = record.digest + place.to_bytes(8, "little")
        said = b"" if meta is None else pickle.dumps(meta, 5)
        card = head + _BODY.pack(len(said), brief is not None) + said
        if brief is not None:
            card += brief
        cards = self._plane.exchange(card, _HEAD, partial(self._dispute, place))
        if cards.done():
            self._exchanged(place, head, cards)
        else:
            cards.add_done_callback(partial(self._exchanged, place, head))

    def _exchanged(self, place: int, head: bytes, exchange: asyncio.Future[list[bytes]]) -> None:
        if place >= self._limit or exchange.cancelled():
            return
        error = exchange.exception()
        if error is not None:
            self._on_failure(place, error)
            return
        cards = exchange.result()
        for card in cards:
            if card[:_HEAD] != head:
                self._dispute(place)
                return
        metas: list[Any] = []
        briefs: list[bytes | None] = []
        for card in cards:
            length, has_brief = _BODY.unpack_from(card, _HEAD)
            end = _SAID + length
            metas.append(pickle.loads(card[_SAID:end]) if length else None)
            briefs.append(card[end:] if has_brief else None)
        self._on_agreed(place, metas, briefs)

    def _dispute(self, place: int) -> None:
        if place in self._disputed:
            return
        self._disputed.add(place)
        for rank in self._neighbours:
            self._post(rank, ("dispute", place))
        if place in self._said:
            self._disputes.announce(place, *self._said[place][:2])
