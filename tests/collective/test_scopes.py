"""Calls in one group, drawn with the turns of the loop that each member takes between their steps."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from collective import ReduceOp, ScopeEnded
from collective.testing import world
from collective.testing._scopes import parts_of_call
from collective.testing._world import turns

if TYPE_CHECKING:
    from collective.group import Group
    from collective.scopes import CallScope

STEPS = ("allreduce", "allgather", "reduce_scatter", "broadcast", "alltoall", "ring", "keys")


class Drawn(NamedTuple):
    """One call: what it does, the turns that each rank takes before each step, and who fails at which step."""

    steps: tuple[str, ...]
    turns: tuple[tuple[int, ...], ...]
    fails: tuple[int, int] | None
    length: int


@st.composite
def calls(draw: st.DrawFn, size: int) -> list[Drawn]:
    made = []
    for _ in range(draw(st.integers(2, 6))):
        steps = tuple(draw(st.lists(st.sampled_from(STEPS), min_size=1, max_size=4)))
        waits = st.tuples(*[st.integers(0, 12)] * len(steps))
        fails = draw(st.none() | st.tuples(st.integers(0, size - 1), st.integers(0, len(steps) - 1)))
        made.append(Drawn(steps, draw(st.tuples(*[waits] * size)), fails, draw(st.sampled_from((1, 700, 30_000)))))
    return made


async def take(group: Group, step: str, value: float, length: int) -> None:
    """Take a step, whose result no other call's values give."""
    size, mine = group.size, np.full(length, value + group.rank)
    everyone = [np.full(length, value + rank) for rank in range(size)]
    total = sum(everyone)
    match step:
        case "allreduce":
            assert (await group.allreduce(mine) == total).all()
        case "allgather":
            assert (await group.allgather(mine) == np.concatenate(everyone)).all()
        case "reduce_scatter":
            part = await group.reduce_scatter(np.concatenate([mine] * size), ReduceOp.MAX)
            assert (part == value + size - 1).all()
        case "broadcast":
            root = int(value) % size
            assert (await group.broadcast(mine if group.rank == root else None, root) == value + root).all()
        case "alltoall":
            got = await group.alltoall([mine + 0.5 * dst for dst in range(size)])
            assert all((part == value + src + 0.5 * group.rank).all() for src, part in enumerate(got))
        case "ring":
            sent = group.send(mine, (group.rank + 1) % size)
            assert (await group.recv((group.rank - 1) % size) == value + (group.rank - 1) % size).all()
            await sent
        case "keys":
            keys = ("a", "b") if group.rank % 2 else ("b", "a")
            works = {key: group.scope(key).allreduce(mine + len(key) * (key == "a")) for key in keys}
            assert (await works["a"] == total + size).all()
            assert (await works["b"] == total).all()


async def answer(group: Group, part: CallScope, number: int, drawn: Drawn) -> str:
    """Be one member's part in a call, as the call layer runs it; return how it ended."""
    with part:
        try:
            for at, step in enumerate(drawn.steps):
                await turns(drawn.turns[group.rank][at])
                if drawn.fails == (group.rank, at):
                    raise ValueError("for the test")
                await take(group, step, 1000.0 * (number + 1) + 100 * at, drawn.length)
        except (ValueError, ScopeEnded) as error:
            part.abandon(str(error))
            await part.settle()
            return type(error).__name__
        finally:
            part.finish()
    return "right"


@pytest.mark.parametrize("backend", ["memory", "shm"])
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
@given(data=st.data(), size=st.integers(2, 4))
def test_drawn_calls_never_mix(backend: str, data: st.DataObject, size: int) -> None:
    """Kind: calls in flight that members reach in other orders, of which some fail: no value of one in another."""
    drawn = data.draw(calls(size))

    async def main() -> None:
        async with world(backend, size) as opened, asyncio.timeout(60):
            tasks: list[list[asyncio.Task[Any]]] = []
            for number, call in enumerate(drawn):
                pairs = zip(opened.groups, parts_of_call(opened, f"call {number}"), strict=True)
                tasks.append([asyncio.create_task(answer(group, part, number, call)) for group, part in pairs])
            for call, made in zip(drawn, tasks, strict=True):
                ended = [await each for each in made]
                assert set(ended) == {"right"} if call.fails is None else "ValueError" in ended
            assert {group.epoch for group in opened.groups} == {0}
            totals = await opened.call(lambda group: group.allreduce(np.ones(1)))
            assert {float(total[0]) for total in totals} == {size}

    asyncio.run(main())
