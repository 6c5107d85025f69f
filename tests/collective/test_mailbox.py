"""What becomes of messages that are on their way when a member's part in the group ends."""

from __future__ import annotations

import asyncio
import threading
import time
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from collective import BackendError, GroupBroken, GroupClosed, PeerLost
from collective._core import mailbox
from collective._links.arena import arena
from collective.testing import world
from collective.testing._world import outcome, outcomes, turns, until

if TYPE_CHECKING:
    from collections.abc import Awaitable

    from collective.work import Work

LARGE = np.ones(8 << 20)
"""An array that takes many turns of the loop to move."""


@pytest.mark.parametrize("breaker", [1, 2], ids=["sender", "receiver"])
def test_a_break_in_the_middle_of_a_message_is_no_loss(breaker: int) -> None:
    """Ranks 1 and 2 hear of breaks from rank 0: each of them sees the other's channel end before that."""

    async def main() -> None:
        async with world("gloo", 3, link="unix") as opened, asyncio.timeout(20):
            for delay in range(4, 24, 4):
                pending = [opened.groups[1].send(LARGE, 2), opened.groups[2].recv(1)]
                await turns(delay)
                opened.groups[breaker]._engine.break_everywhere("for the test")
                for error in await outcomes(pending):
                    assert isinstance(error, GroupBroken)
                await opened.reset()

    asyncio.run(main())


def test_a_receiver_that_leaves_in_the_middle_of_a_message_is_named() -> None:
    async def main() -> None:
        async with world("gloo", 3, link="unix") as opened, asyncio.timeout(20):
            pending = [opened.groups[1].send(LARGE, 2), opened.groups[2].recv(1)]
            await turns(12)
            await opened.groups[2].aclose()
            error = (await outcomes(pending))[0]
            assert isinstance(error, PeerLost)
            assert (error.rank, error.cause) == (2, "it closed the group")

    asyncio.run(main())


@pytest.mark.parametrize(("link", "dst"), [("unix", 1), ("shm", 1), ("memory", 0)])
def test_an_error_of_a_send_reaches_both_ends(link: str, dst: int, monkeypatch: pytest.MonkeyPatch) -> None:
    copying, go = threading.Event(), threading.Event()

    def flat(tensor: Any, gate: object = None) -> np.ndarray:
        copying.set()
        assert go.wait(10)
        raise RuntimeError("the device is gone")

    async def main() -> None:
        async with world("shm", 2, link=link) as opened, asyncio.timeout(20):
            source, target = opened.groups[0], opened.groups[dst]
            tensor = LARGE[::2]  # to be copied on a thread
            with monkeypatch.context() as patch:
                patch.setattr(mailbox, "flat", flat)
                for given_up in (False, True):
                    copying.clear()
                    go.clear()
                    sent, received = source.send(tensor, dst), target.recv(0)
                    waiting = asyncio.ensure_future(_await(received))
                    await until(copying.is_set)
                    if given_up:
                        waiting.cancel()
                        await asyncio.wait([waiting])
                        waiting = asyncio.ensure_future(_await(target.recv(0)))
                    go.set()
                    assert isinstance(await outcome(sent), RuntimeError)
                    error = await outcome(waiting)
                    assert isinstance(error, BackendError)
                    told = f"send(float64[{tensor.size}], dst={dst}, tag=0) on rank 0 (worker[0]) of group 'group'"
                    assert str(error) == f"recv(src=0, tag=0): {told} failed: RuntimeError: the device is gone"
            sent, received = source.send(tensor, dst), target.recv(0)
            assert (await received).shape == tensor.shape
            await sent

    asyncio.run(main())


def test_a_recv_that_finds_no_memory_raises_that() -> None:
    async def main() -> None:
        async with world("shm", 2, link="unix") as opened, asyncio.timeout(20):
            sender, receiver = opened.groups
            early = receiver.recv(0)
            sent = sender.send(np.broadcast_to(np.zeros(1), (1 << 50,)), 1)
            for received in (early, receiver.recv(0)):
                assert isinstance(await outcome(received), MemoryError)
            assert not sent.done()
            await sender.aclose()
            assert isinstance(await outcome(sent), GroupClosed)

    asyncio.run(main())


def test_what_a_recv_gave_its_caller_is_kept_no_longer_and_given_to_nobody_else() -> None:
    async def main() -> None:
        async with world("shm", 2, link="shm") as opened, asyncio.timeout(20):
            sender, receiver = opened.groups
            before = arena().statistics().used
            received = receiver.recv(0, out=np.empty(1 << 18))
            await sender.send(np.ones(1 << 18), 1)
            await received
            await until(lambda: arena().statistics().used == before)  # though the Work is still there

            again = asyncio.ensure_future(_await_in_a_long_turn(received))
            await turns(1)
            again.cancel()
            await asyncio.wait([again])
            assert again.cancelled()
            following = receiver.recv(0)
            await turns()
            assert not following.done()
            assert received.result() is await received
            await sender.send(np.zeros(1), 1)
            await following

    asyncio.run(main())


async def _await_in_a_long_turn(work: Work[Any]) -> None:
    await work
    time.sleep(2e-3)  # noqa: ASYNC251 (the next await lets the others have a turn)
    await work


async def _await(awaitable: Awaitable[Any]) -> Any:
    return await awaitable
