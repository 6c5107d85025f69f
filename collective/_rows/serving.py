"""How a producer gives its rows to one consumer, which asks for them by number."""

from __future__ import annotations

import asyncio
import pickle
from collections import deque
from typing import TYPE_CHECKING

import numpy as np

from collective._core.offload import LONG, offload
from collective._rows.setup import Line
from collective.abc import LARGE

if TYPE_CHECKING:
    from collective._core.warm import Pool
    from collective._rows.formats import Format, Storage
    from collective._rows.ledger import Positions
    from collective.abc import Buffer, Channel

_MESSAGE = 1 << 20
"""Bytes after which a message of rows takes up no more pieces."""


class Outlet(Line):
    """One consumer, as a producer sees it."""

    def __init__(self, rank: int, positions: Positions) -> None:
        super().__init__()
        self.rank = rank
        self.wanted: deque[tuple[int, int]] = deque()
        self.wake = asyncio.Event()
        self.drained = False
        """Whether it wants no more rows."""
        self.parted = False
        """Whether its user has come to the end."""
        self.done = positions

    async def send(self, storage: Storage, form: Format, channel: Channel, pool: Pool) -> int:
        """Send the next pieces that it wants in one message, and release them; return how many rows that were."""
        spans: list[tuple[int, int]] = []
        parts: list[list[int]] = []
        buffers: list[Buffer] = []
        nbytes = 0
        while self.wanted and nbytes < _MESSAGE:
            span = self.wanted.popleft()
            piece = storage.piece(*span)
            made = piece.buffers
            if piece.encode is not None:
                made = await offload(piece.encode) if piece.nbytes > LONG else piece.encode()
            spans.append(span)
            parts.append(piece.parts)
            buffers += made
            nbytes += sum(len(buffer) for buffer in made)
        # Links of shared memory do not copy large buffers, and small ones cost as much as their bytes.
        joined = form.exact and len(buffers) > 1 and min(map(len, buffers)) <= LARGE
        if joined:
            memory = pool.arena(nbytes)
            if memory is None:
                buffers = [b"".join(buffers)]
            else:
                np.concatenate([np.frombuffer(buffer, np.uint8) for buffer in buffers], out=memory)
                buffers = [memory.data]
        await channel.send(pickle.dumps(("rows", joined, parts), 5), buffers)
        for first, stop in spans:
            storage.release(first, stop)
        return sum(stop - first for first, stop in spans)
