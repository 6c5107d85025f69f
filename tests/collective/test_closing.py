"""What ends is gone at once, on every member, however and whenever it ends."""

from __future__ import annotations

import asyncio
import pickle
import struct
from typing import TYPE_CHECKING

import numpy as np
import pytest

from collective import GroupBroken, GroupError
from collective.group import Group
from collective.testing import world
from collective.testing._calls import works_again
from collective.testing._world import _CREDENTIAL, outcome, outcomes, turns, until

if TYPE_CHECKING:
    from collective.group import Group as Held


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
