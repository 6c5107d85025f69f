"""The life of one Gloo group: meeting, issuing operations in order, landing them, and letting go.

Threads: operations are issued on the loop where that is quick, else on the session's worker; they land on Gloo's own
threads, which bring the result to the caller's memory and then tell the loop. The process group is made and released on
the worker. torch is imported there too: it takes seconds.
"""

from __future__ import annotations

import asyncio
import atexit
import ctypes
import os
import threading
import time
from typing import TYPE_CHECKING, Final, NamedTuple, TypeAlias

from collective._backends._gloo_board import Board
from collective._backends._worker import Worker
from collective._gate import Gate
from collective.errors import BackendError, OutOfResources

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import distributed

    from collective._backends._gloo_mesh import Mesh
    from collective.abc import PlaneContext

SHORT: Final = 1 << 20
"""Bytes that are staged on the loop: a fraction of a millisecond."""
_GRACE: Final = 0.25
"""Seconds that transfers under way get to end by themselves before their connections are cut."""
_EXIT: Final = 0.5
"""Seconds that the interpreter's exit may wait for Gloo to let go, which takes milliseconds or, rarely, minutes."""


class Moves(NamedTuple):
    """What an operation has issued."""

    works: list[distributed.Work]
    land: Callable[[], None]
    """Brings the result to the caller's memory, through the gate, when all of `works` are done."""


Issue: TypeAlias = "Callable[[Mesh | None], Moves]"
"""Stages and issues an operation. It gets None in a group of one, where nothing moves."""


class Session:
    """One process group, from meeting to letting go. Every method is called on the loop, unless it says otherwise."""

    def __init__(self, context: PlaneContext) -> None:
        self.gate = Gate()
        self._context = context
        self._board = Board(self._spread)
        self._flights = _Flights()
        self._lock = threading.Lock()
        self._opened = False
        self._ended = False
        self._mesh: Mesh | None = None
        self._worker: Worker | None = None
        self._loop: asyncio.AbstractEventLoop

    async def open(self) -> None:
        """Meet the other members. Raises: BackendError."""
        if self._ended or self._worker is not None:
            raise BackendError(f"gloo: group {self._context.group!r} was opened before")
        self._loop = asyncio.get_running_loop()
        connected: asyncio.Future[None] = self._loop.create_future()
        try:
            self._worker = Worker(f"gloo {self._context.group}")
        except RuntimeError as error:
            raise _failure(error) from error
        _living.add(self)
        self._flights.depart()
        self._worker.submit(lambda: self._arrive(connected))
        await connected
        self._opened = True

    def hear(self, message: bytes) -> None:
        """Take what another member published."""
        self._board.hear(message)

    def start(self, nbytes: int, issue: Issue, *, waits: bool = False) -> asyncio.Future[None]:
        """Issue an operation after those before it, and return its completion.

        :param nbytes: how much is copied and reduced on the way.
        :param waits: whether issuing it waits for other members.
        """
        worker, done = self._opened_worker(), self._loop.create_future()
        self._flights.depart()
        if not waits and nbytes <= SHORT and worker.idle:
            self._fly(issue, done)
        else:
            worker.submit(lambda: self._fly(issue, done))
        return done

    def finished(self) -> asyncio.Future[None]:
        """Return a completion that is done: of an operation with nothing in it."""
        self._opened_worker()
        done: asyncio.Future[None] = self._loop.create_future()
        done.set_result(None)
        return done

    def abandon(self) -> None:
        """End it now. What is pending stays so here, and fails at the other members, or stays pending there."""
        if self._end() and not self._flights.landed.is_set():
            try:
                threading.Thread(target=self._cut_off, name=f"gloo {self._context.group} cut", daemon=True).start()
            except RuntimeError:  # no more threads: the loop does it, as it would be a hang without
                self._loop.call_later(_GRACE, self._cut_again)

    async def aclose(self) -> None:
        """End it when nothing is pending, and wait until Gloo's threads have ended."""
        if not self._flights.landed.is_set():
            self.abandon()
        elif not self._ended and self._worker is not None:
            released: asyncio.Future[None] = self._loop.create_future()
            self._end(lambda: self._settle(released, None))
            await released

    def _opened_worker(self) -> Worker:
        if not self._opened or self._ended or self._worker is None:
            raise BackendError(f"gloo: group {self._context.group!r} is not open on rank {self._context.rank}")
        return self._worker

    def _arrive(self, connected: asyncio.Future[None]) -> None:
        error = self._connect()
        self._flights.land()
        self._settle(connected, error)

    def _connect(self) -> Exception | None:
        """Make the process group, on the worker."""
        if self._context.size == 1:
            return None
        try:
            from collective._backends._gloo_mesh import Mesh

            context = self._context
            self._mesh = Mesh(
                self._board, context.rank, context.size, interface=context.interface, timeout=context.timeout
            )
            self._mesh.connect()
        except Exception as error:
            return _failure(error)
        return None

    def _fly(self, issue: Issue, done: asyncio.Future[None]) -> None:
        if self._ended:
            self._flights.land()
            return
        try:
            works, land = issue(self._mesh)
            if works:
                from collective._backends._gloo_mesh import when_done

                when_done(works, lambda error: self._land(land, done, error))
                return
        except Exception as error:
            self._land(_nothing, done, error)
        else:
            self._land(land, done, None)

    def _land(self, land: Callable[[], None], done: asyncio.Future[None], error: Exception | None) -> None:
        """Finish an operation, on the thread on which it ended."""
        if error is None:
            try:
                land()
            except Exception as failed:
                error = failed
        self._flights.land()  # first: who sees the completion may close at once
        if self.gate.is_open:
            self._settle(done, None if error is None else _failure(error))

    def _settle(self, future: asyncio.Future[None], error: Exception | None) -> None:
        """Complete a future of the loop's, from any thread."""

        def complete() -> None:
            if not future.done():
                if error is None:
                    future.set_result(None)
                else:
                    future.set_exception(error)

        self._call_soon(complete)

    def _spread(self, message: bytes) -> None:
        """Tell the other members what this one published, from the worker."""

        def tell() -> None:
            for rank in range(self._context.size):
                if rank != self._context.rank and not self._ended:
                    self._context.tell(rank, message)

        self._call_soon(tell)

    def _call_soon(self, callback: Callable[[], None]) -> None:
        try:
            self._loop.call_soon_threadsafe(callback)
        except RuntimeError:
            if not self._loop.is_closed():
                raise
            # Nobody is left to be told.

    def _end(self, then: Callable[[], None] | None = None) -> bool:
        """Take no more operations, write nothing any more, have the process group released; False if done before."""
        with self._lock:
            if self._ended:
                return False
            self._ended = True
        self.gate.shut()
        self._board.close()
        if self._worker is not None:
            self._worker.submit(self._release)
            if then is not None:
                self._worker.submit(then)
            self._worker.stop()
        return True

    def _cut_off(self) -> None:
        """Cut the connections of what is still pending after a while, until nothing is; blocks for that."""
        while not self._flights.landed.wait(_GRACE):
            self._cut()

    def _cut_again(self) -> None:
        """Do the same from the loop, a cut at a time."""
        if not self._flights.landed.is_set():
            self._cut()
            self._loop.call_later(_GRACE, self._cut_again)

    def _cut(self) -> None:
        mesh = self._mesh
        if mesh is not None and not self._flights.landed.is_set():
            mesh.sever()

    def _release(self) -> None:
        """Let go of the process group once nothing moves any more, on the worker, after all else."""
        self._flights.landed.wait()
        if self._mesh is not None:
            self._mesh.close()
            self._mesh = None
        _living.discard(self)

    def join(self, timeout: float) -> bool:
        """Wait until it has been released, at most `timeout` seconds; return whether it was. Blocks."""
        return self._worker is None or self._worker.join(timeout)

    def leak(self) -> None:
        """Keep the process group for ever: its destructor would wait for what never ends."""
        if self._mesh is not None:
            ctypes.pythonapi.Py_IncRef(ctypes.py_object(self._mesh))


class _Flights:
    """Counts the operations between issue and landing."""

    def __init__(self) -> None:
        self.landed = threading.Event()
        self.landed.set()
        self._lock = threading.Lock()
        self._count = 0

    def depart(self) -> None:
        with self._lock:
            self._count += 1
            self.landed.clear()

    def land(self) -> None:
        with self._lock:
            self._count -= 1
            if self._count == 0:
                self.landed.set()


def _nothing() -> None:
    pass


def _failure(error: Exception) -> BackendError:
    """Return an error as this package's."""
    if isinstance(error, BackendError):
        return error
    exhausted = OutOfResources.of(error, f"this process ({os.getpid()})", "move data")
    failure = BackendError(f"gloo: {exhausted or error or type(error).__name__}")
    failure.__cause__ = error
    return failure


_living: set[Session] = set()
"""Sessions that hold a process group, or may come to: one whose last reference was lost elsewhere, perhaps on a thread
of Gloo's, would be destroyed there, and wait for itself."""


def _end_all() -> None:
    """End what still lives when the interpreter exits: a thread of Gloo's that calls into a finalized one aborts it."""
    deadline = time.monotonic() + _EXIT
    sessions = list(_living)
    for session in sessions:
        session._end()  # not by `abandon`: no thread can be started any more
        session._cut()
    for session in sessions:
        if not session.join(max(0.0, deadline - time.monotonic())):
            session.leak()


def _forget_all() -> None:
    """Leave the parent's process groups alone in a forked child, which has none of their threads."""
    for session in _living:
        session.leak()
    _living.clear()


atexit.register(_end_all)
os.register_at_fork(after_in_child=_forget_all)
