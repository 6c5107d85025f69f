"""Checks of bad input, disagreement, deadlines, and use after close or from the wrong thread."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from collective.errors import (
    CollectiveMismatch,
    CollectiveTimeout,
    GroupBroken,
    GroupClosed,
    GroupError,
    PeerLost,
    WrongThread,
)
from collective.layouts import Layout, Partial, Replicate, Shard
from collective.testing._arrays import DTYPES, check_array, dtype_of
from collective.testing._calls import works_again
from collective.testing._cases import check
from collective.testing._oracle import REDUCTIONS
from collective.testing._world import attempt, outcome, outcomes, refused
from collective.types import ReduceOp

if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import TypeAlias

    from collective.group import Group
    from collective.testing._world import World
    from collective.work import Work

    Issue: TypeAlias = Callable[[Group], Work[Any]]

_HERE = Path(__file__).name


def _bad_calls(size: int) -> dict[str, tuple[Issue, type[Exception]]]:
    x = np.ones((size, 2))
    nonsense: Any = "sum"
    dates = np.zeros(size, "datetime64[s]")
    return {
        "root below range": (lambda group: group.reduce(x, -1), ValueError),
        "root above range": (lambda group: group.broadcast(x, size), ValueError),
        "gather root above range": (lambda group: group.gather(x, size), ValueError),
        "scatter root below range": (lambda group: group.scatter([x] * size, -1), ValueError),
        "root that is no int": (lambda group: group.reduce(x, nonsense), TypeError),
        "op that is none": (lambda group: group.allreduce(x, nonsense), TypeError),
        "dates cannot be reduced": (lambda group: group.allreduce(dates), TypeError),
        "foreign byte order cannot be reduced": (lambda group: group.reduce_scatter(x.astype(">f8")), TypeError),
        "zero-dimensional reduce_scatter": (lambda group: group.reduce_scatter(np.float64(1)), ValueError),
        "splits that sum to less": (lambda group: group.reduce_scatter(x, splits=[0] * size), ValueError),
        "splits that sum to more": (lambda group: group.reduce_scatter(x, splits=[2] * size), ValueError),
        "too many splits": (lambda group: group.reduce_scatter(x, splits=[1] * size + [0]), ValueError),
        "too few splits": (lambda group: group.reduce_scatter(x, splits=[size] if size > 1 else []), ValueError),
        "negative splits": (
            lambda group: group.reduce_scatter(x, splits=[-1] + [1] * (size - 2) + [3] if size > 1 else [-1]),
            ValueError,
        ),
        "too few to scatter": (lambda group: group.scatter([x] * (size - 1), group.rank), ValueError),
        "too many for alltoall": (lambda group: group.alltoall([x] * (size + 1)), ValueError),
        "no list for alltoall": (lambda group: group.alltoall(x), TypeError),
        "a hole in alltoall": (lambda group: group.alltoall([x] * (size - 1) + [None]), TypeError),
        "nothing to broadcast": (lambda group: group.broadcast(None, group.rank), TypeError),
        "nothing to scatter": (lambda group: group.scatter(None, group.rank), TypeError),
        "a list to reduce": (lambda group: group.allreduce([1.0]), TypeError),
        **_bad_repartitions(size),
    }


def _bad_repartitions(size: int) -> dict[str, tuple[Issue, type[Exception]]]:
    x = np.ones((2, 2))
    y = np.ones((3, 2))
    rows = Layout((2 * size, 2), size, [Shard(0)])
    both = [rows, rows]
    first = Layout((2, 2), 1, [Replicate()], [size - 2] if size > 1 else [5])
    last = Layout((2, 2), 1, [Replicate()], [size - 1])
    beyond = Layout((2, 2), 1, [Replicate()], [size])
    sums = Layout((2, 2), size, [Partial()])
    nonsense: Any = "rows"
    return {
        "not the part that src says": (lambda group: group.repartition(x[1:], rows, rows), ValueError),
        "nothing, and src says some": (lambda group: group.repartition(None, rows, rows), ValueError),
        "a src outside the group": (lambda group: group.repartition(x, beyond, last), ValueError),
        "a dst outside the group": (lambda group: group.repartition(x, last, beyond), ValueError),
        "layouts of two shapes": (lambda group: group.repartition(x, rows, sums), ValueError),
        "a dst that is partial": (lambda group: group.repartition(x, last, sums), ValueError),
        "dates cannot be summed": (lambda group: group.repartition(x.astype("M8[s]"), sums, last), TypeError),
        "no layout": (lambda group: group.repartition(x, nonsense, rows), TypeError),
        "other keys than src": (lambda group: group.repartition({"b": x}, {"a": last}, {"a": last}), ValueError),
        "an out of another shape": (lambda group: group.repartition(x, rows, rows, out=x[:1].copy()), ValueError),
        "an out that is no array": (lambda group: group.repartition(x, rows, rows, out=[1.0]), TypeError),
        "an out that is shared": (lambda group: group.repartition(x, rows, rows, out=x, share=True), ValueError),
        "an out where nothing goes": (lambda group: group.repartition(x, sums, first, out=x), ValueError),
        "an out in the input": (lambda group: group.repartition(y[:2], rows, rows, out=y[1:]), ValueError),
        "two outs in one": (lambda group: group.repartition([x, x], both, both, out=[y[:2], y[1:]]), ValueError),
        "other keys in dst": (lambda group: group.repartition({"a": x}, {"a": last}, [last]), ValueError),
    }


@check(sizes=(1, 2, 3))
async def bad_input_is_refused(world: World) -> None:
    """A call that fails its own checks raises there; the others learn of it at once, by a mismatch that tells why."""
    erring = world.groups[-1]
    for label, (issue, kind) in _bad_calls(world.size).items():
        waiting = [group.allreduce(np.ones(1)) for group in world.groups[:-1]]
        error = attempt(issue, erring)
        assert isinstance(error, kind), f"{label} gave {error!r}"
        for rank, result in enumerate(await outcomes(waiting)):
            assert isinstance(result, CollectiveMismatch), f"{label}: rank {rank} got {result!r}"
            assert type(error).__name__ in str(result), f"{label}: the others are not told of {error!r}: {result}"
        await world.reset()
        await works_again(world)


@check(sizes=(2, 3))
async def a_refused_call_takes_its_place(world: World) -> None:
    """The call that was refused and the others' calls at its place break the group, whichever came first."""
    erring = world.groups[0]
    refused(ValueError, erring.reduce, np.ones(1), 17)
    for group in world.groups[1:]:
        result = await outcome(attempt(group.reduce, np.ones(1), 0))
        assert isinstance(result, CollectiveMismatch | GroupBroken), f"got {result!r}"
    later = await outcome(attempt(erring.barrier))
    assert isinstance(later, CollectiveMismatch | GroupBroken), f"the erring rank went on with {later!r}"
    await world.reset()
    await works_again(world)


@check(sizes=(2, 3))
async def a_refused_call_leaves_earlier_places(world: World) -> None:
    """What comes before a refused call completes, also where a member calls it only when it knows of the refusal."""
    erring, late = world.groups[0], world.groups[-1]
    early = [group.allreduce(np.ones(2)) for group in world.groups[:-1]]
    refused(ValueError, erring.reduce, np.ones(1), 17)
    assert isinstance(await outcome(late.recv(0, tag=9)), GroupError), "the refusal breaks what waits"
    for work in [*early, late.allreduce(np.ones(2))]:
        check_array(await work, np.full(2, float(world.size)), "numpy")
    assert isinstance(await outcome(attempt(late.barrier)), CollectiveMismatch | GroupBroken)
    await world.reset()
    await works_again(world)


@check(sizes=(1, 2))
async def what_the_table_lacks_is_refused(world: World) -> None:
    """Every op and dtype that is not in the table of reductions raises TypeError at the call."""
    group = world.groups[-1]
    missing = [(op, dtype) for op in ReduceOp for dtype in DTYPES if (op, dtype) not in REDUCTIONS]
    assert missing
    for op, dtype in missing:
        array = np.ones(world.size).astype(dtype_of(dtype))
        refused(TypeError, group.allreduce, array, op)
        refused(TypeError, group.reduce, array, 0, op)
        refused(TypeError, group.reduce_scatter, array, op)
    await world.reset()
    await works_again(world)


def _disagreements(size: int) -> dict[str, tuple[Issue, Issue]]:
    """Return pairs of calls that do not fit: of the last rank, and of the others."""
    x, last = np.ones((size, 2)), size - 1
    ones = [size - 1, *[0] * (size - 2), 1]
    return {
        "another operation": (lambda group: group.barrier(), lambda group: group.allreduce(x)),
        "allgather for reduce_scatter": (lambda group: group.allgather(x), lambda group: group.reduce_scatter(x)),
        "another shape": (lambda group: group.allreduce(x[:1]), lambda group: group.allreduce(x)),
        "as many elements": (lambda group: group.allreduce(x.reshape(-1)), lambda group: group.allreduce(x)),
        "another dtype": (lambda group: group.allreduce(x.astype(int)), lambda group: group.allreduce(x)),
        "another reduction": (lambda group: group.allreduce(x, ReduceOp.MAX), lambda group: group.allreduce(x)),
        "another root to reduce": (lambda group: group.reduce(x, last), lambda group: group.reduce(x, 0)),
        "another root to broadcast": (lambda group: group.broadcast(x, last), lambda group: _broadcast(group, x)),
        "another root to gather": (lambda group: group.gather(x, last), lambda group: group.gather(x, 0)),
        "another root to scatter": (
            lambda group: group.scatter([x] * size, last),
            lambda group: group.scatter([x] * size if group.rank == 0 else None, 0),
        ),
        "other splits": (
            lambda group: group.reduce_scatter(x, splits=ones),
            lambda group: group.reduce_scatter(x, splits=[0] * last + [size]),
        ),
        "other columns": (lambda group: group.allgather(x[:, :1]), lambda group: group.allgather(x)),
        "more dimensions": (lambda group: group.allgather(x[..., None]), lambda group: group.allgather(x)),
        "another dtype to gather": (lambda group: group.allgather(x > 0), lambda group: group.allgather(x)),
        "a split": (lambda group: group.split(0), lambda group: group.barrier()),
    }


def _broadcast(group: Group, array: np.ndarray) -> Work[Any]:
    return group.broadcast(array if group.rank == 0 else None, 0)


@check(sizes=(2, 3, 4))
async def disagreement_is_told_to_all(world: World) -> None:
    """Members that call different things get CollectiveMismatch, every one, saying what each called and where."""
    for label, (odd, common) in _disagreements(world.size).items():
        for odd_first in (True, False):
            groups = world.groups[::-1] if odd_first else world.groups
            works = [(odd if group.rank == world.size - 1 else common)(group) for group in groups]
            for error in await outcomes(works):
                assert isinstance(error, CollectiveMismatch), f"{label}: got {error!r}"
                said = sorted(rank for ranks, _ in error.calls for rank in ranks)
                assert said == list(world.ranks), f"{label} does not say what each called: {error}"
                assert all(f"{_HERE}:" in what for _, what in error.calls), f"{label} does not say where: {error}"
                assert len({what for _, what in error.calls}) > 1, f"{label} does not say the difference: {error}"
            for group in world.groups:
                later = await outcome(attempt(group.barrier))
                assert isinstance(later, GroupBroken), f"{label}: the group goes on with {later!r}"
            await world.reset()
            await works_again(world)


@check(sizes=(2, 3))
async def disagreement_leaves_earlier_work(world: World) -> None:
    """What all called before the place of a mismatch is done; what was called after it fails."""
    for length in (1, 400_000):
        ones = np.ones(length)
        before = [group.allreduce(ones) for _ in range(4) for group in world.groups]
        differing = [group.allreduce(np.ones(2 + group.rank)) for group in world.groups]
        after = [group.barrier() for group in world.groups]
        for work in before:
            check_array(await work, ones * world.size, "numpy")
        for error in await outcomes(differing):
            assert isinstance(error, CollectiveMismatch), f"got {error!r}"
        for error in await outcomes(after):
            assert isinstance(error, GroupError), f"got {error!r}"
        await world.reset()
        await works_again(world)


@check(sizes=(3,))
async def disagreement_does_not_wait_for_all(world: World) -> None:
    """Two members that disagree learn of it within seconds, also where another one has not called anything yet."""
    for absent in (0, world.size - 1):
        present = [group for group in world.groups if group.rank != absent]
        works = [group.allreduce(np.ones(1 + number % 2)) for number, group in enumerate(present)]
        async with asyncio.timeout(5):
            for error in await outcomes(works):
                assert isinstance(error, CollectiveMismatch), f"got {error!r}"
        late = await outcome(attempt(world.groups[absent].barrier))
        assert isinstance(late, CollectiveMismatch | GroupBroken), f"the late member got {late!r}"
        await world.reset()
        await works_again(world)


@check(sizes=(2, 3, 4), timeout=0.15)
async def late_members_are_named(world: World) -> None:
    """A collective that not all call within the timeout raises CollectiveTimeout, naming who is missing."""
    for late in world.ranks:
        works = [group.allreduce(np.ones(1)) for group in world.groups if group.rank != late]
        pending = [world.groups[0].recv(0, tag=1)]
        for error in await outcomes(works):
            assert isinstance(error, CollectiveTimeout), f"got {error!r}"
            assert isinstance(error, TimeoutError)
            assert len(error.missing) == 1, f"missing is {error.missing}"
            assert world.member(late) in error.missing[0], f"missing is {error.missing}, not rank {late}"
            assert world.member(late) in str(error)
        for error in await outcomes(pending):
            assert isinstance(error, GroupError), f"got {error!r}"
        for group in world.groups:
            error = await outcome(attempt(group.barrier))
            assert isinstance(error, CollectiveTimeout | GroupBroken), f"got {error!r}"
        await world.reset()
        await works_again(world)


@check(sizes=(1, 2), timeout=0.05)
async def a_lone_recv_has_no_timeout(world: World) -> None:
    """The group's timeout does not run on a recv, nor on a send that waits for its recv."""
    receiver = world.groups[-1]
    receiving = receiver.recv(0, tag=1)
    sending = world.groups[0].send(np.ones(100_000), receiver.rank, tag=2)
    await asyncio.sleep(0.2)
    assert not receiving.done()
    await world.groups[0].send(np.ones(1), receiver.rank, tag=1)
    check_array(await receiving, np.ones(1), "numpy")
    check_array(await receiver.recv(0, tag=2), np.ones(100_000), "numpy")
    await sending


def _every_call(group: Group) -> dict[str, Callable[[], object]]:
    x = np.ones(group.size)
    return {
        "send": lambda: group.send(x, 0),
        "recv": lambda: group.recv(0),
        "broadcast": lambda: group.broadcast(x, group.rank),
        "reduce": lambda: group.reduce(x, 0),
        "allreduce": lambda: group.allreduce(x),
        "reduce_scatter": lambda: group.reduce_scatter(x),
        "allgather": lambda: group.allgather(x),
        "gather": lambda: group.gather(x, 0),
        "scatter": lambda: group.scatter([x] * group.size, group.rank),
        "alltoall": lambda: group.alltoall([x] * group.size),
        "barrier": lambda: group.barrier(),
        "split": lambda: group.split(0),
    }


@check(sizes=(1, 2, 3))
async def other_threads_are_refused(world: World) -> None:
    """Every operation called from another thread raises WrongThread, takes no place and breaks nothing."""
    group = world.groups[-1]
    for name, call in _every_call(group).items():
        error = await asyncio.to_thread(attempt, call)
        assert isinstance(error, WrongThread), f"{name} from another thread gave {error!r}"
        error = await asyncio.to_thread(asyncio.run, _on_this_loop(call))
        assert isinstance(error, WrongThread), f"{name} from another loop gave {error!r}"
    await works_again(world)


async def _on_this_loop(call: Callable[[], object]) -> object:
    return attempt(call)


@check(sizes=(1, 2, 3))
async def closed_groups_are_refused(world: World) -> None:
    """Every operation after `aclose` raises GroupClosed at the call; closing again does nothing."""
    for group in world.groups:
        await group.aclose()
        await group.aclose()
    for group in world.groups:
        for name, call in _every_call(group).items():
            error = attempt(call)
            assert isinstance(error, GroupClosed), f"{name} on a closed group gave {error!r}"
        error = await outcome(attempt(group.reset))
        assert isinstance(error, GroupClosed), f"reset of a closed group gave {error!r}"


@check(sizes=(2, 3, 4))
async def leaving_does_not_hang_the_others(world: World) -> None:
    """When a member closes its group, what needs it fails on the others; what it had finished is theirs."""
    leaver, *others = world.groups
    await works_again(world)
    await leaver.send(np.array([5]), 1)
    finished = [group.allreduce(np.ones(1)) for group in world.groups]
    await finished[0]
    pending = [group.barrier() for group in others]
    receiving = [group.recv(0, tag=1) for group in others]
    await leaver.aclose()
    for error in await outcomes([*pending, *receiving]):
        assert isinstance(error, GroupError), f"got {error!r}"
    for work in finished[1:]:
        check_array(await work, np.full(1, float(world.size)), "numpy")
    for group in others:
        assert isinstance(await outcome(attempt(group.barrier)), GroupError)


@check(sizes=(2, 3))
async def leaving_after_a_disagreement(world: World) -> None:
    """What a mismatch left to complete fails at once where a member closes the group without having called it."""
    *others, leaver = world.groups
    early = [group.barrier() for group in others]
    waiting = [group.recv(leaver.rank, tag=9) for group in others]
    refused(ValueError, others[0].reduce, np.ones(1), 17)
    await outcomes(waiting)  # the mismatch is known to all
    await leaver.aclose()
    async with asyncio.timeout(5):
        for error in await outcomes(early):
            assert isinstance(error, PeerLost), f"got {error!r}"
