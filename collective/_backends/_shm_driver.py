"""Takes the steps of operations, in order: on the loop as far as that does not hold it up, else on a thread.

An operation that is short is driven on the loop. Where others are not there yet, the loop spins for a moment, if that
has paid of late, and then goes about its business until the bell rings. What is long is driven by the worker, which
takes what is queued behind it too. Every step is taken inside the gate: when `abandon` has shut that, nothing of a
caller's is touched any more. After a step that failed no other is taken: this member's phases would no longer pair with
the others'. The group breaks then.
"""

from __future__ import annotations

import contextlib
import os
import select
from collections import deque
from contextvars import Context
from time import perf_counter
from typing import TYPE_CHECKING, Any, Final, TypeVar

from collective._backends._shm_steps import POST
from collective._backends._worker import Worker
from collective._core.offload import LONG
from collective._gate import Gate
from collective.errors import BackendError

if TYPE_CHECKING:
    import asyncio

    from collective._backends._shm_segment import Segment
    from collective._backends._shm_steps import Steps

T = TypeVar("T")

INLINE: Final = LONG
"""Bytes that are copied and reduced on the loop, in one operation and in one turn."""
_SPIN_ON_LOOP: Final = 50e-6
_SPIN_ON_THREAD: Final = 20e-6
"""Seconds for which a wait spins, holding the GIL, before it sleeps."""
_WAKING: Final = 100e-6
"""Seconds that going to sleep and being woken may take."""
_PROBE: Final = 64
"""Waits after which spinning is tried again where it did not pay."""


class _Move:
    """An operation that is not done."""

    __slots__ = ("begun", "done", "nbytes", "result", "steps", "waits")

    def __init__(self, steps: Steps, nbytes: int, done: asyncio.Future[Any], result: Any) -> None:
        self.steps = steps
        self.nbytes = nbytes
        self.done = done
        self.result = result
        self.begun = False
        self.waits = False
        """Whether its next step waits for the others to post."""


class _Spin:
    """How long to spin: halved by each wait that was too long for it, restored by one that was not."""

    def __init__(self, most: float, *, crowded: bool = False) -> None:
        self._most = most
        self._crowded = crowded
        self._now = most
        self._waits = 0
        self._since = 0.0

    def until(self, segment: Segment) -> bool:
        """Spin until all have come, or for so long; return whether they have."""
        if segment.arrived:
            return True
        self._waits += 1
        budget = self._most if self._waits % _PROBE == 0 else self._now
        self._since = perf_counter()
        if budget < 2e-6:
            return False
        end = self._since + budget
        while perf_counter() < end:
            if segment.arrived:
                self._now = self._most
                return True
            if self._crowded:
                os.sched_yield()
        return False

    def learn(self) -> None:
        """Learn from how long the wait was for which this did not spin long enough: all have come now."""
        short = perf_counter() - self._since < _WAKING + self._most
        self._now = self._most if short else self._now / 2


class Driver:
    """Drives the operations of one member. Every method is called on the loop.

    :param segment: closed by the driver when it ends; None in a group of one.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, segment: Segment | None, name: str) -> None:
        self._loop = loop
        self._segment = segment
        self._name = name
        self._gate = Gate()
        """It guards the fields below as well, where the loop and the worker share them."""
        self._moves: deque[_Move] = deque()
        self._driving = False
        """Whether the loop or the worker has taken on what is queued."""
        self._on_worker = False
        self._listening = False
        self._resuming = False
        """Whether the loop goes on driving in its next turn."""
        self._worker: Worker | None = None
        # A peer in this process needs the GIL, and perhaps this very loop, to get here; one on this CPU needs the CPU.
        hopeless = (segment is not None and segment.shares_process()) or len(os.sched_getaffinity(0)) == 1
        crowded = segment is not None and segment.size > len(os.sched_getaffinity(0))
        self._loop_spin = _Spin(0.0 if hopeless else _SPIN_ON_LOOP, crowded=crowded)
        self._worker_spin = _Spin(0.0 if hopeless else _SPIN_ON_THREAD, crowded=crowded)

    def start(self, steps: Steps, nbytes: int, *, result: T | None = None) -> asyncio.Future[T]:
        """Take an operation that copies and reduces so many bytes, after those before it; its end gives `result`."""
        done: asyncio.Future[T] = self._loop.create_future()
        with self._gate:
            self._moves.append(_Move(steps, nbytes, done, result))
            idle, self._driving = not self._driving, True
        if idle:
            self._drive_on_loop()
        return done

    def abandon(self) -> None:
        """Take no more steps, and free all as soon as the worker is out of it. Idempotent."""
        if self._segment is not None and not self._ended:
            self._segment.disown()
        self._end(None)

    async def aclose(self) -> None:
        """End it, and wait until all is freed. Idempotent."""
        released: asyncio.Future[None] = self._loop.create_future()
        if self._end(released):
            await released

    @property
    def _ended(self) -> bool:
        return not self._gate.is_open

    def _end(self, released: asyncio.Future[None] | None) -> bool:
        """Take no more steps; return whether that is new, and `released` will be done."""
        if self._ended:
            return False
        self._gate.shut()
        with self._gate:
            self._moves.clear()
            if self._on_worker and self._segment is not None:
                self._segment.ring()
        self._stop_listening()
        if self._worker is None:
            self._release(released)
        else:
            self._worker.submit(lambda: self._release(released))
            self._worker.stop()
        return True

    # ---------------------------------------------------------------- on the loop

    def _drive_on_loop(self) -> None:
        left = INLINE
        while not self._ended:
            with self._gate:
                if not self._moves:
                    self._driving = False
                    return
                move = self._moves[0]
                self._on_worker = move.nbytes > INLINE and not move.begun
            if self._on_worker and self._has_worker():
                assert self._worker is not None
                self._stop_listening()
                self._worker.submit(self._drive_on_worker)
                return
            if left < move.nbytes and not move.begun and left < INLINE:
                self._resuming = True
                self._loop.call_soon(self._resume)
                return
            try:
                if not self._advance(move):
                    self._listen()
                    return
            except Exception as error:
                move.done.set_exception(_failure(error))
                return
            move.done.set_result(move.result)
            left -= move.nbytes
            with self._gate:
                self._moves.popleft()

    def _has_worker(self) -> bool:
        """Start the worker; where the system has no thread to give, the loop does its part: late is better than not."""
        if self._worker is None:
            with contextlib.suppress(RuntimeError):
                self._worker = Worker(f"shm {self._name}")
        self._on_worker = self._worker is not None
        return self._on_worker

    def _resume(self) -> None:
        self._resuming = False
        self._drive_on_loop()

    def _advance(self, move: _Move) -> bool:
        """Take steps as far as that is possible now; return whether the operation is done."""
        segment = self._segment
        while True:
            if move.waits:
                assert segment is not None
                if not self._loop_spin.until(segment) and segment.announce_sleep():
                    return False
            if not self._step(move):
                return True

    def _listen(self) -> None:
        if not self._listening and self._segment is not None:
            self._listening = True
            # In a context of its own: it must not keep that of the call that happens to be the first, nor act in it.
            Context().run(self._loop.add_reader, self._segment.bell, self._awake)

    def _stop_listening(self) -> None:
        if self._listening and self._segment is not None:
            self._listening = False
            if not self._loop.is_closed():
                self._loop.remove_reader(self._segment.bell)

    def _awake(self) -> None:
        if self._segment is not None and not self._ended:
            self._segment.announce_awake()
            if self._segment.arrived:
                self._loop_spin.learn()
            # The bell may ring once more than it was waited for; there is one driver at a time.
            if self._driving and not self._on_worker and not self._resuming:
                self._drive_on_loop()

    # -------------------------------------------------------------- on the worker

    def _drive_on_worker(self) -> None:
        while True:
            with self._gate:
                if self._ended or not self._moves:
                    self._driving = self._on_worker = False
                    return
                move = self._moves[0]
            try:
                while self._step(move):
                    if move.waits and not self._wait():
                        break
            except Exception as error:
                self._tell(move.done, None, _failure(error))
                return
            with self._gate:
                if not self._ended:
                    self._moves.popleft()
                    self._tell(move.done, move.result, None)
            del move

    def _wait(self) -> bool:
        """Wait for the others on the worker; return False where the work was abandoned."""
        segment = self._segment
        assert segment is not None
        if self._worker_spin.until(segment):
            return True
        poll = select.poll()
        poll.register(segment.bell, select.POLLIN)
        while not self._ended and segment.announce_sleep():
            poll.poll()
            segment.announce_awake()
        self._worker_spin.learn()
        return not self._ended

    # ------------------------------------------------------------------- on either

    def _step(self, move: _Move) -> bool:
        """Take a step; return False after the last one."""
        with self._gate as is_open:
            if not is_open:
                return False
            move.begun = True
            more = next(move.steps, None)
            move.waits = bool(more)
            if more == POST and self._segment is not None:
                self._segment.post()
            return more is not None

    def _tell(self, done: asyncio.Future[Any], result: Any, error: Exception | None) -> None:
        def complete() -> None:
            if not done.done():
                if error is None:
                    done.set_result(result)
                else:
                    done.set_exception(error)

        try:
            self._loop.call_soon_threadsafe(complete)
        except RuntimeError:
            if not self._loop.is_closed():
                raise
            # Nobody is left to be told.

    def _release(self, released: asyncio.Future[None] | None) -> None:
        segment, self._segment = self._segment, None
        if segment is not None:
            segment.close()
        if released is not None:
            self._tell(released, None, None)


def _failure(error: Exception) -> BackendError:
    failure = BackendError(f"shm: {type(error).__name__}: {error}")
    failure.__cause__ = error
    return failure
