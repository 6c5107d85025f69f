"""A thread of one data plane, for what must not run on the loop."""

from __future__ import annotations

import queue
import threading
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable


class Worker:
    """A daemon thread that runs jobs in the order in which one other thread submits them. Jobs do not raise.

    Daemon, because a job may wait for a library that cannot be interrupted, and that must not hold up the interpreter.
    """

    def __init__(self, name: str) -> None:
        self._jobs: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._unfinished = 0
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    @property
    def idle(self) -> bool:
        """Whether every job that was submitted has returned."""
        return self._unfinished == 0

    def submit(self, job: Callable[[], None]) -> None:
        """Run a job after those submitted before."""
        with self._lock:
            self._unfinished += 1
        self._jobs.put(job)

    def stop(self) -> None:
        """End the thread after the jobs submitted so far."""
        self._jobs.put(None)

    def join(self, timeout: float) -> bool:
        """Wait for the thread to end, at most `timeout` seconds; return whether it did."""
        self._thread.join(timeout)
        return not self._thread.is_alive()

    def _run(self) -> None:
        while (job := self._jobs.get()) is not None:
            job()
            del job  # nothing that it holds may wait here for the next one
            with self._lock:
                self._unfinished -= 1
