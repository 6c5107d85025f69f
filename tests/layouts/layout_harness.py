"""Layouts drawn by hypothesis, and plans carried out in one process."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
from hypothesis import strategies as st

from collective import Layout, Partial, ReduceOp, Replicate, Shard
from collective._rings import CONTRIBUTION, PLAIN, RESULT
from collective.layouts import StridedShard
from collective.reductions import reduce_arrays

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from collective import Plan
    from collective._boxes import Box
    from collective._rings import Route

RANKS = 8


@st.composite
def meshes(draw: Callable) -> tuple[int, ...]:
    """Draw a mesh of 1 to 8 ranks."""
    mesh: list[int] = []
    while (room := RANKS // math.prod(mesh)) and len(mesh) < 3 and (not mesh or draw(st.booleans())):
        mesh.append(draw(st.integers(1, room)))
    return tuple(mesh)


@st.composite
def layouts(draw: Callable, shape: tuple[int, ...], *, partial: bool) -> Layout:
    """Draw a layout of a tensor of a shape."""
    mesh = draw(meshes())
    ranks = draw(st.permutations(range(RANKS)))[: math.prod(mesh)]
    op = draw(st.sampled_from([ReduceOp.SUM, ReduceOp.MAX]))
    placements: list[object] = []
    cut: set[int] = set()
    for parts in mesh:
        kinds = ["replicate"] + ["partial"] * partial + ["shard", "shard", "strided", "splits"] * bool(shape)
        kind = draw(st.sampled_from(kinds))
        dim = draw(st.integers(0, len(shape) - 1)) if shape else 0
        if kind == "replicate":
            placements.append(Replicate())
        elif kind == "partial":
            placements.append(Partial(op))
        elif kind == "strided":
            placements.append(StridedShard(dim, draw(st.integers(1, 4))))
        elif kind == "splits" and dim not in cut:
            ends = sorted(draw(st.lists(st.integers(0, shape[dim]), min_size=parts - 1, max_size=parts - 1)))
            placements.append(Shard(dim, tuple(b - a for a, b in zip([0, *ends], [*ends, shape[dim]], strict=True))))
        else:
            placements.append(Shard(dim))
        if kind in ("shard", "strided", "splits"):
            cut.add(dim)
    return Layout(shape, mesh, placements, ranks, _order(draw, placements))


def _order(draw: Callable, placements: Sequence[object]) -> list[int] | None:
    """Draw an order of cutting; none where splits are given, which fit only where they cut first."""
    if any(isinstance(each, Shard) and each.splits is not None for each in placements):
        return None
    return draw(st.none() | st.permutations(range(len(placements))))


shapes = st.lists(st.integers(0, 9), max_size=3).map(tuple)


@st.composite
def pairs(draw: Callable) -> tuple[Layout, Layout]:
    """Draw a source and a destination of one shape."""
    shape = draw(shapes)
    return draw(layouts(shape, partial=True)), draw(layouts(shape, partial=False))


def spread(layout: Layout, seed: int = 0) -> tuple[dict[int, np.ndarray], np.ndarray]:
    """Return what each rank of a layout holds, and the whole tensor that this amounts to."""
    contributions = len(layout.grid.copies(layout.grid.cells[0]))
    values = np.random.default_rng(seed).integers(1, 1000, (contributions, *layout.shape)).astype(np.int64)
    held = {}
    for cell in layout.grid.cells:
        for number, ranks in enumerate(layout.grid.copies(cell)):
            for rank in ranks:
                held[rank] = layout.local(rank, values[number]).copy()
    whole = np.empty(layout.shape, np.int64)
    flat = [each.reshape(-1) for each in values]
    reduce_arrays(flat, layout.partial or ReduceOp.SUM, whole.reshape(-1))
    return held, whole


def pack(array: np.ndarray, boxes: Sequence[Box], side: str) -> np.ndarray:
    """Return the elements of boxes, one after the other."""
    return np.concatenate([array[slices(box, side)].reshape(-1) for box in boxes] or [array.reshape(-1)[:0]])


def slices(box: Box, side: str) -> tuple[slice, ...]:
    return tuple(slice(at, at + n) for at, n in zip(getattr(box, side), box.shape, strict=True))


def carry_out(plan: Plan, held: dict[int, np.ndarray]) -> dict[int, np.ndarray]:
    """Carry out a plan rank by rank; every element of a result must be written exactly once."""
    ranks = {*plan.src.ranks, *plan.dst.ranks}
    parts = {rank: plan.part(rank) for rank in ranks}
    takers = [rank for rank in plan.dst.ranks if plan.takes(rank)]
    results = {rank: np.full(plan.dst.local_shape(rank), -1, np.int64) for rank in takers}
    written = {rank: np.zeros(results[rank].shape, int) for rank in takers}
    streams: dict[Route, np.ndarray] = {}

    def put(rank: int, boxes: Sequence[Box], data: np.ndarray) -> None:
        start = 0
        for box in boxes:
            results[rank][slices(box, "dst")] = data[start : start + box.volume].reshape(box.shape)
            written[rank][slices(box, "dst")] += 1
            start += box.volume
        assert start == data.size

    for rank, part in parts.items():
        for box in part.keeps:
            put(rank, [box], pack(held[rank], [box], "src"))
        for route, boxes in part.sends.items():
            assert route.sender == rank
            assert route not in streams
            if route.kind != RESULT:
                streams[route] = pack(held[rank], boxes, "src")
    used: dict[Route, int] = {}
    for rank, part in parts.items():
        for total in part.sums:
            operands = []
            for sender in total.senders:
                if sender == rank:
                    operands.append(pack(held[rank], [total.box], "src"))
                else:
                    route = next(r for r in streams if r[:2] == (CONTRIBUTION, sender) and r.first == rank)
                    start = used.get(route, 0)
                    operands.append(streams[route][start : start + total.box.volume])
                    used[route] = start + total.box.volume
            out = np.empty(total.box.volume, np.int64)
            reduce_arrays(operands, plan.src.partial, out)
            put(rank, [total.box], out)
    for rank, part in parts.items():
        for route, boxes in part.sends.items():
            if route.kind == RESULT:
                streams[route] = pack(results[rank], boxes, "dst")
    for route, data in streams.items():
        if route.kind == CONTRIBUTION:
            assert used[route] == data.size
            continue
        reached = list(route.children(route.sender))
        for rank in reached:
            put(rank, parts[rank].receives[route], data)
            reached += route.children(rank)
        assert sorted(reached) == sorted(route.ring.ranks)
    for rank, part in parts.items():
        assert {*part.receives} == {r for r in streams if rank in r.ring and r.kind != CONTRIBUTION}
    assert all((count == 1).all() for count in written.values())
    return results


def uneven(plan: Plan) -> int:
    """Return by how many elements ranks differ that hold the same of the source, in what they send of that; and those
    that hold nothing and get the same, on one host, in what they pass on."""
    sent: dict[int, int] = {}
    passed: dict[int, int] = {}
    for rank in plan.ranks:
        for route, boxes in plan.part(rank).sends.items():
            volume = sum(box.volume for box in boxes)
            if route.kind != RESULT:
                sent[rank] = sent.get(rank, 0) + volume
            below = [route.first]
            for each in below if route.kind == PLAIN else ():
                below += route.children(each)
                passed[each] = passed.get(each, 0) + len(route.children(each)) * volume
    alike = [holders for cell in plan.src.grid.cells for holders in plan.src.grid.copies(cell)]
    apart = max((_range([sent.get(rank, 0) for rank in ranks]) for ranks in alike), default=0)
    for rank in plan.dst.ranks:
        mates = [mate for mate in plan.mates(rank) if plan.takes(mate) and mate not in plan.src.ranks]
        apart = max(apart, _range([passed.get(mate, 0) for mate in mates]))
    return apart


def _range(numbers: Sequence[int]) -> int:
    return max(numbers, default=0) - min(numbers, default=0)
