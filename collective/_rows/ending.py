"""How the consumers of a stream that ends early agree on its last round, with none of them in the middle. Pure."""

from __future__ import annotations

from typing import TYPE_CHECKING

from collective._rows.ledger import furthest

if TYPE_CHECKING:
    from collective._rows.ledger import Positions
    from collective._rows.setup import Ending


class Farewell:
    """One consumer's knowledge of how far each of them had come when it heard of the end.

    From then on each gives out nothing, until it has heard from all; then all give out what the furthest has given.

    :ivar end: where the stream ends, once that is known; None also where some consumer had come to its very end.
    :ivar why: whose doing it is; the same on all consumers once all are heard.
    """

    def __init__(self, me: int, consumers: int) -> None:
        self._me = me
        self._consumers = consumers
        self._places: dict[int, Positions | None] = {}
        self.why: Ending | None = None
        self.end: Positions | None = None

    @property
    def begun(self) -> bool:
        """Whether this consumer has heard of an early end."""
        return self.why is not None

    @property
    def pending(self) -> bool:
        """Whether nothing may be given out now."""
        return self.begun and len(self._places) < self._consumers

    def begin(self, why: Ending, place: Positions) -> None:
        """Hear of an early end; `place` is how far this consumer has come. Of several reasons, all keep the same."""
        if self.why is None:
            self._places[self._me] = place
            self.why = why
        else:
            self.why = min(self.why, why, key=lambda each: (not each.failed, each.rank))
        self._conclude()

    def take(self, consumer: int, place: Positions | None) -> None:
        """Take note of how far another one has come; None: to the very end."""
        self._places.setdefault(consumer, place)
        self._conclude()

    def _conclude(self) -> None:
        places = list(self._places.values())
        if self.begun and len(places) == self._consumers and self.end is None:
            known = [place for place in places if place is not None]
            if len(known) == len(places):
                self.end = furthest(known)
