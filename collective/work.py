"""The awaitable that every group operation returns at once."""

from __future__ import annotations

import asyncio
import contextlib
from functools import partial
from time import perf_counter
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from collective.errors import ScopeEnded

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Sequence

T = TypeVar("T")


class Work(Generic[T]):
    """The completion of one operation on a group.

    It can be awaited many times and by several tasks. Cancelling an await leaves the operation in its place, and the
    Work can be awaited again; only a `recv` that nobody awaits any more is withdrawn (contract 7). A failure that
    nobody looked at goes to the loop's exception handler, unless it is a ScopeEnded, whose cause is told where it is.
    Belongs to the event loop of its group.

    :param stop: called before the Work fails: when it has returned, nothing is read or written in the caller's memory.
    """

    __slots__ = ("__weakref__", "_future", "_stop", "_waiters", "description")

    def __init__(self, description: str, *, stop: Callable[[], None] | None = None) -> None:
        self.description = description
        self._future: asyncio.Future[T] = asyncio.get_running_loop().create_future()
        self._waiters = 0
        self._stop = stop

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
                self._give_up()
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
        return self._future.result()

    def exception(self) -> BaseException | None:
        """Return the operation's error, or None where it succeeded.

        Raises:
            asyncio.InvalidStateError: it is not done yet.
        """
        return self._future.exception()

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
            self._stop = None  # nothing is left to stop, and nothing to keep for that
            self._future.set_result(result)

    def _fail(self, error: BaseException) -> None:
        if not self._future.done():
            stop, self._stop = self._stop, None
            if stop is not None:
                stop()
            self._future.set_exception(error)
            if isinstance(error, ScopeEnded):
                self._future.exception()  # a consequence, whose cause is told where it is: nobody has to look

    def _give_up(self) -> None:
        """One of those who await it does so no more. It counts among them yet."""
        # As asyncio.shield does: a failure after that is nobody's to look at, unless it is awaited again.
        self._future.add_done_callback(_look_at)


class Withdrawable(Work[T]):
    """The Work of a recv. It is withdrawn when nobody awaits it any more, or can: as its last await is cancelled, begun
    or not, and where it is dropped. Then the next recv gets the message, also one that had come and nobody has seen.

    Tasks that are made of it, by `asyncio.wait_for`, `gather` or `create_task`, drive it by `send`, `throw` and `close`
    as they drive a coroutine. So it learns of a cancellation before the first step, too: around any other awaitable
    they put a coroutine, which then is dropped without a word.

    :param withdraw: withdraws the operation, unless it has failed; returns whether it has.
    """

    __slots__ = ("_driven", "_withdraw")

    def __init__(self, description: str, *, stop: Callable[[], None], withdraw: Callable[[], bool]) -> None:
        super().__init__(description, stop=stop)
        self._driven: dict[asyncio.Task[Any] | None, Generator[Any, None, T]] = {}
        """What each of those tasks has begun."""
        self._withdraw: Callable[[], bool] | None = withdraw

    def done(self) -> bool:
        done = super().done()
        if done:
            self._withdraw = None  # the caller has it: nothing is left to withdraw, and nothing to keep for that
        return done

    def result(self) -> T:
        result = super().result()
        self._withdraw = None
        return result

    def exception(self) -> BaseException | None:
        error = super().exception()
        self._withdraw = None
        return error

    def add_done_callback(self, callback: Callable[[Work[T]], object]) -> None:
        _called_back.add(self)

        def call_back(_: asyncio.Future[T]) -> None:
            _called_back.discard(self)
            self._withdraw = None
            callback(self)

        self._future.add_done_callback(call_back)

    def __del__(self) -> None:
        withdraw = getattr(self, "_withdraw", None)
        if withdraw is not None:
            with contextlib.suppress(RuntimeError):  # the loop is closed, and nobody receives there any more
                self._future.get_loop().call_soon_threadsafe(withdraw)  # in any thread, in the midst of anything

    def _give_up(self, waiters: int = 1) -> None:
        super()._give_up()
        if self._waiters == waiters and self._withdraw is not None and self._withdraw():
            self._withdraw = None
            if self._future.done():
                self._future = self._future.get_loop().create_future()
            self._future.cancel()

    def send(self, value: None) -> Any:
        """Take the current task's next step."""
        task = asyncio.current_task()
        if task not in self._driven:
            self._driven[task] = self.__await__()
        return self._step(task, partial(self._driven[task].send, value))

    def throw(self, error: BaseException) -> Any:
        """Raise an error in the current task's next step."""
        task = asyncio.current_task()
        if task not in self._driven:
            self._give_up(waiters=0)
            raise error
        return self._step(task, partial(self._driven[task].throw, error))

    def close(self) -> None:
        """End what the current task has begun."""
        steps = self._driven.pop(asyncio.current_task(), None)
        if steps is not None:
            steps.close()

    def _step(self, task: asyncio.Task[Any] | None, take: Callable[[], Any]) -> Any:
        try:
            return take()
        except BaseException:  # its end; a result ends it by StopIteration
            self._driven.pop(task, None)
            raise


_called_back: set[Work[Any]] = set()
"""Works that somebody wants to be called back by, who need not hold them."""


def await_all(works: Sequence[Work[Any]]) -> Generator[Any, None, list[Any]]:
    """Await all of these from the first step on; return their results in order, or raise the first error.

    Where that ends early, by an error or a cancellation, those are withdrawn that can be.
    """
    pending = [work._future for work in works if not work._future.done()]
    for work in works:
        work._waiters += 1
    try:
        if pending and not any(map(has_failed, works)):
            yield from _until_all_done(pending)
        elif _turn_is_long(asyncio.get_running_loop()):
            yield
        failed = [work for work in works if has_failed(work)]
        for work in sorted(failed, key=lambda work: work._future.cancelled()):  # a withdrawn one tells nothing
            work.result()
        return [work.result() for work in works]
    except BaseException:
        for work in works:
            work._give_up()
        raise
    finally:
        for work in works:
            work._waiters -= 1


def has_failed(work: Work[Any]) -> bool:
    """Whether an operation has ended without a result; an unseen failure stays unseen."""
    future = work._future
    return future.done() and (future.cancelled() or future._exception is not None)


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
    return _until_all_done([future])


def _until_all_done(futures: Sequence[asyncio.Future[Any]]) -> Generator[Any, None, None]:
    """Wait for all of these, or for one that fails. They are not cancelled where the wait is."""
    waiter: asyncio.Future[None] = futures[0].get_loop().create_future()
    left = len(futures)

    def wake(future: asyncio.Future[Any]) -> None:
        nonlocal left
        left -= 1
        if not waiter.done() and (not left or future.cancelled() or future._exception is not None):
            waiter.set_result(None)

    for future in futures:
        future.add_done_callback(wake)
    try:
        yield from waiter
    finally:
        for future in futures:
            future.remove_done_callback(wake)


def _look_at(future: asyncio.Future[Any]) -> None:
    if not future.cancelled():
        future.exception()
