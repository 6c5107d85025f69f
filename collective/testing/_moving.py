"""Checks of broadcast, allgather, gather, scatter, alltoall and barrier."""

from __future__ import annotations

from itertools import cycle
from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np

from collective.group import Group
from collective.testing._arrays import DTYPES, FORMS, check_array, sample
from collective.testing._cases import MIXES, check
from collective.testing._oracle import concatenated
from collective.testing._tables import Trial, run_table
from collective.testing._world import Each, refused, turns

if TYPE_CHECKING:
    from collections.abc import Iterator

    from collective.testing._world import World

_SHAPES: dict[str, tuple[int, ...]] = {
    "matrix": (4, 3),
    "odd": (5,),
    "cube": (2, 3, 2),
    "empty": (0, 3),
    "no columns": (3, 0),
    "zero-dimensional": (),
}


@check(mixes=MIXES)
async def broadcast_table(world: World) -> None:
    """Every dtype x every shape x every root, forms taking turns; non-roots pass None and get the root's kind."""

    def trials() -> Iterator[Trial]:
        forms = cycle(FORMS)
        for dtype in DTYPES:
            for label, shape in _SHAPES.items():
                for root, form in zip(world.ranks, forms, strict=False):
                    values = sample(shape, dtype, root)
                    yield Trial(
                        f"{dtype} {label} {form} from {root}",
                        [values] * world.size,
                        Group.broadcast,
                        world.only(root, world.make(root, values, form)),
                        root,
                        kinds=[world.kinds[root]] * world.size,
                    )

    await run_table(world, trials())


@check(mixes=MIXES)
async def allgather_table(world: World) -> None:
    """Every dtype x even, uneven, empty and zero-dimensional parts x every form."""
    size = world.size
    layouts: dict[str, list[tuple[int, ...]]] = {
        "even": [(2, 3)] * size,
        "rising": [(rank, 2) for rank in world.ranks],
        "falling": [(size - rank,) for rank in world.ranks],
        "all from the last": [(3 if rank == size - 1 else 0, 2, 2) for rank in world.ranks],
        "empty": [(0,)] * size,
        "no columns": [(rank + 1, 0) for rank in world.ranks],
        "zero-dimensional": [()] * size,
        "zero-dimensional among one-dimensional": [() if rank % 2 else (rank,) for rank in world.ranks],
    }

    def trials() -> Iterator[Trial]:
        for dtype in DTYPES:
            for label, shapes in layouts.items():
                parts = [sample(shape, dtype, rank) for rank, shape in enumerate(shapes)]
                expected = [concatenated(parts)] * size
                for form in FORMS:
                    yield Trial(f"{dtype} {label} {form}", expected, Group.allgather, world.spread(parts, form))

    await run_table(world, trials())


def _pieces(world: World, first: int) -> list[np.ndarray]:
    """One array a rank, each of another shape and dtype."""
    shapes = list(_SHAPES.values())
    return [
        sample(shapes[(first + rank) % len(shapes)], DTYPES[(first * 4 + rank) % len(DTYPES)], rank)
        for rank in world.ranks
    ]


@check(mixes=MIXES)
async def gather_table(world: World) -> None:
    """Another shape and dtype from each rank, to every root, in the root's kind; None elsewhere."""

    def trials() -> Iterator[Trial]:
        for first, form in zip(range(60), cycle(FORMS), strict=False):
            pieces = _pieces(world, first)
            for root in world.ranks:
                label = f"pieces {first} {form} to {root}"
                yield Trial(label, world.only(root, pieces), Group.gather, world.spread(pieces, form), root)

    await run_table(world, trials())


@check(mixes=MIXES)
async def scatter_table(world: World) -> None:
    """Another shape and dtype to each rank, from every root, in the root's kind; non-roots pass None."""

    def trials() -> Iterator[Trial]:
        for first, form in zip(range(60), cycle(FORMS), strict=False):
            pieces = _pieces(world, first)
            for root in world.ranks:
                tensors = [world.make(root, piece, form) for piece in pieces]
                yield Trial(
                    f"pieces {first} {form} from {root}",
                    pieces,
                    Group.scatter,
                    world.only(root, tensors),
                    root,
                    kinds=[world.kinds[root]] * world.size,
                )

    await run_table(world, trials())


@check(mixes=MIXES)
async def alltoall_table(world: World) -> None:
    """Another shape and dtype for each pair of ranks, the own part included; lists and tuples."""

    def trials() -> Iterator[Trial]:
        for first, form in zip(range(90), cycle(FORMS), strict=False):
            rows = [_pieces(world, first + 7 * rank) for rank in world.ranks]
            container: Any = (list, tuple)[first % 2]
            tensors = [container(world.make(rank, piece, form) for piece in row) for rank, row in enumerate(rows)]
            columns = [[row[rank] for row in rows] for rank in world.ranks]
            yield Trial(f"pieces {first} {form}", columns, Group.alltoall, Each(tensors))

    await run_table(world, trials())


@check(sizes=(1, 3))
async def any_dtype_moves(world: World) -> None:
    """Moving data treats elements as bytes: dates, strings, other byte orders, structures and eight-bit floats too."""
    dtypes: list[Any] = ["datetime64[ns]", ">f4", "<U3", [("x", "<f4"), ("y", "<i8")]]
    dtypes += [ml_dtypes.float8_e4m3fn, ml_dtypes.int4]

    def trials() -> Iterator[Trial]:
        for dtype in map(np.dtype, dtypes):
            values = np.zeros((4, 2), dtype)
            values.view(np.uint8)[...] = np.arange(values.nbytes, dtype=np.uint8).reshape(4, -1) % 8
            everywhere = [values] * world.size
            whole = np.tile(values, (world.size, 1))
            yield Trial(f"broadcast {dtype}", everywhere, Group.broadcast, world.only(0, values), 0)
            yield Trial(f"allgather {dtype}", [whole] * world.size, Group.allgather, values)
            yield Trial(f"alltoall {dtype}", [everywhere] * world.size, Group.alltoall, everywhere)

    await run_table(world, trials())


@check(sizes=(2, 3), mixes=("torch",))
async def torch_eight_bit_floats_move(world: World) -> None:
    """torch's eight-bit floats move as well."""
    import torch

    for dtype in (torch.float8_e4m3fn, torch.float8_e5m2):
        values = torch.arange(6).to(torch.float32).to(dtype)
        whole = torch.cat([values] * world.size)
        for result in await world.call(Group.allgather, values):
            assert result.dtype == dtype, f"got {result.dtype}, expected {dtype}"
            assert torch.equal(result.view(torch.uint8), whole.view(torch.uint8))


@check(sizes=(1, 2, 3))
async def numpy_scalars_are_arrays(world: World) -> None:
    """A numpy scalar is a zero-dimensional array; what comes back is an array, never a scalar."""
    for result in await world.call(Group.allreduce, np.float32(2)):
        check_array(result, np.array(2 * world.size, np.float32), "numpy")
    for result in await world.call(Group.broadcast, world.only(0, np.int16(3)), 0):
        check_array(result, np.array(3, np.int16), "numpy")


@check(sizes=(2, 4), mixes=("numpy", "torch"))
async def large_arrays_move(world: World) -> None:
    """Several MiB, which are copied off the loop, move like the rest, strided ones too."""
    values = sample((1 << 19, 2), "float64", 1)
    whole = concatenated([values] * world.size)
    for form in ("contiguous", "strided"):
        for result in await world.call(Group.broadcast, world.only(0, world.make(0, values, form)), 0):
            check_array(result, values, world.kinds[0])
        results = await world.call(Group.allgather, world.spread([values] * world.size, form))
        for rank, result in enumerate(results):
            check_array(result, whole, world.kinds[rank])
    halves = [values[:, rank % 2] for rank in world.ranks]
    tensors = Each([world.make(rank, half) for half in halves] for rank in world.ranks)
    for rank, parts in enumerate(await world.call(Group.alltoall, tensors)):
        for part in parts:
            check_array(part, halves[rank], world.kinds[rank])


@check(sizes=(2, 3, 4))
async def barrier_waits_for_all(world: World) -> None:
    """Nobody leaves a barrier before the last one has called it, whoever that is."""
    for last in world.ranks:
        early = [group.barrier() for group in world.groups if group.rank != last]
        await turns()
        assert not any(work.done() for work in early), f"somebody left the barrier before rank {last} came"
        for work in (*early, world.groups[last].barrier()):
            await work


@check(sizes=(2, 3))
async def objects_do_not_move(world: World) -> None:
    """References to objects and things that are no arrays raise TypeError at the call."""
    for thing in (np.array([object()]), [1.0, 2.0], 1.5, "text", np.ma.array([1.0], mask=[True])):
        for group in world.groups:
            refused(TypeError, group.allgather, thing)
        await world.reset()
