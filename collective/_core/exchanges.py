"""The collectives that move pieces of any shape and dtype between pairs of members: gather, scatter, alltoall."""

from __future__ import annotations

from abc import abstractmethod
from typing import TYPE_CHECKING, Any

import numpy as np

from collective._core.operands import Landing, Spec, as_bytes, copies, describe, flat
from collective._core.operations import Operation, check_rank, passes_nothing

if TYPE_CHECKING:
    from collections.abc import Awaitable, Sequence

    from collective._core.agreement import Metas
    from collective.abc import DataPlane


class Exchange(Operation):
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
        gate = self.gate if self.stage_bytes else None
        self.sources = [nothing if piece is None else as_bytes(flat(piece, gate)) for piece in self.pieces]
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
        return [None if landing is None else landing.finish(self) for landing in self.landings]


class Gather(Exchange):
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


class Scatter(Exchange):
    """Every member gets its own of the root's tensors."""

    def __init__(self, rank: int, size: int, tensors: Sequence[Any] | None, root: int) -> None:
        super().__init__(rank, size)
        self.root = check_rank(root, size, "root")
        self.specs: list[Spec] = []
        if rank == root:
            pieces = _one_each(tensors, size, "scatter")
            self.meta = [self.give(dst, piece, f"tensors[{dst}]") for dst, piece in enumerate(pieces)]
        else:
            passes_nothing(tensors, rank, root, "scatter")

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


class AllToAll(Exchange):
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


def _one_each(tensors: Any, size: int, name: str) -> list[Any]:
    if not isinstance(tensors, list | tuple):
        raise TypeError(f"{name} takes a list of {size} tensors, one a rank, not {type(tensors).__name__}")
    if len(tensors) != size:
        raise ValueError(f"{name} takes one tensor a rank, {size}, and got {len(tensors)}")
    return list(tensors)
