"""Checks of allreduce, reduce and reduce_scatter against the whole table of reductions."""

from __future__ import annotations

from itertools import cycle
from typing import TYPE_CHECKING

import numpy as np

from collective.group import Group
from collective.testing._arrays import FLOATS, FORMS, HALVES, bits, check_array, dtype_of, sample
from collective.testing._cases import MIXES, check
from collective.testing._oracle import REDUCTIONS, chunks, cut, exact, reduced
from collective.testing._tables import Trial, run_table
from collective.types import ReduceOp

if TYPE_CHECKING:
    from collections.abc import Iterator

    from collective.testing._world import World


def _shapes(size: int) -> dict[str, tuple[int, ...]]:
    return {"even": (2 * size, 3), "uneven": (size + 1,), "empty": (0, 3), "zero-dimensional": ()}


@check(mixes=MIXES)
async def allreduce_table(world: World) -> None:
    """Every reduction and dtype x even, uneven, empty, zero-dimensional, strided, transposed and read-only inputs."""

    def trials() -> Iterator[Trial]:
        for op, dtype in REDUCTIONS:
            for label, shape in _shapes(world.size).items():
                parts = [sample(shape, dtype, rank) for rank in world.ranks]
                expected = [reduced(parts, op)] * world.size
                for form in FORMS if label == "even" else FORMS[:1]:
                    yield Trial(
                        f"{op.name} {dtype} {label} {form}",
                        expected,
                        Group.allreduce,
                        world.spread(parts, form),
                        op,
                        exact=exact(op, dtype),
                    )

    await run_table(world, trials())


@check(mixes=MIXES)
async def reduce_table(world: World) -> None:
    """Every reduction and dtype x every shape x every root, forms taking turns; None on all but the root."""

    def trials() -> Iterator[Trial]:
        forms = cycle(FORMS)
        for op, dtype in REDUCTIONS:
            for label, shape in _shapes(world.size).items():
                parts = [sample(shape, dtype, rank) for rank in world.ranks]
                total = reduced(parts, op)
                for root, form in zip(world.ranks, forms, strict=False):
                    yield Trial(
                        f"{op.name} {dtype} {label} {form} to {root}",
                        world.only(root, total),
                        Group.reduce,
                        world.spread(parts, form),
                        root,
                        op,
                        exact=exact(op, dtype),
                    )

    await run_table(world, trials())


@check(mixes=MIXES)
async def reduce_scatter_table(world: World) -> None:
    """Every reduction and dtype x even, uneven, empty and given splits, forms taking turns."""
    size = world.size
    layouts: dict[str, tuple[tuple[int, ...], list[int] | None]] = {
        "even": ((2 * size, 3), None),
        "uneven": ((size + 1,), None),
        "fewer rows than ranks": ((1, 2, 2), None),
        "empty": ((0, 3), None),
        "empty rows": ((size, 0), None),
        "rising splits": ((sum(world.ranks), 2), list(world.ranks)),
        "all to the last": ((3,), [0] * (size - 1) + [3]),
    }

    def trials() -> Iterator[Trial]:
        forms = cycle(FORMS)
        for op, dtype in REDUCTIONS:
            for label, (shape, splits) in layouts.items():
                parts = [sample(shape, dtype, rank) for rank in world.ranks]
                form = next(forms)
                yield Trial(
                    f"{op.name} {dtype} {label} {form}",
                    cut(reduced(parts, op), splits or chunks(shape[0], size)),
                    Group.reduce_scatter,
                    world.spread(parts, form),
                    op,
                    splits=splits,
                    exact=exact(op, dtype),
                )

    await run_table(world, trials())


@check(sizes=(1, 2, 3))
async def reductions_default_to_sum(world: World) -> None:
    """Without an op, every reduction is a sum, also right after another one was not."""
    ones = np.ones(world.size)
    total = ones * world.size
    everywhere = [total] * world.size
    await run_table(
        world,
        [
            Trial("MAX", [ones] * world.size, Group.allreduce, ones, ReduceOp.MAX),
            Trial("allreduce", everywhere, Group.allreduce, ones),
            Trial("reduce", world.only(0, total), Group.reduce, ones, 0),
            Trial("reduce_scatter", cut(total, [1] * world.size), Group.reduce_scatter, ones),
        ],
    )


@check(sizes=(2, 3, 4), mixes=MIXES)
async def nan_wins_min_and_max(world: World) -> None:
    """MIN and MAX propagate NaN from whichever rank, and order infinities."""

    def trials() -> Iterator[Trial]:
        for dtype in FLOATS:
            for holder in world.ranks:
                parts = [np.array([rank, -rank, 7, 7]).astype(dtype_of(dtype)) for rank in world.ranks]
                parts[holder][2] = np.nan
                parts[holder][3] = -np.inf
                for op in (ReduceOp.MIN, ReduceOp.MAX):
                    expected = [reduced(parts, op)] * world.size
                    label = f"{op.name} {dtype} NaN at {holder}"
                    yield Trial(label, expected, Group.allreduce, world.spread(parts), op)

    await run_table(world, trials())


@check(sizes=(2, 3, 4), mixes=MIXES)
async def halves_accumulate_in_float32(world: World) -> None:
    """float16 and bfloat16 round once, at the end: what a running half sum would lose, overflow or flush is kept."""
    columns = {
        "float16": [(2048, 1, 1, 1), (60000, 60000, -60000, 0), (300, 300, 0.5, 1), (2e-4, 2e-4, 30000, 1)],
        "bfloat16": [(256, 1, 1, 1), (3e38, 3e38, -3e38, 0), (1.0078125,) * 4, (1e-30, 1e-30, 1e35, 1)],
    }

    def trials() -> Iterator[Trial]:
        for dtype in HALVES:
            table = np.array(columns[dtype]).astype(dtype_of(dtype))
            parts = [table[:, rank].copy() for rank in world.ranks]
            for op in (ReduceOp.SUM, ReduceOp.PROD, ReduceOp.AVG):
                total = reduced(parts, op)
                shares = cut(total, chunks(len(total), world.size))
                label = f"{op.name} {dtype}"
                yield Trial(label, [total] * world.size, Group.allreduce, world.spread(parts), op)
                yield Trial(label, world.only(1, total), Group.reduce, world.spread(parts), 1, op)
                yield Trial(label, shares, Group.reduce_scatter, world.spread(parts), op)

    await run_table(world, trials())


@check(sizes=(2, 3, 4))
async def overflow_is_silent(world: World) -> None:
    """Integers wrap and floats overflow to infinity without a warning or an error."""

    def trials() -> Iterator[Trial]:
        for dtype in ("int8", "uint16", "int64", "uint64", "float16", "float32", "float64"):
            numeric = dtype_of(dtype)
            limits = np.iinfo(numeric) if numeric.kind in "iu" else np.finfo(numeric)
            values = np.array([limits.max, limits.min], numeric)
            for op in (ReduceOp.SUM, ReduceOp.PROD):
                expected = [reduced([values] * world.size, op)] * world.size
                yield Trial(f"{op.name} {dtype}", expected, Group.allreduce, values, op)

    await run_table(world, trials())


@check(sizes=(2, 3, 4))
async def allreduce_gives_equal_bits(world: World) -> None:
    """Every member gets the same bits, run after run, also of sums that depend on their order."""
    rng = np.random.default_rng(7)
    for dtype in (*FLOATS, "complex64"):
        for length in (1, 1000, 300_001):
            scale = 10.0 ** rng.integers(-3, 4, length)
            parts = [(rng.standard_normal(length) * scale).astype(dtype_of(dtype)) for _ in world.ranks]
            for op in (ReduceOp.SUM, ReduceOp.AVG):
                results = [
                    result for _ in range(2) for result in await world.call(Group.allreduce, world.spread(parts), op)
                ]
                seen = len({bits(result) for result in results})
                assert seen == 1, f"{op.name} of {length} {dtype} gave {seen} different results"


@check(sizes=(2, 3))
async def large_reductions(world: World) -> None:
    """Several MiB, which run off the loop, reduce like the rest."""
    parts = [sample((1 << 20, 3), "float32", rank) for rank in world.ranks]
    total = reduced(parts, ReduceOp.SUM)
    last = world.size - 1
    shares = cut(total, chunks(1 << 20, world.size))
    for form in ("contiguous", "strided"):
        for result in await world.call(Group.allreduce, world.spread(parts, form)):
            check_array(result, total, "numpy")
        for share, expected in zip(
            await world.call(Group.reduce_scatter, world.spread(parts, form)), shares, strict=True
        ):
            check_array(share, expected, "numpy")
        results = await world.call(Group.reduce, world.spread(parts, form), last)
        check_array(results[last], total, "numpy")
