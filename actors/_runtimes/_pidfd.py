"""Waiting for processes that are not our children to be gone."""

from __future__ import annotations

import asyncio
import os
import signal
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from actors.abc import ProcessId


class PidWatch:
    """Knows when a process of this machine is gone, and can end it for certain. Belongs to a loop."""

    def __init__(self, process: ProcessId) -> None:
        loop = self._loop = asyncio.get_running_loop()
        self.pid = process.pid
        self._ended: asyncio.Future[None] = loop.create_future()
        try:
            self._fd = os.pidfd_open(process.pid)
        except ProcessLookupError:
            self._fd = -1
            self._ended.set_result(None)
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

    def _on_end(self) -> None:
        self._loop.remove_reader(self._fd)
        if not self._ended.done():
            self._ended.set_result(None)

    def _unreaped(self) -> bool:
        try:
            signal.pidfd_send_signal(self._fd, 0)
        except ProcessLookupError:
            return False
        return True
