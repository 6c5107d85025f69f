"""The collectives: what each announces, what must fit, and what it asks of the data plane.

An operation is made at the call, where it checks what this member alone can see. `record` and `meta` are announced;
`agree` sees every member's meta and reaches the same verdict on each; then `stage`, `issue` and `finish` follow, in the
order of places.
"""

from __future__ import annotations

import hashlib
import math
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any

import numpy as np

from collective import reductions
from collective._core.agreement import Record
from collective._core.operands import Landing, Spec, as_bytes, check_out, copies, describe, flat
from collective.types import ReduceOp

if TYPE_CHECKING:
    from collections.abc import Awaitable, Sequence

    from collective._core.agreement import Metas
    from collective.abc import DataPlane


class Disagreement(Exception):
    """The metas do not fit together; holds what each rank passed."""

    def __init__(self, said: Sequence[str]) -> None:
        super().__init__(said)
        self.said = said


class Operation(ABC):
    """One collective at one member."""

    def __init__(self, rank: int, size: int) -> None:
        self.rank = rank
        self.size = size
        self.meta: Any = None
        self.stage_bytes = 0
        """Bytes that `stage` copies."""

    @abstractmethod
    def describe(self) -> str:
        """Return the call as its caller would write it; equal strings mean that members agree."""

    def record(self, where: str) -> Record:
        """Return what is announced."""
        what = self.describe()
        return Record(hashlib.blake2b(what.encode(), digest_size=16).digest(), what, where)

    @abstractmethod
    def agree(self, metas: Metas) -> None:
        """Take every member's meta.

        Raises:
            Disagreement: they do not fit; on every member alike.
        """

    @abstractmethod
    def stage(self) -> None:
        """Bring the input into the form that `issue` wants; may run on a thread."""

    def issue(self, plane: DataPlane) -> Awaitable[None] | None:
        """Ask the data plane for it; None where nothing has to move."""
        return None

    @property
    def long_finish(self) -> bool:
        """Whether `finish` may take longer than the loop can wait."""
        return False

    def finish(self) -> Any:
        """Return the result; may run on a thread."""
        return None


class Barrier(Operation):
    """All have called it."""

    def describe(self) -> str:
        return "barrier()"

    def agree(self, metas: Metas) -> None:
        pass

    def stage(self) -> None:
        pass


class Split(Operation):
    """Collect every member's (color, key)."""

    def __init__(self, rank: int, size: int, color: int | None, key: int) -> None:
        super().__init__(rank, size)
        if color is not None and (isinstance(color, bool) or not isinstance(color, int)):
            raise TypeError(f"color is {color!r}; an int, or None to be in no subgroup")
        if isinstance(key, bool) or not isinstance(key, int):
            raise TypeError(f"key is {key!r}; an int")
        self.meta = (color, key)
        self.color = color
        self.ranks: list[int] = []

    def describe(self) -> str:
        return "split()"

    def agree(self, metas: Metas) -> None:
        assert metas is not None
        mine = [(key, rank) for rank, (color, key) in enumerate(metas) if color == self.color]
        self.ranks = [rank for _, rank in sorted(mine)]

    def stage(self) -> None:
        pass


class _OneTensor(Operation):
    """An operation with one input of one spec and one landing."""

    def __init__(self, rank: int, size: int, tensor: Any, out: Any) -> None:
        super().__init__(rank, size)
        self.tensor = tensor
        self.spec = describe(tensor)
        self.landing = Landing(out, self.spec.kind, self.spec.device)
        self.stage_bytes = copies(tensor, self.spec)
        self.source: np.ndarray

    def agree(self, metas: Metas) -> None:
        pass

    def stage(self) -> None:
        self.source = flat(self.tensor)
        self.tensor = None

    @property
    def long_finish(self) -> bool:
        return self.landing.long

    def finish(self) -> Any:
        return self.landing.finish()


class AllReduce(_OneTensor):
    """Every member gets the reduction."""

    def __init__(self, rank: int, size: int, tensor: Any, op: ReduceOp, out: Any) -> None:
        super().__init__(rank, size, tensor, out)
        self.op = _reduce_op(op, self.spec)
        if out is not None:
            check_out(out, self.spec, inputs=[tensor])

    def describe(self) -> str:
        return f"allreduce({self.spec}, {self.op.name})"

    def issue(self, plane: DataPlane) -> Awaitable[None]:
        return plane.allreduce(self.source, self.landing.memory(self.spec.dtype, self.spec.shape), self.op)


class Reduce(_OneTensor):
    """The root gets the reduction."""

    def __init__(self, rank: int, size: int, tensor: Any, root: int, op: ReduceOp, out: Any) -> None:
        super().__init__(rank, size, tensor, out)
        self.root = check_rank(root, size, "root")
        self.op = _reduce_op(op, self.spec)
        if out is not None:
            if rank != root:
                raise ValueError(f"out was passed on rank {rank}; only the root, {root}, gets a result")
            check_out(out, self.spec, inputs=[tensor])

    def describe(self) -> str:
        return f"reduce({self.spec}, root={self.root}, {self.op.name})"

    def issue(self, plane: DataPlane) -> Awaitable[None]:
        target = self.landing.memory(self.spec.dtype, self.spec.shape) if self.rank == self.root else None
        return plane.reduce(self.source, target, self.op, self.root)

    def finish(self) -> Any:
        return self.landing.finish() if self.rank == self.root else None


class ReduceScatter(_OneTensor):
    """Every member gets its part of the reduction, cut along dimension 0."""

    def __init__(self, rank: int, size: int, tensor: Any, op: ReduceOp, splits: Sequence[int] | None, out: Any) -> None:
        super().__init__(rank, size, tensor, out)
        self.op = _reduce_op(op, self.spec)
        if not self.spec.shape:
            raise ValueError("reduce_scatter cuts along dimension 0 and the tensor has none; reshape it to (1,)")
        self.splits = _chunks(self.spec.shape[0], size) if splits is None else _check_splits(splits, self.spec, size)
        self.shape = (self.splits[rank], *self.spec.shape[1:])
        if out is not None:
            check_out(out, self.spec._replace(shape=self.shape), inputs=[tensor])

    def describe(self) -> str:
        return f"reduce_scatter({self.spec}, {self.op.name}, splits={list(self.splits)})"

    def issue(self, plane: DataPlane) -> Awaitable[None]:
        row = math.prod(self.spec.shape[1:])
        target = self.landing.memory(self.spec.dtype, self.shape)
        return plane.reduce_scatter(self.source, target, self.op, [rows * row for rows in self.splits])


class AllGather(_OneTensor):
    """Every member gets the concatenation along dimension 0."""

    def __init__(self, rank: int, size: int, tensor: Any, out: Any) -> None:
        super().__init__(rank, size, tensor, out)
        shape = self.spec.shape or (1,)
        self.rest = shape[1:]
        if out is not None:
            check_out(out, self.spec, inputs=[tensor], shape_known=False)
        self.meta = (shape[0], None if out is None else describe(out).shape)
        self.rows: list[int] = []

    def describe(self) -> str:
        rest = "".join(f", {length}" for length in self.rest)
        return f"allgather({self.spec.dtype}[rows{rest}])"

    def agree(self, metas: Metas) -> None:
        assert metas is not None
        self.rows = [rows for rows, _ in metas]
        whole = (sum(self.rows), *self.rest)
        if any(out not in (None, whole) for _, out in metas):
            raise Disagreement(
                [f"{rows} rows" + ("" if out is None else f", out of {out} for {whole}") for rows, out in metas]
            )

    def issue(self, plane: DataPlane) -> Awaitable[None]:
        row = math.prod(self.rest) * self.source.itemsize
        target = self.landing.memory(self.spec.dtype, (sum(self.rows), *self.rest))
        return plane.allgather(as_bytes(self.source), as_bytes(target), [rows * row for rows in self.rows])


class Broadcast(Operation):
    """Every member gets the root's tensor."""

    def __init__(self, rank: int, size: int, tensor: Any, root: int, out: Any) -> None:
        super().__init__(rank, size)
        self.root = check_rank(root, size, "root")
        self.tensor = tensor
        self.out = out
        if rank == root:
            spec = describe(tensor)
            if out is not None:
                check_out(out, spec, inputs=[tensor])
            self.meta = (spec, None)
            self.stage_bytes = copies(tensor, spec) + spec.nbytes
        else:
            _passes_nothing(tensor, rank, root, "broadcast")
            self.meta = (None, None if out is None else _writable(out))
        self.spec: Spec
        self.source: np.ndarray
        self.landing: Landing

    def describe(self) -> str:
        return f"broadcast(root={self.root})"

    def agree(self, metas: Metas) -> None:
        assert metas is not None
        self.spec = spec = Spec(*metas[self.root][0])
        if any(out is not None and tuple(out[1:3]) != tuple(spec[1:3]) for _, out in metas):
            raise Disagreement(
                [
                    f"the tensor is {spec}" if rank == self.root else f"out is {'None' if out is None else Spec(*out)}"
                    for rank, (_, out) in enumerate(metas)
                ]
            )

    def stage(self) -> None:
        kind, device = (self.spec.kind, self.spec.device) if self.out is None else describe(self.out)[::3]
        self.landing = Landing(self.out, kind, device)
        memory = self.landing.memory(self.spec.dtype, self.spec.shape)
        if self.rank == self.root:
            self.source = flat(self.tensor)
            self.tensor = None
            if memory.ctypes.data != self.source.ctypes.data:
                memory[...] = self.source
        self.source = memory

    def issue(self, plane: DataPlane) -> Awaitable[None]:
        return plane.broadcast(as_bytes(self.source), self.root)

    @property
    def long_finish(self) -> bool:
        return self.landing.long

    def finish(self) -> Any:
        return self.landing.finish()


class _Exchange(Operation):
    """Pieces of any shape and dtype between pairs: `sources[j]` goes to rank j, `expected[i]` comes from rank i."""

    def __init__(self, rank: int, size: int) -> None:
        super().__init__(rank, size)
        self.pieces: list[Any] = [None] * size
        self.sources: list[np.ndarray]
        self.landings: list[Landing | None]
        self.targets: list[np.ndarray]

    def give(self, dst: int, tensor: Any, what: str) -> Spec:
        """Enter a piece for a rank."""
        spec = describe(tensor, what)
        self.pieces[dst] = tensor
        self.stage_bytes += copies(tensor, spec)
        return spec

    @abstractmethod
    def expects(self) -> list[tuple[Spec, str, str] | None]:
        """Return for each rank the spec of what it sends here and the kind and device to land it as."""

    def stage(self) -> None:
        nothing = np.empty(0, np.uint8)
        self.sources = [nothing if piece is None else as_bytes(flat(piece)) for piece in self.pieces]
        self.pieces = []
        self.landings = []
        self.targets = []
        for expected in self.expects():
            if expected is None:
                self.landings.append(None)
                self.targets.append(nothing)
            else:
                spec, kind, device = expected
                landing = Landing(None, kind, device)
                self.landings.append(landing)
                self.targets.append(as_bytes(landing.memory(spec.dtype, spec.shape)))

    def issue(self, plane: DataPlane) -> Awaitable[None]:
        return plane.alltoall(self.sources, self.targets)

    @property
    def long_finish(self) -> bool:
        return any(landing.long for landing in self.landings if landing is not None)

    def finish(self) -> Any:
        return [None if landing is None else landing.finish() for landing in self.landings]


class Gather(_Exchange):
    """The root gets a list of every member's tensor."""

    def __init__(self, rank: int, size: int, tensor: Any, root: int) -> None:
        super().__init__(rank, size)
        self.root = check_rank(root, size, "root")
        self.mine = self.meta = self.give(root, tensor, "the tensor")
        self.specs: list[Spec] = []

    def describe(self) -> str:
        return f"gather(root={self.root})"

    def agree(self, metas: Metas) -> None:
        assert metas is not None
        self.specs = [Spec(*meta) for meta in metas]

    def expects(self) -> list[tuple[Spec, str, str] | None]:
        if self.rank != self.root:
            return [None] * self.size
        return [(spec, self.mine.kind, self.mine.device) for spec in self.specs]

    def finish(self) -> Any:
        return super().finish() if self.rank == self.root else None


class Scatter(_Exchange):
    """Every member gets its own of the root's tensors."""

    def __init__(self, rank: int, size: int, tensors: Sequence[Any] | None, root: int) -> None:
        super().__init__(rank, size)
        self.root = check_rank(root, size, "root")
        self.specs: list[Spec] = []
        if rank == root:
            pieces = _one_each(tensors, size, "scatter")
            self.meta = [self.give(dst, piece, f"tensors[{dst}]") for dst, piece in enumerate(pieces)]
        else:
            _passes_nothing(tensors, rank, root, "scatter")

    def describe(self) -> str:
        return f"scatter(root={self.root})"

    def agree(self, metas: Metas) -> None:
        assert metas is not None
        self.specs = [Spec(*spec) for spec in metas[self.root]]

    def expects(self) -> list[tuple[Spec, str, str] | None]:
        expected: list[tuple[Spec, str, str] | None] = [None] * self.size
        spec = self.specs[self.rank]
        expected[self.root] = (spec, spec.kind, spec.device)
        return expected

    def finish(self) -> Any:
        return super().finish()[self.root]


class AllToAll(_Exchange):
    """Rank i gets `tensors[i]` of every member."""

    def __init__(self, rank: int, size: int, tensors: Sequence[Any]) -> None:
        super().__init__(rank, size)
        pieces = _one_each(tensors, size, "alltoall")
        self.mine = self.meta = [self.give(dst, piece, f"tensors[{dst}]") for dst, piece in enumerate(pieces)]
        self.specs: list[Spec] = []

    def describe(self) -> str:
        return "alltoall()"

    def agree(self, metas: Metas) -> None:
        assert metas is not None
        self.specs = [Spec(*meta[self.rank]) for meta in metas]

    def expects(self) -> list[tuple[Spec, str, str] | None]:
        return [(spec, mine.kind, mine.device) for spec, mine in zip(self.specs, self.mine, strict=True)]


def check_rank(rank: Any, size: int, what: str) -> int:
    """Return a group-local rank.

    Raises:
        TypeError: it is no int. ValueError: the group has no such rank.
    """
    if isinstance(rank, bool) or not isinstance(rank, int | np.integer):
        raise TypeError(f"{what} is {rank!r}; an int from 0 to {size - 1}")
    if not 0 <= rank < size:
        raise ValueError(f"{what} is {rank}; the group has ranks 0 to {size - 1}")
    return int(rank)


def _reduce_op(op: Any, spec: Spec) -> ReduceOp:
    if not isinstance(op, ReduceOp):
        raise TypeError(f"op is {op!r}; a collective.ReduceOp: {', '.join(known.name for known in ReduceOp)}")
    reductions.check(op, spec.dtype)
    return op


def _chunks(rows: int, size: int) -> tuple[int, ...]:
    """Return the lengths that torch.chunk cuts, with empty parts where it returns fewer."""
    length = -(-rows // size)
    return tuple(max(0, min(length, rows - rank * length)) for rank in range(size))


def _check_splits(splits: Any, spec: Spec, size: int) -> tuple[int, ...]:
    try:
        rows = tuple(int(length) for length in splits)
    except (TypeError, ValueError):
        raise TypeError(f"splits is {splits!r}; a sequence of {size} row counts") from None
    if len(rows) != size or min(rows) < 0 or sum(rows) != spec.shape[0]:
        raise ValueError(
            f"splits {list(rows)} do not cut {spec.shape[0]} rows into {size} parts: they sum to {sum(rows)} "
            f"and there are {len(rows)} of them"
        )
    return rows


def _one_each(tensors: Any, size: int, name: str) -> list[Any]:
    if not isinstance(tensors, list | tuple):
        raise TypeError(f"{name} takes a list of {size} tensors, one a rank, not {type(tensors).__name__}")
    if len(tensors) != size:
        raise ValueError(f"{name} takes one tensor a rank, {size}, and got {len(tensors)}")
    return list(tensors)


def _passes_nothing(tensor: Any, rank: int, root: int, name: str) -> None:
    if tensor is not None:
        raise ValueError(
            f"{name}: rank {rank} passed {type(tensor).__name__} and root is {root}; pass None on the other ranks"
            " (out= gives memory to fill)"
        )


def _writable(out: Any) -> Spec:
    spec = describe(out, "out")
    check_out(out, spec)
    return spec
