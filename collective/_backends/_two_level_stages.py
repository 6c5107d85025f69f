"""The operations of the "two-level" data plane, each as the stages of one member on the two planes below.

A stage inside the host is taken by all members there, one between hosts by their leaders. Each of them issues the
stages of an operation in the same order, so that they pair up; which they are follows from what all members agreed on,
or, in an alltoall, from sizes that are exchanged first. Long operations go in parts, so that what is staged here does
not depend on their length, and one part moves between hosts while the next is brought together inside them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import numpy as np

from collective._backends._two_level_alltoall import Exchange
from collective._backends._two_level_line import overlap
from collective._backends._two_level_places import Windows
from collective._core.offload import offload
from collective.reductions import HALVES, reduce_arrays
from collective.tensors import numpy_dtype
from collective.types import ReduceOp

if TYPE_CHECKING:
    from asyncio import Future
    from collections.abc import Awaitable, Callable, Generator, Iterator, Sequence

    from collective._backends._two_level_line import Stages
    from collective._backends._two_level_places import Places
    from collective._gate import Gate
    from collective.abc import DataPlane

SHORT: Final = 64 << 10
"""Bytes of all members together up to which every one of them goes to every member, and is reduced there."""
_PART: Final = 8 << 20
"""Bytes of a part of a long operation."""
_STAGED: Final = 4 << 20
"""Bytes of a part that is copied on the loop. Measured between 4 processes, half of it takes a tenth more time."""
_WIDENED: Final = 2 << 20
"""Bytes of a part of halves as float32: to convert them takes up to a millisecond."""
_INLINE: Final = 256 << 10
"""Bytes that are divided and rounded on the loop."""
_LEADER: Final = 0
"""The leader's rank inside its host."""
_HALVES: Final = tuple(numpy_dtype(name) for name in HALVES)
_NOTHING: Final = np.empty(0, np.uint8)


class Levels:
    """One member's two planes, and the operations that are made of theirs.

    :param inner: the plane of the members on this host.
    :param outer: the plane of the hosts' leaders, whose ranks are the hosts' indices; None on who is none.
    :param watch: takes every stage that is issued; the operation is not done before it is.
    """

    def __init__(
        self,
        places: Places,
        inner: DataPlane,
        outer: DataPlane | None,
        *,
        gate: Gate,
        watch: Callable[[Awaitable[None]], Future[None]],
    ) -> None:
        self._places = places
        self._inner = inner
        self._outer = outer
        self._gate = gate
        self._watch = watch

    def broadcast(self, array: np.ndarray, root: int) -> Stages:
        """Show it on the root's host, bring it to the others, show it there."""
        yield from overlap(self._broadcast(part, root) for part in _cut(array, _PART))

    def allreduce(self, source: np.ndarray, target: np.ndarray, op: ReduceOp) -> Stages:
        """Reduce on each host, then between hosts, and show the result on each."""
        # numpy's complex product differs in the last bit between CPUs with and without fused multiply-add.
        everywhere_equal = op is not ReduceOp.PROD or source.dtype.kind != "c"
        if everywhere_equal and self._is_short(source):
            parts = yield from self._gathered(source)
            reduce_arrays(parts, op, target)
            return
        parts_of = zip(_cut_for(source, op), _cut_for(target, op), strict=True)
        yield from overlap(self._allreduce(mine, result, op) for mine, result in parts_of)

    def reduce(self, source: np.ndarray, target: np.ndarray | None, op: ReduceOp, root: int) -> Stages:
        """Reduce on each host, then between hosts to the root's, whose leader sends it to the root."""
        if self._is_short(source):
            parts = yield from self._gathered(source)
            if target is not None:
                reduce_arrays(parts, op, target)
            return
        targets = (None for _ in _cut_for(source, op)) if target is None else _cut_for(target, op)
        parts_of = zip(_cut_for(source, op), targets, strict=True)
        yield from overlap(self._reduce(mine, result, op, root) for mine, result in parts_of)

    def reduce_scatter(
        self, source: np.ndarray, target: np.ndarray, op: ReduceOp, counts: Sequence[int]
    ) -> Stages:
        """Reduce on each host, then between hosts, each of which gets its members' parts for its leader to hand out."""
        if self._is_short(source):
            first = sum(counts[: self._places.rank])
            parts = yield from self._gathered(source)
            reduce_arrays([part[first : first + target.size] for part in parts], op, target)
            return
        wide = _wide(source.dtype, op)
        windows = Windows.of(counts, (_STAGED if wide == source.dtype else _WIDENED) // wide.itemsize)
        yield from overlap(self._reduce_scatter(source, target, op, windows, start) for start in windows.starts)

    def allgather(self, source: np.ndarray, target: np.ndarray, counts: Sequence[int]) -> Stages:
        """Show to each other on each host what its members have, exchange that between hosts, show the others'."""
        windows = Windows.of(counts, _STAGED)
        yield from overlap(self._allgather(source, target, windows, start) for start in windows.starts)

    def alltoall(self, sources: Sequence[np.ndarray], targets: Sequence[np.ndarray]) -> Stages:
        """Exchange inside each host directly; the rest goes by the leaders, so many bytes of each pair at a time."""
        exchange = Exchange(self._places, self._inner, self._outer, issue=self._issue, most=_STAGED)
        yield from exchange.run(sources, targets)

    # ------------------------------------------------------------------ parts

    def _broadcast(self, array: np.ndarray, root: int) -> Stages:
        places, source = self._places, self._places.host_of(root)
        if places.host == source:
            shown = self._issue(self._inner.broadcast(array, places.here.index(root)))
            if self._outer is not None:
                if places.rank != root:
                    yield shown
                yield self._issue(self._outer.broadcast(array, source))
            return
        if self._outer is not None:
            yield self._issue(self._outer.broadcast(array, source))
        self._issue(self._inner.broadcast(array, _LEADER))

    def _allreduce(self, source: np.ndarray, target: np.ndarray, op: ReduceOp) -> Stages:
        wide = _widened(source, op)
        partial = target if wide is source else wide
        yield self._reduce_here(wide, partial, op)
        if self._outer is not None:
            yield self._issue(self._outer.allreduce(partial, partial, _inner_op(op)))
            yield from self._finish(partial, target, op)
        self._issue(self._inner.broadcast(_bytes(target), _LEADER))

    def _reduce(self, source: np.ndarray, target: np.ndarray | None, op: ReduceOp, root: int) -> Stages:
        places, host = self._places, self._places.host_of(root)
        wide = _widened(source, op)
        result = target
        if result is None:
            result = np.empty_like(source) if places.leads else source
        partial = result if wide is source else wide
        yield self._reduce_here(wide, partial, op)
        if self._outer is not None:
            total = partial if places.host == host else None
            yield self._issue(self._outer.reduce(partial, total, _inner_op(op), host))
        if places.host != host:
            return
        if self._outer is not None:
            yield from self._finish(partial, result, op)
        if places.here[_LEADER] != root:
            self._hand_out({places.here.index(root): result} if places.leads else {}, target)

    def _reduce_scatter(
        self, source: np.ndarray, target: np.ndarray, op: ReduceOp, windows: Windows, start: int
    ) -> Stages:
        places, sizes = self._places, windows.sizes(start)
        pieces = [windows.part(source, rank, start) for rank in places.order]
        wide = np.concatenate(pieces, dtype=_wide(source.dtype, op))
        yield self._reduce_here(wide, wide, op)
        results: dict[int, np.ndarray] = {}
        if self._outer is not None:
            sums = places.sums(sizes)
            total = np.empty(sums[places.host], wide.dtype)
            yield self._issue(self._outer.reduce_scatter(wide, total, _inner_op(op), sums))
            result = np.empty(total.size, source.dtype)
            yield from self._finish(total, result, op)
            results = dict(enumerate(_split(result, [sizes[rank] for rank in places.here])))
        self._hand_out(results, target[start : start + sizes[places.rank]])

    def _allgather(self, source: np.ndarray, target: np.ndarray, windows: Windows, start: int) -> Stages:
        places, sizes = self._places, windows.sizes(start)
        sums = places.sums(sizes)
        block = np.empty(sums[places.host], np.uint8)
        mine = source[start : start + sizes[places.rank]]
        gathered = np.empty(sum(sums), np.uint8)
        blocks = _split(gathered, sums)
        yield self._issue(self._inner.allgather(mine, block, [sizes[rank] for rank in places.here]))
        if self._outer is not None:
            yield self._issue(self._outer.allgather(block, gathered, sums))
        else:
            blocks[places.host][:] = block
        before = sum(sums[: places.host])
        rest = [gathered] if gathered.size <= SHORT else [gathered[:before], gathered[before + block.size :]]
        yield from [self._issue(self._inner.broadcast(others, _LEADER)) for others in rest if others.size]
        for rank, piece in zip(places.order, _split(gathered, [sizes[rank] for rank in places.order]), strict=True):
            windows.part(target, rank, start)[:] = piece

    # --------------------------------------------------------------- steps

    def _is_short(self, source: np.ndarray) -> bool:
        return source.nbytes * self._places.size <= SHORT

    def _gathered(self, source: np.ndarray) -> Generator[Awaitable[Any], None, list[np.ndarray]]:
        """Bring every member's source to every member, by rank."""
        size = self._places.size
        gathered = np.empty((size, source.size), source.dtype)
        yield from self.allgather(_bytes(source), _bytes(gathered), [source.nbytes] * size)
        return list(gathered)

    def _reduce_here(self, source: np.ndarray, partial: np.ndarray, op: ReduceOp) -> Future[None]:
        """Reduce what the members of this host have to its leader, not divided yet."""
        target = partial if self._places.leads else None
        return self._issue(self._inner.reduce(source, target, _inner_op(op), _LEADER))

    def _finish(self, total: np.ndarray, target: np.ndarray, op: ReduceOp) -> Stages:
        """Divide and round a leader's total into its target, which may be the total itself."""
        if total is target and op is not ReduceOp.AVG:
            return

        def write(piece: slice) -> None:
            with np.errstate(all="ignore"):
                part = total[piece]
                if op is ReduceOp.AVG:
                    part = np.divide(part, self._places.size, out=part)
                np.copyto(target[piece], part, casting="same_kind")

        if total.nbytes <= _INLINE:
            self._gate.write(target, write)
        else:
            yield offload(lambda: self._gate.write(target, write))

    def _hand_out(self, results: dict[int, np.ndarray], target: np.ndarray | None) -> None:
        """Send what the leader has for members of its host, by their ranks there, to them."""
        size = len(self._places.here)
        sent, received = [_NOTHING] * size, [_NOTHING] * size
        for index, result in results.items():
            sent[index] = _bytes(result)
        if target is not None:
            received[_LEADER] = _bytes(target)
        self._issue(self._inner.alltoall(sent, received))

    def _issue(self, completion: Awaitable[None]) -> Future[None]:
        return self._watch(completion)


def _inner_op(op: ReduceOp) -> ReduceOp:
    """Return how partial results combine: an average is divided once, at the end."""
    return ReduceOp.SUM if op is ReduceOp.AVG else op


def _wide(dtype: np.dtype[Any], op: ReduceOp) -> np.dtype[Any]:
    """Return the dtype of partial results: halves are rounded once, at the end."""
    exact = op in (ReduceOp.MIN, ReduceOp.MAX)
    return np.dtype(np.float32) if dtype in _HALVES and not exact else dtype


def _widened(source: np.ndarray, op: ReduceOp) -> np.ndarray:
    """Return the source itself, or a copy in the dtype of partial results."""
    return source.astype(_wide(source.dtype, op), copy=False)


def _cut_for(array: np.ndarray, op: ReduceOp) -> Iterator[np.ndarray]:
    wide = _wide(array.dtype, op)
    return _cut(array, (_PART if wide == array.dtype else _WIDENED) // wide.itemsize)


def _cut(array: np.ndarray, length: int) -> Iterator[np.ndarray]:
    """Cut an array into consecutive parts of at most so many elements."""
    return (array[start : start + length] for start in range(0, array.size, length))


def _split(array: np.ndarray, counts: Sequence[int]) -> list[np.ndarray]:
    """Return consecutive parts of so many elements each."""
    return np.split(array, np.cumsum(counts)[:-1]) if counts else []


def _bytes(array: np.ndarray) -> np.ndarray:
    return array.reshape(-1).view(np.uint8)
