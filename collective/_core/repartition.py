"""Repartition: tensors go from one layout to another, over links from rank to rank."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from collective import planning, reductions, tensors
from collective._core import targets, trees
from collective._core.arithmetic import Job
from collective._core.movement import Movement
from collective._core.offload import LONG
from collective._core.operands import Spec, copies, describe
from collective._core.operations import Disagreement, Operation
from collective._core.sharing import Shown, shareable, show
from collective.errors import CollectiveError
from collective.layouts import Layout

if TYPE_CHECKING:
    from collections.abc import Awaitable, Sequence

    from collective._core.agreement import Metas
    from collective._core.flows import Flows
    from collective.abc import DataPlane

_MANY = 64
"""Ranks of all layouts together from which on planning may take longer than the loop can wait."""
_NAMED = 3
"""Tensors of a structure whose layouts are written out where members disagree."""


@dataclass
class _Leaf:
    """One tensor of the structure."""

    path: trees.Path
    src: Layout
    dst: Layout
    local: Any = None
    spec: Spec | None = None
    """What this rank holds of it, if anything."""
    copied: bool = False
    """Whether that is copied first, as it is written to, too."""
    dtype: str = ""
    out: Any = None
    """The caller's array for this rank's part, if there is one."""
    own: bool = False
    """Whether it is written to only when it has all come: it is not one block of host memory."""
    result: np.ndarray | None = None
    mates: Sequence[int] = ()
    """Where a host's ranks share one copy: those that want this rank's part. The first has it, and shows it."""


class Repartition(Operation):
    """Every rank of the destination gets its part of what the ranks of the source hold.

    :param flows: the channels of the epoch, over which it moves.
    :param hosts: the host of each rank; None where all are on one.
    :param out: arrays that this rank's parts are written into, in a structure like `dst`.
    """

    def __init__(
        self,
        rank: int,
        size: int,
        local: Any,
        *,
        src: Any,
        dst: Any,
        flows: Flows,
        hosts: Sequence[str] | None,
        share: bool = False,
        out: Any = None,
    ) -> None:
        super().__init__(rank, size)
        self._flows = flows
        self._hosts = hosts
        self._share = share
        self._structure = dst
        self._leaves = [_Leaf(*each) for each in pair(src, dst, size)]
        self._take(local, src)
        held = [leaf.spec for leaf in self._leaves if leaf.spec is not None]
        self._kind, self._device = (held[0].kind, held[0].device) if held else ("", "")
        outs = self._take_out(out, dst)
        if held or outs is not None:
            names = tuple(None if leaf.spec is None else leaf.spec.dtype for leaf in self._leaves)
            self.meta = (self._kind, self._device, names[0] if len(set(names)) == 1 else names, outs)
        if sum(len(leaf.src.ranks) + len(leaf.dst.ranks) for leaf in self._leaves) >= _MANY:
            self.stage_bytes = LONG + 1

    def describe(self) -> str:
        pairs = [f"{_after(trees.name(leaf.path))}{leaf.src!r} -> {leaf.dst!r}" for leaf in self._leaves]
        shared = ", share=True" if self._share else ""
        if len(pairs) <= _NAMED:
            return f"repartition({'; '.join(pairs)}{shared})"
        digest = hashlib.blake2b("; ".join(pairs).encode(), digest_size=8).hexdigest()
        return f"repartition({len(pairs)} tensors, {digest}: {'; '.join(pairs[:_NAMED])}; ...{shared})"

    def agree(self, metas: Metas) -> None:
        if not self._leaves:
            return
        assert metas is not None
        known = {meta[2] for meta in metas if meta is not None and meta[2] is not None}
        if len(known) == 1 and isinstance(dtype := next(iter(known)), str):
            for leaf in self._leaves:
                leaf.dtype = dtype
        else:
            self._agree_on_each(metas)
        self._agree_on_outs(metas)
        if not self._kind:
            self._kind, self._device = metas[self._leaves[0].src.ranks[0]][:2]

    def _agree_on_each(self, metas: Sequence[Any]) -> None:
        said = [_names(meta, len(self._leaves)) for meta in metas]
        for number, leaf in enumerate(self._leaves):
            leaf.dtype = said[leaf.src.ranks[0]][number]
            if any(said[rank][number] != leaf.dtype for rank in leaf.src.ranks):
                where = f"tensor{trees.name(leaf.path)}"
                raise Disagreement([f"{where} is {names[number] or 'not held'}" for names in said])

    def _agree_on_outs(self, metas: Sequence[Any]) -> None:
        given = [None if meta is None else meta[3] for meta in metas]
        for number, leaf in enumerate(self._leaves if any(given) else ()):
            names = [None if outs is None else outs[number] for outs in given]
            if any(name not in (None, leaf.dtype) for name in names):
                where = trees.name(leaf.path)
                said = [f"out{where} is {name or 'not passed'}" for name in names]
                raise Disagreement([f"{each}, and the tensor {leaf.dtype}" for each in said])

    def stage(self) -> None:
        jobs = []
        for leaf in self._leaves:
            dtype = tensors.numpy_dtype(leaf.dtype)
            plan = planning.plan(leaf.src, leaf.dst, itemsize=dtype.itemsize, hosts=self._hosts, share=self._share)
            if self._share:
                leaf.mates = plan.mates(self.rank)
            if plan.takes(self.rank):
                leaf.result = self._memory(leaf, dtype)
            source = None if leaf.local is None else tensors.to_host(leaf.local)
            if source is not None and leaf.copied:
                copy = np.empty_like(source)  # it is written to while it is read
                self.gate.fill(copy, source)
                source = copy
            jobs.append(Job(plan.part(self.rank), source, leaf.result, leaf.src.partial))
            leaf.local = None
        self._jobs = jobs

    def _memory(self, leaf: _Leaf, dtype: np.dtype[Any]) -> np.ndarray:
        shape = leaf.dst.local_shape(self.rank)
        if leaf.out is not None:
            memory = targets.result_in(leaf.out, shape)
            leaf.own = memory is None
            if memory is not None:
                return memory
        return shareable(shape, dtype) if len(leaf.mates) > 1 else np.empty(shape, dtype)

    def issue(self, plane: DataPlane) -> Awaitable[None] | None:
        jobs, self._jobs = self._jobs, []
        movement = Movement(self.rank, self.seq, jobs, flows=self._flows, gate=self.gate)
        if not any(len(leaf.mates) > 1 for leaf in self._leaves):
            return movement.start()
        done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._flows.spawn(self._move_and_show(movement, done))
        return done

    async def _move_and_show(self, movement: Movement, done: asyncio.Future[None]) -> None:
        place = (self.seq, "show")
        shown: list[asyncio.Future[dict[int, np.ndarray]]] = []
        wanted: dict[int, list[int]] = {}
        given: dict[int, list[int]] = {}
        for number, leaf in enumerate(self._leaves):
            if leaf.mates and leaf.mates[0] != self.rank:
                wanted.setdefault(leaf.mates[0], []).append(number)
            for mate in leaf.mates[1:] if leaf.result is not None else ():
                given.setdefault(mate, []).append(number)
        for taker, numbers in wanted.items():
            dtypes = {number: tensors.numpy_dtype(self._leaves[number].dtype) for number in numbers}
            sink = Shown(dtypes, private=self._kind == "torch")
            shown.append(sink.arrays)
            self._flows.expect(taker, place, sink)
        try:
            await movement.start()
            await asyncio.gather(*(self._show(mate, numbers, place) for mate, numbers in given.items()))
            for arrays in await asyncio.gather(*shown):
                for number, array in arrays.items():
                    self._leaves[number].result = array
        except Exception as error:  # no memory, say: the others wait for this member
            done.set_exception(error)
        else:
            done.set_result(None)

    async def _show(self, mate: int, numbers: list[int], place: Any) -> None:
        arrays = {number: result for number in numbers if (result := self._leaves[number].result) is not None}
        with contextlib.suppress(CollectiveError):  # see `Flows.open`
            await show(arrays, mate, place, flows=self._flows)

    @property
    def long_finish(self) -> bool:
        copied = self._device != "cpu" or (self._share and self._kind != "numpy")
        results = [(leaf, leaf.result.nbytes) for leaf in self._leaves if leaf.result is not None]
        moved = sum(nbytes for leaf, nbytes in results if (leaf.own if leaf.out is not None else copied))
        return not tensors.loaded(self._kind) or moved > LONG

    def finish(self) -> Any:
        if self._leaves and all(leaf.result is None for leaf in self._leaves):
            return None
        results = {leaf.path: self._land(leaf) for leaf in self._leaves}
        return trees.rebuild(self._structure, results.__getitem__)

    def _land(self, leaf: _Leaf) -> Any:
        result, leaf.result = leaf.result, None
        if result is None:
            return None
        if leaf.out is not None:
            self.gate.fill(leaf.out, result)
            return leaf.out
        shows = leaf.mates[1:] and leaf.mates[0] == self.rank
        if shows or (self._share and self._kind == "numpy"):
            result = result.view()
            result.flags.writeable = False
        return tensors.from_host(result, self._kind, self._device, dtype=leaf.dtype)

    def _take(self, local: Any, src: Any) -> None:
        """Check what this rank holds against what its layouts say."""
        given = trees.match(local, src, "local", "src")
        for leaf in self._leaves:
            array, where = given[leaf.path], f"local{trees.name(leaf.path)}"
            if leaf.src.grid.cell_of(self.rank) is None:
                if array is not None:
                    raise ValueError(f"{where} was passed on rank {self.rank}, which is not in src, {leaf.src!r}")
                continue
            if array is None:
                raise ValueError(f"{where} is None on rank {self.rank}, which is in src, {leaf.src!r}")
            leaf.local = array
            leaf.spec = spec = describe(array, where)
            expected = leaf.src.local_shape(self.rank)
            if spec.shape != expected:
                raise ValueError(
                    f"{where} has shape {spec.shape}, and the part of rank {self.rank} in src, {leaf.src!r}, {expected}"
                )
            if leaf.src.partial is not None:
                reductions.check(leaf.src.partial, spec.dtype)
            if spec.device != "cpu":
                self.stage_bytes += copies(array, spec)

    def _take_out(self, out: Any, dst: Any) -> list[str | None] | None:
        """Check the arrays for results against what this rank gets; return their dtypes, None without any."""
        given = trees.match(out, dst, "out", "dst")
        dtypes: list[str | None] = []
        for leaf in self._leaves:
            array, where = given[leaf.path], f"out{trees.name(leaf.path)}"
            if array is not None and leaf.dst.grid.cell_of(self.rank) is None:
                raise ValueError(f"{where} was passed on rank {self.rank}, which is not in dst, {leaf.dst!r}")
            if array is not None and self._share:
                raise ValueError(f"{where} was passed with share=True, whose results are views of what all share")
            leaf.out = array
            dtypes.append(None)
            if array is not None:
                dtypes[-1] = targets.check_target(array, where, leaf.dst.local_shape(self.rank)).dtype
        if not any(dtypes):
            return None
        outs = [(f"out{trees.name(leaf.path)}", leaf.out) for leaf in self._leaves if leaf.out is not None]
        held = [(f"local{trees.name(leaf.path)}", leaf.local) for leaf in self._leaves if leaf.local is not None]
        same = targets.check_overlaps(outs, held)
        for leaf in self._leaves:
            leaf.copied = f"local{trees.name(leaf.path)}" in same
            if leaf.copied and leaf.spec is not None:
                self.stage_bytes += leaf.spec.nbytes
        return dtypes


def pair(src: Any, dst: Any, size: int) -> list[tuple[trees.Path, Layout, Layout]]:
    """Return the tensors of two structures of layouts, which fit together and into a group of that size.

    Raises:
        TypeError, ValueError: they do not.
    """
    targets = trees.match(dst, src, "dst", "src")
    pairs = []
    for path, source in trees.leaves(src):
        target = targets[path]
        for what, layout in ((f"src{trees.name(path)}", source), (f"dst{trees.name(path)}", target)):
            if not isinstance(layout, Layout):
                raise TypeError(f"{what} is {layout!r}; a collective.Layout, or a structure of them")
            if layout.last_rank >= size:
                raise ValueError(f"{what} is {layout!r}, and the group has ranks 0 to {size - 1}")
        planning.check(source, target, where=trees.name(path))
        pairs.append((path, source, target))
    return pairs


def _names(meta: Any, count: int) -> Sequence[str]:
    if meta is None:
        return ("",) * count
    names = meta[2]
    if names is None:
        return ("",) * count
    return (names,) * count if isinstance(names, str) else [each or "" for each in names]


def _after(name: str) -> str:
    return f"{name}: " if name else ""
