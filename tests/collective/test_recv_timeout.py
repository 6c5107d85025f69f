"""`GroupSpec(recv_timeout=...)`: checked as `timeout` is, kept by subgroups, and used in scopes of calls."""

from __future__ import annotations

import asyncio

import numpy as np
import pytest

from actors import Actor, Gang, Role
from collective import CollectiveTimeout, GroupSpec
from collective.testing import world
from collective.testing._world import outcome


@pytest.mark.parametrize("wrong", [0, -1.0, float("nan")])
def test_it_is_positive_or_none(wrong: float) -> None:
    with pytest.raises(ValueError, match="recv_timeout"):
        GroupSpec("g", ("a",), recv_timeout=wrong)
    assert GroupSpec("g", ("a",)).recv_timeout is None


def test_subgroups_have_it_too() -> None:
    async def main() -> None:
        async with world("memory", 2) as opened, asyncio.timeout(20):
            groups = await opened.form("deadlines", recv_timeout=0.05)
            parts = await asyncio.gather(*(group.split(0) for group in groups))
            assert parts[0] is not None
            assert isinstance(await outcome(parts[0].recv(1)), CollectiveTimeout)

    asyncio.run(main())


class Listener(Actor):
    async def listen(self) -> str:
        group = self.groups["g"]
        try:
            await group.recv(1 - group.rank)
        except CollectiveTimeout as error:
            await group.send(np.ones(1), 1 - group.rank)
            await group.recv(1 - group.rank)
            return str(error)
        return ""


def test_a_recv_in_a_call_raises_it_and_the_call_goes_on() -> None:
    async def main() -> None:
        groups = [GroupSpec("g", ("listener",), recv_timeout=0.5)]
        async with Gang(Role("listener", Listener, 2), groups=groups, runtime="inproc") as gang, asyncio.timeout(20):
            for error in await gang["listener"].listen():
                assert "recv_timeout" in error

    asyncio.run(main())
