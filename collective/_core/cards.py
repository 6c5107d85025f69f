"""Agree, then issue, where the data plane itself can show what each member says (contract 2): in shared memory, mostly.

A collective begins with an exchange of cards, which name its scope and the digest of its record, and carry its meta. A
member shows the oldest call of its own that is not agreed. Where all cards are equal, that call is agreed, and no
message has been sent: the outcome of an exchange follows from its cards alone, so that it is the same on all.

Where they are not, members have called in different orders, or different things, or one has ended a scope. From there
on they say over links what they have called (`agreement`), as long as that goes on; then they show cards again. Who
has not shown a card in such an exchange shows a void one: a word of it goes through the group. Who has shown one takes
part to the end, whatever became of its call.

    ("dispute", exchange)       the cards of this exchange are not equal: show one, whatever you have called
    ("link", exchange, ...)     what `Agreement` says, from that exchange on
"""

from __future__ import annotations

import pickle
import struct
from functools import partial
from time import perf_counter
from typing import TYPE_CHECKING, Any, Final, Protocol

from collective._core import tree
from collective._core.agreement import Agreement, Announcing, Listener
from collective.scopes import ROOT

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Sequence

    from collective._core.agreement import Post
    from collective._core.pipeline import Pending
    from collective.abc import AnnouncingPlane
    from collective.scopes import Ending

QUIET: Final = 16
"""Collectives that all call in one order, one after the other, before cards are shown again."""

_TURN: Final = 1e-3
"""Seconds after which what still waits is left to the loop's next turn."""
_HEAD: Final = 32
"""Bytes of a card that must be equal on all: the digest and the scope."""
_BODY: Final = struct.Struct("<I?")
"""The length of the meta, and whether there is a brief; then both."""
_SAID: Final = _HEAD + _BODY.size
_VOID: Final = bytes(_SAID)
"""No digest is zero: this card is equal to none that is shown for a call, and agrees on nothing."""


class Onlooker(Listener, Protocol):
    """The member that is told, as well, of what cards alone can bring about."""

    def on_withdrawn(self, withdrawn: Sequence[Pending], ending: Ending) -> None:
        """These are of a scope that has ended here, and no other member has been told of them."""

    def on_failure(self, pending: Pending, error: BaseException) -> None:
        """The others cannot be shown this."""


class Cards(Announcing):
    """Announces by cards, and by an `Agreement` while the members' calls do not come in one order.

    The exchange of a collective comes after the one before it was issued to the data plane (`issued`), so that the
    data plane's operations have one order on all members.
    """

    shows_briefs = True

    def __init__(
        self,
        rank: int,
        size: int,
        *,
        loop: asyncio.AbstractEventLoop,
        plane: AnnouncingPlane,
        post: Post,
        listener: Onlooker,
    ) -> None:
        self._rank = rank
        self._size = size
        self._neighbours = tree.neighbours(rank, size)
        self._loop = loop
        self._plane = plane
        self._post = post
        self._listener = listener
        self._waiting: dict[Pending, None] = {}
        """What was called here and is not agreed, in order."""
        self._begun = 0
        """Exchanges that have begun here; a number below it names one."""
        self._shown: Pending | None = None
        """Whose card is in the exchange that is under way."""
        self._exchanging = False
        self._unissued = 0
        """Collectives that were agreed and not issued."""
        self._disputed = -1
        """The last exchange that is known to be disputed."""
        self._links: Agreement | None = None
        self._since = -1
        """The exchange from which on `_links` agrees, or did."""
        self._early: list[tuple[int, tuple[Any, ...]]] = []
        """What others have said over links from an exchange on that has not ended here."""
        self._ending: dict[bytes, Ending] = {}
        """Scopes that have ended here while others may yet agree on a call of theirs: on a card, or over links."""
        self._pumping = False
        self._closed = False

    def announce(self, pending: Pending) -> None:
        if self._closed:
            return
        self._waiting[pending] = None
        if self._links is not None:
            self._links.announce(pending)
        else:
            self._pump()

    def end_scope(self, root: bytes, ending: Ending) -> None:
        if self._closed:
            return
        if self._links is not None:
            self._ending[root] = ending
            self._links.end_scope(root, ending)
            return
        if self._shown is not None and self._shown.scope.root == root:
            # It may yet be agreed, with the card that was shown; if not, it has ended when that is known.
            self._ending[root] = ending
            self._dispute(self._begun - 1)
        self._withdraw(root, ending)

    def issued(self, pending: Pending) -> None:
        self._unissued -= 1
        self._pump()

    def hear(self, message: tuple[Any, ...]) -> None:
        kind, number = message[:2]
        if self._closed:
            return
        if kind == "dispute":
            self._dispute(number)
        elif number == self._since and self._links is not None:
            self._links.hear(message[2])
        elif number > self._since:
            self._early.append((number, message[2]))

    def end(self) -> None:
        self._closed = True
        self._shown = None
        self._waiting.clear()
        self._ending.clear()
        self._early.clear()
        if self._links is not None:
            self._links.end()

    # ------------------------------------------------------------------ cards

    def _pump(self) -> None:
        # Issuing one may lead here again, from within.
        if self._pumping:
            return
        self._pumping = True
        try:
            end = 0.0
            while not (self._exchanging or self._unissued or self._closed) and self._links is None:
                pending = next(iter(self._waiting), None)
                disputed = self._disputed == self._begun
                if pending is None and not disputed:
                    return
                if not end:
                    end = perf_counter() + _TURN
                elif perf_counter() > end:
                    self._loop.call_soon(self._pump)
                    return
                if disputed or pending is None or pending.record.failed:
                    self._show_nothing()
                else:
                    self._show(pending)
        finally:
            self._pumping = False

    def _show(self, pending: Pending) -> None:
        meta, brief = pending.meta, pending.brief
        head = pending.record.digest + pending.scope.leaf
        said = b"" if meta is None else pickle.dumps(meta, 5)
        card = head + _BODY.pack(len(said), brief is not None) + said
        if brief is not None:
            card += brief
        self._shown = pending
        self._exchange(card, head)

    def _show_nothing(self) -> None:
        number = self._begun
        self._exchange(_VOID, b"")
        self._dispute(number)

    def _exchange(self, card: bytes, head: bytes) -> None:
        number = self._begun
        self._begun += 1
        self._exchanging = True
        cards = self._plane.exchange(card, _HEAD, partial(self._dispute, number))
        if cards.done():
            self._exchanged(number, head, cards)
        else:
            cards.add_done_callback(partial(self._exchanged, number, head))

    def _exchanged(self, number: int, head: bytes, exchange: asyncio.Future[list[bytes]]) -> None:
        if self._closed or exchange.cancelled():
            return
        self._exchanging = False
        pending, self._shown = self._shown, None
        error = exchange.exception()
        if error is not None:
            if pending is not None:
                self._listener.on_failure(pending, error)
            return
        cards = exchange.result()
        for card in cards:
            if card[:_HEAD] != head:
                self._go_to_links(number)
                return
        assert pending is not None, "a void card agrees on nothing"
        metas: list[Any] = []
        briefs: list[bytes | None] = []
        for card in cards:
            length, has_brief = _BODY.unpack_from(card, _HEAD)
            end = _SAID + length
            metas.append(pickle.loads(card[_SAID:end]) if length else None)
            briefs.append(card[end:] if has_brief else None)
        self.on_agreed(pending, metas, briefs)
        if self._ending:
            self._end_scopes()
        self._pump()

    def _dispute(self, number: int) -> None:
        """Have everybody show a card in an exchange, this member too."""
        over = number < self._begun - self._exchanging
        if self._closed or over or number <= self._disputed:
            return
        self._disputed = number
        for rank in self._neighbours:
            self._post(rank, ("dispute", number))
        self._pump()

    def _end_scopes(self) -> None:
        """The exchange is over in which a card of these scopes was shown."""
        ending, self._ending = self._ending, {}
        for root, why in ending.items():
            self._withdraw(root, why)

    def _withdraw(self, root: bytes, ending: Ending) -> None:
        """Withdraw what no other member has seen."""
        withdrawn = [each for each in self._waiting if each.scope.root == root and each is not self._shown]
        for pending in withdrawn:
            del self._waiting[pending]
        self._listener.on_withdrawn(withdrawn, ending)

    # ------------------------------------------------------------------ links

    def _go_to_links(self, number: int) -> None:
        self._since = number
        self._end_scopes()
        self._links = links = Agreement(
            self._rank,
            self._size,
            loop=self._loop,
            post=lambda rank, message: self._post(rank, ("link", number, message)),
            listener=self,
            quiet=QUIET,
            on_quiet=self._go_to_cards,
        )
        for pending in list(self._waiting):
            links.announce(pending)
        early, self._early = self._early, []
        for since, message in early:
            self.hear(("link", since, message))

    def _go_to_cards(self) -> None:
        self._links = None
        self._end_scopes()
        self._pump()

    # What was agreed by either way goes on to the member, and is not shown on cards any more.

    def on_agreed(self, pending: Pending, metas: Any, briefs: Any = None) -> None:
        """Take a verdict."""
        del self._waiting[pending]
        self._unissued += 1
        self._listener.on_agreed(pending, metas, briefs)

    def on_mismatch(self, pending: Pending | None, scope: bytes, calls: Any) -> None:
        """Take a verdict."""
        self._drop(scope)
        self._listener.on_mismatch(pending, scope, calls)

    def on_scope_ended(self, root: bytes, ending: Ending) -> None:
        """Take a verdict."""
        self._drop(root)
        self._listener.on_scope_ended(root, ending)

    def _drop(self, scope: bytes) -> None:
        root = scope[:ROOT]
        self._ending.pop(root, None)
        for pending in [each for each in self._waiting if each.scope.root == root]:
            del self._waiting[pending]
