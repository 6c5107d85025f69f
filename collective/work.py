"""The awaitable that every group operation returns at once."""

from __future__ import annotations

import asyncio
from time import perf_counter
from typing import TYPE_CHECKING, Any, Generic, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable, Generator

T = TypeVar("T")


class Work(Generic[T]):
    """The completion of one operation on a group.

    It can be awaited many times and by several tasks. Cancelling an await leaves the operation in its place, and the
    Work can be awaited again; only a `recv` whose last await was cancelled is withdrawn (contract 7). A failure that
    nobody looked at goes to the loop's exception handler. Belongs to the event loop of its group.
    """

    __slots__ = ("__weakref__", "_busy", "_future", "_on_abandon", "_waiters", "description")

    def __init__(self, description: str, *, on_abandon: Callable[[], bool] | None = None) -> None:
        self.description = description
        self._future: asyncio.Future[T] = asyncio.get_running_loop().create_future()
        self._waiters = 0
        self._on_abandon = on_abandon
        self._busy: asyncio.Future[Any] | None = None
        """While a thread writes to the caller's memory: a cancelled await lasts until that has ended."""

    def __await__(self) -> Generator[Any, None, T]:
        future = self._future
        if not future.done() or _turn_is_long(future.get_loop()):
            self._waiters += 1
            try:
                if future.done():
                    yield
                else:
                    yield from _until_done(future)
            except asyncio.CancelledError:
                # As asyncio.shield does: a failure after that is nobody's to look at, unless it is awaited again.
                future.add_done_callback(_look_at)
                while self._busy is not None and not self._busy.done():
                    try:
                        yield from _until_done(self._busy)
                    except asyncio.CancelledError:
                        continue  # it takes some milliseconds, and the first cancellation is raised then
                if self._waiters == 1 and self._on_abandon is not None and self._on_abandon():
                    self._withdraw()
                raise
            finally:
                self._waiters -= 1
        return self.result()

    def done(self) -> bool:
        """Return whether the operation has ended, by a result, an error or a withdrawal."""
        return self._future.done()

    def result(self) -> T:
        """Return the result, or raise the operation's error.

        Raises:
            asyncio.InvalidStateError: it is not done yet.
        """
        result = self._future.result()
        self._on_abandon = None  # the caller has it: nothing is left to withdraw, and nothing to keep for that
        return result

    def exception(self) -> BaseException | None:
        """Return the operation's error, or None where it succeeded.

        Raises:
            asyncio.InvalidStateError: it is not done yet.
        """
        error = self._future.exception()
        self._on_abandon = None
        return error

    def add_done_callback(self, callback: Callable[[Work[T]], object]) -> None:
        """Call `callback(work)` on the loop once the operation has ended; soon, if it already has."""
        self._future.add_done_callback(lambda _: callback(self))

    async def wait_stream(self) -> None:
        """Return once the operation is issued and ordered before the current stream's later work.

        In host memory there are no streams: the same as awaiting the Work.
        """
        await self

    def __repr__(self) -> str:
        if not self._future.done():
            state = "pending"
        elif self._future.cancelled():
            state = "withdrawn"
        else:
            # Reading the private slot keeps an unseen failure unseen.
            state = "failed" if self._future._exception is not None else "done"
        return f"<Work {self.description} {state}>"

    def _succeed(self, result: T) -> None:
        if not self._future.done():
            self._future.set_result(result)

    def _fail(self, error: BaseException) -> None:
        if not self._future.done():
            self._future.set_exception(error)

    def _withdraw(self) -> None:
        """Make the Work cancelled, also where its result had arrived unseen: it went to the next recv."""
        if self._future.done():
            self._future = self._future.get_loop().create_future()
        self._future.cancel()


def _turn_is_long(loop: asyncio.AbstractEventLoop) -> bool:
    """Whether awaits of what was done already have kept the loop from its next turn for a millisecond."""
    since = _turns.get(loop)
    if since is None:
        _turns[loop] = perf_counter()
        loop.call_soon(_turns.pop, loop, None)
        return False
    return perf_counter() - since > 1e-3


_turns: dict[asyncio.AbstractEventLoop, float] = {}
"""When the first such await in this turn of a loop was."""


def _until_done(future: asyncio.Future[Any]) -> Generator[Any, None, None]:
    """Wait for a future, which is not cancelled where the wait is."""
    waiter: asyncio.Future[None] = future.get_loop().create_future()

    def wake(_: asyncio.Future[Any]) -> None:
        if not waiter.done():
            waiter.set_result(None)

    future.add_done_callback(wake)
    try:
        yield from waiter
    finally:
        future.remove_done_callback(wake)


def _look_at(future: asyncio.Future[Any]) -> None:
    if not future.cancelled():
        future.exception()
