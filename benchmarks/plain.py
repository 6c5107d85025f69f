"""The plain Ray actor that `benchmarks.start` compares with; it imports nothing of Gangline."""

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


class PlainGiver:
    """Returns the same array again and again."""

    def __init__(self, nbytes: int) -> None:
        import numpy as np

        self.array = np.ones(nbytes, np.uint8)

    def give(self) -> object:
        """Return it; Ray stores it."""
        return self.array


class DirectGiver:
    """Returns the same tensor again and again, over Ray Direct Transport."""

    def __init__(self, nbytes: int) -> None:
        import torch

        self.tensor = torch.ones(nbytes, dtype=torch.uint8)

    def give(self) -> object:
        """Return it; Ray keeps it here until it is wanted elsewhere."""
        return self.tensor


class PlainTaker:
    """Reads."""

    def take(self, array: object) -> int:
        """Look at a tensor's last byte."""
        return int(array[-1])  # type: ignore[index]
