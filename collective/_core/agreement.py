"""Agree, then issue (contract 2): members announce each collective up a tree, and a verdict comes down.

A node sends up what its whole subtree announced at a place, merged by what was said, so that the records of a healthy
group have one size at any number of members. The root compares and sends the verdict down. Places are decided in
order, so that every member learns its verdicts in order too.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, TypeAlias

from collective._core import tree

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable

Metas: TypeAlias = "list[Any] | None"
Briefs: TypeAlias = "list[bytes | None] | None"
Calls: TypeAlias = "list[tuple[list[int], str]]"

GRACE = 1.0
"""Seconds that the root waits, after two members disagreed, for the others to say what they called."""


class Record(NamedTuple):
    """What a member announces: `digest` must be equal on all; `what` and `where` are for people."""

    digest: bytes
    what: str
    where: str
    failed: bool = False
    """The call failed its own checks at its member: nobody can pair with it."""


@dataclass(slots=True)
class _Place:
    said: dict[Record, list[int]] = field(default_factory=dict)
    metas: dict[int, Any] = field(default_factory=dict)
    heard: int = 0
    sent: bool = False
    grace: asyncio.TimerHandle | None = None

    @property
    def conflict(self) -> bool:
        return len({record.digest for record in self.said}) > 1

    @property
    def failed(self) -> bool:
        return any(record.failed for record in self.said)


class Announcing(ABC):
    """One member's part in the agreement of one epoch: what is called here is told, and what others call is heard.

    :cvar shows_briefs: whether members see the bytes of short operations together with their announcements.
    """

    shows_briefs: ClassVar[bool]

    @abstractmethod
    def announce(self, place: int, record: Record, meta: Any = None, brief: bytes | None = None) -> None:
        """Say what this member called at a place; `meta` goes to every member unless it is None.

        :param brief: goes to every member as well, where `shows_briefs`; else it is None.
        """

    @abstractmethod
    def issued(self, place: int) -> None:
        """Learn that the collective of a place, which was agreed, has been issued to the data plane."""

    @abstractmethod
    def hear(self, message: tuple[Any, ...]) -> None:
        """Take a message of another member's part."""

    @abstractmethod
    def end(self) -> None:
        """Agree on nothing any more."""


class Agreement(Announcing):
    """Announces by messages, ("up" | "verdict", ...).

    :param post: post a message to another rank.
    :param on_agreed: called in the order of places, with every rank's meta where the operation has any.
    :param on_mismatch: called with a place and what each member called there; nothing is agreed from that place on.
        What comes before it still is, or is refused in its turn.
    """

    shows_briefs = False

    def __init__(
        self,
        rank: int,
        size: int,
        *,
        loop: asyncio.AbstractEventLoop,
        post: Callable[[int, tuple[Any, ...]], None],
        on_agreed: Callable[[int, Metas], None],
        on_mismatch: Callable[[int, Calls], None],
    ) -> None:
        self._rank = rank
        self._size = size
        self._loop = loop
        self._post = post
        self._on_agreed = on_agreed
        self._on_mismatch = on_mismatch
        self._parent = tree.parent(rank) if rank else None
        self._children = tree.children(rank, size)
        self._whole = tree.subtree_size(rank, size)
        self._places: dict[int, _Place] = {}
        self._limit: float = math.inf
        """The first place that was refused."""

    def announce(self, place: int, record: Record, meta: Any = None, brief: bytes | None = None) -> None:
        if place < self._limit:
            metas = {} if meta is None else {self._rank: meta}
            self._merge(place, [(record, [self._rank])], metas, 1)

    def issued(self, place: int) -> None:
        """Nothing waits for that: collectives are announced as they are called, and issued in their order."""

    def hear(self, message: tuple[Any, ...]) -> None:
        kind, place = message[0], message[1]
        if place >= self._limit:
            return
        if kind == "up":
            _, _, said, metas, heard = message
            self._merge(place, said, metas, heard)
        else:
            _, _, agreed, content = message
            self._conclude(place, agreed, content)

    def end(self) -> None:
        self._end_from(0)

    def _merge(self, place: int, said: list[tuple[Record, list[int]]], metas: dict[int, Any], heard: int) -> None:
        state = self._places.get(place)
        if state is None:
            state = self._places[place] = _Place()
        for record, ranks in said:
            state.said.setdefault(Record(*record), []).extend(ranks)
        state.metas.update(metas)
        state.heard += heard
        if self._parent is None:
            self._decide(place, state)
        elif state.heard == self._whole or state.sent or state.failed or state.conflict:
            # A disagreement climbs at once, and what comes after it climbs behind it.
            report = [(tuple(record), ranks) for record, ranks in state.said.items()]
            self._post(self._parent, ("up", place, report, state.metas, state.heard))
            if state.sent or state.heard < self._whole:
                self._places[place] = _Place(sent=True)
            else:
                del self._places[place]

    def _decide(self, place: int, state: _Place) -> None:
        if not (state.failed or state.conflict):
            if state.heard == self._size:
                metas = [state.metas.get(rank) for rank in range(self._size)] if state.metas else None
                self._conclude(place, True, metas)
        elif state.failed or state.heard == self._size:
            self._refuse(place)
        elif state.grace is None:
            state.grace = self._loop.call_later(GRACE, self._refuse, place)

    def _refuse(self, place: int) -> None:
        said = self._places[place].said
        calls = [(sorted(ranks), f"{record.what} at {record.where}") for record, ranks in said.items()]
        calls.sort()
        self._conclude(place, False, calls)

    def _conclude(self, place: int, agreed: bool, content: Any) -> None:
        for child in self._children:
            self._post(child, ("verdict", place, agreed, content))
        if agreed:
            self._places.pop(place, None)
            self._on_agreed(place, content)
        else:
            self._end_from(place)
            self._on_mismatch(place, content)

    def _end_from(self, limit: int) -> None:
        self._limit = limit
        for place in [place for place in self._places if place >= limit]:
            grace = self._places.pop(place).grace
            if grace is not None:
                grace.cancel()
