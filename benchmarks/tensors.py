"""The actors that `benchmarks.store` moves tensors between."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import numpy as np

from actors import Actor

if TYPE_CHECKING:
    from collective import TensorRef


class Giver(Actor):
    """Puts the same array again and again."""

    def __init__(self, nbytes: int) -> None:
        self.array = np.ones(nbytes, np.uint8)

    async def give(self) -> TensorRef:
        """Put it."""
        return await self.store.put(self.array)

    async def puts(self, repeat: int) -> tuple[list[float], list[float]]:
        """Return the seconds of puts, and of copies to the same memory."""
        target = np.empty_like(self.array)
        np.copyto(target, self.array)
        await self.give()
        ours, theirs = [], []
        for _ in range(repeat):
            start = time.perf_counter()
            ref = await self.give()
            ours.append(time.perf_counter() - start)
            del ref
            start = time.perf_counter()
            np.copyto(target, self.array)
            theirs.append(time.perf_counter() - start)
        return ours, theirs


class Taker(Actor):
    """Reads."""

    async def take(self, ref: TensorRef) -> int:
        """Look at a tensor's last byte."""
        return int((await ref)[-1])
