"""The segments of an arena: memory files, and the extents in them that are used."""

from __future__ import annotations

import weakref
from bisect import bisect_right
from typing import TYPE_CHECKING, Protocol

from collective._links import mapping
from collective._links.mapping import Access, round_up

if TYPE_CHECKING:
    import numpy as np


class User(Protocol):
    """A link that has shown segments to its other end."""

    def segment_gone(self, number: int) -> None:
        """Learn, in any thread, that a segment is no more."""
        ...


class Extent:
    """A part of a segment. Free when `uses` is 0."""

    __slots__ = ("is_block", "nbytes", "offset", "owned", "segment", "size", "uses")

    def __init__(self, segment: Segment, offset: int, nbytes: int) -> None:
        self.segment = segment
        self.offset = offset
        self.nbytes = nbytes
        self.size = round_up(nbytes)
        self.uses = 1
        self.is_block = False
        self.owned = False
        """Whether it is a block whose owner has not let go."""

    @property
    def array(self) -> np.ndarray:
        """Its bytes, to write."""
        return self.segment.array[self.offset : self.offset + self.nbytes]


class Segment:
    """A memory file of the arena. Its number is never used again in this process."""

    def __init__(self, number: int, nbytes: int) -> None:
        self.number = number
        self.nbytes = nbytes
        self.file = mapping.create("gangline-arena", nbytes)
        self.array, self.pages = self.file.map(Access.WRITE)
        mapping.forbid_writing(self.file)
        self.users: weakref.WeakSet[User] = weakref.WeakSet()
        self.blocks: list[tuple[int, Extent]] = []
        """The extents that are blocks, by their offsets."""
        self.retired = False
        """Whether a receiver whose link has ended may still read something of it: nothing new is put there."""
        self._free = [(0, nbytes)]

    @property
    def unused(self) -> int:
        """Bytes that nobody uses."""
        return sum(size for _, size in self._free)

    @property
    def idle(self) -> bool:
        """Whether nobody uses any of it."""
        return self._free == [(0, self.nbytes)]

    def take(self, nbytes: int) -> Extent | None:
        """Return a free extent, the first that is large enough."""
        size = round_up(nbytes)
        for at, (offset, room) in enumerate(self._free):
            if room >= size:
                if room > size:
                    self._free[at] = (offset + size, room - size)
                else:
                    del self._free[at]
                return Extent(self, offset, nbytes)
        return None

    def give_back(self, extent: Extent) -> None:
        """Make an extent free."""
        free = self._free
        start, stop = extent.offset, extent.offset + extent.size
        at = bisect_right(free, (start, 0))
        if at < len(free) and free[at][0] == stop:
            stop += free.pop(at)[1]
        if at and sum(free[at - 1]) == start:
            at -= 1
            start = free.pop(at)[0]
        free.insert(at, (start, stop - start))
