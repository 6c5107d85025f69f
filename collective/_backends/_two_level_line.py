"""Runs the operations of one member one after another, each as a sequence of stages on other data planes."""

from __future__ import annotations

import asyncio
from collections import deque
from typing import TYPE_CHECKING, Any, TypeAlias

from collective.errors import BackendError

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Generator, Iterable

Stages: TypeAlias = "Generator[Awaitable[Any], None, None]"
"""An operation: issues its stages, and yields the completions of those that it waits for."""


class Line:
    """A queue of operations. Every method is called on the loop.

    An operation begins when the one before it is done: its stages, and every one that it had watched. So stages meet
    their like on all members, which issue operations in the same order and stages in the same order within each. It is
    driven by callbacks, not by a task, so that ending it leaves nothing to be awaited.

    :param on_failure: called once when a stage or an operation fails, before that is told; nothing is run afterwards.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, on_failure: Callable[[], None]) -> None:
        self._loop = loop
        self._on_failure = on_failure
        self._queue: deque[tuple[Stages, asyncio.Future[None]]] = deque()
        self._pending = 0
        """Stages of the running operation that are watched and not done."""
        self._waiting = False
        """Whether the running operation waits for a stage."""
        self._exhausted = False
        """Whether the running operation has issued its last stage."""
        self._ended = False

    def start(self, stages: Stages) -> asyncio.Future[None]:
        """Run an operation after those before it."""
        done: asyncio.Future[None] = self._loop.create_future()
        self._queue.append((stages, done))
        if len(self._queue) == 1:
            self._advance()
        return done

    def watch(self, completion: Awaitable[Any]) -> asyncio.Future[Any]:
        """Keep the running operation from being done before this stage is, and fail it where the stage fails."""
        stage = asyncio.ensure_future(completion)
        self._pending += 1
        stage.add_done_callback(self._watched)
        return stage

    def end(self) -> None:
        """Run nothing any more; what is pending is never done. Idempotent."""
        self._ended = True
        queue, self._queue = self._queue, deque()
        for stages, _ in queue:
            stages.close()

    def _advance(self) -> None:
        while self._queue and not self._waiting and not self._ended:
            stages, done = self._queue[0]
            if not self._exhausted:
                try:
                    stage = next(stages, None)
                except Exception as error:
                    self._fail(error)
                    return
                if stage is not None:
                    self._waiting = True
                    asyncio.ensure_future(stage).add_done_callback(self._resume)
                    return
                self._exhausted = True
            if self._pending:
                return
            self._queue.popleft()
            self._exhausted = False
            done.set_result(None)

    def _resume(self, stage: asyncio.Future[Any]) -> None:
        self._waiting = False
        error = None if stage.cancelled() else stage.exception()
        if error is not None:
            self._fail(error)
        elif not stage.cancelled():
            self._advance()

    def _watched(self, stage: asyncio.Future[Any]) -> None:
        self._pending -= 1
        error = None if stage.cancelled() else stage.exception()
        if error is not None:
            self._fail(error)
        elif self._exhausted and not stage.cancelled():
            self._advance()

    def _fail(self, error: BaseException) -> None:
        if self._ended:
            return
        _, done = self._queue[0]
        self.end()
        self._on_failure()
        done.set_exception(_failure(error))


def overlap(parts: Iterable[Stages]) -> Stages:
    """Run parts of an operation, each of which starts its first stage before the one ahead of it goes on.

    So the first stage of one part, as a rule inside the host, runs beside the second of the part ahead, between hosts.
    """
    ahead: Stages | None = None
    for part in parts:
        first = next(part, None)
        if ahead is not None:
            yield from ahead
        if first is not None:
            yield first
        ahead = part
    if ahead is not None:
        yield from ahead


def _failure(error: BaseException) -> BackendError:
    what = str(error) if isinstance(error, BackendError) else f"{type(error).__name__}: {error}"
    failure = BackendError(f"two-level: {what}")
    failure.__cause__ = error
    return failure
