"""Checks of allreduce, reduce and reduce_scatter against the whole table of reductions."""

from __future__ import annotations

from itertools import count
from typing import TYPE_CHECKING

import numpy as np

from collective.testing._arrays import FLOATS, FORMS, HALVES, bits, check_array, dtype_of, sample
from collective.testing._cases import MIXES, check
from collective.testing._oracle import REDUCTIONS, chunks, cut, exact, reduced
from collective.testing._tables import Trial, run_table
from collective.types import ReduceOp

if TYPE_CHECKING:
    from collections.abc import Iterator

    from collective.testing._world import World

_FORMS = ("contiguous", "strided", "read-only")


def shapes(size: int) -> dict[str, tuple[int, ...]]:
    """Return the shapes that every reduction is tried with."""
    return {"even": (2 * size, 3), "uneven": (size + 1,), "empty": (0, 3), "zero-dimensional": ()}


@check(mixes=MIXES)
async def allreduce_table(world: World) -> None:
    """Every reduction and dtype x every shape x contiguous, strided and read-only inputs."""

    def trials() -> Iterator[Trial]:
        for op, dtype in REDUCTIONS:
            for label, shape in shapes(world.size).items():
                parts = [sample(shape, dtype, rank) for rank in world.ranks]
                expected = [reduced(parts, op)] * world.size
                for form in _FORMS:
                    yield Trial(
                        f"{op.name} {dtype} {label} {form}",
                        lambda group, op=op, parts=parts, form=form: group.allreduce(  # type: ignore[misc]
                            world.make(group.rank, parts[group.rank], form), op
                        ),
                        expected,
                        exact(op, dtype),
                    )

    await run_table(world, trials())


@check(mixes=MIXES)
async def reduce_table(world: World) -> None:
    """Every reduction and dtype x every shape x every root, forms taking turns; None on all but the root."""

    def trials() -> Iterator[Trial]:
        turn = count()
        for op, dtype in REDUCTIONS:
            for label, shape in shapes(world.size).items():
                parts = [sample(shape, dtype, rank) for rank in world.ranks]
                total = reduced(parts, op)
                for root in world.ranks:
                    form = FORMS[next(turn) % len(FORMS)]
                    yield Trial(
                        f"{op.name} {dtype} {label} {form} to {root}",
                        lambda group, op=op, parts=parts, form=form, root=root: group.reduce(  # type: ignore[misc]
                            world.make(group.rank, parts[group.rank], form), root, op
                        ),
                        [total if rank == root else None for rank in world.ranks],
                        exact(op, dtype),
                    )

    await run_table(world, trials())


@check(mixes=MIXES)
async def reduce_scatter_table(world: World) -> None:
    """Every reduction and dtype x even, uneven, empty and given splits, forms taking turns."""
    size = world.size
    layouts: dict[str, tuple[tuple[int, ...], list[int] | None]] = {
        "even": ((2 * size, 3), None),
        "uneven": ((2 * size - 1,), None),
        "fewer rows than ranks": ((1, 2, 2), None),
        "empty": ((0, 3), None),
        "empty rows": ((size, 0), None),
        "rising splits": ((sum(world.ranks), 2), list(world.ranks)),
        "all to the last": ((3,), [0] * (size - 1) + [3]),
    }

    def trials() -> Iterator[Trial]:
        turn = count()
        for op, dtype in REDUCTIONS:
            for label, (shape, splits) in layouts.items():
                parts = [sample(shape, dtype, rank) for rank in world.ranks]
                form = FORMS[next(turn) % len(FORMS)]
                yield Trial(
                    f"{op.name} {dtype} {label} {form}",
                    lambda group, op=op, parts=parts, form=form, splits=splits: group.reduce_scatter(  # type: ignore[misc]
                        world.make(group.rank, parts[group.rank], form), op, splits=splits
                    ),
                    cut(reduced(parts, op), splits or chunks(shape[0], size)),
                    exact(op, dtype),
                )

    await run_table(world, trials())


@check(sizes=(1, 2, 3))
async def reductions_default_to_sum(world: World) -> None:
    """Without an op, every reduction is a sum, also right after another one was not."""
    ones = np.ones(world.size)
    total = ones * world.size
    await world.call(lambda group: group.allreduce(ones, ReduceOp.MAX))
    for result in await world.call(lambda group: group.allreduce(ones)):
        check_array(result, total, "numpy")
    for rank, result in enumerate(await world.call(lambda group: group.reduce(ones, 0))):
        if rank == 0:
            check_array(result, total, "numpy")
    for result in await world.call(lambda group: group.reduce_scatter(ones)):
        check_array(result, total[:1], "numpy")


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
                    yield Trial(
                        f"{op.name} {dtype} NaN at {holder}",
                        lambda group, op=op, parts=parts: group.allreduce(  # type: ignore[misc]
                            world.make(group.rank, parts[group.rank]), op
                        ),
                        [reduced(parts, op)] * world.size,
                    )

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
                expected = reduced(parts, op)
                yield Trial(
                    f"allreduce {op.name} {dtype}",
                    lambda group, op=op, parts=parts: group.allreduce(world.make(group.rank, parts[group.rank]), op),  # type: ignore[misc]
                    [expected] * world.size,
                )
                yield Trial(
                    f"reduce_scatter {op.name} {dtype}",
                    lambda group, op=op, parts=parts: group.reduce_scatter(  # type: ignore[misc]
                        world.make(group.rank, parts[group.rank]), op
                    ),
                    cut(expected, chunks(len(expected), world.size)),
                )

    await run_table(world, trials())


@check(sizes=(2, 3, 4))
async def overflow_is_silent(world: World) -> None:
    """Integers wrap and floats overflow to infinity without a warning or an error."""

    def trials() -> Iterator[Trial]:
        for dtype in ("int8", "uint16", "int64", "uint64", "float16", "float32", "float64", "complex64"):
            numeric = dtype_of(dtype)
            limits = np.iinfo(numeric) if numeric.kind in "iu" else np.finfo(numeric)
            values = np.array([limits.max, limits.min], numeric)
            for op in (ReduceOp.SUM, ReduceOp.PROD):
                if dtype == "complex64" and op is ReduceOp.PROD:
                    continue
                yield Trial(
                    f"{op.name} {dtype}",
                    lambda group, op=op, values=values: group.allreduce(values, op),  # type: ignore[misc]
                    [reduced([values] * world.size, op)] * world.size,
                )

    await run_table(world, trials())


@check(sizes=(2, 3, 4), mixes=MIXES)
async def allreduce_gives_equal_bits(world: World) -> None:
    """Every member gets the same bits, run after run, also of sums that depend on their order."""
    rng = np.random.default_rng(7)
    for dtype in (*FLOATS, "complex64"):
        for length in (1, 1000, 300_001):
            parts = [
                (rng.standard_normal(length) * 10.0 ** rng.integers(-3, 4, length)).astype(dtype_of(dtype))
                for _ in world.ranks
            ]
            for op in (ReduceOp.SUM, ReduceOp.AVG):
                seen = {
                    bits(result)
                    for _ in range(2)
                    for result in await world.call(
                        lambda group, op=op, parts=parts: group.allreduce(  # type: ignore[misc]
                            world.make(group.rank, parts[group.rank]), op
                        )
                    )
                }
                assert len(seen) == 1, f"{op.name} of {length} {dtype} gave {len(seen)} different results"


@check(sizes=(2, 3))
async def large_reductions(world: World) -> None:
    """Several MiB, which run off the loop, reduce like the rest."""
    parts = [sample((1 << 20, 3), "float32", rank) for rank in world.ranks]
    total = reduced(parts, ReduceOp.SUM)
    for result in await world.call(lambda group: group.allreduce(parts[group.rank])):
        check_array(result, total, "numpy")
    shares = await world.call(lambda group: group.reduce_scatter(parts[group.rank][:, :1]))
    for share, expected in zip(shares, cut(total[:, :1], chunks(1 << 20, world.size)), strict=True):
        check_array(share, expected, "numpy")
    results = await world.call(lambda group: group.reduce(parts[group.rank], world.size - 1))
    check_array(results[-1], total, "numpy")
