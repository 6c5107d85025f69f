"""What one rank does within its own memory for a repartition: copying what stays, and reducing what came."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from collective import reductions
from collective._core.offload import LONG
from collective._core.streams import DST, SRC, cut, view_of
from collective._gate import PIECE

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from collective._boxes import Box
    from collective._gate import Gate
    from collective._pairs import Part, Sum
    from collective.types import ReduceOp


class Job(NamedTuple):
    """One tensor at one rank.

    :ivar source: what the rank holds of it, or None; only read.
    :ivar result: what it shall hold, or None.
    """

    part: Part
    source: np.ndarray | None
    result: np.ndarray | None
    op: ReduceOp | None


class Arithmetic:
    """What one rank does for all tensors of one operation, as far as its gate is open."""

    def __init__(self, rank: int, jobs: Sequence[Job], gate: Gate) -> None:
        self._rank = rank
        self._jobs = jobs
        self._gate = gate
        self.operands = {sender: np.empty(size, np.uint8) for sender, size in self._sizes().items()}
        """The contributions of each other rank, one after the other, in bytes."""

    @property
    def long(self) -> bool:
        """Whether it takes longer than the loop can wait."""
        moved = 0
        for job in self._jobs:
            item = job.source if job.source is not None else job.result
            boxes = [*job.part.keeps, *(total.box for total in job.part.sums for _ in total.senders)]
            moved += sum(box.volume for box in boxes) * item.itemsize if item is not None else 0
        return moved > LONG

    def keep(self) -> None:
        """Copy what stays."""
        for job in self._jobs:
            for box in job.part.keeps:
                assert job.source is not None
                assert job.result is not None
                for part in _chunks(box, job.source.itemsize):
                    with self._gate as is_open:
                        if not is_open:
                            return
                        view_of(job.result, part, DST)[...] = view_of(job.source, part, SRC)

    def reduce(self) -> None:
        """Reduce the operands, which have all come."""
        used = dict.fromkeys(self.operands, 0)
        for job in self._jobs:
            for total in job.part.sums:
                assert job.result is not None
                for part in _chunks(total.box, job.result.itemsize):
                    with self._gate as is_open:
                        if not is_open:
                            return
                        self._reduce(job, total, part, used)
        self.operands.clear()

    def _sizes(self) -> dict[int, int]:
        sizes: dict[int, int] = {}
        for job in self._jobs:
            for total in job.part.sums:
                assert job.result is not None
                for sender in total.senders:
                    if sender != self._rank:
                        sizes[sender] = sizes.get(sender, 0) + total.box.volume * job.result.itemsize
        return sizes

    def _reduce(self, job: Job, total: Sum, box: Box, used: dict[int, int]) -> None:
        assert job.result is not None
        assert job.op is not None
        operands = [self._operand(job, box, sender, used) for sender in total.senders]
        out = view_of(job.result, box, DST)
        direct = out.flags.c_contiguous
        target = out.reshape(-1) if direct else np.empty(out.size, out.dtype)
        reductions.reduce_arrays(operands, job.op, target)
        if not direct:
            out[...] = target.reshape(out.shape)

    def _operand(self, job: Job, box: Box, sender: int, used: dict[int, int]) -> np.ndarray:
        if sender == self._rank:
            assert job.source is not None
            return np.ascontiguousarray(view_of(job.source, box, SRC)).reshape(-1)
        assert job.result is not None
        start = used[sender]
        used[sender] = stop = start + box.volume * job.result.itemsize
        return self.operands[sender][start:stop].view(job.result.dtype)


def _chunks(box: Box, itemsize: int) -> Iterator[Box]:
    """Yield a box in parts, for each of which whoever shuts the gate may wait."""
    return cut(box, max(1, PIECE // itemsize))
