"""Blocks of arrays as one stream of bytes: how they are taken out for a message, and put in from one."""

from __future__ import annotations

import math
from bisect import bisect_right
from typing import TYPE_CHECKING, Any, Final, Literal

import numpy as np

from collective._boxes import Box, part_of
from collective._core.operands import as_bytes

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

Side = Literal["src", "dst"]
SRC: Final = "src"
DST: Final = "dst"


class Stream:
    """The elements of boxes of arrays, one box after the other, in bytes."""

    def __init__(self) -> None:
        self._pieces: list[tuple[np.ndarray, Box, Side]] = []
        self._starts: list[int] = []
        self.nbytes = 0

    def add(self, array: np.ndarray, boxes: Sequence[Box], side: Side) -> None:
        """Append boxes of an array, which is the source's part or the destination's."""
        for box in boxes:
            self._pieces.append((array, box, side))
            self._starts.append(self.nbytes)
            self.nbytes += box.volume * array.itemsize

    def add_flat(self, memory: np.ndarray) -> None:
        """Append all of a one-dimensional array."""
        self.add(memory, [Box((0,), (0,), (memory.size,))], DST)

    def messages(self, packed: int, plain: int = 0) -> Iterator[tuple[int, memoryview]]:
        """Yield (offset, bytes): views of at most `plain` bytes of what lies in one block, else copies of `packed`."""
        offset, size = 0, 0
        views: list[np.ndarray] = []
        for array, box, side in self._pieces:
            limit = max(packed, plain) if view_of(array, box, side).flags.c_contiguous else packed
            for part in cut(box, max(1, limit // array.itemsize)):
                view = view_of(array, part, side)
                if views and size + view.nbytes > packed:
                    yield offset, _joined(views, size)
                    offset, size, views = offset + size, 0, []
                views.append(view)
                size += view.nbytes
        if views:
            yield offset, _joined(views, size)

    def place(self, offset: int, nbytes: int) -> memoryview | None:
        """Return the memory of some bytes, or None where they do not lie in one block."""
        parts = list(self._between(offset, offset + nbytes))
        if len(parts) != 1:
            return None
        view = view_of(*parts[0])
        return as_bytes(view.reshape(-1)).data if view.flags.c_contiguous else None

    def put(self, offset: int, data: np.ndarray) -> None:
        """Write bytes, uint8, to where they belong."""
        start = 0
        for array, part, side in self._between(offset, offset + data.nbytes):
            view = view_of(array, part, side)
            piece = data[start : start + view.nbytes]
            start += view.nbytes
            view[...] = piece.view(view.dtype).reshape(view.shape)

    def _between(self, start: int, stop: int) -> Iterator[tuple[np.ndarray, Box, Side]]:
        number = bisect_right(self._starts, start) - 1
        while start < stop:
            array, box, side = self._pieces[number]
            begin, item = self._starts[number], array.itemsize
            end = min(stop, begin + box.volume * item)
            for part in part_of(box, (start - begin) // item, (end - begin) // item):
                yield array, part, side
            start = end
            number += 1


def view_of(array: np.ndarray, box: Box, side: Side) -> np.ndarray:
    """Return a box of an array, as a view."""
    starts = box.src if side == SRC else box.dst
    index: tuple[Any, ...] = tuple([slice(at, at + length) for at, length in zip(starts, box.shape, strict=True)])
    view: np.ndarray = array[(*index, ...)]
    return view


def cut(box: Box, most: int) -> Iterator[Box]:
    """Cut a box into boxes of at most so many elements, along whole rows where they are short enough."""
    volume = box.volume
    if volume <= most:
        yield box
        return
    row = math.prod(box.shape[1:])
    step = most // row * row or most
    for start in range(0, volume, step):
        yield from part_of(box, start, min(volume, start + step))


def _joined(views: list[np.ndarray], size: int) -> memoryview:
    if len(views) == 1 and views[0].flags.c_contiguous:
        return as_bytes(views[0].reshape(-1)).data
    joined = np.empty(size, np.uint8)
    start = 0
    for view in views:
        joined[start : start + view.nbytes].view(view.dtype).reshape(view.shape)[...] = view
        start += view.nbytes
    return joined.data
