"""Scopes: what collectives and messages are paired by, beside their order (RFC 0002, Scopes).

A call layer runs each call in a CallScope. What the call issues in a group that it reaches as a whole has the call's
own scope; all else is in the group's default scope, in the order of the member's program. A call that ends badly ends
its own scope on every member, and what it left unfinished in a default scope breaks that group (contract 7).
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import hashlib
import sys
from collections import Counter, OrderedDict
from contextvars import Context, ContextVar
from typing import TYPE_CHECKING, Final, NamedTuple
from weakref import WeakSet, WeakValueDictionary

from collective.errors import CollectiveMismatch, CollectiveTimeout, GroupError, ScopeEnded
from collective.work import has_failed

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence
    from contextvars import Token
    from types import TracebackType
    from typing import Any, Protocol, Self, TypeAlias

    from collective._core.engine import Engine
    from collective.abc import Endpoint
    from collective.work import Work

    class Abandonable(Protocol):
        """What a call has made, a stream for example."""

        @property
        def finished(self) -> bool:
            """Whether nobody waits for this member any more."""

        def abandon(self, reason: str) -> None:
            """End it for all: the call that made it has failed."""

    Key: TypeAlias = "str | int | bytes | tuple[Key, ...]"
    Reach: TypeAlias = "tuple[str, range | frozenset[int]] | None"
    """The role whose actors a call reaches, and their ranks; None for all of them, which its caller answers for."""

ROOT: Final = 16
"""Bytes by which a scope that can end is known, with all that is inside it."""
KEPT: Final = 1 << 14
"""Scopes that have ended, and parts that are over, that a member remembers for those that come late."""


class Scope:
    """What operations are paired by. Equal bytes on every member; `name` is for people.

    :ivar bytes: those of the scope that it ends with, `root`, and where it is a key inside that, its own behind them.
    """

    __slots__ = ("bytes", "ends", "leaf", "name", "root")

    def __init__(self, root: bytes, leaf: bytes, name: str) -> None:
        self.root = root
        self.leaf = leaf
        self.bytes = root if leaf == root else root + leaf
        self.ends = root != _NOBODY
        """Whether it can end while its group goes on; what goes wrong in another breaks the group."""
        self.name = name

    def inside(self, key: Key) -> Scope:
        """Return the scope of a key in this one.

        Raises:
            TypeError: the key is no str, int, bytes or tuple of these.
        """
        leaf = hashlib.blake2b(self.leaf + _spell(key).encode(), digest_size=ROOT).digest()
        return Scope(self.root, leaf, f"{self.name}[{key!r}]")

    def __repr__(self) -> str:
        return f"<Scope {self.name}>"


_NOBODY: Final = bytes(ROOT)
DEFAULT: Final = Scope(_NOBODY, _NOBODY, "the default scope")


class Call(NamedTuple):
    """A call that several actors answer: equal on all of them.

    :ivar id: names it and no other; the earlier call has the smaller one.
    :ivar name: for people.
    :ivar reach: whom it reaches.
    """

    id: bytes
    name: str
    reach: Reach


class Ending(NamedTuple):
    """Why a scope ended; told to every member.

    :ivar who: the member that ended it, as errors name it, and `rank` its rank.
    :ivar operation: what it had not finished there, if anything, and `line` where in its code that was called.
    :ivar missing: who had not come, where it ended by a timeout of so many seconds, and what they `waited` for.
    """

    rank: int
    who: str
    operation: str
    line: str
    cause: str
    timeout: float = 0.0
    missing: tuple[str, ...] = ()
    waited: tuple[str, ...] = ()

    def error(self, group: str, scope: Scope, operation: str) -> GroupError:
        """Return the error of an operation that the scope's end has left undone."""
        if self.missing:
            return CollectiveTimeout(
                group, operation, self.timeout, self.missing, scope=scope.name, pending=self.waited
            )
        return self.ended(group, scope)

    def ended(self, group: str, scope: Scope) -> ScopeEnded:
        """Return the error of an operation in the scope that is called too late."""
        return ScopeEnded(group, scope.name, self.rank, self.operation, self.line, self.cause, who=self.who)


_current: ContextVar[CallScope | None] = ContextVar("collective_call_scope", default=None)
_inside: ContextVar[tuple[tuple[str, Scope], ...]] = ContextVar("collective_scopes_inside", default=())
_engines: WeakValueDictionary[str, Engine] = WeakValueDictionary()


class CallScope:
    """One actor's part in a call: collects the collectives that are issued inside it, by this task and those it starts.

    A call layer runs each call in one of its own, calls `abandon` and `settle` where the call ended by an exception or
    a cancellation, and `finish` in any case. Not for concurrent entry; leave it in the context that entered it.

    :param call: the call, where several actors answer it; without one all is in the groups' default scopes.
    :param endpoint: the actor's.
    :param name: how errors name it, where it is no such call.
    """

    __slots__ = ("__weakref__", "_failed", "_made", "_parts", "_pending", "_sends", "_token", "call", "name", "scope")

    def __init__(self, call: Call | None = None, endpoint: Endpoint | None = None, name: str = "a call") -> None:
        self.call = call
        self.name = name if call is None else call.name
        self.scope: Scope | None = None
        self._parts: Parts | None = None
        self._made: list[Abandonable] = []
        self._pending: dict[Work[Any], tuple[Engine, Scope]] = {}
        self._sends: dict[Work[Any], bool] = {}
        """Sends that wait for their receives, and whether they end with the scope of the call."""
        self._failed: WeakSet[Work[Any]] = WeakSet()
        """What has failed, and perhaps was not looked at."""
        self._token: Token[CallScope | None] | None = None
        if call is not None:
            assert endpoint is not None, "a call is answered at an endpoint"
            self.scope = Scope(call.id, call.id, call.name)
            self._parts = parts_at(endpoint)
            self._parts.begin(call)

    def __enter__(self) -> Self:
        self._token = _current.set(self)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._token is not None:
            _current.reset(self._token)
            self._token = None

    def finish(self) -> None:
        """Take note that the call has ended here; the part is over when its tasks have ended, too."""
        self._made = []  # Contexts hold this object, some for long.
        if self._parts is not None and self.call is not None:
            self._parts.finish(self.call)

    @property
    def shares_scope(self) -> bool:
        """Whether it has its scope in common with other calls, which its caller has put into one."""
        return self.call is not None and self.call.reach is None

    def reaches(self, engine: Engine) -> bool:
        """Whether the call reaches every member of a group of this actor."""
        return self._parts is engine.parts and self.call is not None and engine.is_reached(self.call.reach)

    def abandon(self, reason: str) -> list[str]:
        """End the call's scope on every member of its groups, and its row streams; waits for nothing.

        Groups in whose default scope a collective of the call is unfinished are broken on every member. Returns their
        tokens, with which `reset_everywhere` can be called in this process.
        """
        made, self._made = self._made, []
        for each in made:
            if not each.finished:
                each.abandon(reason)
        unfinished = [(work, *where) for work, where in self._pending.items() if not work.done()]
        left: dict[Engine, Work[Any]] = {}
        broken: dict[Engine, Work[Any]] = {}
        for work, engine, scope in unfinished:
            if self.scope is not None and scope.root == self.scope.root:
                left.setdefault(engine, work)
            elif scope.root == engine.default_scope.root:
                broken.setdefault(engine, work)
            else:  # by a view that another call has left
                engine.end_scope(scope.root, _left(engine, work, reason))
        for engine, work in broken.items():
            engine.break_everywhere(f"{engine.me} left {work.description} unfinished: {reason}")
        if self.scope is not None and self._parts is not None:
            for engine in self._parts.engines_of(self):
                engine.end_scope(self.scope.root, _left(engine, left.get(engine), reason))
        for work in (*self._pending, *self._sends, *self._failed):
            # The call that would have seen how it ends has ended; `reason` tells why.
            if work.done():
                look_at(work)
            else:
                work.add_done_callback(look_at)
        return [engine.token for engine in broken]

    async def settle(self) -> None:
        """Wait, after `abandon`, until nothing that was issued is under way: what was agreed completes first."""
        while left := [work for work in (*self._pending, *self._ending_sends()) if not work.done()]:
            with contextlib.suppress(Exception):
                await left[0]  # as `abandon` has said, the call that would look at it has ended

    def note(self, work: Work[Any], engine: Engine, scope: Scope) -> None:
        """Take note of an operation that the call has issued."""
        self._pending[work] = engine, scope
        work.add_done_callback(self._discard)

    def note_send(self, work: Work[Any], scope: Scope) -> None:
        """Take note of a send that waits for its receive."""
        self._sends[work] = self.scope is not None and scope.root == self.scope.root
        work.add_done_callback(self._discard)

    def note_failed(self, work: Work[Any]) -> None:
        """Take note of what has failed: where the call fails too, nobody may come to look at it."""
        self._failed.add(work)

    def _ending_sends(self) -> list[Work[Any]]:
        return [work for work, ends in self._sends.items() if ends]

    def _discard(self, work: Work[Any]) -> None:
        self._pending.pop(work, None)
        self._sends.pop(work, None)
        if has_failed(work):
            self.note_failed(work)


def _left(engine: Engine, work: Work[Any] | None, reason: str) -> Ending:
    operation, _, line = ("", "", "") if work is None else work.description.rpartition(" at ")
    return Ending(engine.rank, engine.me, operation, line, reason)


def look_at(work: Work[Any]) -> None:
    """See how a Work ended, for a caller that does not."""
    with contextlib.suppress(asyncio.CancelledError):
        work.exception()


class Parts:
    """The parts that one endpoint's actor has in calls: which are under way, and which are over, with their tasks.

    :ivar engines: those of the actor's groups.
    :ivar touched: the roots of scopes for whose end somebody has to do something.
    :ivar threads: returns the calls that hold all worker threads of the actor, and those that wait for one.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.engines: WeakSet[Engine] = WeakSet()
        self.touched: set[bytes] = set()
        self.threads: Callable[[], tuple[list[Call | None], list[Call]]] = lambda: ([], [])
        self._loop = loop
        self._running: Counter[bytes] = Counter()
        self._finished: OrderedDict[bytes, bool] = OrderedDict()
        """Calls that have ended here, and whether their tasks are known to have ended, too."""
        self._watched: set[bytes] = set()
        """Calls of which a task still runs, that will have the next one looked for."""
        self._asked: dict[bytes, list[Callable[[], None]]] = {}

    def begin(self, call: Call) -> None:
        """Take note of a part that begins."""
        self._running[call.id] += 1

    def finish(self, call: Call) -> None:
        """Take note that a call has ended here."""
        self._running[call.id] -= 1
        if self._running[call.id]:
            return
        del self._running[call.id]
        if call.reach is None:  # more calls may come into this scope
            self.touched.discard(call.id)
            return
        self._finished[call.id] = False
        if len(self._finished) > KEPT:
            self._finished.popitem(last=False)
        if call.id in self.touched:
            self._look(call.id)

    def is_over(self, root: bytes) -> bool:
        """Whether the actor's part in a call is over, as far as it remembers."""
        over = self._finished.get(root)
        if over is False:
            return self._look(root)
        return over is True

    def when_over(self, root: bytes, tell: Callable[[], None]) -> None:
        """Call back once the part is over; at once, if it is."""
        if self.is_over(root):
            tell()
        else:
            self.touched.add(root)
            self._asked.setdefault(root, []).append(tell)

    def _look(self, root: bytes) -> bool:
        """See whether tasks of a call still run, which has ended here; they know best when they end."""
        if root in self._watched:
            return False
        if self._finished.get(root) is not False:
            return root in self._finished
        for task in asyncio.all_tasks(self._loop):
            part = context_of(task).get(_current)
            # In one process other actors have their tasks on this loop, and parts in this call that are their own.
            if part is not None and part._parts is self and part.call is not None and part.call.id == root:
                self._watched.add(root)
                task.add_done_callback(lambda _: self._look_again(root), context=Context())
                return False
        self._finished[root] = True
        self.touched.discard(root)
        for engine in list(self.engines):
            engine.part_over(root)
        for tell in self._asked.pop(root, ()):
            tell()
        return True

    def _look_again(self, root: bytes) -> None:
        self._watched.discard(root)
        self._look(root)

    def engines_of(self, part: CallScope) -> list[Engine]:
        """Return those of the groups that a call reaches as a whole."""
        return [engine for engine in self.engines if not engine.closed and part.reaches(engine)]


def context_of(task: asyncio.Task[Any]) -> Context:
    """Return the context that a task runs in."""
    if sys.version_info >= (3, 12):
        return task.get_context()
    # A task of C has its context, and does not show it.
    return next((each for each in gc.get_referents(task) if isinstance(each, Context)), Context())


def parts_at(endpoint: Endpoint) -> Parts:
    """Return the parts of the actor at an endpoint."""
    # Kept on the endpoint, so that both go together.
    parts: Parts | None = endpoint.__dict__.get("_gangline_parts")
    if parts is None:
        parts = endpoint.__dict__["_gangline_parts"] = Parts(asyncio.get_running_loop())
    return parts


def scope_in(engine: Engine) -> Scope:
    """Return the scope of what the running code calls in a group."""
    for token, scope in reversed(_inside.get()):
        if token == engine.token:
            return scope
    part = _current.get()
    if part is not None and part.scope is not None and part.reaches(engine):
        return part.scope
    return engine.default_scope


def current_part() -> CallScope | None:
    """Return the part of a call that the running code belongs to."""
    return _current.get()


def current_call() -> Call | None:
    """Return the call of several actors that the running code belongs to."""
    part = _current.get()
    return None if part is None else part.call


def enter(engine: Engine, scope: Scope) -> Token[tuple[tuple[str, Scope], ...]]:
    """Make a scope that of what the running code and the tasks that it starts call in a group, until `leave`."""
    return _inside.set((*_inside.get(), (engine.token, scope)))


def leave(token: Token[tuple[tuple[str, Scope], ...]]) -> None:
    """Undo `enter`."""
    _inside.reset(token)


async def reset_everywhere(tokens: Iterable[str]) -> None:
    """Have every member of the groups named by `tokens` reset its group, and return once all have.

    Groups that have closed since are passed over: nobody can use them.

    Raises:
        PeerLost, CollectiveTimeout: some member cannot; the group stays broken.
    """
    engines = [engine for token in tokens if (engine := _engines.get(token)) is not None and not engine.closed]
    async with asyncio.TaskGroup() as tasks:
        for engine in engines:
            tasks.create_task(engine.reset_everywhere())


def scope_of_messages(engine: Engine, scope: Scope) -> Scope:
    """Return the scope by which messages and streams are paired that the running code sends or makes in another.

    The default scope of a subgroup is that of the call that has made it. That call's messages are over with it; those
    of others, who may come as long as the subgroup lives, are nobody's.
    """
    if scope is engine.default_scope and scope.ends:
        call = current_call()
        return scope if call is not None and call.id == scope.root else DEFAULT
    return scope


def touch(engine: Engine, scope: Scope) -> None:
    """Have the engine told when this member's part in a call is over."""
    if scope.ends:
        engine.parts.touched.add(scope.root)


def note_made(made: Abandonable) -> None:
    """Enter a row stream, or a subgroup, into the part of the call that the running code belongs to, if any."""
    part = _current.get()
    if part is not None:
        part._made = [each for each in part._made if not each.finished] + [made]


def register(engine: Engine) -> None:
    """Make an engine known under its token for as long as it lives."""
    _engines[engine.token] = engine
    engine.parts.engines.add(engine)


def _spell(key: Any) -> str:
    """Write a key so that equal keys, and no others, give equal text."""
    if isinstance(key, tuple):
        return f"({','.join(map(_spell, key))},)"
    if isinstance(key, bool) or not isinstance(key, str | int | bytes):
        raise TypeError(f"a scope's key is {key!r}; a str, an int, bytes, or a tuple of these")
    base: type[Any] = next(kind for kind in (str, int, bytes) if isinstance(key, kind))
    return repr(base(key))


def mismatch(group: str, scope: Scope, place: int, calls: Sequence[tuple[Sequence[int], str]]) -> CollectiveMismatch:
    """Return the error of members that called different things in one scope."""
    return CollectiveMismatch(group, place, calls, scope=scope.name if scope.ends else "")
