"""Checks of `out=`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from collective.errors import CollectiveMismatch
from collective.group import Group
from collective.testing._arrays import bits, check_array, sample
from collective.testing._cases import MIXES, check
from collective.testing._oracle import chunks, concatenated, cut, reduced
from collective.testing._world import Each, attempt, issue, outcome, outcomes, refused
from collective.types import ReduceOp

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from collective.testing._arrays import Array
    from collective.testing._world import World
    from collective.work import Work

Operation: TypeAlias = "Callable[[Group, Array, Array], Work[Any]]"
"""Issues an operation with an input and an `out`; None where this rank gets no result."""

_DTYPES = ("bool", "int16", "uint64", "bfloat16", "float32", "complex128")


def _broadcast(group: Group, x: Array, out: Array) -> Work[Any]:
    last = group.size - 1
    return group.broadcast(x if group.rank == last else None, last, out=out)


def _ring(group: Group, x: Array, out: Array) -> Work[Any]:
    group.send(x, (group.rank + 1) % group.size)
    return group.recv((group.rank - 1) % group.size, out=out)


OPERATIONS: dict[str, Operation] = {
    "broadcast": _broadcast,
    "reduce": lambda group, x, out: group.reduce(x, group.size - 1, out=out),
    "allreduce": lambda group, x, out: group.allreduce(x, out=out),
    "reduce_scatter": lambda group, x, out: group.reduce_scatter(x, out=out),
    "allgather": lambda group, x, out: group.allgather(x, out=out),
    "recv": _ring,
}
"""Every operation that has an `out`; a root is the last rank, and recv is from the left neighbour."""


def expected(name: str, parts: Sequence[np.ndarray]) -> Sequence[np.ndarray | None]:
    """Return what each rank gets from one of OPERATIONS with these inputs."""
    size = len(parts)
    total = reduced(parts, ReduceOp.SUM)
    if name == "broadcast":
        return [parts[-1]] * size
    if name == "reduce":
        return [*[None] * (size - 1), total]
    if name == "reduce_scatter":
        return cut(total, chunks(len(total), size))
    if name == "allgather":
        return [concatenated(parts)] * size
    if name == "recv":
        return [parts[rank - 1] for rank in range(size)]
    return [total] * size


@check(mixes=MIXES)
async def out_receives_the_result(world: World) -> None:
    """Every operation fills a contiguous, strided or transposed `out`, touches nothing beside it, and returns it."""
    for dtype in _DTYPES:
        parts = [sample((2 * world.size + 1, 3), dtype, rank) for rank in world.ranks]
        for name, operation in OPERATIONS.items():
            wanted = expected(name, parts)
            for form in ("contiguous", "strided", "transposed"):
                outs = Each(
                    None if part is None else world.make(rank, np.zeros_like(part), form)
                    for rank, part in enumerate(wanted)
                )
                results = await world.call(operation, world.spread(parts), outs)
                for rank, (result, out, part) in enumerate(zip(results, outs, wanted, strict=True)):
                    assert result is out, f"{name} into a {form} out gave rank {rank} another array"
                    if part is not None:
                        check_array(out, part, world.kinds[rank])
                        _check_gaps(out, form)


def _check_gaps(out: Array, form: str) -> None:
    if form == "strided" and isinstance(out, np.ndarray):
        room = out.base
        assert isinstance(room, np.ndarray)
        assert not room[..., 1::2].any(), "memory between the elements of out was written"


@check(mixes=MIXES)
async def out_may_be_the_input(world: World) -> None:
    """Where their shapes are equal, `out` may be the input itself, or another view of exactly the same elements."""
    for form in ("contiguous", "strided"):
        for dtype in _DTYPES:
            parts = [sample((6, 2), dtype, rank) for rank in world.ranks]
            for name in ("broadcast", "reduce", "allreduce"):
                for view in (False, True):
                    await _check_in_place(world, name, world.spread(parts, form), parts, view=view)


async def _check_in_place(world: World, name: str, inputs: Each, parts: Sequence[np.ndarray], *, view: bool) -> None:
    wanted = expected(name, parts)
    outs = Each(
        None if part is None else array[...] if view else array for array, part in zip(inputs, wanted, strict=True)
    )
    results = await world.call(OPERATIONS[name], inputs, outs)
    for rank, (result, out, part) in enumerate(zip(results, outs, wanted, strict=True)):
        assert result is out
        if part is not None:
            check_array(inputs[rank], part, world.kinds[rank])
        else:
            assert bits(inputs[rank]) == bits(parts[rank]), f"{name}: rank {rank}, not the root, lost its input"


@check(sizes=(2, 3), mixes=("torch",))
async def autograd_learns_of_writes_to_out(world: World) -> None:
    """Writing to `out` counts as a change of that tensor: a backward pass that had saved its old value raises."""
    for operation in (OPERATIONS["broadcast"], OPERATIONS["allreduce"]):
        outs = world.spread([np.ones(3)] * world.size)
        before = [out._version for out in outs]
        await world.call(operation, world.spread([np.ones(3)] * world.size), outs)
        assert all(out._version > version for out, version in zip(outs, before, strict=True))


@check(sizes=(1, 2, 3), mixes=("numpy", "torch"))
async def wrong_out_is_refused(world: World) -> None:
    """An `out` of another dtype, shape or library, a read-only one or no array raises at the call; nothing moves."""
    parts = [sample((2 * world.size, 2), "float32", rank) for rank in world.ranks]
    last = world.groups[-1]
    for name, operation in OPERATIONS.items():
        if name == "recv":
            continue  # shape and dtype come with the message: see out_that_does_not_fit_the_data
        wanted = expected(name, parts)[last.rank]
        assert wanted is not None
        for label, bad in _bad_outs(world.kinds[0], wanted).items():
            if name == "allgather" and label in ("longer", "other dimensions"):
                continue  # so does the length of the whole
            before = bits(bad) if hasattr(bad, "dtype") else b""
            error = attempt(operation, last, world.make(last.rank, parts[last.rank]), bad)
            assert isinstance(error, ValueError | TypeError), f"{name} with a {label} out gave {error!r}"
            assert not hasattr(bad, "dtype") or bits(bad) == before, f"{name} wrote to a {label} out"
            await world.reset()


def _bad_outs(kind: str, result: np.ndarray) -> dict[str, Any]:
    """Return what cannot take a result of that kind."""
    import torch

    shape = result.shape
    new: Any = torch.zeros if kind == "torch" else np.zeros
    library: Any = torch if kind == "torch" else np
    outs = {
        "longer": new((shape[0] + 1, *shape[1:]), dtype=library.float32),
        "other dimensions": new((result.size,), dtype=library.float32),
        "wider dtype": new(shape, dtype=library.float64),
        "same-sized dtype": new(shape, dtype=library.int32),
        "other library": np.zeros(shape, np.float32) if kind == "torch" else torch.zeros(shape),
        "list": result.tolist(),
    }
    if kind == "torch":
        outs["expanded"] = torch.zeros(1, 1).expand(shape)
    else:
        outs["broadcast"] = np.broadcast_to(np.zeros(1, np.float32), shape)
        outs["read-only"] = np.zeros(shape, np.float32)
        outs["read-only"].flags.writeable = False
    return outs


@check(sizes=(1, 2, 3), mixes=("numpy", "torch"))
async def overlapping_out_is_refused(world: World) -> None:
    """An `out` that shares some of the input's memory, but is not the input, raises ValueError at the call."""
    group = world.groups[-1]
    half = 4 * world.size
    room = world.make(group.rank, np.zeros(2 * half, np.float32))
    overlaps = {
        "allreduce": (room[:half], room[1 : half + 1]),
        "reduce": (room[:half], room[half - 1 : 2 * half - 1]),
        "broadcast": (room[:half], room[::2]),
        "reduce_scatter": (room[:half], room[2:6]),
        "allgather": (room[1:5], room[:half]),
    }
    for name, (x, out) in overlaps.items():
        error = refused(ValueError, OPERATIONS[name], group, x, out)
        assert "overlap" in str(error), f"{name}: {error}"
        await world.reset()


@check(sizes=(2, 3, 4), mixes=("numpy", "torch"))
async def out_that_does_not_fit_the_data(world: World) -> None:
    """Where shape and dtype come with the data, a misfit of `out` is a mismatch for all, or that recv's own error."""
    erring = world.size - 1
    part, longer = np.zeros((2, 2), np.float32), np.zeros((3, 2), np.float32)
    whole = concatenated([part] * world.size)
    for bad in (longer, part.astype(np.float64), part.reshape(4)):
        outs = world.spread([part] * erring + [bad])
        outs[0] = None
        await _expect_mismatch(world, Group.broadcast, world.only(0, world.make(0, part)), 0, out=outs)
        receiving = world.groups[erring].recv(0, out=world.make(erring, bad))
        await world.groups[0].send(world.make(0, part), erring)
        error = await outcome(receiving)
        assert isinstance(error, ValueError | TypeError), f"recv into an out that does not fit gave {error!r}"
        await world.reset()
    for bad in (longer, whole.reshape(-1), whole[:-1]):
        outs = world.spread([whole] * erring + [bad])
        await _expect_mismatch(world, Group.allgather, world.spread([part] * world.size), out=outs)


async def _expect_mismatch(world: World, operation: Callable[..., Work[Any]], *args: Any, **options: Any) -> None:
    """Assert that nobody succeeds, then mend the group; the last rank, which errs, may be refused at the call."""
    works = [attempt(issue, operation, group, *args, **options) for group in world.groups]
    *others, mine = await outcomes(works)
    for rank, error in enumerate(others):
        assert isinstance(error, CollectiveMismatch), f"rank {rank} got {error!r}"
    assert isinstance(mine, CollectiveMismatch | ValueError | TypeError), f"the erring rank got {mine!r}"
    await world.reset()
