"""The operations of the "shm" data plane, each as a generator of one member's steps.

A step reads and writes memory and never waits. A generator yields POST when this member has written its part of a phase
into its slot: the phase is then posted, and the next step comes when all members have posted it. It yields POSTED where
it has posted the phase itself, and REST to let others in between two steps. So every phase is an exchange among all.
Phases alternate between two slots: a member writes a slot again two phases later, after all have posted the phase
between, hence after they have read this one.

All members take the same number of phases for an operation, which follows from what they agreed on, and from what they
show in its first phase: in an alltoall their sizes, else whose input lies in a block that all can read (`_Inputs`).
"""

from __future__ import annotations

from itertools import accumulate
from typing import TYPE_CHECKING, Final, TypeAlias

import numpy as np

from collective.errors import BackendError
from collective.reductions import reduce_arrays
from collective.types import ReduceOp

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Sequence

    from collective._backends._shm_segment import Segment

Steps: TypeAlias = "Generator[int, None, None]"
REST, POST, POSTED = range(3)

SHORT: Final = 16 << 10
"""Bytes up to which every member reduces the whole, in one phase."""
_PIECE: Final = 1 << 20
"""Bytes that a member works on in one step by itself."""


class _Inputs:
    """Where the inputs of an operation lie: in their members' blocks, or where they have to be copied from to be seen.

    `shown` is set after the first phase, into which each member writes where its own lies.
    """

    def __init__(self, segment: Segment, own: np.ndarray | None, sizes: Sequence[int]) -> None:
        """Say where this member's input lies, if it has one; the members' inputs have so many bytes."""
        self._segment = segment
        self._sizes = sizes
        offset = None if own is None else segment.blocks.offset_of(own)
        self.in_place = offset is not None
        """Whether this member's input need not be copied."""
        segment.rows[segment.rank][segment.writing][0] = -1 if offset is None else offset
        self.blocks: dict[int, np.ndarray] = {}
        """The inputs that can be read in place, this member's own aside, by rank; from the first phase on."""
        self.all_in_place = False
        self._looked = False

    def look(self) -> None:
        """After the first phase, see where the others' lie."""
        if not self._looked:
            self._looked = True
            segment = self._segment
            for other in segment.others:
                offset = int(segment.rows[other][segment.reading][0])
                if offset >= 0:
                    self.blocks[other] = segment.blocks.view(other, offset, self._sizes[other])
            self.all_in_place = self.in_place and len(self.blocks) == len(segment.others)

    def check(self) -> None:
        """Raise where what was read in place may have been changed meanwhile: it is not to be passed on."""
        for other in self.blocks:
            if not self._segment.owns(other):
                raise BackendError(f"rank {other} gave up while its input was read in place")

    @property
    def lent(self) -> bool:
        """Whether some member's input is read in place, so that all must wait until all have read."""
        return self._looked and (self.in_place or bool(self.blocks))


def nothing() -> Steps:
    """Take no step."""
    yield from ()


def copy_alone(target: np.ndarray, source: np.ndarray) -> Steps:
    """Copy this member's own part."""
    step = max(1, _PIECE // target.itemsize)
    for start in range(0, target.size, step):
        target[start : start + step] = source[start : start + step]
        yield REST


def reduce_alone(source: np.ndarray, target: np.ndarray, op: ReduceOp) -> Steps:
    """Reduce in a group of one."""
    step = max(1, _PIECE // target.itemsize)
    for start in range(0, target.size, step):
        reduce_arrays([source[start : start + step]], op, target[start : start + step])
        yield REST


def exchange(
    segment: Segment, card: bytes, cards: list[bytes], head: int, on_misfit: Callable[[], object]
) -> Steps:
    """Fill `cards` with those of all members; on one whose head is not that of a card that came before, call back."""
    rank, size = segment.rank, len(card) + 4
    cards[rank] = card
    if size <= segment.geometry.chunk:
        segment.shown[rank][segment.writing][:size] = len(card).to_bytes(4, "little") + card
    else:
        raise ValueError(f"what a collective announces takes {len(card)} bytes, beyond {segment.geometry.chunk - 4}")
    segment.post()
    which = segment.reading
    for other in segment.others:
        if segment.has_posted(other) and segment.shown[other][which][4 : 4 + head] != card[:head]:
            on_misfit()
    yield POSTED
    for other in segment.others:
        shown = segment.shown[other][which]
        cards[other] = bytes(shown[4 : 4 + int.from_bytes(shown[:4], "little")])


def broadcast(segment: Segment, array: np.ndarray, root: int) -> Steps:
    """Show the root's bytes, chunk by chunk."""
    rank, chunk = segment.rank, segment.geometry.chunk
    inputs = _Inputs(segment, array if rank == root else None, [array.size] * segment.size)
    for start in range(0, array.size, chunk):
        part = array[start : start + chunk]
        if rank == root and not inputs.in_place:
            segment.chunks[root][segment.writing][: part.size] = part
        yield REST if root in inputs.blocks or (rank == root and inputs.in_place and start) else POST
        inputs.look()
        if rank != root:
            shown = inputs.blocks[root][start:] if root in inputs.blocks else segment.chunks[root][segment.reading]
            part[:] = shown[: part.size]
    inputs.check()
    if inputs.lent:
        yield POST


def allgather(segment: Segment, source: np.ndarray, target: np.ndarray, counts: Sequence[int]) -> Steps:
    """Show every member's bytes, chunk by chunk."""
    chunk, rank = segment.geometry.chunk, segment.rank
    inputs = _Inputs(segment, source, counts)
    places = [end - count for end, count in zip(accumulate(counts), counts, strict=True)]
    for start in range(0, max(counts), chunk):
        part = source[start : start + chunk]
        if not inputs.in_place:
            segment.chunks[rank][segment.writing][: part.size] = part
        target[places[rank] + start : places[rank] + start + part.size] = part
        yield REST if inputs.all_in_place else POST
        inputs.look()
        for other in segment.others:
            size = min(chunk, counts[other] - start)
            if size > 0:
                place = places[other] + start
                block = inputs.blocks.get(other)
                shown = segment.chunks[other][segment.reading] if block is None else block[start:]
                target[place : place + size] = shown[:size]
    inputs.check()
    if inputs.lent:
        yield POST


def reduce(segment: Segment, source: np.ndarray, target: np.ndarray | None, op: ReduceOp, *, to_all: bool) -> Steps:
    """Reduce to those members that have a target."""
    # numpy's complex product differs in the last bit between places in memory (fused multiply-add): only where one
    # member computes each element are all sure to get the same.
    everywhere_equal = op is not ReduceOp.PROD or source.dtype.kind != "c"
    if source.nbytes <= SHORT and (everywhere_equal or not to_all):
        return _reduce_whole(segment, source, target, op)
    return _reduce_in_shards(segment, source, target, op)


def _reduce_whole(segment: Segment, source: np.ndarray, target: np.ndarray | None, op: ReduceOp) -> Steps:
    if not source.size:
        return
    segment.chunks[segment.rank][segment.writing][: source.nbytes] = source.view(np.uint8)
    yield POST
    if target is not None:
        which = segment.reading
        parts = [chunks[which][: source.nbytes].view(source.dtype) for chunks in segment.chunks]
        reduce_arrays(parts, op, target)


def _reduce_in_shards(segment: Segment, source: np.ndarray, target: np.ndarray | None, op: ReduceOp) -> Steps:
    """Each member reduces its shard of each chunk, and shows it in the next phase, beside its part of the next one."""
    rank, size, itemsize = segment.rank, segment.size, source.itemsize
    length = segment.geometry.chunk // itemsize
    inputs = _Inputs(segment, source, [source.nbytes] * size)
    before: np.ndarray | None = None
    for start in (*range(0, source.size, length), None):
        part = source[:0] if start is None else source[start : start + length]
        shard = -(-part.size // size)
        first, last = min(part.size, rank * shard), min(part.size, rank * shard + shard)
        if not inputs.in_place:
            shown = segment.chunks[rank][segment.writing].view(part.dtype)
            shown[:first] = part[:first]  # all but the shard that no one else reads
            shown[last : part.size] = part[last:]
        yield POST  # after the last one, all have read what they need of all inputs
        inputs.look()
        which = segment.reading
        if before is not None:
            old = -(-before.size // size)
            for other in segment.others:
                piece = before[other * old : other * old + old]
                piece[:] = segment.results[other][which][: piece.nbytes].view(piece.dtype)
        if last > first:
            assert start is not None, "the last phase has no part"
            parts = []
            for other in range(size):
                block = inputs.blocks.get(other)
                begin = first * itemsize if block is None else (start + first) * itemsize
                shown_bytes = segment.chunks[other][which] if block is None else block
                parts.append(shown_bytes[begin : begin + (last - first) * itemsize].view(part.dtype))
            parts[rank] = part[first:last]
            mine = segment.results[rank][1 - which][: (last - first) * itemsize].view(part.dtype)
            reduce_arrays(parts, op, mine)
            inputs.check()
        if start is not None and target is not None:
            before = target[start : start + length]
            if last > first:
                before[first:last] = mine


def reduce_scatter(
    segment: Segment, source: np.ndarray, target: np.ndarray, op: ReduceOp, counts: Sequence[int]
) -> Steps:
    """Show each of the other members a piece of its part at a time."""
    rank, size, itemsize = segment.rank, segment.size, source.itemsize
    length = segment.geometry.chunk // (size - 1) // itemsize
    inputs = _Inputs(segment, source, [source.nbytes] * size)
    places = [end - count for end, count in zip(accumulate(counts), counts, strict=True)]
    for start in range(0, max(counts), length):
        shown = segment.chunks[rank][segment.writing].view(source.dtype)
        for other in () if inputs.in_place else segment.others:
            place = length * (other - (other > rank))
            count = min(length, counts[other] - start)
            if count > 0:
                shown[place : place + count] = source[places[other] + start : places[other] + start + count]
        yield REST if inputs.all_in_place else POST
        inputs.look()
        count = min(length, counts[rank] - start)
        if count > 0:
            parts = []
            for other in range(size):
                block = inputs.blocks.get(other)
                place = length * (rank - (rank > other)) if block is None else places[rank] + start
                chunk = segment.chunks[other][segment.reading] if block is None else block
                parts.append(chunk[place * itemsize : (place + count) * itemsize].view(source.dtype))
            parts[rank] = source[places[rank] + start : places[rank] + start + count]
            reduce_arrays(parts, op, target[start : start + count])
    inputs.check()
    if inputs.lent:
        yield POST


def alltoall(segment: Segment, sources: Sequence[np.ndarray], targets: Sequence[np.ndarray]) -> Steps:
    """Show, chunk by chunk, all that goes to others, in the order of the ranks that follow this one."""
    rank, chunk = segment.rank, segment.geometry.chunk
    segment.rows[rank][segment.writing][:] = [array.size for array in sources]
    begins = _begins(rank, [array.size for array in sources])
    incoming: list[int] = []
    start, longest = 0, 1
    while start < longest:
        shown = segment.chunks[rank][segment.writing]
        for other in segment.others:
            _copy_window(sources[other], begins[other], shown, start, chunk, into=True)
        yield POST
        if start == 0:
            rows = [row[segment.reading].tolist() for row in segment.rows]
            longest = max(sum(row) - row[other] for other, row in enumerate(rows))
            incoming = [_begins(other, row)[rank] for other, row in enumerate(rows)]
        for other in segment.others:
            shown = segment.chunks[other][segment.reading]
            _copy_window(targets[other], incoming[other], shown, start, chunk, into=False)
        start += chunk
    yield from copy_alone(targets[rank], sources[rank])


def _begins(rank: int, sizes: Sequence[int]) -> list[int]:
    """Return where each member's bytes begin in what a rank shows."""
    begins, end = [0] * len(sizes), 0
    for step in range(1, len(sizes)):
        other = (rank + step) % len(sizes)
        begins[other] = end
        end += sizes[other]
    return begins


def _copy_window(array: np.ndarray, begin: int, shown: np.ndarray, start: int, chunk: int, *, into: bool) -> None:
    """Copy between a chunk, which shows the bytes from `start` on, and an array of the bytes from `begin` on."""
    low, high = max(begin, start), min(begin + array.size, start + chunk)
    if low < high:
        own, window = array[low - begin : high - begin], shown[low - start : high - start]
        if into:
            window[:] = own
        else:
            own[:] = window
