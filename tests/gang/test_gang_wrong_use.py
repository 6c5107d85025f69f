"""What a running gang says to those who use it wrongly: what is wrong, and what they meant."""

from __future__ import annotations

import asyncio
import pickle
from typing import Any

import pytest
from gang_harness import run

from actors import Actor, ActorClosed, Gang, NotPicklable, NotReady, Role
from collective import GroupSpec
from scheduling import Resources


class Member(Actor):
    async def own_group(self, name: str) -> int:
        return self.groups[name].size

    async def group_of_gang(self, name: str) -> int:
        return self.gang.groups[name].size

    async def role_of_gang(self, name: str) -> int:
        return len(self.gang[name])

    async def give_group(self) -> Any:
        return self.groups["dp"]

    async def pass_group(self) -> None:
        await self.gang["other"][0].take(list(self.groups.values()))

    async def take(self, what: Any) -> None: ...

    async def rows(self) -> Any:
        yield 1


SPECS = [GroupSpec("dp", roles=("member",)), GroupSpec("all", roles=("member", "other"))]


def gang(runtime: str) -> Gang:
    small = Resources(cpu=0.1)
    roles = Role("member", Member, 2, resources=small), Role("other", Member, 1, resources=small)
    return Gang(*roles, groups=SPECS, runtime=runtime)


def test_a_wrong_name_is_told_what_names_there_are(runtime):
    """Kind: a mapping by names says no more than the name that it lacks."""

    async def main():
        async with gang(runtime) as running:
            assert "dq" not in running.groups
            assert running.groups.get("dq") is None
            with pytest.raises(KeyError, match=r"no group 'dq'; did you mean 'dp'\? \(there are 'dp', 'all'\)"):
                _ = running.groups["dq"]
            member, other = running["member"][0], running["other"][0]
            for call, says in (
                (member.own_group("dq"), r"member\[0\] has no group 'dq'; did you mean 'dp'\?"),
                (other.own_group("dp"), r"other\[0\] is no member of group 'dp' of its gang; there are 'all'"),
                (member.group_of_gang("al"), r"has no group 'al'; did you mean 'all'\?"),
                (member.role_of_gang("members"), r"has no role 'members'; did you mean 'member'\?"),
            ):
                with pytest.raises(KeyError, match=says):
                    await call
            assert await other.group_of_gang("dp") == 2

    run(main())


def test_a_group_that_is_to_travel_says_what_does():
    """Kind: what cannot travel fails on something that is inside it."""

    async def main():
        async with gang("inproc") as running:
            for call in (running["member"][0].give_group, running["member"][0].pass_group):
                with pytest.raises(NotPicklable, match=r"what travels is the reference gang\.groups\['dp'\]"):
                    await call()

    run(main())


def test_a_call_after_the_end_finds_the_actor_closed(runtime):
    """Kind: who ended in good order is taken for dead by who comes later."""

    async def main():
        async with gang(runtime) as running:
            member, other = running["member"], running["other"][0]
            assert await member.own_group("dp") == [2, 2]
            copy = pickle.loads(pickle.dumps(other))
        for handle in (member[0], other, copy):
            with pytest.raises(ActorClosed, match=r"has shut down; own_group\(\)"):
                await handle.own_group("dp")
            with pytest.raises(ActorClosed):
                async with handle.rows() as rows:
                    await anext(rows)
        with pytest.raises(ExceptionGroup) as caught:
            await member.own_group("dp")
        assert {type(error) for error in caught.value.exceptions} == {ActorClosed}

    run(main())


def test_another_event_loop_is_told_so():
    """Kind: what belongs to one loop hangs, or blames its peers, on another."""
    running = gang("inproc")

    async def use() -> None:
        async with asyncio.timeout(10):
            with pytest.raises(NotReady, match=r"own_group\(\): this handle is used on another event loop"):
                await running["member"][0].own_group("dp")
            with pytest.raises(NotReady, match=r"gang 'gang' was started on another event loop; start and end"):
                await running.aclose()

    with asyncio.Runner() as runner:
        runner.run(running.__aenter__())
        asyncio.run(use())
        runner.run(running.aclose())
    asyncio.run(running.aclose())  # ended before
    left = gang("inproc")
    with asyncio.Runner() as runner:
        runner.run(left.__aenter__())
    with pytest.raises(NotReady, match="which is closed"):
        asyncio.run(left.aclose())
