"""Where the elements of a destination cell are reduced, when the source is Partial.

Each is reduced at one rank that takes the cell, its *root*: at one that contributes to it, where there is such a rank,
as that contribution need not be sent. Those that may be the roots of the same elements are it for equal ranges.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from collective._tallies import Division, Only, Tally

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from collective._grids import Cell


class Piece(NamedTuple):
    """Elements from `start` to `stop` of a block, which lie at `position` of a range that has one root."""

    start: int
    stop: int
    number: int
    position: int


class _Class(NamedTuple):
    """Elements that may have the same roots, their ranges, and the number of the first of these."""

    tally: Tally | Only
    division: Division
    first: int


class Roots:
    """The roots of a destination cell's elements.

    :param volume: elements of the cell.
    :param takers: the ranks that take it.
    :param nearer: by source cell, those of the takers that contribute to what it shares with this one, and the blocks
        of that, (position here, volume).
    :param parts: into how many ranges the whole cell may be cut.
    """

    def __init__(
        self,
        volume: int,
        takers: Sequence[int],
        nearer: Mapping[Cell, tuple[Sequence[int], Sequence[tuple[int, int]]]],
        parts: int,
    ) -> None:
        self.ranges: list[tuple[int, int]] = []
        """(root, elements) of each range."""
        self._load: dict[int, int] = {}
        fewer = [(at, size, 1) for _, blocks in nearer.values() for at, size in blocks]
        self._usual = self._class(Tally(volume, fewer=fewer), takers, parts, volume)
        self._nearer = {
            cell: self._class(Only(blocks), roots, parts, volume) for cell, (roots, blocks) in nearer.items()
        }

    def _class(self, tally: Tally | Only, roots: Sequence[int], parts: int, volume: int) -> _Class:
        wanted = -(-parts * tally.total // volume) if volume else 0
        made = _Class(tally, Division(tally.total, max(1, min(len(roots), wanted))), len(self.ranges))
        # Who has least takes the first, which may be the larger one: so those with the same choices stay even.
        chosen = sorted(roots, key=lambda root: self._load.get(root, 0))[: made.division.parts]
        for part, root in enumerate(chosen):
            self._load[root] = self._load.get(root, 0) + made.division.length(part)
            self.ranges.append((root, made.division.length(part)))
        return made

    def near(self, cell: Cell) -> range:
        """Return the numbers of the ranges of what a source cell shares with this, if takers contribute to it."""
        known = self._nearer.get(cell)
        return range(known.first, known.first + known.division.parts) if known is not None else range(0)

    def cut(self, cell: Cell, at: int, volume: int) -> Iterator[Piece]:
        """Yield the pieces of a block at a position of the cell, which it shares with a source cell."""
        known = self._nearer.get(cell, self._usual)
        first = known.tally.before(at)
        for start, stop, part in known.division.cut(first, first + volume):
            yield Piece(start, stop, known.first + part, first + start - known.division.start(part))
