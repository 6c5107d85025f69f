"""Calls in flight at once: their collectives and sends never mix, and one that fails leaves the others alone."""

from __future__ import annotations

import asyncio
import contextlib
import gc
from typing import TYPE_CHECKING

import numpy as np
import pytest
from gang_harness import run
from scope_traffic import Front, Server, traffic

from actors import Actor, Gang, Role
from collective import CollectiveTimeout, GroupBroken, GroupError, GroupSpec, ScopeEnded
from collective._core.engine import Engine
from collective.testing._world import until
from scheduling import Resources

if TYPE_CHECKING:
    from collections.abc import Awaitable, Iterable

SMALL = Resources(cpu=0.1)
HOW = {"right", "Refused", "cancelled"}


def gang(backend: str, runtime: str) -> Gang:
    servers, fronts = Role("server", Server, 3, resources=SMALL), Role("front", Front, 3, resources=SMALL)
    return Gang(
        servers, fronts, groups=[GroupSpec("dp", ("server",), backend=backend, timeout=30)], runtime=runtime
    )


async def check_traffic(backend: str, runtime: str, counts: Iterable[tuple[str, int, int]]) -> None:
    async with gang(backend, runtime) as made, asyncio.timeout(100):
        for method, callers, calls in counts:
            ended = await traffic(made, calls, method, callers)
            assert sum(ended.values()) == calls
            # Plain methods of several callers may wait for each other's threads, and then the younger call is ended.
            assert ended.keys() <= HOW | ({"waited for threads"} if method == "answer_in_thread" else set()), ended
            assert ended["right"] > calls / (10 if method == "answer_in_thread" else 4), ended


@pytest.mark.parametrize("backend", ["memory", "shm", "gloo"])
def test_calls_in_flight_never_mix_in_one_process(backend: str) -> None:
    counts = [("answer", 1, 200), ("answer", 3, 200), ("answer_in_thread", 1, 40), ("answer_in_thread", 3, 40)]
    run(check_traffic(backend, "inproc", counts))


@pytest.mark.usefixtures("ray_session")
@pytest.mark.parametrize("backend", ["shm", "gloo"])
def test_calls_in_flight_never_mix_between_processes(backend: str) -> None:
    counts = [("answer", 1, 200), ("answer", 3, 200), ("answer_in_thread", 1, 40), ("answer_in_thread", 3, 40)]
    run(check_traffic(backend, "ray", counts))


class Half(Actor):
    """One of two roles that share a group."""

    async def meet(self, value: float, seconds: float = 0.0) -> float:
        await asyncio.sleep(seconds)
        return float((await self.groups["all"].allreduce(np.array([value])))[0])

    async def fail(self) -> None:
        raise ValueError("for the test")

    async def leave(self) -> None:
        self.groups["all"].barrier()
        raise ValueError("in mid-collective")


def halves(runtime: str) -> Gang:
    roles = [Role(name, Half, 2, resources=SMALL) for name in ("left", "right")]
    return Gang(*roles, groups=[GroupSpec("all", ("left", "right"), timeout=20)], runtime=runtime)


def test_calls_to_several_roles_share_a_scope_in_a_block(runtime: str) -> None:
    """Without one, nothing tells two such requests apart: the second is an error, not a wrong sum."""

    async def request(made: Gang, number: int) -> list[float]:
        with made.scope(("request", number)):
            left = made["left"].meet(10.0**number, 0.02 * (number % 3))
            right = made["right"].meet(10.0**number, 0.02 * (2 - number % 3))
            return [value for each in await asyncio.gather(left, right) for value in each]

    async def main() -> None:
        async with halves(runtime) as made, asyncio.timeout(60):
            answers = await asyncio.gather(*(request(made, number) for number in range(6)))
            assert answers == [[4 * 10.0**number] * 4 for number in range(6)]
            pending = asyncio.gather(made["left"].meet(1.0), made["right"].meet(1.0, 0.5))
            await asyncio.sleep(0.2)
            with pytest.raises(ExceptionGroup) as caught:
                await made["left"].meet(2.0)
            for error in caught.value.exceptions:
                assert isinstance(error, GroupError)
                assert "default scope" in str(error)
                assert "of left.meet" in str(error)
            assert await pending == [[4.0] * 2] * 2
            with made.scope("two that an actor cannot tell apart"):
                first = asyncio.gather(made["left"].meet(1.0), made["right"].meet(1.0, 0.5))
                await asyncio.sleep(0.2)
                with pytest.raises(ExceptionGroup) as caught:
                    await made["left"].meet(2.0)
                assert all("gang.scope('two that" in str(error) for error in caught.value.exceptions)
            await asyncio.gather(first, return_exceptions=True)  # it shares the scope, which has ended
            with made.scope("one that fails"):
                failing = made["left"].meet(3.0), made["right"].fail()
                errors = await asyncio.gather(*failing, return_exceptions=True)
            assert [type(error) for error in errors] == [ExceptionGroup] * 2
            assert await request(made, 1) == [40.0] * 4

    run(main())


def test_a_group_is_reset_from_the_driver(runtime: str) -> None:
    async def main() -> None:
        async with halves(runtime) as made, asyncio.timeout(60):
            with pytest.raises(ValueError, match="in mid-collective"):
                await made["left"][0].leave()
            with pytest.raises(ExceptionGroup) as caught:
                await made["right"].meet(1.0)
            assert all(isinstance(error, GroupBroken) for error in caught.value.exceptions)
            await made.groups["all"].reset()
            answers = await asyncio.gather(made["left"].meet(1.0), made["right"].meet(1.0))
            assert answers == [[4.0] * 2] * 2

    run(main())


class Keeper(Actor):
    """Keeps a subgroup that one call made, for other calls."""

    async def make(self) -> None:
        self.kept = await self.groups["all"].split(0)
        assert self.kept is not None

    async def receive(self) -> str:
        """Receive what nobody sends."""
        if self.rank == 0:
            return "left"
        try:
            await self.groups["all"].recv(0)
        except ScopeEnded as error:
            return error.cause
        return "received"

    async def send_and_receive(self, length: int) -> float:
        assert self.kept is not None
        if self.rank == 0:
            await self.kept.send(np.full(length, 5.0), 1)
        return 5.0 if self.rank == 0 else float((await self.kept.recv(0))[-1])

    async def add(self, value: float) -> float:
        assert self.kept is not None
        return float((await self.kept.allreduce(np.array([value])))[0])

    async def leave(self) -> None:
        assert self.kept is not None
        self.kept.allreduce(np.array([100.0]))
        raise ValueError("in mid-collective")

    async def fail_after_making(self) -> None:
        await self.make()
        await self.groups["all"].barrier()
        raise ValueError("for the test")

    async def reset(self) -> None:
        assert self.kept is not None
        await self.kept.reset()

    async def send_too_much_and_fail(self) -> None:
        group = self.groups["all"]
        sending = group.send(np.ones(2_000_000), 1 - self.rank)
        if self.rank == 0:
            raise ValueError("for the test")
        await group.recv(0, tag=3)
        await sending

    async def leave_group(self) -> None:
        self.groups["all"].barrier()
        raise ValueError("in mid-collective")

    async def fail_in_tasks(self) -> None:
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self.fail_alone())
            tasks.create_task(self.wait_for_all())

    async def fail_alone(self) -> None:
        await asyncio.sleep(0.05)
        if self.rank == 0:
            raise ValueError("for the test")

    async def wait_for_all(self) -> None:
        await self.groups["all"].scope(self.rank).barrier()

    async def split_and_close(self) -> None:
        made = await self.groups["all"].split(0)
        assert made is not None
        await made.aclose()

    async def only_one_group_is_left(self) -> None:
        endpoint = self.groups["all"]._engine.endpoint

        def is_left() -> bool:
            gc.collect()
            return sum(type(each) is Engine and each.endpoint is endpoint for each in gc.get_objects()) == 1

        await until(is_left)

    async def receive_for_long(self) -> None:
        await asyncio.sleep(0)
        if self.rank == 0:
            await self.groups["all"].barrier()
        with contextlib.suppress(ScopeEnded):  # it may come to the caller before the timeout that is its cause
            await self.groups["all"].recv(0, tag=4)


def keepers(runtime: str) -> Gang:
    return Gang(
        Role("keeper", Keeper, 2, resources=SMALL), groups=[GroupSpec("all", ("keeper",), timeout=20)], runtime=runtime
    )


def test_a_recv_ends_with_the_senders_part_wherever_that_runs(runtime: str) -> None:
    """Parts that others have in the call on the same loop keep nobody waiting."""

    async def main() -> None:
        async with keepers(runtime) as made, asyncio.timeout(30):
            left, cause = await made["keeper"].receive()
            assert left == "left"
            assert "its part in the call is over" in cause

    run(main())


def test_a_subgroup_outlives_the_call_that_made_it(runtime: str) -> None:
    """Calls without a scope send and receive in its default scope; one that leaves it breaks it; a reset mends it."""

    async def each(*calls: Awaitable[float | None]) -> list[float | BaseException | None]:
        return await asyncio.gather(*calls, return_exceptions=True)

    async def main() -> None:
        async with keepers(runtime) as made, asyncio.timeout(60):
            handles = made["keeper"]
            first, second = handles
            await handles.make()
            for length in (3, 1_000_000):
                assert await each(*(handle.send_and_receive(length) for handle in handles)) == [5.0, 5.0]
                assert await handles.send_and_receive(length) == [5.0, 5.0]
            assert await each(first.add(1.0), second.add(2.0)) == [3.0, 3.0]
            (error,) = await each(first.leave())
            assert isinstance(error, ValueError)
            for error in await each(first.add(1.0), second.add(2.0)):
                assert isinstance(error, GroupBroken)
            await handles.reset()
            assert await each(first.add(1.0), second.add(2.0)) == [3.0, 3.0]
            await each(handles.fail_after_making())
            for error in await each(first.add(1.0), second.add(2.0)):
                assert isinstance(error, ScopeEnded)
            assert await handles.add(1.0) == [2.0, 2.0]
            await handles.reset()
            assert await each(first.add(1.0), second.add(2.0)) == [3.0, 3.0]

    run(main())


def test_what_a_failed_call_leaves_is_seen_to(runtime: str) -> None:
    """Nobody awaits its sends any more: no error of theirs is reported as a forgotten one (`run` looks for that)."""

    async def main() -> None:
        async with keepers(runtime) as made, asyncio.timeout(30):
            for broken in (False, False, True):
                if broken:
                    with pytest.raises(ValueError, match="in mid-collective"):
                        await made["keeper"][0].leave_group()
                with pytest.raises(ExceptionGroup) as caught:
                    await made["keeper"].send_too_much_and_fail()
                (error,) = caught.value.exceptions
                assert isinstance(error, GroupBroken if broken and not isinstance(error, ValueError) else ValueError)

    run(main())


def test_consequences_in_task_groups_are_left_out_as_others_are(runtime: str) -> None:
    async def main() -> None:
        async with keepers(runtime) as made, asyncio.timeout(30):
            with pytest.raises(ExceptionGroup) as caught:
                await made["keeper"].fail_in_tasks()
            (error,) = caught.value.exceptions
            assert isinstance(error, ExceptionGroup)
            assert [type(each) for each in error.exceptions] == [ValueError]

    run(main())


def test_a_split_that_a_call_has_not_seen_is_closed(runtime: str) -> None:
    """A call that is cancelled at any moment of a split leaves no subgroup that nobody has."""

    async def main() -> None:
        async with keepers(runtime) as made, asyncio.timeout(60):
            handles = made["keeper"]
            for number in range(40):
                call = asyncio.ensure_future(handles.split_and_close())
                await asyncio.sleep(0.0005 * number)
                call.cancel()
                await asyncio.gather(call, return_exceptions=True)
            await handles.only_one_group_is_left()

    run(main())


def test_a_timeout_names_what_missing_members_receive(runtime: str) -> None:
    """They wait for messages too, not for collectives alone."""

    async def main() -> None:
        roles = [Role("keeper", Keeper, 2, resources=SMALL)]
        groups = [GroupSpec("all", ("keeper",), timeout=0.5)]
        async with Gang(*roles, groups=groups, runtime=runtime) as made, asyncio.timeout(30):
            with pytest.raises(ExceptionGroup) as caught:
                await made["keeper"].receive_for_long()
            (error,) = caught.value.exceptions
            assert isinstance(error, CollectiveTimeout)
            assert "rank 1 (keeper[1]) waits for recv(src=0, tag=4) in call" in str(error)

    run(main())
