"""Blocks of elements that are blocks both in a source's part and in a destination's, and ranges of their elements."""

from __future__ import annotations

import itertools
import math
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from collective._grids import Cell, Grid


class Box(NamedTuple):
    """A block of elements: where it starts in the source's part and in the destination's, and its shape."""

    src: tuple[int, ...]
    dst: tuple[int, ...]
    shape: tuple[int, ...]

    @property
    def volume(self) -> int:
        """How many elements it has."""
        return math.prod(self.shape)


def meet(grid: Grid, cell: Cell, other: Grid, *, from_source: bool) -> Iterator[tuple[Cell, list[Box]]]:
    """Yield the cells of another grid that share elements with a cell, each with those elements as boxes.

    Both sides find the same boxes in the same order: the largest ones, in the order of the destination.
    """
    along: list[dict[tuple[int, ...], list[tuple[int, int, int]]]] = []
    for cut, part, facing in zip(grid.cuts, cell, other.cuts, strict=True):
        found: dict[tuple[int, ...], list[tuple[int, int, int]]] = {}
        for span in cut.spans(part):
            for hit in facing.find(span.whole, span.whole + span.length):
                here, there = span.local + hit.whole - span.whole, hit.local
                if hit.length:
                    pair = (here, there) if from_source else (there, here)
                    found.setdefault(hit.part, []).append((*pair, hit.length))
        along.append({part: _merged(runs) for part, runs in found.items()})
    for chosen in itertools.product(*(found.items() for found in along)):
        yield tuple([part for part, _ in chosen]), _boxes([runs for _, runs in chosen])


def shared(grid: Grid, cell: Cell, other: Grid, facing: Cell) -> list[Box]:
    """Return the boxes that a source cell shares with one cell of the destination, as `meet` does."""
    along = []
    for cut, part, cut_there, part_there in zip(grid.cuts, cell, other.cuts, facing, strict=True):
        runs = []
        theirs = cut_there.spans(part_there)
        first = 0
        for span in cut.spans(part):
            while first < len(theirs) and theirs[first].whole + theirs[first].length <= span.whole:
                first += 1
            for hit in theirs[first:]:
                start = max(span.whole, hit.whole)
                stop = min(span.whole + span.length, hit.whole + hit.length)
                if start >= stop:
                    break
                runs.append((span.local + start - span.whole, hit.local + start - hit.whole, stop - start))
        along.append(_merged(runs))
    return _boxes(along)


def before(start: Sequence[int], shape: Sequence[int], whole: Sequence[int]) -> int:
    """Return how many elements come before a block, where a grid of such blocks is walked in order."""
    count, row = 0, 1
    for at, length, full in zip(reversed(start), reversed(shape), reversed(whole), strict=True):
        # Of the dimensions to the right all is counted; of those to the left, the block's own lengths.
        count = count * length + at * row
        row *= full
    return count


def count(grid: Grid, cell: Cell, other: Grid, *, most: int | None = None) -> int:
    """Return into how many boxes a destination cell falls that source cells share with it; `most`, if that is less."""
    number = 1
    for cut, part, facing in zip(grid.cuts, cell, other.cuts, strict=True):
        hits = (hit for span in cut.spans(part) for hit in facing.find(span.whole, span.whole + span.length))
        number *= sum(1 for _ in itertools.islice(hits, most))
    return number if most is None else min(most, number)


def part_of(box: Box, start: int, stop: int) -> list[Box]:
    """Return boxes that have the elements from start to stop of a box, in its order."""
    if start >= stop:
        return []
    if start == 0 and stop == box.volume:
        return [box]
    row = math.prod(box.shape[1:])
    first, last = start // row, (stop - 1) // row
    if first == last:
        return _row(box, first, start - first * row, stop - first * row)
    parts: list[Box] = []
    if start > first * row:
        parts += _row(box, first, start - first * row, row)
        first += 1
    whole = last + 1 if stop == (last + 1) * row else last
    if first < whole:
        parts.append(_slab(box, first, whole))
    if whole == last:
        parts += _row(box, last, 0, stop - last * row)
    return parts


def _slab(box: Box, first: int, last: int) -> Box:
    return Box(
        (box.src[0] + first, *box.src[1:]), (box.dst[0] + first, *box.dst[1:]), (last - first, *box.shape[1:])
    )


def _row(box: Box, number: int, start: int, stop: int) -> list[Box]:
    """Return a range of the elements of one row."""
    slab = _slab(box, number, number + 1)
    inner = Box(slab.src[1:], slab.dst[1:], slab.shape[1:])
    return [
        Box((slab.src[0], *each.src), (slab.dst[0], *each.dst), (1, *each.shape))
        for each in part_of(inner, start, stop)
    ]


def _boxes(along: Sequence[list[tuple[int, int, int]]]) -> list[Box]:
    return [
        Box(tuple([run[0] for run in runs]), tuple([run[1] for run in runs]), tuple([run[2] for run in runs]))
        for runs in itertools.product(*along)
    ]


def _merged(runs: list[tuple[int, int, int]]) -> list[tuple[int, int, int]]:
    """Return runs of (source, destination, length) in the destination's order, neighbours on both sides joined."""
    runs.sort(key=lambda run: run[1])
    joined = runs[:1]
    for src, dst, length in runs[1:]:
        last = joined[-1]
        if last[0] + last[2] == src and last[1] + last[2] == dst:
            joined[-1] = (last[0], last[1], last[2] + length)
        else:
            joined.append((src, dst, length))
    return joined
