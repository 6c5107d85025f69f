"""Waiting for processes that are not our children to be gone."""

from __future__ import annotations

import asyncio
import fcntl
import os
import signal
import struct
from typing import TYPE_CHECKING, Final

from actors._fates import SECONDS

if TYPE_CHECKING:
    from actors.abc import ProcessId

_INFO: Final = struct.Struct("<Q52xi")
"""struct pidfd_info of linux/pidfd.h, its first version: what is asked for, and the exit code; the rest is left out."""
_GET_INFO: Final = 3 << 30 | _INFO.size << 16 | 0xFF << 8 | 11
_EXIT: Final = 1 << 3
_POLL: Final = 0.002


class PidWatch:
    """Knows when a process of this machine is gone, and can end it for certain. Belongs to a loop."""

    def __init__(self, process: ProcessId) -> None:
        loop = self._loop = asyncio.get_running_loop()
        self.pid = process.pid
        self._ended: asyncio.Future[None] = loop.create_future()
        self.fate: asyncio.Future[str] = loop.create_future()
        """How it ended, for people, once it has and that is known; "" where it cannot be."""
        try:
            self._fd = os.pidfd_open(process.pid)
        except ProcessLookupError:
            self._fd = -1
            self._ended.set_result(None)
            self.fate.set_result("")
        else:
            loop.add_reader(self._fd, self._on_end)

    def kill(self) -> None:
        """Send SIGKILL, to this process and no other."""
        if self._fd >= 0:
            try:
                signal.pidfd_send_signal(self._fd, signal.SIGKILL)
            except ProcessLookupError:
                return

    async def gone(self) -> None:
        """Return once it has ended and its parent has noticed, so that its pid names nothing any more."""
        await asyncio.shield(self._ended)
        # No event tells that a process was reaped. Ray's parent process does it at once.
        pause = 0.0005
        while self._fd >= 0 and self._unreaped():
            await asyncio.sleep(pause)
            pause = min(2 * pause, 0.05)

    def close(self) -> None:
        """Stop watching. Idempotent."""
        if self._fd >= 0:
            if not self._loop.is_closed():
                self._loop.remove_reader(self._fd)
            os.close(self._fd)
            self._fd = -1
        if not self.fate.done() and not self._loop.is_closed():
            self.fate.set_result("")

    def _on_end(self) -> None:
        self._loop.remove_reader(self._fd)
        if not self._ended.done():
            self._ended.set_result(None)
        self._look(self._loop.time() + SECONDS)

    def _look(self, until: float) -> None:
        """Learn how it ended, once its parent has noticed: there is no event for that."""
        if self.fate.done():
            return
        try:
            how = _how_it_ended(self._fd)
        except OSError:  # before Linux 6.15 only its parent is told
            how = ""
        if how is None and self._loop.time() < until:
            self._loop.call_later(_POLL, self._look, until)
        else:
            self.fate.set_result(how or "")

    def _unreaped(self) -> bool:
        try:
            signal.pidfd_send_signal(self._fd, 0)
        except ProcessLookupError:
            return False
        return True


def _how_it_ended(descriptor: int) -> str | None:
    """Return how a process ended; None while its parent has not noticed."""
    answer = bytearray(_INFO.pack(_EXIT, 0))
    fcntl.ioctl(descriptor, _GET_INFO, answer)
    known, status = _INFO.unpack(answer)
    if not known & _EXIT:
        return None
    code = os.waitstatus_to_exitcode(status)
    if code >= 0:
        return f"its process ended with exit code {code}"
    name = signal.Signals(-code).name if -code in list(signal.Signals) else f"signal {-code}"
    return f"its process was ended by {name}"
