"""Checks of `out=`, and of who shares memory with whom."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from collective.errors import CollectiveMismatch
from collective.testing._arrays import bits, check_array, dtype_of, overlap, sample, values_of
from collective.testing._cases import MIXES, check
from collective.testing._oracle import chunks, concatenated, cut, reduced
from collective.testing._world import attempt, outcome, outcomes, refused
from collective.types import ReduceOp

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from collective.group import Group
    from collective.testing._arrays import Array
    from collective.testing._world import World
    from collective.work import Work

Issue: TypeAlias = "Callable[[Group, Array, Array], Work[Any]]"
"""Issues an operation with an input and an `out`, which is None where this rank gets no result."""

_DTYPES = ("bool", "int16", "uint64", "bfloat16", "float32", "complex128")


def _operations(world: World, parts: Sequence[np.ndarray]) -> dict[str, tuple[Issue, list[np.ndarray | None]]]:
    """Return every operation that has an `out`, with what each rank gets for these inputs."""
    size = world.size
    last = size - 1
    total = reduced(parts, ReduceOp.SUM)
    only_last: list[np.ndarray | None] = [None] * last + [total]
    ring: Issue = lambda group, x, out: _ring(group, x, out)  # noqa: E731
    return {
        "broadcast": (
            lambda group, x, out: group.broadcast(x if group.rank == last else None, last, out=out),
            [parts[last]] * size,
        ),
        "reduce": (lambda group, x, out: group.reduce(x, last, out=out), only_last),
        "allreduce": (lambda group, x, out: group.allreduce(x, out=out), [total] * size),
        "reduce_scatter": (
            lambda group, x, out: group.reduce_scatter(x, out=out),
            list(cut(total, chunks(len(total), size))),
        ),
        "allgather": (lambda group, x, out: group.allgather(x, out=out), [concatenated(parts)] * size),
        "recv": (ring, [parts[rank - 1] for rank in world.ranks]),
    }


def _ring(group: Group, x: Array, out: Array) -> Work[Any]:
    group.send(x, (group.rank + 1) % group.size)
    return group.recv((group.rank - 1) % group.size, out=out)


@check(mixes=MIXES)
async def out_receives_the_result(world: World) -> None:
    """Every operation writes into a contiguous, strided or transposed `out`, touches nothing beside it, and returns it."""
    for dtype in _DTYPES:
        parts = [sample((2 * world.size + 1, 3), dtype, rank) for rank in world.ranks]
        for name, (issue, expected) in _operations(world, parts).items():
            for form in ("contiguous", "strided", "transposed"):
                blanks = [None if part is None else np.zeros_like(part) for part in expected]
                outs = [None if blank is None else world.make(rank, blank, form) for rank, blank in enumerate(blanks)]
                results = await world.call(
                    lambda group, issue=issue, parts=parts, outs=outs: issue(  # type: ignore[misc]
                        group, world.make(group.rank, parts[group.rank]), outs[group.rank]
                    )
                )
                for rank, (result, out, wanted) in enumerate(zip(results, outs, expected, strict=True)):
                    assert result is out, f"{name} into a {form} out gave rank {rank} another array"
                    if wanted is not None:
                        check_array(out, wanted, world.kinds[rank])
                        _check_gaps(out, form)


def _check_gaps(out: Array, form: str) -> None:
    if form == "strided" and isinstance(out, np.ndarray) and isinstance(out.base, np.ndarray):
        assert not out.base[..., 1::2].any(), "memory between the elements of out was written"


@check(mixes=MIXES)
async def out_may_be_the_input(world: World) -> None:
    """Where their shapes are equal, `out` may be the input itself, or another view of exactly the same elements."""
    for form in ("contiguous", "strided"):
        for dtype in _DTYPES:
            parts = [sample((6, 2), dtype, rank) for rank in world.ranks]
            total = reduced(parts, ReduceOp.SUM)
            for view in (False, True):
                for root in world.ranks:
                    await _in_place(world, parts, form, view, total, ("reduce", root))
                    await _in_place(world, parts, form, view, parts[root], ("broadcast", root))
                await _in_place(world, parts, form, view, total, ("allreduce", 0))


async def _in_place(
    world: World, parts: Sequence[np.ndarray], form: str, view: bool, expected: np.ndarray, call: tuple[str, int]
) -> None:
    inputs = [world.make(rank, part, form) for rank, part in enumerate(parts)]
    outs = [array[...] if view else array for array in inputs]
    name, root = call

    def issue(group: Group) -> Work[Any]:
        array, out = inputs[group.rank], outs[group.rank]
        if name == "allreduce":
            return group.allreduce(array, out=out)
        if name == "broadcast":
            return group.broadcast(array if group.rank == root else None, root, out=out)
        return group.reduce(array, root, out=out if group.rank == root else None)

    results = await world.call(issue)
    for rank, result in enumerate(results):
        if name == "reduce" and rank != root:
            assert result is None
            assert bits(inputs[rank]) == bits(parts[rank]), f"rank {rank}, not the root, lost its input"
        else:
            assert result is outs[rank]
            check_array(result, expected, world.kinds[rank])


@check(sizes=(2, 3), mixes=("torch",))
async def autograd_learns_of_writes_to_out(world: World) -> None:
    """Writing to `out` counts as a change of that tensor: a backward pass that had saved its old value raises."""
    import torch

    for issue in (
        lambda group, out: group.allreduce(torch.ones(3), out=out),
        lambda group, out: group.broadcast(torch.ones(3) if group.rank == 0 else None, 0, out=out),
    ):
        outs = [torch.ones(3) for _ in world.ranks]
        before = [out._version for out in outs]
        await world.call(lambda group, issue=issue, outs=outs: issue(group, outs[group.rank]))  # type: ignore[misc, no-untyped-call]
        assert all(out._version > version for out, version in zip(outs, before, strict=True))


@check(sizes=(1, 2, 3), mixes=("numpy", "torch"))
async def wrong_out_is_refused(world: World) -> None:
    """An `out` of another dtype, shape or library, a read-only one or no array raises at the call, and nothing moves."""
    parts = [sample((2 * world.size, 2), "float32", rank) for rank in world.ranks]
    kind = world.kinds[0]
    for name, (issue, expected) in _operations(world, parts).items():
        getters = [rank for rank, part in enumerate(expected) if part is not None]
        if name == "recv" or (name == "broadcast" and world.size > 1):
            continue  # the shape and dtype come with the data: see the next checks
        for label, bad in _bad_outs(world, expected[getters[-1]], kind).items():
            if name == "allgather" and label in ("longer", "other dimensions"):
                continue  # so does the length of the whole
            group = world.groups[getters[-1]]
            before = bits(bad) if hasattr(bad, "dtype") else b""
            mine = world.make(group.rank, parts[group.rank])
            error = attempt(lambda issue=issue, group=group, mine=mine, bad=bad: issue(group, mine, bad))  # type: ignore[misc]
            assert isinstance(error, ValueError | TypeError), f"{name} with a {label} out gave {error!r}"
            assert not hasattr(bad, "dtype") or bits(bad) == before, f"{name} wrote to a {label} out"
            await world.reset()


def _bad_outs(world: World, expected: np.ndarray | None, kind: str) -> dict[str, Any]:
    assert expected is not None
    shape = expected.shape
    other = {"numpy": "torch", "torch": "numpy"}[kind]
    worlds = {"numpy": np.zeros(shape, np.float32)}
    import torch

    outs: dict[str, Any] = {
        "longer": world.make(0, np.zeros((shape[0] + 1, *shape[1:]), np.float32)),
        "other dimensions": world.make(0, np.zeros((shape[0] * 2,), np.float32)),
        "wider dtype": world.make(0, np.zeros(shape, np.float64)),
        "same-sized dtype": world.make(0, np.zeros(shape, np.int32)),
        "other library": torch.zeros(shape) if other == "torch" else worlds["numpy"],
        "list": [0.0] * shape[0],
    }
    if kind == "numpy":
        frozen = np.zeros(shape, np.float32)
        frozen.flags.writeable = False
        outs["read-only"] = frozen
        outs["broadcast"] = np.broadcast_to(np.zeros(1, np.float32), shape)
    else:
        outs["expanded"] = torch.zeros(1, 1).expand(shape)
    return outs


@check(sizes=(1, 2, 3), mixes=("numpy", "torch"))
async def overlapping_out_is_refused(world: World) -> None:
    """An `out` that shares some of the input's memory, but is not the input, raises ValueError at the call."""
    size = world.size
    group = world.groups[size - 1]
    room = world.make(group.rank, np.zeros(8 * size, np.float32))
    half = 4 * size
    calls: dict[str, Callable[[], object]] = {
        "allreduce": lambda: group.allreduce(room[:half], out=room[1 : half + 1]),
        "allreduce of other strides": lambda: group.allreduce(room[:half], out=room[::2]),
        "reduce": lambda: group.reduce(room[:half], group.rank, out=room[half - 1 : 2 * half - 1]),
        "reduce_scatter": lambda: group.reduce_scatter(room[: half + size], out=room[2:7]),
        "broadcast": lambda: group.broadcast(room[:half], group.rank, out=room[1 : half + 1]),
        "allgather": lambda: group.allgather(room[1:5], out=room[:half]),
    }
    for name, call in calls.items():
        error = refused(call, ValueError)
        assert "out" in str(error), f"{name}: {error}"
        await world.reset()


@check(sizes=(2, 3, 4), mixes=("numpy", "torch"))
async def out_that_does_not_fit_the_data(world: World) -> None:
    """Where shape and dtype come with the data, an `out` that does not fit is a mismatch for all, or this recv's error."""
    wrong = world.size - 1
    ok, longer = np.zeros((2, 2), np.float32), np.zeros((3, 2), np.float32)
    for bad in (longer, ok.astype(np.float64), ok.reshape(4)):

        def broadcast(group: Group, bad: np.ndarray = bad) -> Work[Any]:
            out = None if group.rank == 0 else world.make(group.rank, bad if group.rank == wrong else ok)
            return group.broadcast(world.make(0, ok) if group.rank == 0 else None, 0, out=out)

        await _expect_mismatch(world, "broadcast", broadcast)
        recv = world.groups[wrong].recv(0, out=world.make(wrong, bad))
        await world.groups[0].send(world.make(0, ok), wrong)
        error = await outcome(recv)
        assert isinstance(error, ValueError | TypeError), f"recv into an out that does not fit gave {error!r}"
        await world.reset()
    whole = concatenated([ok] * world.size)
    for bad in (longer, whole.reshape(-1), whole[:-1]):

        def allgather(group: Group, bad: np.ndarray = bad) -> Work[Any]:
            return group.allgather(
                world.make(group.rank, ok), out=world.make(group.rank, bad if group.rank == wrong else whole)
            )

        await _expect_mismatch(world, "allgather", allgather)


async def _expect_mismatch(world: World, name: str, issue: Callable[[Group], Work[Any]]) -> None:
    """Assert that nobody succeeds, then mend the group; the erring rank may be refused at the call."""
    results = await outcomes([attempt(lambda group=group: issue(group)) for group in world.groups])  # type: ignore[misc]
    *others, mine = results
    for rank, result in enumerate(others):
        assert isinstance(result, CollectiveMismatch), f"{name}: rank {rank} got {result!r}"
    assert isinstance(mine, CollectiveMismatch | ValueError | TypeError), f"{name}: the erring rank got {mine!r}"
    await world.reset()


@check(mixes=MIXES)
async def inputs_are_free_once_done(world: World) -> None:
    """An input stays as it was, and may be changed when its own rank's Work is done without changing any result."""
    for length in (1, 1000, 100_000):
        parts = [sample((length, 2), "float32", rank) for rank in world.ranks]
        for name, (issue, expected) in _operations(world, parts).items():
            inputs = [world.make(rank, part) for rank, part in enumerate(parts)]

            async def one(group: Group, issue: Issue = issue, inputs: list[Array] = inputs) -> Any:
                if group.rank == group.size - 1 and group.size > 1:
                    await group.barrier()  # the others' results wait for this one's input
                    return await issue(group, inputs[group.rank], None)
                await group.barrier()
                return await issue(group, inputs[group.rank], None)

            results = await world.each(one)
            for rank, (array, part) in enumerate(zip(inputs, parts, strict=True)):
                assert bits(array) == part.tobytes(), f"{name} changed the input of rank {rank}"
            for array in inputs:
                array[...] = 0
            for rank, (result, wanted) in enumerate(zip(results, expected, strict=True)):
                sources = {"broadcast": world.size - 1, "recv": rank - 1}
                if wanted is not None:
                    check_array(result, wanted, world.kinds[sources.get(name, rank)])


@check(mixes=MIXES)
async def results_share_memory_with_nobody(world: World) -> None:
    """A result overlaps no input and no other member's result, whatever the size; it can be written to."""
    for length in (1, 1000, 50_000):
        parts = [sample((length, 2), "float64", rank) for rank in world.ranks]
        for name, (issue, _) in _operations(world, parts).items():
            inputs = [world.make(rank, part) for rank, part in enumerate(parts)]
            results = await world.call(
                lambda group, issue=issue, inputs=inputs: issue(group, inputs[group.rank], None)  # type: ignore[misc]
            )
            _check_apart(name, [result for result in results if result is not None], inputs)
        rows = [[world.make(rank, part) for part in parts] for rank in world.ranks]
        exchanged = await world.call(lambda group, rows=rows: group.alltoall(rows[group.rank]))  # type: ignore[misc]
        _check_apart("alltoall", sum(exchanged, []), sum(rows, []))
        gathered = await world.call(lambda group, rows=rows: group.gather(rows[group.rank][0], 0))  # type: ignore[misc]
        _check_apart("gather", gathered[0], [row[0] for row in rows])
        scattered = await world.call(
            lambda group, rows=rows: group.scatter(rows[0] if group.rank == 0 else None, 0)  # type: ignore[misc]
        )
        _check_apart("scatter", scattered, rows[0])


def _check_apart(name: str, results: Sequence[Array], inputs: Sequence[Array]) -> None:
    for number, result in enumerate(results):
        assert not any(overlap(result, array) for array in inputs), f"{name}: result {number} shares an input's memory"
        others = [other for index, other in enumerate(results) if index != number]
        assert not any(overlap(result, other) for other in others), f"{name}: result {number} shares another's memory"
        assert values_of(result).flags.writeable, f"{name}: result {number} is read-only"
        result[...] = 1


@check(sizes=(2, 3))
async def small_sends_are_copied(world: World) -> None:
    """A send of up to 64 KiB is done without a recv; changing its tensor then changes nothing that arrives."""
    sender, receiver = world.groups[0], world.groups[-1]
    for nbytes in (0, 1, 1 << 10, 64 << 10):
        values = np.full(nbytes, 7, dtype_of("uint8"))
        await sender.send(values, receiver.rank)
        values[...] = 0
        check_array(await receiver.recv(0), np.full(nbytes, 7, np.uint8), "numpy")


@check(sizes=(2, 3))
async def large_sends_are_free_once_done(world: World) -> None:
    """A send of several MiB may wait for its recv; when it is done its tensor may be changed."""
    sender, receiver = world.groups[0], world.groups[-1]
    values = sample((3 << 18,), "float64", 3)
    kept = values.copy()
    sending = sender.send(values, receiver.rank)
    receiving = receiver.recv(0)
    await sending
    values[...] = 0
    check_array(await receiving, kept, "numpy")
