"""How all members learn that one has closed the group, was late, or died: along the tree, and over no new link."""

from __future__ import annotations

import asyncio
import random
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from collective import CollectiveTimeout, GroupError, PeerLost
from collective.group import Group
from collective.testing import world
from collective.testing._calls import works_again
from collective.testing._world import attempt, outcome, outcomes, turns

if TYPE_CHECKING:
    from collective.group import Group as Held
    from collective.testing import World


def links_of(opened: World) -> set[Any]:
    """Return all ends of links."""
    endpoints: list[Any] = list(opened.endpoints)
    return {link for endpoint in endpoints for link in endpoint._all}


@pytest.mark.parametrize("order", ["at once", "from the root", "from the leaves", "mixed"])
def test_goodbyes_open_no_link(order: str) -> None:
    """Kind: news that goes to everybody directly. Seventy members close over the tree's 69 links."""

    async def main() -> None:
        async with world("memory", 70) as opened, asyncio.timeout(20):
            await opened.call(Group.barrier)
            before = links_of(opened)
            ranks = list(opened.ranks)
            if order == "from the leaves":
                ranks.reverse()
            elif order == "mixed":
                random.Random(0).shuffle(ranks)
            if order == "at once":
                await asyncio.gather(*(group.aclose() for group in opened.groups))
            else:
                for rank in ranks:
                    await opened.groups[rank].aclose()
            await turns()
            assert links_of(opened) == before
            assert len(before) == 2 * 69
            assert not any(link._channels for link in before)

    asyncio.run(main())


def test_a_timeout_opens_no_link_and_names_who_is_missing() -> None:
    """Kind: as above, of timeouts. Those that have called it are not named, though one of them answers late."""

    async def main() -> None:
        async with world("memory", 70, timeout=0.3) as opened, asyncio.timeout(20):
            before = links_of(opened)
            missing = (0, 3, 40)
            works = [group.barrier() for group in opened.groups if group.rank not in missing]
            for error in await outcomes(works):
                assert isinstance(error, CollectiveTimeout), f"got {error!r}"
                assert error.missing == tuple(f"rank {rank} ({opened.member(rank)})" for rank in missing)
            assert links_of(opened) == before
            for rank in missing:
                assert isinstance(await outcome(attempt(opened.groups[rank].barrier)), GroupError)
            await opened.reset()
            await works_again(opened)

    asyncio.run(main())


def test_a_loss_opens_no_link() -> None:
    """Kind: as above, of losses. Inner members die, the root among them; all survivors hear of one within a second."""

    async def main() -> None:
        for dead in ((0,), (1,), (0, 1, 2), (69,)):
            async with world("memory", 70) as opened, asyncio.timeout(20):
                survivors = [group for group in opened.groups if group.rank not in dead]
                pending = [group.recv(group.rank) for group in survivors]
                before = links_of(opened)
                for rank in dead:
                    opened.endpoints[rank].abort()
                async with asyncio.timeout(1):
                    for error in await outcomes(pending):
                        assert isinstance(error, PeerLost), f"got {error!r}"
                        assert error.rank in dead
                assert links_of(opened) <= before

    asyncio.run(main())


@pytest.mark.parametrize("seed", range(6))
def test_who_waits_for_a_leaver_is_told_whoever_has_left_before(seed: int) -> None:
    """Kind: news behind a member that has left. Members leave one by one; what waits for one that stays goes on."""

    async def main() -> None:
        draw = random.Random(seed)
        size = 30
        async with world("memory", size) as opened, asyncio.timeout(30):
            here = list(opened.groups)
            while len(here) > 2:
                leaver = here.pop(draw.randrange(len(here)) if draw.random() < 0.5 else 0)
                waiting = draw.choice(here)
                other = draw.choice(here)
                staying = waiting.recv(other.rank, tag=1)
                await other.send(np.ones(1), waiting.rank, tag=1)
                await staying
                doomed = waiting.recv(leaver.rank, tag=2)
                await turns(draw.randrange(3))
                await leaver.aclose()
                async with asyncio.timeout(1):
                    error = await outcome(doomed)
                assert isinstance(error, PeerLost), f"got {error!r}"
                assert error.rank == leaver.rank
                here.remove(waiting)  # its sends and receives have ended with that
                await waiting.aclose()
            before = here[0].recv(here[1].rank)
            await here[1].send(np.ones(1), here[0].rank)
            await before
            assert not opened.unseen

    asyncio.run(main())


def test_a_death_is_told_across_a_member_that_has_left() -> None:
    """Kind: as above. The root and an inner member have closed; a leaf below that dies, and all hear of it."""

    async def main() -> None:
        async with world("memory", 20) as opened, asyncio.timeout(20):
            for rank in (0, 1):
                await opened.groups[rank].aclose()
            survivors = [opened.groups[rank] for rank in (*range(2, 9), *range(10, 20))]
            pending = [group.recv(group.rank) for group in survivors]
            opened.endpoints[9].abort()
            async with asyncio.timeout(1):
                for error in await outcomes(pending):
                    assert isinstance(error, PeerLost), f"got {error!r}"
                    assert error.rank == 9

    asyncio.run(main())


def test_the_end_of_a_process_that_others_hear_through_is_a_loss() -> None:
    """Kind: as above. The root has left and its process ends too: nobody would hear of anybody, so all hear of that."""

    async def main() -> None:
        async with world("memory", 4) as opened, asyncio.timeout(20):
            await opened.groups[0].aclose()
            pending = [group.recv(group.rank) for group in opened.groups[1:]]
            await opened.endpoints[0].aclose()
            for error in await outcomes(pending):
                assert isinstance(error, PeerLost), f"got {error!r}"
                assert error.rank == 0

    asyncio.run(main())


def test_the_end_of_a_process_that_has_left_is_none() -> None:
    """Kind: as above, the other way round: a leaf that has left may end, and the others go on."""

    async def main() -> None:
        async with world("memory", 4) as opened, asyncio.timeout(20):
            waiting = opened.groups[0].recv(1)
            await opened.groups[3].aclose()
            await opened.endpoints[3].aclose()
            await turns()
            await opened.groups[1].send(np.ones(1), 0)
            await waiting

    asyncio.run(main())


# What all have called completes on all, though some close at once.


@pytest.mark.parametrize("backend", ["memory", "shm"])
@pytest.mark.parametrize("what", ["split", "reset", "split again", "form"])
def test_what_all_have_come_to_is_formed_though_some_close_at_once(backend: str, what: str) -> None:
    """Kind: a goodbye that overtakes the word that all have come. They travel over the same links."""

    async def form_and_close(opened: World, rank: int) -> None:
        await (await opened.join("other", rank)).aclose()

    async def member(group: Held) -> None:
        if what == "reset":
            await group.reset()
            await group.aclose()
            return
        subgroup = await group.split(0)
        assert subgroup is not None
        if what == "split again":
            inner = await subgroup.split(0)
            assert inner is not None
            await inner.aclose()
        await subgroup.aclose()

    async def main() -> None:
        link = "memory" if backend == "memory" else "unix"
        async with world(backend, 12, link=link) as opened, asyncio.timeout(30):
            if what == "form":
                await asyncio.gather(*(form_and_close(opened, rank) for rank in opened.ranks))
                return
            await opened.each(member)
            assert not opened.unseen

    asyncio.run(main())


def test_what_was_sent_before_a_goodbye_arrives() -> None:
    """Kind: a goodbye that overtakes what its member has sent beside the tree."""

    async def main() -> None:
        async with world("shm", 12, link="unix") as opened, asyncio.timeout(30):
            for number in range(20):
                subgroups = await opened.call(Group.split, 0)
                sent = [subgroups[11].send(np.full(1 + 100 * number, at), 10) for at in range(100)]
                waiting = [subgroups[10].recv(11) for _ in sent]
                await sent[-1]
                await subgroups[11].aclose()
                for at, result in enumerate(await outcomes(waiting)):
                    assert isinstance(result, np.ndarray), f"got {result!r}"
                    assert result[0] == at
                for subgroup in subgroups:
                    await subgroup.aclose()

    asyncio.run(main())


def test_a_parent_that_one_member_closes_ends_its_subgroups_for_the_others() -> None:
    """Kind: who waits in a subgroup for a member whose parent group is closed. It hears of that, as of any leaving."""

    async def main() -> None:
        async with world("memory", 3) as opened, asyncio.timeout(5):
            subgroups = await opened.call(Group.split, 0)
            pending = [subgroups[1].barrier(), subgroups[2].recv(0)]
            resetting = asyncio.ensure_future(outcome(subgroups[1].reset()))
            await turns()
            await opened.groups[0].aclose()
            for error in [*await outcomes(pending), await resetting]:
                assert isinstance(error, GroupError), f"got {error!r}"
            assert isinstance(await outcome(attempt(subgroups[0].barrier)), GroupError)

    asyncio.run(main())
