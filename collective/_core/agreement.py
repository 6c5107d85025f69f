"""Agree, then issue (contract 2): members announce each collective up a tree, and verdicts come down.

In each scope the collectives of a member are paired first in, first out with those of the others. A node sends up what
its whole subtree announced, merged by what was said, so that the records of a healthy group have one size at any
number of members. The root gives its verdicts in the order in which collectives become complete, whatever their
scopes, as Horovod's coordinator does; that is the one order in which every member issues them. So members may call
collectives of different scopes in different orders, and one that waits delays no other.

A scope ends by a verdict too: what was agreed before it completes on all, and nothing after it, on any.

    up      (scope, said, metas, heard)    what a part of the subtree called at the front of a scope
            (end, root, ending)            a member has ended a scope: tell all, in the order of the verdicts
    down    a Verdict
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import OrderedDict, deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, Protocol, TypeAlias

from collective._core import tree
from collective.scopes import KEPT, ROOT

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable

    from collective._core.pipeline import Pending
    from collective.scopes import Ending

Metas: TypeAlias = "list[Any] | None"
Briefs: TypeAlias = "list[bytes | None] | None"
Calls: TypeAlias = "list[tuple[list[int], str]]"
Post: TypeAlias = "Callable[[int, tuple[Any, ...]], None]"

GRACE = 1.0
"""Seconds that the root waits, after two members disagreed, for the others to say what they called."""


class Record(NamedTuple):
    """What a member announces: `digest` must be equal on all; `what` and `where` are for people."""

    digest: bytes
    what: str
    where: str
    failed: bool = False
    """The call failed its own checks at its member: nobody can pair with it."""


class Listener(Protocol):
    """The member that an agreement tells its verdicts, in the order that is the same on all."""

    def on_agreed(self, pending: Pending, metas: Metas, briefs: Briefs = None) -> None:
        """All members called this; with every rank's meta, where the operation has any."""

    def on_mismatch(self, pending: Pending | None, scope: bytes, calls: Calls) -> None:
        """Members called different things at the front of a scope, which ends by that; None where this has not yet."""

    def on_scope_ended(self, root: bytes, ending: Ending) -> None:
        """A scope has ended: nothing of it is agreed any more."""


class Announcing(ABC):
    """One member's part in the agreement of one epoch: what is called here is told, and what others call is heard.

    :cvar shows_briefs: whether members see the bytes of short operations together with their announcements.
    """

    shows_briefs: ClassVar[bool]

    @abstractmethod
    def announce(self, pending: Pending) -> None:
        """Say what this member called: the next in its scope."""

    @abstractmethod
    def end_scope(self, root: bytes, ending: Ending) -> None:
        """End a scope: nothing of it is announced here any more, and what was is withdrawn or agreed."""

    @abstractmethod
    def issued(self, pending: Pending) -> None:
        """Learn that a collective, which was agreed, has been issued to the data plane."""

    @abstractmethod
    def hear(self, message: tuple[Any, ...]) -> None:
        """Take a message of another member's part."""

    @abstractmethod
    def end(self) -> None:
        """Agree on nothing any more."""


@dataclass(slots=True)
class _Round:
    """The collectives of a subtree's members that are paired with each other."""

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


class _Queue:
    """What is announced in one scope and not decided. `at` is the round that each source is in, and how far in it."""

    __slots__ = ("at", "rounds")

    def __init__(self) -> None:
        self.rounds: deque[_Round] = deque()
        self.at: dict[int, tuple[int, int]] = {}

    def take(self, source: int, whole: int, heard: int) -> _Round:
        """Return the round of what a source of so many members says next."""
        number, before = self.at.get(source, (0, 0))
        if number == len(self.rounds):
            self.rounds.append(_Round())
        done = before + heard == whole
        self.at[source] = (number + 1, 0) if done else (number, before + heard)
        return self.rounds[number]

    def drop(self) -> None:
        """Drop the first round, which is complete."""
        self.rounds.popleft()
        self.at = {source: (number - 1, heard) for source, (number, heard) in self.at.items()}


class Ended:
    """The scopes that have ended, the last of them: what is still announced there goes nowhere."""

    def __init__(self) -> None:
        self._roots: OrderedDict[bytes, Ending | None] = OrderedDict()

    def add(self, root: bytes, ending: Ending | None = None) -> bool:
        """Take note of one; return whether that is new."""
        if root in self._roots:
            return False
        self._roots[root] = ending
        if len(self._roots) > KEPT:
            self._roots.popitem(last=False)
        return True

    def get(self, root: bytes) -> Ending | None:
        """Return why a scope has ended, or None."""
        return self._roots.get(root)

    def forget(self, root: bytes) -> None:
        """Let a scope begin anew, in another epoch."""
        self._roots.pop(root, None)

    def __contains__(self, root: bytes) -> bool:
        return root in self._roots


class Agreement(Announcing):
    """Announces by messages, ("up" | "end" | "verdict", ...).

    :param post: post a message to another rank.
    :param quiet: collectives in a row that all members called in one order, with nothing between, after which the root
        has `on_quiet` called on all members, in the order of the verdicts, and this agreement ends; None for never.
    """

    shows_briefs = False

    def __init__(
        self,
        rank: int,
        size: int,
        *,
        loop: asyncio.AbstractEventLoop,
        post: Post,
        listener: Listener,
        quiet: int | None = None,
        on_quiet: Callable[[], None] = lambda: None,
    ) -> None:
        self._rank = rank
        self._loop = loop
        self._post = post
        self._listener = listener
        self._quiet = quiet
        self._on_quiet = on_quiet
        self._parent = tree.parent(rank) if rank else None
        self._children = tree.children(rank, size)
        self._sizes = {child: tree.subtree_size(child, size) for child in self._children} | {rank: 1}
        self._whole = sum(self._sizes.values())
        self._queues: dict[bytes, _Queue] = {}
        self._mine: dict[bytes, deque[Pending]] = {}
        self._ended = Ended()
        self._in_a_row = 0
        self._order: dict[int, deque[bytes]] = {source: deque() for source in self._sizes}
        """At the root: in what order its sources came with what is not decided."""
        self._closed = False

    def announce(self, pending: Pending) -> None:
        if self._closed:
            return
        scope, meta = pending.scope.bytes, pending.meta
        self._mine.setdefault(scope, deque()).append(pending)
        metas = {} if meta is None else {self._rank: meta}
        self._merge(self._rank, scope, [(pending.record, [self._rank])], metas, 1)

    def end_scope(self, root: bytes, ending: Ending) -> None:
        if not self._closed:
            self._pass_on_end(root, ending)

    def issued(self, pending: Pending) -> None:
        """Nothing waits for that: collectives are announced as they are called, and issued in their order."""

    def hear(self, message: tuple[Any, ...]) -> None:
        if self._closed:
            return
        kind = message[0]
        if kind == "up":
            self._merge(*message[1:])
        elif kind == "end":
            self._pass_on_end(*message[1:])
        else:
            self._conclude(*message[1:])

    def end(self) -> None:
        self._closed = True
        for queue in self._queues.values():
            _dismiss(queue)
        self._queues.clear()
        self._mine.clear()
        self._order.clear()

    # --------------------------------------------------------------------- up

    def _merge(
        self, source: int, scope: bytes, said: list[tuple[Record, list[int]]], metas: dict[int, Any], heard: int
    ) -> None:
        if scope[:ROOT] in self._ended:
            return
        queue = self._queues.get(scope)
        if queue is None:
            queue = self._queues[scope] = _Queue()
        merged = queue.take(source, self._sizes[source], heard)
        for record, ranks in said:
            merged.said.setdefault(Record(*record), []).extend(ranks)
        merged.metas.update(metas)
        merged.heard += heard
        if self._parent is None:
            if self._quiet is not None:
                self._order[source].append(scope)
            self._decide(scope, queue)
        else:
            self._report(scope, queue, self._parent)

    def _report(self, scope: bytes, queue: _Queue, parent: int) -> None:
        """Say up what is known of the front of a scope: when it is complete; a disagreement at once."""
        while queue.rounds:
            front = queue.rounds[0]
            complete = front.heard == self._whole
            if not front.said or not (complete or front.sent or front.failed or front.conflict):
                return
            report = [(tuple(record), ranks) for record, ranks in front.said.items()]
            heard = sum(len(ranks) for _, ranks in report)
            self._post(parent, ("up", self._rank, scope, report, front.metas, heard))
            if self._closed:  # as in `_conclude`
                return
            front.said, front.metas, front.sent = {}, {}, True
            if not complete:
                return
            queue.drop()
        del self._queues[scope]

    def _pass_on_end(self, root: bytes, ending: Ending) -> None:
        if root in self._ended:
            return
        if self._parent is None:
            self._conclude("ended", root, ending)
        else:
            self._post(self._parent, ("end", root, tuple(ending)))

    # ------------------------------------------------------------------- down

    def _decide(self, scope: bytes, queue: _Queue) -> None:
        while queue.rounds and not self._closed:
            front = queue.rounds[0]
            complete = front.heard == self._whole
            if front.failed or (front.conflict and complete):
                self._refuse(scope, front)
                return
            if front.conflict:
                if front.grace is None:
                    front.grace = self._loop.call_later(GRACE, self._refuse, scope, front)
                return
            if not complete:
                return
            queue.drop()
            if not queue.rounds:
                del self._queues[scope]
            metas = [front.metas.get(rank) for rank in range(self._whole)] if front.metas else None
            self._conclude("agreed", scope, metas)
            if self._closed:
                return
            if self._quiet is not None and self._is_quiet(scope):
                self._conclude("quiet", b"", None)

    def _refuse(self, scope: bytes, front: _Round) -> None:
        calls = [(sorted(ranks), f"{record.what} at {record.where}") for record, ranks in front.said.items()]
        calls.sort()
        self._conclude("mismatch", scope, calls)

    def _is_quiet(self, scope: bytes) -> bool:
        """Count what was decided; return whether all have called in one order for long enough."""
        first = True
        for order in self._order.values():
            first = first and order[0] == scope
            order.remove(scope)
        self._in_a_row = self._in_a_row + 1 if first else 0
        return self._in_a_row == self._quiet

    def _conclude(self, kind: str, scope: bytes, content: Any) -> None:
        """Take a verdict, and pass it on. What it leads to may lead to the next one: that must come behind it."""
        for child in self._children:
            self._post(child, ("verdict", kind, scope, content))
        if self._closed:  # telling it has shown that a member is gone
            return
        if kind == "agreed":
            mine = self._mine[scope]
            pending = mine.popleft()
            if not mine:
                del self._mine[scope]
            self._listener.on_agreed(pending, content)
        elif kind == "quiet":
            self.end()
            self._on_quiet()
        else:
            mine = self._mine.get(scope, deque())
            first = mine[0] if mine else None
            self._forget(scope[:ROOT])
            if kind == "mismatch":
                self._listener.on_mismatch(first, scope, content)
            else:
                self._listener.on_scope_ended(scope, content)

    def _forget(self, root: bytes) -> None:
        self._ended.add(root)
        for scope in [scope for scope in self._queues if scope[:ROOT] == root]:
            _dismiss(self._queues.pop(scope))
        for scope in [scope for scope in self._mine if scope[:ROOT] == root]:
            del self._mine[scope]
        for order in self._order.values():
            for scope in [scope for scope in order if scope[:ROOT] == root]:
                order.remove(scope)


def _dismiss(queue: _Queue) -> None:
    for waiting in queue.rounds:
        if waiting.grace is not None:
            waiting.grace.cancel()
