"""Who holds which cell of a layout's grid: a cell is what a rank holds, named by its mesh coordinates.

Everything is found by arithmetic on one cell or one rank; nothing here is as large as the mesh.
"""

from __future__ import annotations

import itertools
import math
from typing import TYPE_CHECKING, Any, TypeAlias

from collective._cuts import Cut, Level

if TYPE_CHECKING:
    from collections.abc import Sequence

Cell: TypeAlias = "tuple[tuple[int, ...], ...]"
"""For each dimension of the tensor, the coordinates along the mesh dimensions that cut it."""


class Grid:
    """The cells of a layout, and the ranks that hold each; `order` is that in which mesh dimensions cut.

    A mesh dimension that does not cut the tensor either repeats its cells (Replicate) or adds to them (Partial).
    """

    def __init__(
        self,
        shape: Sequence[int],
        mesh: Sequence[int],
        placements: Sequence[Any],
        ranks: Sequence[int],
        order: Sequence[int],
    ) -> None:
        self.shape = tuple(shape)
        self.mesh = tuple(mesh)
        self.ranks = ranks
        kinds = [type(placement).__name__ for placement in placements]
        self._repeating = [number for number, kind in enumerate(kinds) if kind == "Replicate"]
        self._adding = [number for number, kind in enumerate(kinds) if kind == "Partial"]
        self._cutting: list[list[int]] = [[] for _ in shape]
        levels: list[list[Level]] = [[] for _ in shape]
        for number in order:
            placement = placements[number]
            if number not in self._repeating and number not in self._adding:
                splits, factor = getattr(placement, "splits", None), getattr(placement, "split_factor", 1)
                self._cutting[placement.dim].append(number)
                levels[placement.dim].append(Level(mesh[number], splits, factor))
        self.cuts = [Cut(length, chain) for length, chain in zip(shape, levels, strict=True)]
        self._strides = [math.prod(mesh[number + 1 :]) for number in range(len(mesh))]
        self._places = None if isinstance(ranks, range) else {rank: place for place, rank in enumerate(ranks)}
        repeats = self._offsets(self._repeating)
        self.holders = len(repeats)
        """How many ranks hold each cell, or each contribution to it."""
        self._shapes: dict[Cell, tuple[int, ...]] = {}
        self._known: dict[Cell, list[list[int]]] = {}
        self._offsets_of_copies = [[first + second for second in repeats] for first in self._offsets(self._adding)]

    def check_splits(self) -> None:
        """Raise ValueError where explicit splits do not sum to what they cut."""
        for number, cut in enumerate(self.cuts):
            try:
                cut.check()
            except ValueError as error:
                raise ValueError(f"{error} of dimension {number}") from None

    @property
    def cells(self) -> list[Cell]:
        """Every cell; as many as the mesh has ranks, less copies."""
        chains = [itertools.product(*(range(self.mesh[each]) for each in chain)) for chain in self._cutting]
        return list(itertools.product(*chains))

    def cell_of(self, rank: int) -> Cell | None:
        """Return the cell that a rank holds, or None where it holds none."""
        place = self._place_of(rank)
        if place is None:
            return None
        at = [place // stride % length for stride, length in zip(self._strides, self.mesh, strict=True)]
        return tuple(tuple(at[number] for number in chain) for chain in self._cutting)

    def shape_of(self, cell: Cell) -> tuple[int, ...]:
        """Return the shape of a cell."""
        shape = self._shapes.get(cell)
        if shape is None:
            shape = self._shapes[cell] = tuple(
                [cut.length_of(part) for cut, part in zip(self.cuts, cell, strict=True)]
            )
        return shape

    def copies(self, cell: Cell) -> list[list[int]]:
        """Return the ranks of a cell: for each contribution to it, one where nothing is Partial, those that hold it."""
        known = self._known.get(cell)
        if known is None:
            first = 0
            for chain, part in zip(self._cutting, cell, strict=True):
                for number, coordinate in zip(chain, part, strict=True):
                    first += coordinate * self._strides[number]
            ranks = self.ranks
            known = [[ranks[first + offset] for offset in offsets] for offsets in self._offsets_of_copies]
            self._known[cell] = known
        return known

    def _place_of(self, rank: int) -> int | None:
        if self._places is not None:
            return self._places.get(rank)
        assert isinstance(self.ranks, range)
        return rank - self.ranks.start if rank in self.ranks else None

    def _offsets(self, numbers: Sequence[int]) -> list[int]:
        ranges = [range(0, self.mesh[number] * self._strides[number], self._strides[number]) for number in numbers]
        return [sum(each) for each in itertools.product(*ranges)]
