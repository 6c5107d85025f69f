"""The collectives: what each announces, what must fit, and what it asks of the data plane.

An operation is made at the call, where it checks what this member alone can see. `record` and `meta` are announced;
`agree` sees every member's meta and reaches the same verdict on each; then `stage`, `issue` and `finish` follow, in the
order that all agreed on. Where members can show data with their announcements, a short operation is settled by those:
`settle` and `finish` follow.
"""

from __future__ import annotations

import hashlib
import math
from abc import ABC, abstractmethod
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np

from collective import reductions, tensors
from collective._core.agreement import Record
from collective._core.operands import Landing, Spec, as_bytes, check_out, copies, describe, flat, overlap
from collective._gate import Guarded
from collective._integers import integer, integers
from collective.tensors import numpy_dtype
from collective.types import ReduceOp

if TYPE_CHECKING:
    from collections.abc import Awaitable, Sequence

    from collective._core.agreement import Metas
    from collective.abc import DataPlane


BRIEF = 4096
"""Bytes up to which a member shows what it gives with its announcement."""


class Disagreement(Exception):
    """The metas do not fit together; holds what each rank passed."""

    def __init__(self, said: Sequence[str]) -> None:
        super().__init__(said)
        self.said = said


class Operation(Guarded, ABC):
    """One collective at one member."""

    def __init__(self, rank: int, size: int) -> None:
        self.rank = rank
        self.size = size
        self.meta: Any = None
        self.seq = 0
        """Its place in the order that all members agreed on, from `agree` on."""
        self.stage_bytes = 0
        """Bytes that `stage` copies."""

    @abstractmethod
    def describe(self) -> str:
        """Return the call as its caller would write it; equal strings mean that members agree."""

    def record(self, where: str) -> Record:
        """Return what is announced."""
        what = self.describe()
        return Record(_digest(what), what, where)

    @abstractmethod
    def agree(self, metas: Metas) -> None:
        """Take every member's meta.

        Raises:
            Disagreement: they do not fit; on every member alike.
        """

    @abstractmethod
    def stage(self) -> None:
        """Bring the input into the form that `issue` wants; may run on a thread, and then goes through the gate."""

    def issue(self, plane: DataPlane) -> Awaitable[None] | None:
        """Ask the data plane for it; None where nothing has to move."""
        return None

    @property
    def long_finish(self) -> bool:
        """Whether `finish` may take longer than the loop can wait."""
        return False

    def finish(self) -> Any:
        """Return the result; may run on a thread, and then goes through the gate."""
        return None


class BriefOperation(Operation):
    """One that the members can settle by what they show with their announcements, where that is short."""

    @abstractmethod
    def brief(self) -> bytes | None:
        """Return the bytes that this member gives, BRIEF at most, or None where it gives more or nothing.

        The input may be changed when this returns.
        """

    def is_settled_by(self, briefs: Sequence[bytes | None]) -> bool:
        """Whether these are enough for `settle`, on every member alike."""
        return None not in briefs

    @abstractmethod
    def settle(self, briefs: Sequence[Any]) -> None:
        """Work out the result from what each member gave, instead of `stage` and `issue`."""


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
        if color is not None:
            color = integer(color, "color", "an int, or None to be in no subgroup")
        self.color = color
        self.meta = (color, integer(key, "key"))
        self.ranks: list[int] = []

    def describe(self) -> str:
        return "split()"

    def agree(self, metas: Metas) -> None:
        assert metas is not None
        mine = [(key, rank) for rank, (color, key) in enumerate(metas) if color == self.color]
        self.ranks = [rank for _, rank in sorted(mine)]

    def stage(self) -> None:
        pass


class _OneTensor(BriefOperation):
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
        self.source = flat(self.tensor, self.gate if self.stage_bytes else None)
        self.tensor = None

    def brief(self) -> bytes | None:
        return _brief(self.tensor, self.spec)

    def parts(self, briefs: Sequence[bytes]) -> list[np.ndarray]:
        """Return what each member gave."""
        dtype = numpy_dtype(self.spec.dtype)
        return [np.frombuffer(brief, dtype) for brief in briefs]

    @property
    def long_finish(self) -> bool:
        return self.landing.long

    def finish(self) -> Any:
        return self.landing.finish(self)


class _Reduction(_OneTensor):
    """An operation that reduces."""

    op: ReduceOp

    def brief(self) -> bytes | None:
        # numpy's complex product differs in the last bit between places in memory (fused multiply-add): members that
        # each work out the same may not get the same.
        if self.op is ReduceOp.PROD and self.spec.dtype in reductions.COMPLEX:
            return None
        return super().brief()


class AllReduce(_Reduction):
    """Every member gets the reduction."""

    def __init__(self, rank: int, size: int, tensor: Any, op: ReduceOp, out: Any) -> None:
        super().__init__(rank, size, tensor, out)
        self.op = _reduce_op(op, self.spec)
        if out is not None:
            check_out(out, self.spec, inputs=[tensor])

    def describe(self) -> str:
        return f"allreduce({self.spec}, {self.op.name})"

    def settle(self, briefs: Sequence[Any]) -> None:
        target = self.landing.memory(self.spec.dtype, self.spec.shape)
        reductions.reduce_arrays(self.parts(briefs), self.op, target)

    def issue(self, plane: DataPlane) -> Awaitable[None]:
        return plane.allreduce(self.source, self.landing.memory(self.spec.dtype, self.spec.shape), self.op)


class Reduce(_Reduction):
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

    def settle(self, briefs: Sequence[Any]) -> None:
        if self.rank == self.root:
            target = self.landing.memory(self.spec.dtype, self.spec.shape)
            reductions.reduce_arrays(self.parts(briefs), self.op, target)

    def issue(self, plane: DataPlane) -> Awaitable[None]:
        target = self.landing.memory(self.spec.dtype, self.spec.shape) if self.rank == self.root else None
        return plane.reduce(self.source, target, self.op, self.root)

    def finish(self) -> Any:
        return self.landing.finish(self) if self.rank == self.root else None


class ReduceScatter(_Reduction):
    """Every member gets its part of the reduction, cut along dimension 0."""

    def __init__(self, rank: int, size: int, tensor: Any, op: ReduceOp, splits: Sequence[int] | None, out: Any) -> None:
        super().__init__(rank, size, tensor, out)
        self.op = _reduce_op(op, self.spec)
        if not self.spec.shape:
            raise ValueError("reduce_scatter cuts along dimension 0 and the tensor has none; reshape it to (1,)")
        rows = self.spec.shape[0]
        self.splits = chunks(rows, size) if splits is None else check_splits(splits, rows, size)
        self.shape = (self.splits[rank], *self.spec.shape[1:])
        if out is not None:
            check_out(out, self.spec._replace(shape=self.shape))
            if tensors.may_overlap(out, tensor) and tensors.row_of(tensor, out) != sum(self.splits[:rank]):
                raise overlap()

    def describe(self) -> str:
        return f"reduce_scatter({self.spec}, {self.op.name}, splits={list(self.splits)})"

    def settle(self, briefs: Sequence[Any]) -> None:
        row = math.prod(self.spec.shape[1:])
        start = sum(self.splits[: self.rank]) * row
        mine = slice(start, start + self.splits[self.rank] * row)
        target = self.landing.memory(self.spec.dtype, self.shape)
        reductions.reduce_arrays([part[mine] for part in self.parts(briefs)], self.op, target)

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
        own: int | None = None
        """The row of `out` where the tensor lies, if it does."""
        if out is not None:
            check_out(out, self.spec, shape_known=False)
            if tensors.may_overlap(out, tensor):
                own = tensors.row_of(out, tensor if tensor.ndim else tensor[None])
                # The lengths of the others are not known yet: `agree` sees to the rest.
                if own is None or (rank == 0 and own) or (rank == size - 1 and own + shape[0] != len(out)):
                    raise overlap()
        self.meta = (shape[0], None if out is None else describe(out).shape, own)
        self.rows: list[int] = []

    def describe(self) -> str:
        rest = "".join(f", {length}" for length in self.rest)
        return f"allgather({self.spec.dtype}[rows{rest}])"

    def agree(self, metas: Metas) -> None:
        assert metas is not None
        self.rows = [rows for rows, _, _ in metas]
        whole = (sum(self.rows), *self.rest)
        starts = [sum(self.rows[:rank]) for rank in range(len(metas))]
        if any(
            out not in (None, whole) or own not in (None, start)
            for (_, out, own), start in zip(metas, starts, strict=True)
        ):
            raise Disagreement(
                [
                    f"{rows} rows"
                    + ("" if out is None else f", out of {out} for {whole}")
                    + ("" if own is None else f", which lie in out from row {own} on, for {start}")
                    for (rows, out, own), start in zip(metas, starts, strict=True)
                ]
            )

    def settle(self, briefs: Sequence[Any]) -> None:
        target = self.landing.memory(self.spec.dtype, (sum(self.rows), *self.rest))
        np.concatenate(self.parts(briefs), out=target)

    def issue(self, plane: DataPlane) -> Awaitable[None]:
        row = math.prod(self.rest) * self.source.itemsize
        target = self.landing.memory(self.spec.dtype, (sum(self.rows), *self.rest))
        return plane.allgather(as_bytes(self.source), as_bytes(target), [rows * row for rows in self.rows])


class Broadcast(BriefOperation):
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
            passes_nothing(tensor, rank, root, "broadcast")
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

    def brief(self) -> bytes | None:
        return _brief(self.tensor, Spec(*self.meta[0])) if self.rank == self.root else None

    def is_settled_by(self, briefs: Sequence[bytes | None]) -> bool:
        return briefs[self.root] is not None

    def settle(self, briefs: Sequence[Any]) -> None:
        memory = self._land()
        memory[...] = np.frombuffer(briefs[self.root], memory.dtype)

    def _land(self) -> np.ndarray:
        kind, device = (self.spec.kind, self.spec.device) if self.out is None else describe(self.out)[::3]
        self.landing = Landing(self.out, kind, device)
        return self.landing.memory(self.spec.dtype, self.spec.shape)

    def stage(self) -> None:
        memory = self._land()
        if self.rank == self.root:
            self.source = flat(self.tensor, self.gate)
            self.tensor = None
            if memory.ctypes.data != self.source.ctypes.data:
                self.gate.copy(memory, self.source)
        self.source = memory

    def issue(self, plane: DataPlane) -> Awaitable[None]:
        return plane.broadcast(as_bytes(self.source), self.root)

    @property
    def long_finish(self) -> bool:
        return self.landing.long

    def finish(self) -> Any:
        return self.landing.finish(self)


@lru_cache(maxsize=256)
def _digest(what: str) -> bytes:
    return hashlib.blake2b(what.encode(), digest_size=16).digest()


def _brief(tensor: Any, spec: Spec) -> bytes | None:
    """Return the bytes of a tensor in host memory, if they are few; bytes do not tell how many elements of none are."""
    if spec.device != "cpu" or spec.nbytes > BRIEF or (not spec.nbytes and not numpy_dtype(spec.dtype).itemsize):
        return None
    return flat(tensor).tobytes()


def check_rank(rank: Any, size: int, what: str) -> int:
    """Return a group-local rank.

    Raises:
        TypeError: it is no int. ValueError: the group has no such rank.
    """
    found = integer(rank, what, f"an int from 0 to {size - 1}")
    if not 0 <= found < size:
        raise ValueError(f"{what} is {found}; the group has ranks 0 to {size - 1}")
    return found


def _reduce_op(op: Any, spec: Spec) -> ReduceOp:
    if not isinstance(op, ReduceOp):
        raise TypeError(f"op is {op!r}; a collective.ReduceOp: {', '.join(known.name for known in ReduceOp)}")
    reductions.check(op, spec.dtype)
    return op


def chunks(rows: int, size: int) -> tuple[int, ...]:
    """Return the lengths that torch.chunk cuts, with empty parts where it returns fewer."""
    length = -(-rows // size)
    return tuple(max(0, min(length, rows - rank * length)) for rank in range(size))


def check_splits(splits: Any, count: int, size: int) -> tuple[int, ...]:
    """Return the row counts of `size` parts of so many rows.

    Raises:
        TypeError: they are none. ValueError: they do not fit.
    """
    rows = row_counts(splits, size)
    if len(rows) != size or min(rows) < 0 or sum(rows) != count:
        raise ValueError(
            f"splits {list(rows)} do not cut {count} rows into {size} parts: they sum to {sum(rows)} "
            f"and there are {len(rows)} of them"
        )
    return rows


def row_counts(splits: Any, size: int) -> tuple[int, ...]:
    """Return the row counts that a caller gives, whether they fit or not.

    Raises:
        TypeError: they are none.
    """
    return integers(splits, "splits", f"a sequence of {size} row counts")


def passes_nothing(tensor: Any, rank: int, root: int, name: str) -> None:
    if tensor is not None:
        raise ValueError(
            f"{name}: rank {rank} passed {type(tensor).__name__} and root is {root}; pass None on the other ranks"
            " (out= gives memory to fill)"
        )


def _writable(out: Any) -> Spec:
    spec = describe(out, "out")
    check_out(out, spec)
    return spec
