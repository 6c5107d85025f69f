"""Which collectives a call has issued, so that a call that ends badly cannot leave half of one behind (contract 7)."""

from __future__ import annotations

import asyncio
from contextvars import ContextVar
from typing import TYPE_CHECKING
from weakref import WeakValueDictionary

if TYPE_CHECKING:
    from collections.abc import Iterable
    from contextvars import Token
    from types import TracebackType
    from typing import Any, Protocol, Self

    from collective._core.engine import Engine
    from collective.work import Work

    class Abandonable(Protocol):
        """A stream that a call has made."""

        @property
        def finished(self) -> bool:
            """Whether nobody waits for this member any more."""

        def abandon(self, reason: str) -> None:
            """End it for all: the call that made it has failed."""


_current: ContextVar[CallScope | None] = ContextVar("collective_call_scope", default=None)
_engines: WeakValueDictionary[str, Engine] = WeakValueDictionary()


class CallScope:
    """Collects the unfinished collectives that are issued inside it, by this task and by those it starts.

    A call layer runs each call in a scope of its own, and calls `abandon` where the call ended by an exception or a
    cancellation. Not for concurrent entry; leave it in the context that entered it.
    """

    __slots__ = ("_pending", "_streams", "_token")

    def __init__(self) -> None:
        self._streams: list[Abandonable] = []
        self._pending: dict[Work[Any], Engine] = {}
        self._token: Token[CallScope | None] | None = None

    def __enter__(self) -> Self:
        self._token = _current.set(self)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._token is not None:
            _current.reset(self._token)
            self._token = None

    def abandon(self, reason: str) -> list[str]:
        """Break the groups in which a collective of this scope is unfinished, on every member; end its row streams.

        Returns their tokens, with which `reset_everywhere` can be called in this process.
        """
        streams, self._streams = self._streams, []
        for stream in streams:
            if not stream.finished:
                stream.abandon(reason)
        left: dict[Engine, Work[Any]] = {}
        unfinished = [(work, engine) for work, engine in self._pending.items() if not work.done()]
        self._pending.clear()
        for work, engine in unfinished:
            left.setdefault(engine, work)
        for engine, work in left.items():
            engine.break_everywhere(f"{engine.me} left {work.description} unfinished: {reason}")
        for work, _ in unfinished:
            if work.done():
                work.exception()  # the call that would have seen it has ended; `reason` tells why
        return [engine.token for engine in left]

    def _add(self, work: Work[Any], engine: Engine) -> None:
        self._pending[work] = engine
        work.add_done_callback(self._discard)

    def _discard(self, work: Work[Any]) -> None:
        self._pending.pop(work, None)


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


def note(work: Work[Any], engine: Engine) -> None:
    """Enter a collective into the scope of the current call, if there is one."""
    scope = _current.get()
    if scope is not None:
        scope._add(work, engine)


def note_stream(stream: Abandonable) -> None:
    """Enter a row stream into the scope of the current call, if there is one."""
    scope = _current.get()
    if scope is not None:
        scope._streams = [each for each in scope._streams if not each.finished] + [stream]


def register(engine: Engine) -> None:
    """Make an engine known under its token for as long as it lives."""
    _engines[engine.token] = engine
