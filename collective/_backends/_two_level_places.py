"""Which members of a group share a host, and in which order their parts travel between hosts."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy as np


@dataclass(frozen=True)
class Places:
    """Where the members are, as one of them sees it. Every member has the same `hosts`.

    :param hosts: the ranks on each host, in their order; hosts in the order of their first ranks.
    :param rank: this member's rank.
    """

    hosts: tuple[tuple[int, ...], ...]
    rank: int

    @staticmethod
    def of(names: Sequence[str], rank: int) -> Places:
        """Divide members by the names of their hosts; one whose host is not known, "", has one of its own."""
        found: dict[str | int, list[int]] = {}
        for other, name in enumerate(names):
            found.setdefault(name or other, []).append(other)
        return Places(tuple(map(tuple, found.values())), rank)

    @cached_property
    def size(self) -> int:
        """How many members there are."""
        return sum(map(len, self.hosts))

    @cached_property
    def host(self) -> int:
        """The index of this member's host."""
        return self.host_of(self.rank)

    @property
    def here(self) -> tuple[int, ...]:
        """The ranks on this member's host; the first is the host's leader."""
        return self.hosts[self.host]

    @cached_property
    def index(self) -> int:
        """This member's place among those on its host."""
        return self.here.index(self.rank)

    @property
    def leads(self) -> bool:
        """Whether this member stands for its host among hosts."""
        return self.index == 0

    @cached_property
    def order(self) -> list[int]:
        """All ranks, host by host."""
        return [rank for ranks in self.hosts for rank in ranks]

    def host_of(self, rank: int) -> int:
        """Return the index of a member's host."""
        return next(index for index, ranks in enumerate(self.hosts) if rank in ranks)

    def sums(self, counts: Sequence[int]) -> list[int]:
        """Add up counts, one a rank, by host."""
        return [sum(counts[rank] for rank in ranks) for ranks in self.hosts]


@dataclass(frozen=True)
class Windows:
    """Cuts parts, one a rank, that lie one after another, into windows: in each, so many elements of every part.

    :param counts: elements of each rank's part.
    :param length: of a window, in elements of each part.
    """

    counts: tuple[int, ...]
    length: int

    @staticmethod
    def of(counts: Sequence[int], most: int) -> Windows:
        """Make windows of about `most` elements in all."""
        return Windows(tuple(counts), max(1, most // len(counts)))

    @property
    def starts(self) -> range:
        """Where windows start in each part."""
        return range(0, max(self.counts), self.length)

    @cached_property
    def _begins(self) -> list[int]:
        return list(accumulate(self.counts, initial=0))

    def sizes(self, start: int) -> list[int]:
        """Return how many elements of each part a window has."""
        return [min(max(count - start, 0), self.length) for count in self.counts]

    def part(self, array: np.ndarray, rank: int, start: int) -> np.ndarray:
        """Return what a window shows of a rank's part, where `array` holds all parts."""
        begin = self._begins[rank] + start
        return array[begin : begin + min(max(self.counts[rank] - start, 0), self.length)]
