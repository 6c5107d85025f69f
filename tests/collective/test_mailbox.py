"""What becomes of messages that are on their way when a member's part in the group ends."""

from __future__ import annotations

import asyncio

import numpy as np
import pytest

from collective import GroupBroken, PeerLost
from collective.testing import world
from collective.testing._world import outcomes, turns

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
