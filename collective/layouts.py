"""How a global tensor is spread over ranks: layouts, in the words of torch's DTensor.

    Layout((1024, 512), mesh=4, placements=[Shard(0)])                           rows over ranks 0 to 3
    Layout((1024, 512), (2, 4), [Replicate(), Shard(1)], ranks=range(8, 16))     columns over 4, twice
    Layout.of(dtensor)                                                           as torch has it

Nothing here imports torch: its placements and meshes are known by their names.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, TypeAlias

from collective._grids import Grid
from collective._integers import integer, integers
from collective.types import ReduceOp

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from collective._grids import Cell
    from collective.tensors import Array


@dataclass(frozen=True)
class Shard:
    """A mesh dimension that cuts a dimension of the tensor, as torch.chunk cuts: even but for the last parts.

    :param dim: the tensor's dimension; negative ones count from the last.
    :param splits: the length of each part instead, one for each coordinate of the mesh dimension.
    """

    dim: int
    splits: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "dim", integer(self.dim, "Shard(dim)"))
        if self.splits is not None:
            splits = integers(self.splits, "Shard(splits)")
            object.__setattr__(self, "splits", splits)
            if any(length < 0 for length in splits):
                raise ValueError(f"Shard({self.dim}, splits={splits}): a length is negative")

    def __repr__(self) -> str:
        return f"Shard({self.dim})" if self.splits is None else f"Shard({self.dim}, splits={self.splits})"


@dataclass(frozen=True)
class StridedShard:
    """torch's _StridedShard: the dimension is cut into `split_factor` pieces, and each of them into all parts."""

    dim: int
    split_factor: int

    def __post_init__(self) -> None:
        for name in ("dim", "split_factor"):
            object.__setattr__(self, name, integer(getattr(self, name), f"StridedShard({name})"))

    def __repr__(self) -> str:
        return f"_StridedShard({self.dim}, split_factor={self.split_factor})"


@dataclass(frozen=True)
class Replicate:
    """A mesh dimension along which every coordinate holds the same."""

    def __repr__(self) -> str:
        return "Replicate()"


@dataclass(frozen=True)
class Partial:
    """A mesh dimension along which the tensor is yet to be reduced: only for a source.

    :param op: a ReduceOp, or what torch calls it: "sum", "avg", "min", "max" or "product".
    """

    op: ReduceOp | str = ReduceOp.SUM

    def __post_init__(self) -> None:
        if not isinstance(self.op, ReduceOp):
            if not isinstance(self.op, str):
                raise TypeError(f"Partial({self.op!r}): op is a collective.ReduceOp or its name in torch")
            if self.op not in _REDUCTIONS:
                raise ValueError(f"Partial({self.op!r}): known are {', '.join(_REDUCTIONS)}")
            object.__setattr__(self, "op", _REDUCTIONS[self.op])

    @property
    def reduction(self) -> ReduceOp:
        """The reduction."""
        assert isinstance(self.op, ReduceOp)
        return self.op

    def __repr__(self) -> str:
        return f"Partial({self.reduction.name})"


Placement: TypeAlias = Shard | StridedShard | Replicate | Partial

_REDUCTIONS = {
    "sum": ReduceOp.SUM,
    "avg": ReduceOp.AVG,
    "min": ReduceOp.MIN,
    "max": ReduceOp.MAX,
    "product": ReduceOp.PROD,
}


@dataclass(frozen=True, init=False, eq=False, repr=False)
class Layout:
    """How a tensor of a global shape is spread over ranks. Hashable and picklable.

    :param shape: the shape of the whole tensor.
    :param mesh: the lengths of the mesh's dimensions, one int for a mesh of one; or a torch DeviceMesh.
    :param placements: what each mesh dimension does: Shard, Replicate, Partial, or torch's. Where several cut one
        dimension of the tensor, the later cuts the parts of the earlier.
    :param ranks: the group-local rank at each mesh coordinate, the last dimension running fastest; by default from 0
        on, or the DeviceMesh's own.

    Raises:
        TypeError, ValueError: they do not fit together, or a placement is of an unknown kind.
    """

    shape: tuple[int, ...]
    mesh: tuple[int, ...]
    placements: tuple[Placement, ...]
    ranks: Sequence[int]
    grid: Grid

    def __init__(
        self, shape: Sequence[int], mesh: Any, placements: Any, ranks: Iterable[int] | None = None
    ) -> None:
        if hasattr(mesh, "mesh") and hasattr(mesh.mesh, "tolist"):  # a torch DeviceMesh
            ranks = mesh.mesh.reshape(-1).tolist() if ranks is None else ranks
            mesh = tuple(mesh.mesh.shape)
        given = placements if isinstance(placements, list | tuple) else [placements]
        _set(self, "shape", _lengths(shape, "shape"))
        _set(self, "mesh", _lengths(mesh if hasattr(mesh, "__iter__") else [mesh], "mesh"))
        _set(self, "placements", tuple(map(_placement, given)))
        size = math.prod(self.mesh)
        _set(self, "ranks", range(size) if ranks is None else _ranks(ranks))
        if size < 1:
            raise ValueError(f"{self!r}: a mesh has at least one rank")
        if len(self.placements) != len(self.mesh):
            raise ValueError(
                f"{self!r}: {len(self.placements)} placements for {len(self.mesh)} mesh dimensions; one for each"
            )
        if len(self.ranks) != size:
            raise ValueError(f"{self!r}: {len(self.ranks)} ranks for a mesh of {size}")
        _set(self, "placements", tuple(self._fitted(number) for number in range(len(self.mesh))))
        if len({each.op for each in self.placements if isinstance(each, Partial)}) > 1:
            raise ValueError(f"{self!r}: its Partial placements reduce in different ways, whose order would matter")
        _set(self, "grid", Grid(self.shape, self.mesh, self.placements, self.ranks))
        try:
            self.grid.check_splits()
        except ValueError as error:
            raise ValueError(f"{self!r}: {error}") from None

    @classmethod
    def of(cls, tensor: Any, *, ranks: Iterable[int] | None = None) -> Layout:
        """Return the layout of a torch DTensor.

        :param ranks: the group-local rank at each mesh coordinate, where those are not torch's global ranks.

        Raises:
            TypeError: it is no DTensor. ValueError: it has a placement that is not known here.
        """
        mesh, placements = getattr(tensor, "device_mesh", None), getattr(tensor, "placements", None)
        if mesh is None or placements is None:
            raise TypeError(f"Layout.of takes a torch DTensor, not {type(tensor).__module__}.{type(tensor).__name__}")
        return cls(tuple(tensor.shape), mesh, tuple(placements), ranks)

    @property
    def partial(self) -> ReduceOp | None:
        """The reduction that its values are yet to go through, or None."""
        return next((each.reduction for each in self.placements if isinstance(each, Partial)), None)

    def local_shape(self, rank: int) -> tuple[int, ...]:
        """Return the shape of a rank's part.

        Raises:
            ValueError: the layout has no such rank.
        """
        return self.grid.shape_of(self._cell(rank))

    def local(self, rank: int, whole: Array) -> Array:
        """Return a rank's part of the whole tensor: a view of it where the part is one block, else a copy.

        Raises:
            ValueError: the layout has no such rank, or the tensor another shape.
        """
        if tuple(whole.shape) != self.shape:
            raise ValueError(f"the tensor has shape {tuple(whole.shape)}, and {self!r} another")
        cell = self._cell(rank)
        for number, cut in enumerate(self.grid.cuts):
            spans = cut.spans(cell[number])
            if len(spans) > 1:
                index: Any = [at for span in spans for at in range(span.whole, span.whole + span.length)]
            else:
                index = slice(spans[0].whole, spans[0].whole + spans[0].length) if spans else slice(0)
            whole = whole[(*[slice(None)] * number, index)]
        return whole

    def _cell(self, rank: int) -> Cell:
        cell = self.grid.cell_of(integer(rank, "rank"))
        if cell is None:
            raise ValueError(f"{self!r} has no rank {rank}")
        return cell

    def _fitted(self, number: int) -> Placement:
        """Return a placement with its dimension counted from the first, or raise where it does not fit."""
        placement = self.placements[number]
        if not isinstance(placement, Shard | StridedShard):
            return placement
        ndim = len(self.shape)
        if not -ndim <= placement.dim < ndim:
            raise ValueError(f"{self!r}: {placement!r} cuts dimension {placement.dim} of a tensor that has {ndim}")
        if isinstance(placement, Shard) and placement.splits is not None and len(placement.splits) != self.mesh[number]:
            raise ValueError(
                f"{self!r}: {len(placement.splits)} splits for mesh dimension {number}, which has {self.mesh[number]}"
            )
        return replace(placement, dim=placement.dim % ndim)

    @cached_property
    def last_rank(self) -> int:
        """The highest of its ranks."""
        return max(self.ranks)

    def __repr__(self) -> str:
        return self._text if "grid" in self.__dict__ else self._written()

    @cached_property
    def _text(self) -> str:
        return self._written()

    def _written(self) -> str:
        ranks = self.ranks
        known = f"range({ranks.start}, {ranks.stop})" if isinstance(ranks, range) else str(list(ranks))
        placements = ", ".join(map(repr, self.placements))
        return f"Layout({list(self.shape)}, mesh={list(self.mesh)}, [{placements}], ranks={known})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Layout) and self._key == other._key

    def __hash__(self) -> int:
        return self._hash

    def __reduce__(self) -> tuple[object, ...]:
        return Layout, (self.shape, self.mesh, self.placements, self.ranks)

    @property
    def _key(self) -> tuple[object, ...]:
        return self.shape, self.mesh, self.placements, self.ranks

    @cached_property
    def _hash(self) -> int:
        return hash(self._key)


def _set(layout: Layout, name: str, value: object) -> None:
    object.__setattr__(layout, name, value)


def _placement(given: Any) -> Placement:
    """Return a placement of ours for one of torch's, which are known by their names."""
    if isinstance(given, Shard | StridedShard | Replicate | Partial):
        return given
    kind = type(given)
    if kind.__module__.startswith("torch.distributed"):
        if kind.__name__ == "Shard":
            return Shard(given.dim)
        if kind.__name__ == "_StridedShard":
            return StridedShard(given.dim, given.split_factor)
        if kind.__name__ == "Replicate":
            return Replicate()
        if kind.__name__ == "Partial":
            return Partial(given.reduce_op)
        raise ValueError(
            f"torch's placement {kind.__name__} is not known here; redistribute the DTensor to Shard, _StridedShard, "
            "Replicate or Partial first"
        )
    raise TypeError(f"{given!r} is no placement; pass Shard(dim), Replicate(), Partial(op), or torch's")


def _ranks(given: Any) -> Sequence[int]:
    if not isinstance(given, range):
        nested: list[Any] = given.reshape(-1).tolist() if hasattr(given, "reshape") else list(given)
        while nested and isinstance(nested[0], list | tuple):
            nested = [rank for row in nested for rank in row]
        given = [integer(rank, "a rank") for rank in nested]
    known = range(min(given, default=0), max(given, default=-1) + 1)
    if known.start < 0:
        raise ValueError(f"ranks {list(given)} name rank {known.start}; they are group-local, from 0 on")
    if list(given) == list(known):
        return known
    if len(set(given)) != len(given):
        twice = next(rank for number, rank in enumerate(given) if rank in given[:number])
        raise ValueError(f"ranks {list(given)} name rank {twice} twice")
    return tuple(given)


def _lengths(given: Any, what: str) -> tuple[int, ...]:
    lengths = integers(given, what)
    if any(length < 0 for length in lengths):
        raise ValueError(f"{what} is {list(lengths)}; a length is negative")
    return lengths
