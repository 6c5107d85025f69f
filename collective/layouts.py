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
    """A mesh dimension that cuts a dimension of the tensor into `split_factor` pieces, and each of them into all parts.

    This is what torch's _StridedShard says by itself. Where several of a tensor's placements cut one dimension, torch
    mostly means by it that later mesh dimensions cut first (see `Layout`); ours always means what it says.
    """

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
        dimension of the tensor, the later cuts the parts of the earlier. torch's _StridedShards are read as torch's
        fully_shard and redistribute cut: as Shards in another order, if all of their split factors can be products of
        mesh dimensions that cut before them, else one after the other.
    :param ranks: the group-local rank at each mesh coordinate, the last dimension running fastest; by default from 0
        on, or the DeviceMesh's own.
    :param order: the mesh's dimensions in the order in which they cut, where that is not their own.

    Raises:
        TypeError, ValueError: they do not fit together, or a placement is of an unknown kind.
    """

    shape: tuple[int, ...]
    mesh: tuple[int, ...]
    placements: tuple[Placement, ...]
    ranks: Sequence[int]
    order: tuple[int, ...]
    grid: Grid

    def __init__(
        self,
        shape: Sequence[int],
        mesh: Any,
        placements: Any,
        ranks: Iterable[int] | None = None,
        order: Iterable[int] | None = None,
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
        _set(self, "order", tuple(range(len(self.mesh))))
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
        if order is not None:
            self._reorder(tuple(integer(number, "a mesh dimension in order") for number in order))
        elif not any(isinstance(each, StridedShard) for each in given):
            self._unstride()
        _set(self, "grid", Grid(self.shape, self.mesh, self.placements, self.ranks, self.order))
        try:
            self.grid.check_splits()
        except ValueError as error:
            raise ValueError(f"{self!r}: {error}") from None

    @classmethod
    def of(cls, tensor: Any, *, ranks: Iterable[int] | None = None) -> Layout:
        """Return the layout of a torch DTensor: what its local tensors hold.

        :param ranks: the group-local rank at each mesh coordinate, where those are not torch's global ranks.

        Raises:
            TypeError: it is no DTensor. ValueError: it has a placement that is not known here, or the local tensor of
                this process has another shape than its placements say.
        """
        mesh, placements = getattr(tensor, "device_mesh", None), getattr(tensor, "placements", None)
        if mesh is None or placements is None:
            raise TypeError(f"Layout.of takes a torch DTensor, not {type(tensor).__module__}.{type(tensor).__name__}")
        spec, order = getattr(tensor, "_spec", None), None
        if getattr(spec, "use_strided_shard_as_shard_order", None) is False:  # each placement means what it says
            placements = [_placement(each) for each in placements]
            chains = [list(entry.mesh_dims) for entry in getattr(spec, "shard_order", None) or ()]
            order = _joined(chains, len(placements))
        layout = cls(tuple(tensor.shape), mesh, tuple(placements), ranks, order)
        _check_local(layout, tensor)
        return layout

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

    def _reorder(self, order: tuple[int, ...]) -> None:
        """Take an order of cutting; only that of dimensions which cut one dimension of the tensor matters."""
        if sorted(order) != list(range(len(self.mesh))):
            raise ValueError(f"{self!r}: order is {list(order)}; it names each of the {len(self.mesh)} mesh dimensions")
        chains: dict[int, list[int]] = {}
        for number in order:
            placement = self.placements[number]
            if isinstance(placement, Shard | StridedShard):
                chains.setdefault(placement.dim, []).append(number)
        _set(self, "order", _joined(chains.values(), len(self.mesh)))

    def _unstride(self) -> None:
        """Read split factors as an order of cutting, where torch does: where that is possible for all of them."""
        chains: dict[int, list[int]] = {}
        for number in reversed(range(len(self.mesh))):
            placement = self.placements[number]
            if not isinstance(placement, Shard | StridedShard):
                continue
            chain = chains.setdefault(placement.dim, [])
            factor = placement.split_factor if isinstance(placement, StridedShard) else 1
            before = [math.prod(self.mesh[each] for each in chain[:place]) for place in range(len(chain) + 1)]
            if factor not in before:
                return
            chain.insert(before.index(factor), number)
        _set(self, "placements", tuple(Shard(p.dim) if isinstance(p, StridedShard) else p for p in self.placements))
        _set(self, "order", _joined(chains.values(), len(self.mesh)))

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
        order = "" if self.order == tuple(range(len(self.mesh))) else f", order={list(self.order)}"
        return f"Layout({list(self.shape)}, mesh={list(self.mesh)}, [{placements}], ranks={known}{order})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Layout) and self._key == other._key

    def __hash__(self) -> int:
        return self._hash

    def __reduce__(self) -> tuple[object, ...]:
        return Layout, (self.shape, self.mesh, self.placements, self.ranks, self.order)

    @property
    def _key(self) -> tuple[object, ...]:
        return self.shape, self.mesh, self.placements, self.ranks, self.order

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


def _is_strided_in_torch(given: Any) -> bool:
    return type(given).__name__ == "_StridedShard"


def _joined(chains: Iterable[list[int]], count: int) -> tuple[int, ...]:
    """Return one order of so many mesh dimensions that has each chain in its order, and is else their own."""
    order = list(range(count))
    for chain in chains:
        for place, number in zip(sorted(chain), chain, strict=True):
            order[place] = number
    return tuple(order)


def _check_local(layout: Layout, tensor: Any) -> None:
    """Raise ValueError where a DTensor's local tensor in this process has not the shape that its layout says."""
    held, mesh = getattr(getattr(tensor, "_local_tensor", None), "shape", ()), tensor.device_mesh
    if not held or not all(type(length) is int for length in held):
        return  # it has no dimensions, or is symbolic
    try:
        place = mesh.mesh.reshape(-1).tolist().index(mesh.get_rank())
    except ValueError:
        return  # this process is not in the mesh, or its process group is destroyed, and torch says no rank
    held, said = tuple(held), layout.local_shape(layout.ranks[place])
    if held == said:
        return
    why = "Where it was made with DTensor.from_local, pass Layout(shape, mesh, [Shard(dim, splits=...)]) instead"
    if any(map(_is_strided_in_torch, tensor.placements)):
        why = (
            "Uneven _StridedShards are cut as said by fully_shard and redistribute, which full_tensor() expects, but "
            "distribute_tensor cuts otherwise: distribute it as Replicate(), and redistribute what that returns"
        )
    rank = mesh.get_rank()
    raise ValueError(f"{layout!r}: its placements say {said} for torch's rank {rank}, which holds {held}. {why}")


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
