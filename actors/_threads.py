"""Worker threads for plain methods, and the way back from them to the actor's loop."""

from __future__ import annotations

import asyncio
import concurrent.futures
import os
import threading
import time
from contextvars import Context, ContextVar, copy_context
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any

from actors.errors import NotReady
from collective.errors import OutOfResources
from collective.scopes import current_call

if TYPE_CHECKING:
    from collections.abc import Callable

    from collective.scopes import Call


class Job:
    """One plain method on its way through a worker thread. Made, awaited and cancelled on the loop."""

    def __init__(self, function: Callable[[], Any]) -> None:
        self.loop = asyncio.get_running_loop()
        self.result: asyncio.Future[tuple[Any, BaseException | None]] = self.loop.create_future()
        self.ended: asyncio.Future[None] = self.loop.create_future()
        self.call = current_call()
        """The call of several actors that it belongs to."""
        self.started = False
        self._function = function
        self._context = copy_context()
        self._cancelled = False
        self._held: threading.Event | None = None
        self._let_go = False
        self._inner: set[asyncio.Task[Any]] = set()
        self._thread = 0
        self.since = time.time_ns()
        self.waits_for: asyncio.Task[Any] | None = None
        """What its thread has the loop do, and waits for."""

    def refuse(self, error: Exception) -> None:
        """Fail it, where it waits for a thread."""
        self._cancelled = True
        if not self.result.done():
            self.result.set_result((None, error))

    async def cancel(self) -> None:
        """Keep it from starting, or from coming back to the loop, and wait for what it had the loop do.

        The thread itself cannot be interrupted; its result is dropped.
        """
        self._cancelled = True
        while self._inner:
            for task in self._inner:
                task.cancel()
            await asyncio.wait(self._inner)

    def work(self) -> None:
        """Run it; in the worker thread."""
        value, error = None, None
        self._thread = threading.get_ident()
        self.started = True
        if not self._cancelled:
            try:
                value = self._context.run(self._run)
            except BaseException as raised:  # even SystemExit is the caller's to hear, and must not end the thread
                error = raised
        self._context = Context()  # The other has this job in it, and its result would wait for the garbage collector.
        del self._function  # It has the arguments in it, and their memory is somebody else's.
        try:
            self.loop.call_soon_threadsafe(self._end, value, error)
        except RuntimeError:
            # The loop has closed: the actor is gone, and nobody waits.
            return
        if self._held is not None:
            self._held.wait()

    def hold(self) -> None:
        """Have the worker thread start nothing else before `let_go`, though this job ends; in the worker thread."""
        self._held = threading.Event()
        if self._let_go:  # before it was held: its call was cancelled
            self._held.set()

    def let_go(self) -> None:
        """End what `hold` began, if it did."""
        self._let_go = True
        if self._held is not None:
            self._held.set()

    def run_on_loop(self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run an async function on the actor's loop and wait for it; in the worker thread."""
        answer: concurrent.futures.Future[Any] = concurrent.futures.Future()
        context = copy_context()
        thread = threading.get_ident()

        async def invoke() -> tuple[Any, BaseException | None]:
            try:
                return await function(*args, **kwargs), None
            except asyncio.CancelledError:
                raise
            except BaseException as error:  # a SystemExit that left a task would end the loop
                return None, error

        def end(task: asyncio.Task[tuple[Any, BaseException | None]]) -> None:
            self._inner.discard(task)
            if self.waits_for is task:
                self.waits_for = None
            value, error = (None, asyncio.CancelledError()) if task.cancelled() else task.result()
            if error is None:
                answer.set_result(value)
            else:
                answer.set_exception(error)

        def start() -> None:
            if self._cancelled:
                answer.set_exception(asyncio.CancelledError())
                return
            task = self.loop.create_task(invoke(), context=context)
            self._inner.add(task)
            if thread == self._thread:
                self.waits_for = task
            task.add_done_callback(end)

        try:
            self.loop.call_soon_threadsafe(start)
        except RuntimeError as error:
            raise NotReady("from_thread.run: the actor's event loop has closed") from error
        return answer.result()

    def _run(self) -> Any:
        current_job.set(self)
        return self._function()

    def _end(self, value: Any, error: BaseException | None) -> None:
        if not self.result.done():
            self.result.set_result((value, error))
        if not self.ended.done():
            self.ended.set_result(None)


current_job: ContextVar[Job | None] = ContextVar("gangline_job", default=None)


class Workers:
    """At most `count` threads that run jobs, starting them in the order of `submit`.

    The threads start when they are needed. They are daemons: a method that never returns must not keep the process.
    """

    def __init__(self, name: str, count: int) -> None:
        if count < 1:
            raise ValueError(f"{name}: threads is {count}; plain methods need at least one")
        self._name = name
        self._count = count
        self._started = 0
        self._jobs: SimpleQueue[Job | None] = SimpleQueue()
        self._unfinished: dict[asyncio.Future[None], Job] = {}

    def calls(self) -> tuple[list[Call | None], list[Call]]:
        """Return the calls that hold all of the threads, and those that wait for one."""
        started = [job.call for job in self._unfinished.values() if job.started]
        waiting = [job.call for job in self._unfinished.values() if not job.started and job.call is not None]
        return (started, waiting) if len(started) >= self._count else ([], [])

    def holders(self) -> list[Job]:
        """Return the jobs that hold the threads; none where a thread is free."""
        started = [job for job in self._unfinished.values() if job.started]
        return started if len(started) >= self._count else []

    def submit(self, job: Job) -> None:
        """Queue a job.

        Raises:
            OutOfResources: it needs another thread, and the system has none.
        """
        if self._started < min(self._count, len(self._unfinished) + 1):
            self._start_thread()
        self._unfinished[job.ended] = job
        job.ended.add_done_callback(self._unfinished.pop)
        self._jobs.put(job)

    def _start_thread(self) -> None:
        name = f"{self._name} worker {self._started + 1}"
        # A context of its own: a thread must not keep the one of the call that started it alive.
        thread = threading.Thread(target=Context().run, args=(self._serve,), name=name, daemon=True)
        try:
            thread.start()
        except RuntimeError as error:
            exhausted = OutOfResources.of(error, f"the process of {self._name} ({os.getpid()})", "run a plain method")
            raise exhausted or error from error
        self._started += 1

    async def aclose(self) -> None:
        """Wait until every job has ended, and end the threads; where the wait is cancelled, each after its job."""
        try:
            if self._unfinished:
                await asyncio.wait(self._unfinished)
        finally:
            for _ in range(self._started):
                self._jobs.put(None)
            self._started = 0

    def _serve(self) -> None:
        while (job := self._jobs.get()) is not None:
            job.work()
            del job
