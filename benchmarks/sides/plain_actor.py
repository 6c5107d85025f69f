"""The plain Ray actor that `start` and `idle` compare with; it imports nothing of Gangline."""

from __future__ import annotations

import os
from datetime import timedelta


class PlainIdle:
    """Does nothing."""

    async def ready(self) -> int:
        """Answer with the process id."""
        return os.getpid()

    async def form(self, port: int, rank: int, size: int) -> None:
        """Form a process group, as one would by hand."""
        from torch import distributed

        store = distributed.TCPStore("127.0.0.1", port, size, rank == 0, wait_for_workers=False)
        self.group = distributed.ProcessGroupGloo(store, rank, size, timedelta(seconds=60))
