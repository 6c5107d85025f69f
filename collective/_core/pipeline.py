"""From agreed to done: staging, issuing and finishing the collectives of one epoch, in the order all agreed on."""

from __future__ import annotations

import asyncio
from collections import deque
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from collective._core.offload import LONG, offload

if TYPE_CHECKING:
    from collections.abc import Callable

    from collective._core.agreement import Record
    from collective._core.operations import Operation
    from collective.abc import DataPlane
    from collective.scopes import CallScope, Scope
    from collective.work import Work

LIBRARY_GRACE = 0.5
"""Seconds that an error of a library below waits for the loss of a peer to explain it."""


@dataclass(slots=True, eq=False)
class Pending:
    """A collective that is not done."""

    number: int
    """Of this member's calls in the epoch."""
    scope: Scope
    record: Record
    operation: Operation
    work: Work[Any]
    part: CallScope | None = None
    """The call that called it here."""
    brief: bytes | None = None
    """What this member gives, where that is short and can be shown with its announcement."""
    due: float = 0.0
    """When it will have waited for too long."""
    stalls: float = 0.0
    """When it will have waited for so long that this is told."""
    seq: int = -1
    """Its place in the order that all members agreed on."""
    issued: bool = False
    """Whether the data plane may be at the caller's memory: then it is failed only as that is abandoned, too."""

    @property
    def meta(self) -> Any:
        """What every member is told of it."""
        return self.operation.meta

    @property
    def agreed(self) -> bool:
        """Whether all members have called it."""
        return self.seq >= 0

    def fail(self, error: Exception) -> None:
        """End it with an error."""
        self.work._fail(error)


class Pipeline:
    """Issues agreed collectives to a data plane.

    :param on_issued: called with each collective once its operation was issued, or had nothing to issue.
    :param on_done: called with each collective when its Work is done.
    :param on_failure: called with a collective that this member cannot take part in after all.
    """

    def __init__(
        self,
        plane: DataPlane,
        *,
        on_issued: Callable[[Pending], None],
        on_done: Callable[[Pending], None],
        on_failure: Callable[[Pending, BaseException], None],
    ) -> None:
        self._plane = plane
        self._on_issued = on_issued
        self._on_done = on_done
        self._on_failure = on_failure
        self._queue: deque[Pending] = deque()
        self._staging = False
        self._moving: set[int] = set()
        self._held: deque[Pending] = deque()
        """What moves nothing, and waits for what was called before it."""

    def add(self, pending: Pending) -> None:
        """Take a collective that all members agreed on; they come in the order in which they were agreed."""
        self._queue.append(pending)
        self._pump()

    def settle(self, pending: Pending, work_out: Callable[[], None]) -> None:
        """Finish a collective whose data came with the announcements, after those before it were issued.

        :param work_out: its operation's `settle`, with that data.
        """
        pending.issued = True
        try:
            work_out()
        except Exception as error:  # no memory: this member alone cannot take its result
            pending.work._fail(error)
            self._on_done(pending)
        else:
            self._finish(pending)
        self._on_issued(pending)

    def clear(self) -> None:
        """Issue nothing any more of what has come so far."""
        self._queue.clear()
        self._held.clear()

    def _pump(self) -> None:
        # One whose input takes long to stage holds up those behind it: they are issued in order.
        while self._queue and not self._staging:
            pending = self._queue[0]
            if pending.work.done():  # it has failed, and so has what comes after it
                self._queue.clear()
                return
            if pending.operation.stage_bytes > LONG:
                self._staging = True
                offload(pending.operation.stage).add_done_callback(partial(self._staged, pending))
                return
            self._queue.popleft()
            try:
                pending.operation.stage()
            except Exception as error:  # no memory, a device's error: the others wait for this member
                self._on_failure(pending, error)
                return
            self._issue(pending)

    def _staged(self, pending: Pending, staging: asyncio.Future[None]) -> None:
        self._staging = False
        error = staging.exception()
        if not self._queue or self._queue[0] is not pending:
            return  # cleared meanwhile
        if pending.work.done():  # what was read may not be whole
            self._queue.clear()
            return
        self._queue.popleft()
        if error is not None:
            self._on_failure(pending, error)
            return
        self._issue(pending)
        self._pump()

    def _issue(self, pending: Pending) -> None:
        pending.issued = True
        try:
            completion = pending.operation.issue(self._plane)
        except Exception as error:  # as above
            self._on_failure(pending, error)
            return
        if completion is None:
            self._held.append(pending)
            self._release()
        elif isinstance(completion, asyncio.Future) and completion.done():
            self._moved(pending, completion)
        else:
            self._moving.add(pending.seq)
            asyncio.ensure_future(completion).add_done_callback(partial(self._moved, pending))
        self._on_issued(pending)

    def _moved(self, pending: Pending, completion: asyncio.Future[Any]) -> None:
        if completion.cancelled():
            return
        error = completion.exception()
        if error is not None:
            self._on_failure(pending, error)
        elif not pending.work.done():
            self._finish(pending)

    def _finish(self, pending: Pending) -> None:
        if pending.operation.long_finish:
            offload(pending.operation.finish).add_done_callback(lambda finished: self._end(pending, finished.result))
        else:
            self._end(pending, pending.operation.finish)

    def _end(self, pending: Pending, result: Callable[[], Any]) -> None:
        try:
            pending.work._succeed(result())
        except Exception as error:  # this member alone cannot take its result; the others have theirs
            pending.work._fail(error)
        self._on_done(pending)
        if pending.seq in self._moving:
            self._moving.discard(pending.seq)
            self._release()

    def _release(self) -> None:
        while self._held and not any(seq < self._held[0].seq for seq in self._moving):
            self._finish(self._held.popleft())
