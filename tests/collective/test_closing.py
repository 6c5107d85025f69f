"""What ends is gone at once, on every member, however and whenever it ends."""

from __future__ import annotations

import asyncio
import gc
import os
import pickle
import struct
import sys
from operator import le
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from collective import CollectiveMismatch, GroupBroken, GroupError
from collective._backends._shm_segment import Segment
from collective._core.engine import Engine
from collective._core.epoch import Epoch
from collective._core.fabric import Fabric
from collective._core.goodbyes import Relay
from collective._links import forks
from collective.group import Group
from collective.testing import world
from collective.testing._calls import works_again
from collective.testing._world import _CREDENTIAL, outcome, outcomes, turns, until

if TYPE_CHECKING:
    from collective.group import Group as Held
    from collective.testing import World


@pytest.mark.parametrize("link", ["memory", "unix", "shm"])
def test_what_a_broken_epoch_still_receives_is_dropped(link: str) -> None:
    """Kind: bytes on their way to a broken epoch. They raise nothing, nobody holds them, and a reset helps."""

    async def main() -> None:
        backend = "memory" if link == "memory" else "shm"
        async with world(backend, 2, link=link) as opened, asyncio.timeout(30):
            sender, receiver = opened.groups
            for delay in (1, 4, 8, 12, 16, 24, 40, 80):
                works = [sender.send(np.ones(8 << 20), 1), receiver.recv(0)]
                await turns(delay)
                mailbox = receiver._engine.current.mailbox
                receiver._engine.break_everywhere("the test says so")
                for result in await outcomes(works):
                    assert result is None or isinstance(result, GroupBroken | np.ndarray), f"got {result!r}"
                assert not mailbox._incoming
                await opened.reset()
                await works_again(opened)
                assert not opened.unseen, f"after {delay} turns: {opened.unseen}"

    asyncio.run(main())


@pytest.mark.parametrize("ending", ["reset", "break", "nested"])
def test_a_waiting_reset_of_a_subgroup_ends_with_its_parent(ending: str) -> None:
    """Kind: who waits for the others of a group that has ended for good. It is told at once, not after the timeout."""

    async def main() -> None:
        async with world("memory", 2) as opened, asyncio.timeout(5):
            subgroups: list[Held] = await opened.call(Group.split, 0)
            if ending == "nested":
                subgroups = [await work for work in [subgroup.split(0) for subgroup in subgroups]]
            waiting = asyncio.ensure_future(outcome(subgroups[0].reset()))
            await turns()
            if ending == "break":
                opened.groups[1]._engine.break_everywhere("the test says so")
            else:
                await opened.reset()
            error = await waiting
            assert isinstance(error, GroupBroken), f"got {error!r}"
            assert "split from" in str(error)

    asyncio.run(main())


def test_a_subgroup_that_is_opened_again_ends_with_its_parent() -> None:
    """Kind: as above, at every point of a reset that both members have called."""

    async def main() -> None:
        for delay in range(0, 40, 2):
            async with world("shm", 2, link="unix") as opened, asyncio.timeout(5):
                subgroups = await opened.call(Group.split, 0)
                resets = [asyncio.ensure_future(outcome(subgroup.reset())) for subgroup in subgroups]
                await turns(delay)
                opened.groups[0]._engine.break_everywhere("the test says so")
                for result in await asyncio.gather(*resets):
                    assert result is None or isinstance(result, GroupError), f"after {delay} turns: {result!r}"
                for error in await outcomes([subgroup.barrier() for subgroup in subgroups]):
                    assert isinstance(error, GroupBroken), f"after {delay} turns: {error!r}"
                assert not opened.unseen

    asyncio.run(main())


class Bomb:
    """What must not be unpickled."""

    exploded = False

    @classmethod
    def explode(cls) -> None:
        cls.exploded = True

    def __reduce__(self) -> tuple[object, ...]:
        return Bomb.explode, ()


@pytest.mark.parametrize("claim", [0, 1, 3, 99, None])
def test_a_member_cannot_speak_as_another(claim: int | None) -> None:
    """Kind: a rank that is claimed and not held. It is checked against the link, and before anything is unpickled."""

    async def main() -> None:
        async with world("memory", 3) as opened, asyncio.timeout(10):
            group = opened.groups[0]._engine
            link = await opened.endpoints[2].connect(opened.endpoints[0].address, _CREDENTIAL)
            head = b"?" if claim is None else struct.pack("<I", claim)
            port = group.fabric._port
            control, data = link.open(port, head), link.open(port, head + pickle.dumps(Bomb()))
            ends: list[Exception] = []
            for channel in (control, data):
                channel.subscribe(lambda _: None, ends.append)
            control.post(pickle.dumps(("lost", 1, "forged")))
            control.post(pickle.dumps(Bomb()))
            await until(lambda: len(ends) == 2)
            await works_again(opened)
            assert not Bomb.exploded
            assert not group.faults.lost

    asyncio.run(main())


def held() -> tuple[int, int]:
    """Return how many descriptors and segments this process holds."""
    return len(os.listdir("/proc/self/fd")), sum(isinstance(owner, Segment) for owner in forks._held.values())


def alive() -> dict[str, int]:
    gc.collect()
    kinds = (Engine, Epoch, Fabric, Relay)
    return {kind.__name__: sum(type(each) is kind for each in gc.get_objects()) for kind in kinds}


WORLDS = [
    pytest.param("memory", "memory", ("",), id="memory"),
    pytest.param("shm", "unix", ("",), id="shm"),
    pytest.param("gloo", "unix", ("",), id="gloo"),
    pytest.param("two-level", "memory", ("one", "one", "two"), id="two-level"),
]


async def settle(before: tuple[int, int], tasks: set[asyncio.Task[Any]]) -> None:
    """Wait until nothing more is held than before, and no other tasks run."""
    async with asyncio.timeout(10):
        await until(lambda: all(map(le, held(), before)) and asyncio.all_tasks() <= tasks)


@pytest.mark.parametrize(("backend", "link", "hosts"), WORLDS)
def test_a_cancelled_close_frees_all_and_a_second_one_finishes_it(backend: str, link: str, hosts: Any) -> None:
    """Kind: a close that is cancelled, at each step, with and without something under way."""

    async def main() -> None:
        async with world(backend, 3, link=link, hosts=hosts) as opened, asyncio.timeout(60):
            await opened.call(Group.barrier)
            tasks = asyncio.all_tasks()
            await opened.form("first")  # what is opened once and stays: links, threads
            for group in opened._formed[3:]:
                await group.aclose()
            await until(lambda: asyncio.all_tasks() <= tasks)
            before = held()
            for step in range(8 if backend == "gloo" else 20):
                groups = await opened.form(f"group {step}")
                works = [groups[0].allreduce(np.ones(100_000)), groups[1].split(0)] if step % 2 else []
                closes = [asyncio.ensure_future(group.aclose()) for group in groups]
                await turns(step)
                for close in closes:
                    close.cancel()
                await asyncio.wait(closes)
                for group in groups if step == 0 else groups[:2]:  # that of step 0 never began
                    await group.aclose()
                    plane = group._engine.current.plane
                    assert getattr(plane, "_segment", None) is None
                    assert not group._engine.fabric._tasks
                for error in await outcomes(works):
                    assert isinstance(error, GroupError), f"got {error!r}"
                await settle(before, tasks)
                assert not opened.unseen

    asyncio.run(main())


@pytest.mark.parametrize(("backend", "link", "hosts"), WORLDS)
def test_a_group_whose_forming_is_cancelled_leaves_nothing(backend: str, link: str, hosts: Any) -> None:
    """Kind: a form_group that is cancelled, at each step: of one member, whose word ends the others, or of all."""

    async def main() -> None:
        async with world(backend, 3, link=link, hosts=hosts, timeout=1) as opened, asyncio.timeout(100):
            tasks = asyncio.all_tasks()
            await opened.form("first")
            for group in opened._formed[3:]:
                await group.aclose()
            await until(lambda: asyncio.all_tasks() <= tasks)
            before = held()
            for step in range(0, 90, 4 if backend in ("gloo", "two-level") else 1):
                forming = [asyncio.ensure_future(opened.join(f"group {step}", rank)) for rank in opened.ranks]
                await turns(step)
                for each in forming:
                    each.cancel()
                await asyncio.wait(forming)
                for each in forming:
                    if not each.cancelled() and each.exception() is None:
                        await each.result().aclose()
                await settle(before, tasks)
                assert not opened.unseen

    asyncio.run(main())


@pytest.mark.parametrize(("backend", "link", "hosts"), WORLDS)
def test_groups_that_have_ended_are_freed(backend: str, link: str, hosts: Any) -> None:
    """Kind: what something that lives on keeps of a group that does not: the links, the parent, the ports, a timer."""

    async def ends(opened: World, how: str) -> None:
        if how == "reset":
            await opened.reset()
            return
        subgroups = await opened.call(Group.split, 0)
        await outcomes([subgroup.barrier() for subgroup in subgroups])
        if how == "closed":
            await asyncio.gather(*(subgroup.aclose() for subgroup in subgroups))
        elif how == "closed with splits under way":
            works = [subgroup.split(0) for subgroup in subgroups[:2]]
            await turns(3)
            await asyncio.gather(*(subgroup.aclose() for subgroup in subgroups))
            await outcomes(works)
        elif how == "forgotten and ended with the parent":
            await outcomes([subgroups[0].split(1), subgroups[1].split(1), subgroups[2].split(1)])
            await opened.reset()
        elif how == "reset and closed":
            await asyncio.gather(*(subgroup.reset() for subgroup in subgroups))
            await asyncio.gather(*(subgroup.aclose() for subgroup in subgroups))

    async def main() -> None:
        async with world(backend, 3, link=link, hosts=hosts) as opened, asyncio.timeout(60):
            await ends(opened, "closed")
            await until(lambda: not alive()["Relay"])
            before, tasks, descriptors = alive(), asyncio.all_tasks(), held()
            if "gloo" in opened.groups[0].backends:  # which duplicates sockets, also duplicates of other members here
                descriptors = sys.maxsize, descriptors[1]
            for how in (
                "reset",
                "closed",
                "closed with splits under way",
                "forgotten and ended with the parent",
                "reset and closed",
            ):
                for _ in range(3):
                    await ends(opened, how)
                await settle(descriptors, tasks)
                async with asyncio.timeout(5):  # the last goodbyes are on their way
                    await until(lambda: alive() == before)
                assert not opened.unseen
            links: list[Any] = [link for endpoint in opened.endpoints for link in endpoint._all]  # type: ignore[attr-defined]
            assert max(len(link._callbacks) for link in links) <= 2
            assert max(len(link._channels) for link in links) <= 4

    asyncio.run(main())


@pytest.mark.parametrize("backend", ["memory", "shm", "gloo"])
def test_what_all_have_called_completes_though_one_resets_at_once(backend: str) -> None:
    """Kind: a member that is done goes on, here to a reset, before the others have seen that all were there."""

    async def use(group: Held, number: int) -> None:
        for _ in range(3):
            await group.barrier()
            total = await group.allreduce(np.full(1 + 40_000 * (number % 2), 1.0))
            assert (total == group.size).all()
            await turns(group.rank * (number % 4))
            await group.reset()

    async def main() -> None:
        async with world(backend, 3) as opened, asyncio.timeout(60):
            for number in range(8):
                await opened.each(lambda group, number=number: use(group, number))

    asyncio.run(main())


@pytest.mark.parametrize("backend", ["memory", "shm"])
def test_a_refused_call_is_told_though_its_member_resets_at_once(backend: str) -> None:
    """Kind: the reset of who knows overtakes what the others are yet to be told."""

    async def main() -> None:
        async with world(backend, 3) as opened, asyncio.timeout(60):
            *others, erring = opened.groups
            for early in (True, False):
                works = [group.allreduce(np.ones(2)) for group in others] if early else []
                with pytest.raises(ValueError, match="root is 17"):
                    erring.reduce(np.ones(1), 17)
                resetting = asyncio.create_task(erring.reset())
                await turns()
                works = works or [group.allreduce(np.ones(2)) for group in others]
                for error in await outcomes(works):
                    assert isinstance(error, CollectiveMismatch)
                    assert "root is 17" in str(error)
                await asyncio.gather(resetting, *(group.reset() for group in others))
                await asyncio.gather(*(group.barrier() for group in opened.groups))

    asyncio.run(main())
