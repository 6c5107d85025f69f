"""Checks of repartition. That plans are right for any layouts is tested without groups."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from collective.errors import CollectiveMismatch
from collective.group import Group
from collective.layouts import Layout, Partial, Replicate, Shard
from collective.testing._arrays import check_array, overlap, sample, values_of
from collective.testing._cases import MIXES, check
from collective.testing._world import Each, outcomes
from collective.types import ReduceOp

if TYPE_CHECKING:
    from collections.abc import Sequence

    from collective.testing._world import World

_LARGE = (700, 1100)
"""3 MB of float32: messages that are read straight into the result, and several of them for each block."""


def _pairs(shape: tuple[int, ...], size: int) -> list[tuple[Layout, Layout]]:
    """Return sources and destinations on ranks that are the same, overlap, and are apart."""
    every, back = list(range(size)), list(range(size))[::-1]
    rows, columns = Layout(shape, size, [Shard(0)]), Layout(shape, size, [Shard(1)], back)
    one, other = Layout(shape, 1, [Replicate()], [0]), Layout(shape, 1, [Shard(0)], [size - 1])
    pairs = [(rows, columns), (columns, rows), (rows, rows), (one, other), (rows, one), (one, columns)]
    pairs.append((one, Layout(shape, size, [Replicate()], back)))
    pairs.append((Layout(shape, size, [Partial()]), Layout(shape, size, [Replicate()])))
    if size > 2:
        pairs.append((Layout(shape, size - 1, [Partial("max")]), Layout(shape, 2, [Shard(0)], back[:2])))
        pairs.append((Layout(shape, size - 1, [Replicate()], every[1:]), Layout(shape, 2, [Shard(1)], back[-2:])))
    if size == 4:
        grid = Layout(shape, (2, 2), [Shard(0), Shard(1)])
        pairs += [
            (grid, Layout(shape, (2, 2), [Shard(1), Replicate()], [2, 0, 1, 3])),
            (Layout(shape, (2, 2), [Shard(0), Partial()]), grid),
            (Layout(shape, (2, 2), [Shard(0), Shard(0)]), Layout(shape, 3, [Shard(0, (1, shape[0] - 1, 0))])),
        ]
    return pairs


def _whole(layout: Layout, values: np.ndarray) -> np.ndarray:
    contributions = len(layout.grid.copies(layout.grid.cells[0]))
    return values * contributions if layout.partial is ReduceOp.SUM else values


def _spread(world: World, layout: Layout, values: np.ndarray, form: str = "contiguous") -> Each:
    held = [layout.local(rank, values) if rank in layout.ranks else None for rank in world.ranks]
    return Each(None if part is None else world.make(rank, part, form) for rank, part in enumerate(held))


def _check_parts(world: World, results: Sequence[Any], layout: Layout, whole: np.ndarray, kinds: Sequence[str]) -> None:
    for rank, result in enumerate(results):
        if rank in layout.ranks:
            check_array(result, np.ascontiguousarray(layout.local(rank, whole)), kinds[rank])
        else:
            assert result is None, f"rank {rank} is not in the destination and got {result!r}"


@check(mixes=MIXES)
async def repartition_table(world: World) -> None:
    """Every rank gets its part of the whole tensor, of its own kind or, where it passed nothing, the sender's."""
    trials = (((7, 5), "int16", "transposed"), ((6, 4), "bfloat16", "strided"), (_LARGE, "float32", "contiguous"))
    for shape, dtype, form in trials:
        for src, dst in _pairs(shape, world.size):
            values = np.clip(sample(shape, dtype, 1), -3, 3)
            held = _spread(world, src, values, form)
            results = await world.call(Group.repartition, held, src, dst)
            first = world.kinds[src.ranks[0]]
            kinds = [world.kinds[rank] if rank in src.ranks else first for rank in world.ranks]
            try:
                _check_parts(world, results, dst, _whole(src, values).astype(values.dtype), kinds)
            except AssertionError as error:
                error.add_note(f"{dtype}: {src!r} -> {dst!r}")
                raise


@check(sizes=(2, 3, 4), mixes=("numpy", "torch"))
async def repartition_gives_private_results(world: World) -> None:
    """What a result shares memory with is neither the input nor another's, also where nothing had to move."""
    layout = Layout((8, 3), world.size, [Replicate()])
    values = sample((8, 3), "float32", 0)
    held = _spread(world, layout, values)
    results = await world.call(Group.repartition, held, layout, layout)
    for rank, result in enumerate(results):
        assert not overlap(result, held[rank])
        assert not any(overlap(result, other) for other in results[:rank])
        values_of(result)[...] = 0
        check_array(held[rank], values, world.kinds[rank])


@check(sizes=(2, 3, 4), mixes=("numpy", "torch"))
async def repartition_shares_one_copy(world: World) -> None:
    """With share=True the ranks of a host have read-only views of one copy; torch tensors are everybody's own."""
    values = sample(_LARGE, "float32", 0)
    rows = Layout(_LARGE, 2, [Shard(0)])
    shared: Any = {"all": Layout(_LARGE, world.size, [Replicate()]), "some": Layout(_LARGE, 1, [Shard(1)], [1])}
    held = [{"all": rows.local(r, values), "some": rows.local(r, values)} if r < 2 else None for r in world.ranks]
    given = Each(
        None if tree is None else {key: world.make(0, part) for key, part in tree.items()} for tree in held
    )
    results = await world.call(Group.repartition, given, {"all": rows, "some": rows}, shared, share=True)
    for rank, result in enumerate(results):
        check_array(result["all"], values, world.kinds[0])
        if world.kinds[0] == "numpy":
            assert not result["all"].flags.writeable
            first = world.hosts.index(world.hosts[rank])
            assert overlap(result["all"], results[first]["all"])
        elif rank:
            assert not overlap(result["all"], results[0]["all"])
    check_array(results[1]["some"], values, world.kinds[0])


@check(mixes=MIXES)
async def repartition_writes_into_out(world: World) -> None:
    """Results are written into the caller's arrays of any kind and strides, again and again, and into the input."""
    for shape, dtype in (((7, 5), "bfloat16"), (_LARGE, "float32")):
        rows, columns = Layout(shape, world.size, [Shard(0)]), Layout(shape, world.size, [Shard(1)])
        sizes = [columns.local_shape(rank) for rank in world.ranks]
        values = sample(shape, dtype, 1)
        for form in ("contiguous", "transposed"):
            outs = [world.make(rank, np.zeros_like(values, shape=sizes[rank]), form) for rank in world.ranks]
            for step in range(2):
                now = values if step else sample(shape, dtype, 2)
                held = _spread(world, rows, now)
                results = await world.call(Group.repartition, held, rows, columns, out=Each(outs))
                assert all(result is out for result, out in zip(results, outs, strict=True))
                _check_parts(world, results, columns, now, world.kinds)
        square = (4 * world.size, 4 * world.size)
        held = _spread(world, Layout(square, world.size, [Shard(0)]), np.arange(square[0] ** 2.0).reshape(square))
        moved = Layout(square, world.size, [Shard(0)], list(world.ranks)[::-1])
        results = await world.call(Group.repartition, held, Layout(square, world.size, [Shard(0)]), moved, out=held)
        _check_parts(world, results, moved, np.arange(square[0] ** 2.0).reshape(square), world.kinds)


@check(sizes=(2, 3))
async def repartition_into_another_dtype_is_told(world: World) -> None:
    """A rank that only gets, and passes an array of another dtype for it, is told with all others."""
    src, dst = Layout((4,), 1, [Replicate()], [0]), Layout((4,), 1, [Replicate()], [1])
    out = Each(np.zeros(4, np.float32) if rank == 1 else None for rank in world.ranks)
    held = Each(np.ones(4) if rank == 0 else None for rank in world.ranks)
    works = [group.repartition(held[group.rank], src, dst, out=out[group.rank]) for group in world.groups]
    for error in await outcomes(works):
        assert isinstance(error, CollectiveMismatch), f"got {error!r}"
        assert "out is float32, and the tensor float64" in str(error)
    await world.reset()


@check(sizes=(2, 3))
async def repartition_moves_structures(world: World) -> None:
    """A state dict moves in one call: dicts, lists and tuples, of any dtypes, its tensors on different ranks."""
    last, size = world.size - 1, world.size
    whole: Any = {"w": sample((9, 4), "float64", 1), "blocks": [(sample((5,), "int8", 2),), sample((), "float32", 3)]}
    src: Any = {
        "w": Layout((9, 4), size, [Shard(0)]),
        "blocks": [(Layout((5,), 1, [Replicate()], [last]),), Layout((), 1, [Replicate()], [last])],
    }
    dst = {
        "blocks": [(Layout((5,), 2, [Shard(0)]),), Layout((), size, [Replicate()])],
        "w": Layout((9, 4), 1, [Shard(1)], [0]),
    }
    held = [
        {"w": src["w"].local(rank, whole["w"]), "blocks": whole["blocks"] if rank == last else None}
        for rank in world.ranks
    ]
    for rank, result in enumerate(await world.call(Group.repartition, Each(held), src, dst)):
        assert list(result) == ["blocks", "w"]
        (bias,), scale = result["blocks"]
        check_array(scale, whole["blocks"][1], "numpy")
        if rank == 0:
            check_array(result["w"], whole["w"], "numpy")
        if rank < 2:
            check_array(bias, whole["blocks"][0][0][3 * rank : 3 * rank + 3], "numpy")
        else:
            assert bias is None
    assert await world.call(Group.repartition, {}, {}, {}) == [{}] * size


@check(sizes=(2, 3))
async def repartitions_that_differ_are_told(world: World) -> None:
    """Members that say different layouts, or hold different dtypes, all learn what each said."""
    rows = Layout((6, 2), world.size, [Shard(0)])
    held = [rows.local(rank, np.ones((6, 2))) for rank in world.ranks]
    columns = Layout((6, 2), world.size, [Shard(1)])
    wrong = [group.repartition(held[group.rank], rows, columns if group.rank else rows) for group in world.groups]
    for error in await outcomes(wrong):
        assert isinstance(error, CollectiveMismatch), f"got {error!r}"
        assert "Shard(1)" in str(error)
    await world.reset()
    halves = [held[0].astype(np.float32), *held[1:]]
    for error in await outcomes([group.repartition(halves[group.rank], rows, columns) for group in world.groups]):
        assert isinstance(error, CollectiveMismatch), f"got {error!r}"
        assert "float32" in str(error)
        assert "float64" in str(error)
    await world.reset()
