"""The collectives over references, one a class: what its caller checks and promises, and what its members run."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

from collective import reductions
from collective._core import trees
from collective._core.operations import (
    AllGather,
    AllReduce,
    Broadcast,
    ReduceScatter,
    check_rank,
    check_splits,
    chunks,
    row_counts,
)
from collective._core.repartition import Repartition, pair
from collective._store.drafts import Blank
from collective._store.trees import Place, rebuild

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import numpy as np

    from collective._core.engine import Engine
    from collective._core.operations import Operation
    from collective.layouts import Layout
    from collective.types import ReduceOp


class Content(NamedTuple):
    """What a ref refers to, without the data: tensors, and the form in whose places they stand."""

    form: Any
    tensors: tuple[Blank, ...]

    def __str__(self) -> str:
        if isinstance(self.form, Place):
            return _name(self.tensors[0])
        return f"a structure of {len(self.tensors)} tensors"


class Local(NamedTuple):
    """What a member reads or writes, in place: arrays in the places of a form."""

    form: Any
    arrays: Sequence[np.ndarray]

    @property
    def tree(self) -> Any:
        """The structure of arrays; None where there is none."""
        return None if self.form is None else rebuild(self.form, self.arrays)


class Action(ABC):
    """One collective with its arguments, the tensors aside. Picklable."""

    name: ClassVar[str]
    takes_structures: ClassVar[bool] = False

    @abstractmethod
    def results(self, given: Sequence[Content | None]) -> list[Content | None]:
        """Return what each member gets that it has not; None for nothing.

        Raises:
            TypeError, ValueError: what is given does not fit.
        """

    @abstractmethod
    def operations(self, engine: Engine, source: Local, target: Local) -> list[Operation]:
        """Return a member's operations, in their order. What it has not given or gets has no arrays."""

    def keeps(self, rank: int) -> bool:
        """Whether a member's result is what it has given."""
        return False


@dataclass(frozen=True)
class ReduceAll(Action):
    """Each tensor of a structure is reduced by itself."""

    op: ReduceOp
    name = "allreduce"
    takes_structures = True

    def results(self, given: Sequence[Content | None]) -> list[Content | None]:
        return list(_reducible(self.name, given, self.op))

    def operations(self, engine: Engine, source: Local, target: Local) -> list[Operation]:
        pairs = zip(source.arrays, target.arrays, strict=True)
        return [AllReduce(engine.rank, engine.size, array, self.op, out) for array, out in pairs]


@dataclass(frozen=True)
class ReduceScatters(Action):
    """Each rank gets its part of the reduction."""

    op: ReduceOp
    splits: Sequence[int] | None
    name = "reduce_scatter"

    @classmethod
    def of(cls, op: ReduceOp, splits: Any, size: int) -> ReduceScatters:
        """Make one of splits as callers give them: an array, say, whose memory would not go into a pickle.

        Raises:
            TypeError: they are none.
        """
        return cls(op, None if splits is None else row_counts(splits, size))

    def results(self, given: Sequence[Content | None]) -> list[Content | None]:
        known = _reducible(self.name, given, self.op)
        shape, dtype, _ = known[0].tensors[0]
        if not shape:
            raise ValueError(f"{self.name} cuts along dimension 0, and the tensors have none; reshape them to (1,)")
        size = len(given)
        rows = chunks(shape[0], size) if self.splits is None else check_splits(self.splits, shape[0], size)
        return [_tensor((rows[rank], *shape[1:]), dtype, each.tensors[0].kind) for rank, each in enumerate(known)]

    def operations(self, engine: Engine, source: Local, target: Local) -> list[Operation]:
        (array,), (out,) = source.arrays, target.arrays
        return [ReduceScatter(engine.rank, engine.size, array, self.op, self.splits, out)]


@dataclass(frozen=True)
class GatherAll(Action):
    """Each rank gets the concatenation."""

    name = "allgather"

    def results(self, given: Sequence[Content | None]) -> list[Content | None]:
        known = _all_given(self.name, given)
        shapes = [each.tensors[0].shape or (1,) for each in known]
        dtype = known[0].tensors[0].dtype
        for rank, each in enumerate(known):
            if shapes[rank][1:] != shapes[0][1:] or each.tensors[0].dtype != dtype:
                raise ValueError(
                    f"{self.name}: refs[0] is {known[0]} and refs[{rank}] {each}; dtypes must be equal, and shapes but "
                    "for dimension 0"
                )
        whole = (sum(shape[0] for shape in shapes), *shapes[0][1:])
        return [_tensor(whole, dtype, each.tensors[0].kind) for each in known]

    def operations(self, engine: Engine, source: Local, target: Local) -> list[Operation]:
        (array,), (out,) = source.arrays, target.arrays
        return [AllGather(engine.rank, engine.size, array, out)]


@dataclass(frozen=True)
class Broadcasts(Action):
    """Every rank gets what the root has given, which is the root's own result."""

    root: int
    name = "broadcast"
    takes_structures = True

    def results(self, given: Sequence[Content | None]) -> list[Content | None]:
        root = check_rank(self.root, len(given), "root")
        for rank, each in enumerate(given):
            if (each is None) == (rank == root):
                given_or_not = "None" if each is None else str(each)
                raise ValueError(f"{self.name}: refs[{rank}] is {given_or_not} and root is {root}; only it gives a ref")
        return [None if rank == root else given[root] for rank in range(len(given))]

    def operations(self, engine: Engine, source: Local, target: Local) -> list[Operation]:
        rank, size = engine.rank, engine.size
        if rank != self.root:
            return [Broadcast(rank, size, None, self.root, out) for out in target.arrays]
        # Its own `out`, so that nothing is copied but what does not lie in order, and what is small, whose memory
        # nobody can write to.
        return [
            Broadcast(rank, size, array, self.root, array if array.flags.carray else None) for array in source.arrays
        ]

    def keeps(self, rank: int) -> bool:
        return rank == self.root


@dataclass(frozen=True)
class Relayout(Action):
    """What is laid out in one way is laid out in another, a tensor or a structure."""

    src: Any
    dst: Any
    name = "repartition"
    takes_structures = True

    def results(self, given: Sequence[Content | None]) -> list[Content | None]:
        pairs = pair(self.src, self.dst, len(given))
        held: dict[trees.Path, dict[int, Blank]] = {path: {} for path, _, _ in pairs}
        for rank, each in enumerate(given):
            if each is not None:
                if isinstance(each.form, Place) and isinstance(self.src, dict | list | tuple):
                    raise ValueError(f"refs[{rank}] is {each}, and src a {type(self.src).__name__} of Layouts")
                for path, place in trees.match(each.form, self.src, f"refs[{rank}]", "src").items():
                    if not isinstance(place, Place):
                        raise ValueError(f"refs[{rank}]{trees.name(path)} is a structure, and src a Layout there")
                    held[path][rank] = each.tensors[place.index]
        for path, src, _ in pairs:
            _check_parts(path, src, held[path], len(given))
        kinds = {rank: each.tensors[0].kind for rank, each in enumerate(given) if each is not None and each.tensors}
        return [self._result(rank, pairs, held, kinds) for rank in range(len(given))]

    def operations(self, engine: Engine, source: Local, target: Local) -> list[Operation]:
        return [
            Repartition(
                engine.rank,
                engine.size,
                source.tree,
                src=self.src,
                dst=self.dst,
                flows=engine.current.flows,
                hosts=engine.hosts,
                out=target.tree,
            )
        ]

    def _result(
        self,
        rank: int,
        pairs: Sequence[tuple[trees.Path, Layout, Layout]],
        held: Mapping[trees.Path, Mapping[int, Blank]],
        kinds: Mapping[int, str],
    ) -> Content | None:
        got = [(path, src, dst) for path, src, dst in pairs if dst.grid.cell_of(rank) is not None]
        if not got:
            return None
        if len(got) < len(pairs):
            lacks = next(path for path, _, dst in pairs if dst.grid.cell_of(rank) is None)
            raise ValueError(
                f"{self.name}: rank {rank} is in dst{trees.name(got[0][0])} and not in dst{trees.name(lacks)}; a ref "
                "is of all tensors of a structure"
            )
        blanks = []
        for path, src, dst in got:
            sent = held[path][src.ranks[0]]
            blanks.append(Blank(dst.local_shape(rank), sent.dtype, kinds.get(rank, sent.kind)))
        places = {path: Place(number) for number, (path, _, _) in enumerate(got)}
        return Content(trees.rebuild(self.dst, places.__getitem__), tuple(blanks))


def _reducible(name: str, given: Sequence[Content | None], op: ReduceOp) -> list[Content]:
    """Return what is given, which is equal on all members and can be reduced."""
    first, *_ = known = _all_given(name, given)
    for rank, each in enumerate(known):
        if each.form != first.form or len(each.tensors) != len(first.tensors):
            raise ValueError(f"{name}: refs[0] is {first} and refs[{rank}] {each}; structures must be equal")
        for mine, other in zip(each.tensors, first.tensors, strict=True):
            if mine[:2] != other[:2]:
                raise ValueError(
                    f"{name}: refs[0] has {_name(other)} and refs[{rank}] {_name(mine)} in its place; shapes and "
                    "dtypes must be equal"
                )
    for tensor in first.tensors:
        reductions.check(op, tensor.dtype)
    return known


def _all_given(name: str, given: Sequence[Content | None]) -> list[Content]:
    known = []
    for rank, each in enumerate(given):
        if each is None:
            raise ValueError(f"{name}: refs[{rank}] is None; each member gives a ref")
        known.append(each)
    return known


def _check_parts(path: trees.Path, src: Layout, held: Mapping[int, Blank], size: int) -> None:
    """Raise where the ranks do not hold what their layout says."""
    at = trees.name(path)
    dtype = next((part.dtype for part in held.values()), "")
    for rank in range(size):
        part, owns = held.get(rank), src.grid.cell_of(rank) is not None
        if (part is not None) != owns:
            what = f"refs[{rank}]{at} is {_name(part) if part else None}"
            raise ValueError(f"{what}, and rank {rank} is {'' if owns else 'not '}in src, {src!r}")
        if part is None:
            continue
        if part.shape != (expected := src.local_shape(rank)):
            raise ValueError(
                f"refs[{rank}]{at} has shape {part.shape}, and the part of rank {rank} in src, {src!r}, {expected}"
            )
        if part.dtype != dtype:
            raise ValueError(f"refs[{rank}]{at} is {part.dtype}, and other ranks' {dtype}; dtypes must be equal")
        if src.partial is not None:
            reductions.check(src.partial, part.dtype)


def _tensor(shape: tuple[int, ...], dtype: str, kind: str) -> Content:
    return Content(Place(0), (Blank(shape, dtype, kind),))


def _name(tensor: Blank) -> str:
    return f"{tensor.dtype}{list(tensor.shape)}"
