"""What the two ends of a row stream have in common: its terms, and the words that travel between them."""

from __future__ import annotations

import pickle
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from collective import _by_value
from collective._core.faults import LEFT
from collective._core.pipeline import LIBRARY_GRACE
from collective.errors import ConsumerLeft, GroupBroken, GroupClosed, PeerLost, ProducerFailed, RowsMismatch

if TYPE_CHECKING:
    from collections.abc import Callable

    from collective._core.engine import Engine
    from collective._core.epoch import Epoch
    from collective._core.row_streams import Key
    from collective._rows.ledger import Order, Positions, Tail
    from collective.abc import Channel

LAG = 0.02
"""Seconds by which news of what is done may travel later than that."""
_TEXT = 4000
ENOUGH = 8 << 20
"""Bytes that one member holds where no budget was passed and two rounds take less. More gains nothing: it is cold."""
LITTLE = 1 << 20
"""Bytes that are not worth a message of their own while others are on their way."""


@dataclass(frozen=True)
class Terms:
    """What every member passed to RowStream, and must have passed alike.

    :param producers: their ranks, by number; consumers likewise.
    :param budget: bytes that one member holds, None for as many as are needed; may differ between members.
    """

    producers: tuple[int, ...]
    consumers: tuple[int, ...]
    batch_size: int
    order: Order
    tail: Tail
    budget: int | None
    positions: Positions
    origins: Positions

    @property
    def round_rows(self) -> int:
        """Rows of a round."""
        return self.batch_size * len(self.consumers)

    def budget_for(self, row_bytes: int) -> int:
        """Return how many bytes one member holds."""
        return self.budget or max(ENOUGH, 2 * row_bytes * self.round_rows)

    def __str__(self) -> str:
        resumed = f", resume at rows {list(self.positions)}" if any(self.positions) else ""
        return f"RowStream(batch_size={self.batch_size}, order={self.order!r}, tail={self.tail!r}{resumed})"


class Refusing(Protocol):
    """An end of a stream, as what ends it sees it."""

    def refuse(self, refusal: Refusal) -> None:
        """End the stream with an error for all."""

    def end(self) -> None:
        """The group's epoch has ended."""


class Seat:
    """One member's place in a stream: its group's engine and epoch, and what goes wrong.

    :ivar fault: makes the error that every later call raises, once there is one.
    """

    def __init__(self, engine: Engine, key: Key, terms: Terms) -> None:
        self.engine = engine
        self.epoch: Epoch = engine.current
        self.key = key
        self.terms = terms
        self.group = engine.name
        self.fault: Callable[[], BaseException] | None = None
        self._unexplained: dict[int, Refusing] = {}

    def name_of(self, rank: int) -> str:
        """How errors name a member."""
        return str(self.engine.members[rank])

    def group_fault(self) -> Exception:
        """Return the error of a group whose epoch has ended."""
        epoch = self.epoch
        if epoch.fault is not None:
            return epoch.fault()
        if self.engine.closed:
            return GroupClosed(self.group, "a row stream")
        remedy = "make another stream on every member"
        return GroupBroken(self.group, "it was reset while a row stream was open", remedy)

    def line_ended(self, rank: int, cause: Exception, whose: Refusing) -> None:
        """End the stream for a member whose line has ended, unless the group says within a moment what has happened.

        Who learns of a break or a leaving ends its lines: that may be seen before the news of it comes, and it is not
        the member of that line that is lost then.
        """
        if self.epoch.fault is not None:
            whose.end()  # cut: over there it has ended already
        elif rank in self.engine.faults.left:
            whose.refuse(self._lost(rank, LEFT))
        else:
            self._unexplained[rank] = whose
            self.engine.loop.call_later(LIBRARY_GRACE, self._give_up, rank, str(cause))

    def peer_left(self, rank: int) -> None:
        """Take note that a member has closed the group, which explains the end of its line."""
        whose = self._unexplained.pop(rank, None)
        if whose is not None:
            whose.refuse(self._lost(rank, LEFT))

    def _give_up(self, rank: int, cause: str) -> None:
        """Nothing was said of the end of a line."""
        whose = self._unexplained.pop(rank, None)
        if whose is None:
            return
        left = next(iter(self.engine.faults.left), None)
        if self.epoch.fault is not None:
            whose.end()
        else:  # the epoch of that member may have ended for the leaving of another
            whose.refuse(self._lost(rank, cause) if left is None else self._lost(left, LEFT))

    def _lost(self, rank: int, cause: str) -> Refusal:
        """Return what all are told of a member that is gone."""
        member = self.engine.members[rank]
        return Refusal("lost", (member.role, member.rank, cause))


# How an error travels. Each of these makes anew, on any member, the error that a member met.


@dataclass(frozen=True)
class Refusal:
    """Something that all members are told and raise: the stream is over."""

    kind: str
    details: tuple[Any, ...]

    def error(self) -> Exception:
        """Return the error."""
        make: Callable[..., Exception] = {
            "mismatch": RowsMismatch,
            "lost": PeerLost,
            "budget": ValueError,
            "failed": ProducerFailed,
        }[self.kind]
        return make(*self.details)


@dataclass(frozen=True)
class Ending:
    """Why a stream ends before its rows do.

    :param rank: whose doing it is.
    :param error: a producer's error, pickled where it can be; None where a consumer left.
    """

    rank: int
    text: str = ""
    error: bytes | None = None
    failed: bool = False

    def for_producer(self, seat: Seat) -> Exception:
        """Return what producers raise."""
        member = seat.engine.members[self.rank]
        if self.failed:
            return ProducerFailed(seat.group, member.role, member.rank, self.text)
        return ConsumerLeft(seat.group, member.role, member.rank)

    def for_consumer(self, seat: Seat) -> BaseException:
        """Return the producer's own error, caused by one that says whose it is; that one alone where it cannot be."""
        said = self.for_producer(seat)
        if self.error is None:
            return said
        try:
            error = pickle.loads(self.error)
        except Exception as reason:  # whatever a class does when it is made anew; what it said is known
            said.add_note(f"it could not be unpickled: {reason!r}")
            return said
        error.__cause__ = said
        return error if isinstance(error, Exception) else said


def failure(rank: int, error: BaseException) -> Ending:
    """Return the ending that a producer's error is."""
    text = f"{type(error).__name__}: {error}"[:_TEXT]
    try:
        data = _by_value.dumps(error) if isinstance(error, Exception) else None
        if data is not None:
            pickle.loads(data)
    except Exception as reason:  # whatever pickling runs into: the text travels in any case
        return Ending(rank, f"{text} (it cannot be pickled: {reason})", failed=True)
    return Ending(rank, text, data if data is not None and len(data) < 32 << 10 else None, failed=True)


class Line:
    """One channel between a producer and a consumer, from either end: small words overtake rows."""

    def __init__(self) -> None:
        self.channel: Channel | None = None
        self.ended = False
        self._waiting: list[bytes] = []
        self._parts: list[bytes] = []

    def connect(self, channel: Channel) -> None:
        """Use a channel from now on, for what waited too."""
        self.channel = channel
        waiting, self._waiting = self._waiting, []
        for data in waiting:
            channel.post(data)

    def tell(self, *word: Any) -> None:
        """Post a word; it waits where there is no channel yet, and is dropped where there is none any more."""
        data = pickle.dumps(word, 5)
        if len(data) <= _POST and self.channel is not None:
            self.channel.post(data)
            return
        parts = [data[at : at + _POST] for at in range(0, len(data), _POST)]
        for part in [*(_MORE + part for part in parts[:-1]), *([_LAST + parts[-1]] if len(parts) > 1 else parts)]:
            if self.channel is not None:
                self.channel.post(part)
            elif not self.ended:
                self._waiting.append(part)

    def hear(self, header: bytes) -> tuple[Any, ...] | None:
        """Return the word that a header is, or None where it is a part of one."""
        if header[:1] in (_MORE, _LAST):
            self._parts.append(header[1:])
            if header[:1] == _MORE:
                return None
            header = b"".join(self._parts)
            self._parts.clear()
        word: tuple[Any, ...] = pickle.loads(header)
        return word


_POST = 60 << 10
"""Bytes of one post; a longer word, such as a format of thousands of columns, takes several."""
_MORE, _LAST = b"\0", b"\1"
