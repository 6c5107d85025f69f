"""The collectives that move pieces of any shape and dtype between pairs of members: gather, scatter, alltoall."""

from __future__ import annotations

from abc import abstractmethod
from typing import TYPE_CHECKING, Any

import numpy as np

from collective import tensors
from collective._core import targets
from collective._core.operands import Landing, Spec, as_bytes, check_out, copies, describe, flat
from collective._core.operations import Disagreement, Operation, check_rank, passes_nothing

if TYPE_CHECKING:
    from collections.abc import Awaitable, Sequence

    from collective._core.agreement import Metas
    from collective.abc import DataPlane


class Exchange(Operation):
    """Pieces of any shape and dtype between pairs: `sources[j]` goes to rank j, `expected[i]` comes from rank i."""

    def __init__(self, rank: int, size: int) -> None:
        super().__init__(rank, size)
        self.pieces: list[Any] = [None] * size
        self.outs: list[Any] = [None] * size
        """The caller's arrays for what comes from each rank, if there are any."""
        self.overwritten: set[int] = set()
        """Whose pieces are written to, too, and so are copied first."""
        self.sources: list[np.ndarray]
        self.landings: list[Landing | None]
        self.targets: list[np.ndarray]

    def give(self, dst: int, tensor: Any, what: str) -> Spec:
        """Enter a piece for a rank."""
        spec = describe(tensor, what)
        self.pieces[dst] = tensor
        self.stage_bytes += copies(tensor, spec)
        return spec

    def land_in(self, outs: dict[int, Any], names: dict[int, str]) -> dict[int, Spec]:
        """Enter arrays for what comes from ranks, which are called so in errors; return what they are.

        Raises:
            TypeError: one is no array. ValueError: one is read-only, or overlaps another or an input that it is not.
        """
        specs = {src: describe(out, names[src]) for src, out in outs.items()}
        for src, out in outs.items():
            if not tensors.is_writable(out):
                raise ValueError(f"{names[src]} is read-only")
            self.outs[src] = out
        given = {f"the tensor for rank {dst}": dst for dst, piece in enumerate(self.pieces) if piece is not None}
        same = targets.check_overlaps(
            [(names[src], out) for src, out in outs.items()], [(name, self.pieces[dst]) for name, dst in given.items()]
        )
        for name in same:
            dst = given[name]
            piece = self.pieces[dst]
            if dst != self.rank or dst not in outs or not tensors.same_memory(outs[dst], piece):
                self.overwritten.add(dst)
                self.stage_bytes += describe(piece).nbytes
        return specs

    @abstractmethod
    def expects(self) -> list[tuple[Spec, str, str] | None]:
        """Return for each rank the spec of what it sends here and the kind and device to land it as."""

    def stage(self) -> None:
        nothing = np.empty(0, np.uint8)
        gate = self.gate if self.stage_bytes else None
        self.sources = [nothing if piece is None else as_bytes(flat(piece, gate)) for piece in self.pieces]
        for dst in self.overwritten:
            copy = np.empty_like(self.sources[dst])
            self.gate.copy(copy, self.sources[dst])
            self.sources[dst] = copy
        self.pieces = []
        self.landings = []
        self.targets = []
        for out, expected in zip(self.outs, self.expects(), strict=True):
            if expected is None:
                self.landings.append(None)
                self.targets.append(nothing)
            else:
                spec, kind, device = expected
                if out is not None:
                    kind, device = describe(out)[::3]
                landing = Landing(out, kind, device)
                self.landings.append(landing)
                self.targets.append(as_bytes(landing.memory(spec.dtype, spec.shape)))

    def issue(self, plane: DataPlane) -> Awaitable[None]:
        return plane.alltoall(self.sources, self.targets)

    @property
    def long_finish(self) -> bool:
        return any(landing.long for landing in self.landings if landing is not None)

    def finish(self) -> Any:
        return [None if landing is None else landing.finish(self) for landing in self.landings]


class Gather(Exchange):
    """The root gets a list of every member's tensor."""

    def __init__(self, rank: int, size: int, tensor: Any, root: int, out: Any) -> None:
        super().__init__(rank, size)
        self.root = check_rank(root, size, "root")
        self.mine = self.give(root, tensor, "the tensor")
        self.out = out
        outs = None
        if out is not None:
            if rank != root:
                raise ValueError(f"out was passed on rank {rank}; only the root, {root}, gets a result")
            outs = self.land_in(*_outs(out, size, "gather", [self.mine.kind] * size))
        self.meta = (self.mine, outs)
        self.specs: list[Spec] = []

    def describe(self) -> str:
        return f"gather(root={self.root})"

    def agree(self, metas: Metas) -> None:
        assert metas is not None
        self.specs = [Spec(*spec) for spec, _ in metas]
        outs = metas[self.root][1]
        if outs is not None and any(_differ(out, self.specs[src]) for src, out in outs.items()):
            said = [f"the tensor is {spec}" for spec in self.specs]
            said[self.root] += f", out is {', '.join(str(Spec(*outs[src])) for src in range(self.size))}"
            raise Disagreement(said)

    def expects(self) -> list[tuple[Spec, str, str] | None]:
        if self.rank != self.root:
            return [None] * self.size
        return [(spec, self.mine.kind, self.mine.device) for spec in self.specs]

    def finish(self) -> Any:
        results = super().finish()
        if self.rank != self.root:
            return None
        return self.out if isinstance(self.out, list) else results


class Scatter(Exchange):
    """Every member gets its own of the root's tensors."""

    def __init__(self, rank: int, size: int, pieces: Sequence[Any] | None, root: int, out: Any) -> None:
        super().__init__(rank, size)
        self.root = check_rank(root, size, "root")
        self.specs: list[Spec] = []
        given = None
        if rank == root:
            each = enumerate(_one_each(pieces, size, "scatter"))
            given = [self.give(dst, piece, f"tensors[{dst}]") for dst, piece in each]
            if out is not None:
                check_out(out, given[rank])
        else:
            passes_nothing(pieces, rank, root, "scatter")
        filled = None if out is None else self.land_in({root: out}, {root: "out"})[root]
        self.meta = None if given is None and filled is None else (given, filled)

    def describe(self) -> str:
        return f"scatter(root={self.root})"

    def agree(self, metas: Metas) -> None:
        assert metas is not None
        self.specs = [Spec(*spec) for spec in metas[self.root][0]]
        outs = [None if meta is None else meta[1] for meta in metas]
        if any(out is not None and _differ(out, spec) for out, spec in zip(outs, self.specs, strict=True)):
            said = ["out is not passed" if out is None else f"out is {Spec(*out)}" for out in outs]
            said[self.root] += f", the tensors are {', '.join(map(str, self.specs))}"
            raise Disagreement(said)

    def expects(self) -> list[tuple[Spec, str, str] | None]:
        expected: list[tuple[Spec, str, str] | None] = [None] * self.size
        spec = self.specs[self.rank]
        expected[self.root] = (spec, spec.kind, spec.device)
        return expected

    def finish(self) -> Any:
        return super().finish()[self.root]


class AllToAll(Exchange):
    """Rank i gets `tensors[i]` of every member."""

    def __init__(self, rank: int, size: int, pieces: Sequence[Any], out: Any) -> None:
        super().__init__(rank, size)
        each = enumerate(_one_each(pieces, size, "alltoall"))
        self.mine = [self.give(dst, piece, f"tensors[{dst}]") for dst, piece in each]
        self.out = out
        outs = None if out is None else self.land_in(*_outs(out, size, "alltoall", [each.kind for each in self.mine]))
        self.meta = (self.mine, outs)
        self.specs: list[Spec] = []

    def describe(self) -> str:
        return "alltoall()"

    def agree(self, metas: Metas) -> None:
        assert metas is not None
        self.specs = [Spec(*given[self.rank]) for given, _ in metas]
        outs = [found or {} for _, found in metas]
        unfit = [
            {src: out for src, out in found.items() if _differ(out, Spec(*metas[src][0][rank]))}
            for rank, found in enumerate(outs)
        ]
        if any(unfit):
            raise Disagreement([_misfits(rank, found, metas) for rank, found in enumerate(unfit)])

    def expects(self) -> list[tuple[Spec, str, str] | None]:
        return [(spec, mine.kind, mine.device) for spec, mine in zip(self.specs, self.mine, strict=True)]

    def finish(self) -> Any:
        results = super().finish()
        return self.out if isinstance(self.out, list) else results


def _outs(out: Any, size: int, name: str, kinds: Sequence[str]) -> tuple[dict[int, Any], dict[int, str]]:
    """Return the arrays of a caller's `out` by the rank whose tensor each is for, and how errors name them."""
    outs = dict(enumerate(_one_each(out, size, f"{name}'s out")))
    names = {src: f"out[{src}]" for src in outs}
    for src, each in outs.items():
        kind = describe(each, names[src]).kind
        if kind != kinds[src]:
            raise TypeError(f"out[{src}] is a {kind} array and the result a {kinds[src]} one; pass the same library")
    return outs, names


def _differ(out: Any, spec: Spec) -> bool:
    """Whether an array cannot take a tensor: another dtype or shape. `out` is its Spec as it travelled."""
    return tuple(out[1:3]) != tuple(spec[1:3])


def _misfits(rank: int, unfit: dict[int, Any], metas: Sequence[Any]) -> str:
    if not unfit:
        return "tensors like its out"
    return "; ".join(f"out[{src}] is {Spec(*out)} for {Spec(*metas[src][0][rank])}" for src, out in unfit.items())


def _one_each(tensors: Any, size: int, name: str) -> list[Any]:
    if not isinstance(tensors, list | tuple):
        raise TypeError(f"{name} takes a list of {size} tensors, one a rank, not {type(tensors).__name__}")
    if len(tensors) != size:
        raise ValueError(f"{name} takes one tensor a rank, {size}, and got {len(tensors)}")
    return list(tensors)
