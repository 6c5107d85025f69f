"""Checks of broadcast, allgather, gather, scatter, alltoall and barrier."""

from __future__ import annotations

from itertools import count
from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np

from collective.testing._arrays import DTYPES, FORMS, check_array, sample
from collective.testing._cases import MIXES, check
from collective.testing._oracle import concatenated
from collective.testing._tables import Trial, run_table
from collective.testing._world import attempt, outcome, turns

if TYPE_CHECKING:
    from collections.abc import Iterator

    from collective.group import Group
    from collective.testing._world import World
    from collective.work import Work

_SHAPES = {"matrix": (4, 3), "odd": (5,), "cube": (2, 3, 2), "empty": (0, 3), "no columns": (3, 0), "zero-dimensional": ()}
_NUMPY_ONLY = ("datetime64[ns]", ">f4", "<U3", "float8_e4m3fn", "int4", [("x", "<f4"), ("y", "<i8")])


@check(mixes=MIXES)
async def broadcast_table(world: World) -> None:
    """Every dtype x every shape x every root, forms taking turns; non-roots pass None and get the root's kind."""

    def trials() -> Iterator[Trial]:
        turn = count()
        for dtype in DTYPES:
            for label, shape in _SHAPES.items():
                for root in world.ranks:
                    form = FORMS[next(turn) % len(FORMS)]
                    values = sample(shape, dtype, root)
                    yield Trial(
                        f"{dtype} {label} {form} from {root}",
                        lambda group, values=values, form=form, root=root: group.broadcast(  # type: ignore[misc]
                            world.make(root, values, form) if group.rank == root else None, root
                        ),
                        [values] * world.size,
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
        "all from the last": [(0, 2, 2)] * (size - 1) + [(3, 2, 2)],
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
                    yield Trial(
                        f"{dtype} {label} {form}",
                        lambda group, parts=parts, form=form: group.allgather(  # type: ignore[misc]
                            world.make(group.rank, parts[group.rank], form)
                        ),
                        expected,
                    )

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
        for first in range(60):
            pieces = _pieces(world, first)
            form = FORMS[first % len(FORMS)]
            for root in world.ranks:
                yield Trial(
                    f"pieces {first} {form} to {root}",
                    lambda group, pieces=pieces, form=form, root=root: group.gather(  # type: ignore[misc]
                        world.make(group.rank, pieces[group.rank], form), root
                    ),
                    [pieces if rank == root else None for rank in world.ranks],
                )

    await run_table(world, trials())


@check(mixes=MIXES)
async def scatter_table(world: World) -> None:
    """Another shape and dtype to each rank, from every root, in the root's kind; non-roots pass None."""

    def trials() -> Iterator[Trial]:
        for first in range(60):
            pieces = _pieces(world, first)
            form = FORMS[first % len(FORMS)]
            for root in world.ranks:
                yield Trial(
                    f"pieces {first} {form} from {root}",
                    lambda group, pieces=pieces, form=form, root=root: group.scatter(  # type: ignore[misc]
                        [world.make(root, piece, form) for piece in pieces] if group.rank == root else None, root
                    ),
                    pieces,
                    kinds=[world.kinds[root]] * world.size,
                )

    await run_table(world, trials())


@check(mixes=MIXES)
async def alltoall_table(world: World) -> None:
    """Another shape and dtype for each pair of ranks, the own part included; lists and tuples."""

    def trials() -> Iterator[Trial]:
        for first in range(90):
            rows = [_pieces(world, first + 7 * rank) for rank in world.ranks]
            form = FORMS[first % len(FORMS)]
            container: type[Any] = (list, tuple)[first % 2]
            yield Trial(
                f"pieces {first} {form}",
                lambda group, rows=rows, form=form, container=container: group.alltoall(  # type: ignore[misc]
                    container(world.make(group.rank, piece, form) for piece in rows[group.rank])
                ),
                [[row[rank] for row in rows] for rank in world.ranks],
            )

    await run_table(world, trials())


@check(sizes=(1, 3))
async def any_dtype_moves(world: World) -> None:
    """Moving data treats elements as bytes: dates, strings, other byte orders, structures and eight-bit floats too."""

    def trials() -> Iterator[Trial]:
        for name in _NUMPY_ONLY:
            extension = getattr(ml_dtypes, name, None) if isinstance(name, str) else None
            dtype = np.dtype(extension or name)
            zeros = np.zeros((4, 2), dtype)
            zeros.view(np.uint8)[...] = np.arange(zeros.nbytes, dtype=np.uint8).reshape(4, -1) % (8 if extension else 50)
            expected = [zeros] * world.size
            yield Trial(
                f"broadcast {name}",
                lambda group, zeros=zeros: group.broadcast(zeros if group.rank == 0 else None, 0),  # type: ignore[misc]
                expected,
            )
            yield Trial(
                f"allgather {name}",
                lambda group, zeros=zeros: group.allgather(zeros),  # type: ignore[misc]
                [np.tile(zeros, (world.size, 1))] * world.size,
            )
            yield Trial(
                f"alltoall {name}",
                lambda group, zeros=zeros: group.alltoall([zeros] * world.size),  # type: ignore[misc]
                [[zeros] * world.size] * world.size,
            )

    await run_table(world, trials())


@check(sizes=(2, 3), mixes=("torch",))
async def torch_eight_bit_floats_move(world: World) -> None:
    """torch's eight-bit floats move as well."""
    import torch

    for dtype in (torch.float8_e4m3fn, torch.float8_e5m2):
        values = torch.arange(6).to(torch.float32).to(dtype)
        for result in await world.call(lambda group, values=values: group.allgather(values)):  # type: ignore[misc]
            assert result.dtype == dtype, f"got {result.dtype}, expected {dtype}"
            assert torch.equal(result.view(torch.uint8), torch.cat([values] * world.size).view(torch.uint8))


@check(sizes=(1, 2, 3))
async def numpy_scalars_are_arrays(world: World) -> None:
    """A numpy scalar is a zero-dimensional array; what comes back is an array, never a scalar."""
    for result in await world.call(lambda group: group.allreduce(np.float32(2))):
        check_array(result, np.array(2 * world.size, np.float32), "numpy")
    for result in await world.call(lambda group: group.broadcast(np.int16(3) if group.rank == 0 else None, 0)):
        check_array(result, np.array(3, np.int16), "numpy")


@check(sizes=(2, 3, 4), mixes=MIXES)
async def large_arrays_move(world: World) -> None:
    """Several MiB, which are copied off the loop, move like the rest, strided ones too."""
    values = sample((1 << 19, 2), "float64", 1)
    for form in ("contiguous", "strided"):

        def root_only(group: Group, form: str = form) -> Work[Any]:
            return group.broadcast(world.make(0, values, form) if group.rank == 0 else None, 0)

        for result in await world.call(root_only):
            check_array(result, values, world.kinds[0])
        whole = concatenated([values] * world.size)
        results = await world.call(lambda group, form=form: group.allgather(world.make(group.rank, values, form)))  # type: ignore[misc]
        for rank, result in enumerate(results):
            check_array(result, whole, world.kinds[rank])
    halves = [values[:, 0], values[:, 1]]
    exchanged = await world.call(
        lambda group: group.alltoall([world.make(group.rank, halves[rank % 2]) for rank in world.ranks])
    )
    for rank, parts in enumerate(exchanged):
        for part in parts:
            check_array(part, halves[rank % 2], world.kinds[rank])


@check(sizes=(2, 3, 4))
async def barrier_waits_for_all(world: World) -> None:
    """Nobody leaves a barrier before the last one has called it, whoever that is."""
    for last in world.ranks:
        early = [group.barrier() for group in world.groups if group.rank != last]
        await turns()
        assert not any(work.done() for work in early), f"somebody left the barrier before rank {last} came"
        works = [*early, world.groups[last].barrier()]
        assert [await work for work in works] == [None] * world.size


@check(sizes=(2, 3))
async def objects_do_not_move(world: World) -> None:
    """References to objects and things that are no arrays raise TypeError at the call."""
    for thing in (np.array([object()]), [1.0, 2.0], 1.5, "text", np.ma.array([1.0], mask=[True])):
        for group in world.groups:
            error = attempt(lambda group=group, thing=thing: group.allgather(thing))  # type: ignore[misc]
            assert isinstance(error, TypeError), f"allgather({thing!r}) gave {await outcome(error)!r}"  # type: ignore[arg-type]
        await world.reset()
