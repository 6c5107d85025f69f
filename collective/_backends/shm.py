"""The data plane of groups whose members are on one host: they copy through memory that they share, and reduce there.

Members meet over a unix socket, by which rank 0 hands out a memory file and an eventfd of each member
(`_shm_meeting`). An operation is a sequence of phases, exchanges among all through slots in that memory (`_shm_steps`,
`_shm_segment`), which are driven on the loop or on a thread (`_shm_driver`). Every reduction goes through
`reduce_arrays` in rank order, so that the bits are those of the "memory" data plane.

What a group holds is the same for tensors of any size, and warm: two slots for each member, 6 to 10 MiB in all with up
to 64 of them. The kernel frees it when the last member has gone, whatever ended it.
"""

from __future__ import annotations

import asyncio
import contextlib
import platform
import sys
from functools import partial
from typing import TYPE_CHECKING, ClassVar

from collective._backends import _shm_steps as steps
from collective._backends._shm_driver import Driver
from collective._backends._shm_meeting import Meeting
from collective.abc import AnnouncingPlane
from collective.errors import BackendError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import numpy as np

    from collective._backends._shm_segment import Segment
    from collective.abc import PlaneContext
    from collective.types import ReduceOp


class ShmPlane(AnnouncingPlane):
    """The data plane called "shm"; see the module."""

    name: ClassVar[str] = "shm"

    def __init__(self, context: PlaneContext) -> None:
        self._context = context
        self._meeting = Meeting(context)
        self._opening: asyncio.Task[None] | None = None
        self._segment: Segment | None = None
        self._driver: Driver | None = None
        self._ended = False

    async def open(self) -> None:
        context = self._context
        if self._ended or self._opening is not None or self._driver is not None:
            raise BackendError(f"shm: group {context.group!r} was opened before")
        if sys.platform != "linux" or platform.machine() != "x86_64":
            raise BackendError(
                f"shm: relies on how x86-64 orders stores, and on Linux; this is {platform.machine()} with "
                f'{sys.platform}. Declare GroupSpec(..., backend="gloo")'
            )
        if context.size > 1:
            self._opening = asyncio.ensure_future(self._meeting.meet())
            try:
                await self._opening
            except BaseException:
                self._meeting.give_up()
                self._opening.cancel()
                await asyncio.wait([self._opening])
                task = asyncio.current_task()
                if self._ended and self._opening.cancelled() and not (task and task.cancelling()):
                    raise self._abandoned() from None
                raise
            self._segment = self._meeting.take()
            if self._segment is None:
                raise self._abandoned()
        self._driver = Driver(asyncio.get_running_loop(), self._segment, context.group)

    def hear(self, rank: int, message: bytes) -> None:
        self._meeting.hear(message)

    def empty(self, nbytes: int) -> np.ndarray:
        segment = self._segment
        if segment is not None and nbytes:
            with contextlib.suppress(OSError):  # no mapping to be had: memory of this member's own is copied, and does
                return segment.blocks.take(nbytes)
        return super().empty(nbytes)

    def exchange(self, card: bytes, head: int, on_misfit: Callable[[], None]) -> asyncio.Future[list[bytes]]:
        driver, segment = self._opened()
        if segment is None:
            return driver.start(steps.nothing(), 0, result=[card])
        loop, cards = asyncio.get_running_loop(), [b""] * segment.size
        shown = steps.exchange(segment, card, cards, head, partial(loop.call_soon_threadsafe, on_misfit))
        return driver.start(shown, len(card), result=cards)

    def broadcast(self, array: np.ndarray, root: int) -> asyncio.Future[None]:
        driver, segment = self._opened()
        return driver.start(steps.broadcast(segment, array, root) if segment else steps.nothing(), array.nbytes)

    def allreduce(self, source: np.ndarray, target: np.ndarray, op: ReduceOp) -> asyncio.Future[None]:
        driver, segment = self._opened()
        if segment is None:
            return driver.start(steps.reduce_alone(source, target, op), source.nbytes)
        return driver.start(steps.reduce(segment, source, target, op, to_all=True), 2 * source.nbytes)

    def reduce(self, source: np.ndarray, target: np.ndarray | None, op: ReduceOp, root: int) -> asyncio.Future[None]:
        driver, segment = self._opened()
        if segment is None:
            assert target is not None, "the root passes a target"
            return driver.start(steps.reduce_alone(source, target, op), source.nbytes)
        return driver.start(steps.reduce(segment, source, target, op, to_all=False), 2 * source.nbytes)

    def reduce_scatter(
        self, source: np.ndarray, target: np.ndarray, op: ReduceOp, counts: Sequence[int]
    ) -> asyncio.Future[None]:
        driver, segment = self._opened()
        if segment is None:
            return driver.start(steps.reduce_alone(source, target, op), source.nbytes)
        return driver.start(steps.reduce_scatter(segment, source, target, op, counts), 2 * source.nbytes)

    def allgather(self, source: np.ndarray, target: np.ndarray, counts: Sequence[int]) -> asyncio.Future[None]:
        driver, segment = self._opened()
        if segment is None:
            return driver.start(steps.copy_alone(target, source), target.nbytes)
        return driver.start(steps.allgather(segment, source, target, counts), source.nbytes + target.nbytes)

    def alltoall(self, sources: Sequence[np.ndarray], targets: Sequence[np.ndarray]) -> asyncio.Future[None]:
        driver, segment = self._opened()
        if segment is None:
            return driver.start(steps.copy_alone(targets[0], sources[0]), sources[0].nbytes)
        nbytes = sum(array.nbytes for array in (*sources, *targets))
        return driver.start(steps.alltoall(segment, sources, targets), nbytes)

    def abandon(self) -> None:
        self._ended = True
        self._meeting.give_up()
        if self._opening is not None:
            self._opening.cancel()
        if self._driver is not None:
            self._driver.abandon()
            self._segment = None

    async def aclose(self) -> None:
        self._ended = True
        self._meeting.give_up()
        if self._driver is not None:
            await self._driver.aclose()
            self._segment = None

    def _abandoned(self) -> BackendError:
        return BackendError(f"shm: group {self._context.group!r} was abandoned while it was being formed")

    def _opened(self) -> tuple[Driver, Segment | None]:
        if self._driver is None or self._ended:
            raise BackendError(f"shm: group {self._context.group!r} is not open on rank {self._context.rank}")
        return self._driver, self._segment
