"""Checks that the memory of an operation that has failed is its caller's again."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import numpy as np

from collective.errors import GroupError
from collective.layouts import Layout, Partial, Replicate, Shard
from collective.scopes import CallScope
from collective.testing._arrays import make
from collective.testing._calls import works_again
from collective.testing._cases import check
from collective.testing._outputs import OPERATIONS, expected
from collective.testing._world import outcome

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence

    from collective.group import Group
    from collective.testing._outputs import Operation
    from collective.testing._world import World

_LENGTH = 3 << 19
"""Elements of an input, 12 MiB: what is so long is copied by threads, and takes many turns of the loop."""
_SAMPLE = slice(None, None, 1 << 12)
"""Elements that are written to and looked at: few enough to be done before whoever copies has gone on by much."""
_AFTER = -1.0
"""What memory holds that was used again."""


@check(sizes=(2, 3))
async def failed_operations_leave_memory_alone(world: World) -> None:
    """Each operation with an `out`, broken while it is written to: once its Work has failed, nobody writes there, and
    its inputs may be changed; whoever gets a result nevertheless gets what the inputs held before."""
    for form in ("contiguous", "strided"):
        for name, operation in {**OPERATIONS, "recv": _ring, **_EXCHANGES, **_repartitions(world.size)}.items():
            parts = [np.full(_LENGTH, rank + 1.0) for rank in world.ranks]
            wanted = _RESULTS[name](parts) if name in _RESULTS else expected(name, parts)
            await _break_and_wipe(world, name, operation, parts, wanted, form)


def _ring(group: Group, x: Any, out: Any) -> Any:
    with group.batch() as batch:  # which looks at the send's error as well
        batch.recv((group.rank - 1) % group.size, out=out)
        batch.send(x, (group.rank + 1) % group.size)
    return batch


def _split(array: np.ndarray | None, size: int) -> list[np.ndarray] | None:
    return None if array is None else np.split(array, size)


_EXCHANGES: dict[str, Operation] = {
    "alltoall": lambda group, x, out: group.alltoall(np.split(x, group.size), out=np.split(out, group.size)),
    "gather": lambda group, x, out: group.gather(x, group.size - 1, out=_split(out, group.size)),
    "scatter": lambda group, x, out: group.scatter(
        np.split(x, group.size) if group.rank == group.size - 1 else None, group.size - 1, out=out
    ),
}
_RESULTS: dict[str, Callable[[Sequence[np.ndarray]], Sequence[np.ndarray | None]]] = {
    "alltoall": lambda parts: [
        np.concatenate([np.split(part, len(parts))[rank] for part in parts]) for rank in range(len(parts))
    ],
    "gather": lambda parts: [*[None] * (len(parts) - 1), np.concatenate(parts)],
    "scatter": lambda parts: np.split(parts[-1], len(parts)),
    "repartition": lambda parts: parts,
    "broadcast by repartition": lambda parts: [parts[-1]] * len(parts),
}
"""What each rank gets, where `expected` does not know it."""


def _repartitions(size: int) -> dict[str, Operation]:
    whole = Layout((_LENGTH,), size, [Replicate()])
    cut = Layout((size * _LENGTH,), size, [Shard(0)])
    return {
        "repartition": lambda group, x, out: group.repartition(x, cut, cut, out=out),
        "allreduce by repartition": lambda group, x, out: group.repartition(
            x, Layout((_LENGTH,), size, [Partial()]), whole, out=out
        ),
        "broadcast by repartition": lambda group, x, out: group.repartition(
            x if group.rank == size - 1 else None, Layout((_LENGTH,), 1, [Replicate()], [size - 1]), whole, out=out
        ),
    }


async def _break_and_wipe(
    world: World, name: str, operation: Operation, parts: Sequence[np.ndarray], wanted: Sequence[Any], form: str
) -> None:
    inputs = [make("numpy", part, form) for part in parts]
    outs = [None if part is None else make("numpy", np.zeros_like(part), form) for part in wanted]
    with CallScope() as scope:
        works = [operation(group, x, out) for group, x, out in zip(world.groups, inputs, outs, strict=True)]
        left = world.groups[-1].barrier()
    watching = [
        asyncio.create_task(_wipe_once_failed(work, x, out)) for work, x, out in zip(works, inputs, outs, strict=True)
    ]
    while not any(map(_is_begun, outs)) and not all(task.done() for task in watching):  # noqa: ASYNC110 (a thread writes)
        await asyncio.sleep(0)
    scope.abandon("it was cancelled")
    assert isinstance(await outcome(left), GroupError)
    failed = [await task for task in watching]
    await world.reset()
    await works_again(world)
    for rank, (out, part) in enumerate(zip(outs, wanted, strict=True)):
        if out is not None:
            what = f"{name} into a {form} out, on rank {rank}, which {'failed' if failed[rank] else 'succeeded'}"
            found, sought = (out[_SAMPLE], _AFTER) if failed[rank] else (out, part)
            assert (found == sought).all(), f"{what}: it holds {np.unique(found)}"


def _is_begun(out: np.ndarray | None) -> bool:
    return out is not None and bool(out[_SAMPLE].any())


async def _wipe_once_failed(work: Awaitable[Any], x: np.ndarray, out: np.ndarray | None) -> bool:
    """Use the memory of an operation again as soon as it has failed; return whether it has."""
    result = await outcome(work)
    failed = isinstance(result, Exception)
    if failed:
        assert isinstance(result, GroupError), f"got {result!r}"
        x[_SAMPLE] = _AFTER
        if out is not None:
            out[_SAMPLE] = _AFTER
    return failed


@check(sizes=(1, 2))
async def a_recv_that_is_given_up_leaves_out_alone(world: World) -> None:
    """Cancelling the await of a recv while its message is copied to `out`: `out` is the caller's at once, and the
    message, whole, the next recv's."""
    sender, receiver = world.groups[0], world.groups[-1]
    outs: list[np.ndarray] = []
    caught = 0
    while caught < 4 and len(outs) < 16:  # where the machine is busy, a thread may be done before it is caught
        outs.append(out := make("numpy", np.zeros(_LENGTH), ("contiguous", "strided")[len(outs) % 2]))
        waiting = asyncio.create_task(_wait(receiver.recv(0, out=out)))
        sending = sender.send(np.ones(_LENGTH), receiver.rank)
        while not _is_begun(out) and not waiting.done():  # noqa: ASYNC110 (as above)
            await asyncio.sleep(0)
        waiting.cancel()
        await asyncio.wait([waiting])
        caught += not out[_SAMPLE].all()
        out[_SAMPLE] = _AFTER
        if waiting.cancelled():
            assert (await receiver.recv(0) == 1).all(), "the message was lost or cut"
        await sending
    for out in outs:  # at last, since a thread may not have come to it before
        assert (out[_SAMPLE] == _AFTER).all(), "an out was written after its recv had been cancelled"


async def _wait(work: Awaitable[Any]) -> Any:
    return await work
