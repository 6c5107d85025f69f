"""Joining a running Ray, or starting a one-machine one."""

from __future__ import annotations

import logging
import math
import os
import queue
import signal
import socket
import sys
import threading
import warnings
from typing import TYPE_CHECKING, Any

import ray
from ray._private.services import canonicalize_bootstrap_address

from scheduling.background import for_thread
from scheduling.errors import CpusOversubscribed, RayUnavailable
from scheduling.machine import count_cpus

if TYPE_CHECKING:
    from collections.abc import Callable

_logger = logging.getLogger(__name__)

OBJECT_STORE_BYTES = 512 << 20
"""Gangs move their data over links; Ray's object store holds what user code puts there, and spills beyond this."""
_CONNECT = 5.0
"""Seconds that the cluster's head is given to answer."""

_started_session: str | None = None
"""The session of the Ray that this process started itself."""


async def ensure_ray(total_cpu: float) -> None:
    """Do what `scheduling.ensure_ray` says."""
    stretched = None if ray.is_initialized() else await _starter.run(lambda: _join_or_start(total_cpu))
    _exit_on_sigterm()
    if stretched is not None:
        warnings.warn(stretched, CpusOversubscribed, stacklevel=3)


def started_here() -> bool:
    """Return whether `ensure_ray` started the Ray that this process is connected to: nothing adds nodes to it."""
    return _started_session is not None and _session() == _started_session


def _exit_on_sigterm() -> None:
    """Let SIGTERM end the process by SystemExit, so that gangs and Ray are torn down; a handler of the user's stays.

    `ray.init` does so itself where it runs in the main thread. Killed without it, no actor's `teardown` runs, and of a
    Ray that was started here some processes stay for a minute, until they miss the others.
    """
    if threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
        signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))


def _session() -> str:
    session: str = ray.get_runtime_context().get_session_name()
    return session


class _Starter:
    """One thread in which every `ray.init` happens, one at a time; it lives as long as the process.

    Ray's processes ask the kernel to be killed with their parent, and the kernel takes the parent to be the thread that
    started them (prctl(2), PR_SET_PDEATHSIG): started from a passing thread, Ray dies with it.
    """

    def __init__(self) -> None:
        self._guard = threading.Lock()
        self._thread: threading.Thread | None = None
        self._work: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()

    async def run(self, function: Callable[[], str | None]) -> str | None:
        """Run `function` in the thread. Cancelled, the function still runs to its end."""
        future, work = for_thread(function)
        with self._guard:
            if self._thread is None or not self._thread.is_alive():  # or it could not be started
                self._thread = threading.Thread(target=_serve, args=(self._work,), name="ray starter", daemon=True)
                self._thread.start()
            self._work.put(work)
        return await future


def _serve(works: queue.SimpleQueue[Callable[[], None]]) -> None:
    while True:
        works.get()()


_starter = _Starter()


def _in_child() -> None:
    global _starter
    _starter = _Starter()  # its thread stayed in the parent, and another one may have held the lock


os.register_at_fork(after_in_child=_in_child)


def _join_or_start(total_cpu: float) -> str | None:
    """Connect; return a warning where a Ray was started with more CPUs than there are."""
    if ray.is_initialized():  # another gang was faster
        return None
    address = _find_running()
    if address is None:
        return _start(total_cpu)
    try:
        _init(address=address)
    except (ConnectionError, RuntimeError) as error:
        raise RayUnavailable(f"could not join the Ray at {address}: {error}") from error
    return None


def _find_running() -> str | None:
    """Return the address of the Ray to join, as `ray.init()` finds it: RAY_ADDRESS, else that of the last `ray start`.

    (Not any Ray on the machine: one that another program started for itself ends with that program.)
    """
    named = os.environ.get("RAY_ADDRESS", "")
    if "://" in named:
        raise RayUnavailable(
            f"RAY_ADDRESS is {named!r}: gangs cannot use Ray Client; run the program on a node of the cluster"
        )
    try:
        address: str | None = canonicalize_bootstrap_address(None)  # type: ignore[arg-type]  # None is documented
    except ValueError as error:
        raise RayUnavailable(f"RAY_ADDRESS is {named!r}: {error}") from error
    # Ray would wait a minute for a head that is gone, and end the process.
    if address is None or _answers(address):
        return address
    if named:
        raise RayUnavailable(
            f"nothing answers at {address} (RAY_ADDRESS is {named!r}); start that Ray, "
            "or set RAY_ADDRESS=local for a one-machine Ray"
        )
    _logger.warning("the Ray that was last started on this machine, at %s, does not answer; starting another", address)
    return None


def _answers(address: str) -> bool:
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=_CONNECT).close()
    except OSError:
        return False
    return True


def _start(total_cpu: float) -> str | None:
    global _started_session
    real = count_cpus()
    given = max(real, math.ceil(total_cpu))
    try:
        _init(address="local", num_cpus=given, include_dashboard=False, object_store_memory=OBJECT_STORE_BYTES)
    except (OSError, RuntimeError) as error:
        raise RayUnavailable(f"could not start a one-machine Ray: {error}") from error
    _started_session = _session()
    if given == real:
        return None
    return (
        f"started a one-machine Ray with {given} CPUs, which this gang asks for; the machine has {real}, "
        "so its actors will share them"
    )


def _init(**options: Any) -> None:
    loggers = [logging.getLogger(name) for name in _EXPECTED]
    for logger in loggers:
        logger.addFilter(_is_news)
    try:
        ray.init(logging_level=logging.WARNING, **options)
    finally:
        for logger in loggers:
            logger.removeFilter(_is_news)


_EXPECTED = {
    # `_exit_on_sigterm` does it.
    "ray._private.worker": "SIGTERM handler is not set",
    # So it is in every Ray of this version: nothing to act on.
    "ray._private.authentication.authentication_token_setup": "Token authentication is enabled",
}


def _is_news(record: logging.LogRecord) -> bool:
    """Drop the warnings that every start in a thread gives."""
    return not record.getMessage().startswith(_EXPECTED[record.name])
