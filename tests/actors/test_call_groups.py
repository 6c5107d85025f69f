"""Calls that end badly in the middle of a collective: the group is never left half-way (contract 7)."""

from __future__ import annotations

import asyncio
import os
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from actor_harness import Team, run, team

from actors import Actor, from_thread
from actors.actor import connect
from collective.errors import GroupBroken
from collective.formation import form_group
from collective.types import Credential, GroupSpec, Member

if TYPE_CHECKING:
    from collections.abc import AsyncIterator


class Summer(Actor):
    def __init__(self) -> None:
        self.entered = asyncio.Event()

    async def total(self, value: float, *, fail: tuple[int, ...] = (), absent: tuple[int, ...] = ()) -> float:
        if self.rank in absent:
            return 0.0
        work = self.groups["dp"].allreduce(np.full(3, value + self.rank))
        if self.rank in fail:
            raise ValueError(f"rank {self.rank}")
        self.entered.set()
        return float((await work)[0])

    def total_in_thread(self, value: float, *, absent: tuple[int, ...] = ()) -> float:
        return from_thread.run(lambda: self.total(value, absent=absent))

    async def totals(self, *, absent: tuple[int, ...] = ()) -> AsyncIterator[float]:
        yield 0.0
        yield await self.total(1.0, absent=absent)

    async def total_in_default_scope(
        self, value: float, *, fail: tuple[int, ...] = (), absent: tuple[int, ...] = ()
    ) -> float:
        with self.groups["dp"].scope(None):
            return await self.total(value, fail=fail, absent=absent)

    async def reset(self) -> None:
        await self.groups["dp"].reset()

    async def fail_having_finished(self, value: float) -> float:
        raise ValueError(str(await self.total(value)))


@asynccontextmanager
async def summers(count: int) -> AsyncIterator[Team]:
    """Actors that share a group."""
    async with team("memory", Summer, count) as made:
        credential = Credential("members", os.urandom(32))
        for endpoint in made.endpoints:
            endpoint.grant(credential)
        members = [Member("worker", rank, endpoint.address) for rank, endpoint in enumerate(made.endpoints)]
        spec = GroupSpec("dp", roles=("worker",), backend="memory", timeout=20)
        groups = await asyncio.gather(
            *(
                form_group(endpoint, spec, members, rank, key="test/dp", credential=credential)
                for rank, endpoint in enumerate(made.endpoints)
            )
        )
        for instance, group in zip(made.instances, groups, strict=True):
            connect(instance, groups={"dp": group}, gang={})
        yield made
        await asyncio.gather(*(group.aclose() for group in groups))


def test_a_broadcast_that_failed_leaves_groups_that_work() -> None:
    async def main() -> None:
        async with summers(3) as actors:
            assert await actors.handles.total(1.0) == [6.0] * 3
            for fail in ((1,), (0, 2), (0, 1, 2)):
                with pytest.raises(ExceptionGroup) as caught:
                    await actors.handles.total(5.0, fail=fail)
                raised = {str(error) for error in caught.value.exceptions}
                assert raised
                assert raised <= {f"rank {rank}" for rank in fail}
                # No value of the failed call is paired with one of this.
                assert await actors.handles.total(2.0) == [9.0] * 3

    run("memory", main())


def test_what_a_broadcast_leaves_in_the_default_scope_is_reset() -> None:
    async def main() -> None:
        async with summers(2) as actors:
            with pytest.raises(ExceptionGroup, match="rank 0"):
                await actors.handles.total_in_default_scope(1.0, fail=(0,), absent=(1,))
            assert await actors.handles.total_in_default_scope(1.0) == [3.0] * 2
            assert [instance.groups["dp"].epoch for instance in actors.instances] == [1, 1]

    run("memory", main())


def test_a_broadcast_that_was_cancelled_leaves_groups_that_work() -> None:
    async def main() -> None:
        async with summers(2) as actors:
            for method in ("total", "total_in_thread"):
                actors.instances[0].entered.clear()
                call = asyncio.create_task(getattr(actors.handles, method)(5.0, absent=(1,)))
                await actors.instances[0].entered.wait()
                call.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await call
                assert await actors.handles.total(2.0) == [5.0] * 2

    run("memory", main())


def test_a_single_call_that_failed_breaks_the_group_until_reset() -> None:
    async def main() -> None:
        async with summers(2) as actors:
            with pytest.raises(ValueError, match="rank 0"):
                await actors[0].total(1.0, fail=(0,))
            with pytest.raises(ExceptionGroup) as caught:
                await actors.handles[1:].total(1.0)
            (error,) = caught.value.exceptions
            assert isinstance(error, GroupBroken)
            assert "worker[0].total raised ValueError" in str(error)
            await actors.handles.reset()
            assert await actors.handles.total(1.0) == [3.0] * 2

    run("memory", main())


def test_a_failure_with_nothing_unfinished_breaks_no_group() -> None:
    async def main() -> None:
        async with summers(2) as actors:
            calls = [handle.fail_having_finished(1.0) for handle in actors.handles]
            errors = await asyncio.gather(*calls, return_exceptions=True)
            assert [str(error) for error in errors] == ["3.0", "3.0"]
            assert await asyncio.gather(*(a.total(1.0) for a in actors.handles)) == [3.0, 3.0]

    run("memory", main())


def test_leaving_a_stream_in_a_collective_breaks_the_group() -> None:
    async def main() -> None:
        async with summers(2) as actors:
            async with actors[0].totals() as totals:
                assert await anext(totals) == 0.0
                await actors.instances[0].entered.wait()
            with pytest.raises(GroupBroken, match=r"worker\[0\]\.totals was cancelled"):
                await actors[1].total(1.0)
            await actors.handles.reset()
            assert await actors.handles.total(1.0) == [3.0] * 2

    run("memory", main())


def test_what_cannot_be_reset_is_noted() -> None:
    async def main() -> None:
        async with summers(2) as actors:
            async def refuse(tokens: Any) -> None:
                raise TimeoutError("nobody there")

            with pytest.MonkeyPatch.context() as patch:
                patch.setattr("actors._session.reset_everywhere", refuse)
                with pytest.raises(ExceptionGroup) as caught:
                    await actors.handles.total_in_default_scope(1.0, fail=(0,), absent=(1,))
            (note,) = caught.value.__notes__
            assert note.startswith("groups that worker[0] left broken could not be reset: nobody there")

    run("memory", main())
