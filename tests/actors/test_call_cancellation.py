"""Cancelling calls, deadlines, and callers and actors that go away."""

from __future__ import annotations

import asyncio
import gc
import weakref
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import pytest
from actor_harness import run, team

from actors import Actor, ActorClosed
from actors._caller import connection_to
from collective.errors import LinkClosed

if TYPE_CHECKING:
    from collections.abc import AsyncIterator


class Waiter(Actor):
    """Tells when a call starts, and how it ends."""

    def __init__(self) -> None:
        self.started = asyncio.Event()
        self.release = asyncio.Event()
        self.ended = asyncio.Event()
        self.log: list[Any] = []

    async def wait(self, what: Any = None) -> str:
        self.log.append(what)
        self.started.set()
        try:
            await self.release.wait()
        except asyncio.CancelledError:
            self.log.append("cancelled")
            raise
        finally:
            self.ended.set()
        return "released"

    async def refuse_to_end(self) -> str:
        self.started.set()
        with suppress(asyncio.CancelledError):
            await asyncio.Event().wait()
        await self.release.wait()
        self.ended.set()
        return "late"

    async def stay(self) -> AsyncIterator[int]:
        yield 1
        with suppress(asyncio.CancelledError):
            await asyncio.Event().wait()
        await self.release.wait()

    async def fail_when_cancelled(self) -> None:
        self.started.set()
        try:
            await asyncio.Event().wait()
        finally:
            raise ValueError("while cancelling")

    async def take(self, payload: Any) -> None:
        self.log.append(len(payload))

    async def echo(self, value: Any) -> Any:
        return value

    async def fail_one_after_the_other(self) -> None:
        if self.rank:
            await self.fail_when_cancelled()
        self.started.set()
        await self.release.wait()
        raise ValueError("now")


def _running(workers: Any) -> int:
    return sum(len(session.running) for d in workers.dispatchers for session in d._sessions.values())


def _pending(handle: Any) -> int:
    return len(connection_to(handle._target)._calls)


def test_cancelling_a_call_cancels_it_remotely(kind: str) -> None:
    async def main() -> None:
        async with team(kind, Waiter) as workers:
            actor = workers.instances[0]
            call = asyncio.create_task(workers[0].wait("x"))
            await actor.started.wait()
            call.cancel()
            with pytest.raises(asyncio.CancelledError):
                await call
            await actor.ended.wait()
            assert actor.log == ["x", "cancelled"]
            assert await workers[0].echo(1) == 1
            assert _running(workers) == _pending(workers[0]) == 0

    run(kind, main())


def test_a_deadline_cancels_remotely_and_leaves_nothing(kind: str) -> None:
    async def main() -> None:
        async with team(kind, Waiter) as workers:
            actor = workers.instances[0]
            for _ in range(20):
                actor.ended.clear()
                with pytest.raises(TimeoutError):
                    async with asyncio.timeout(0.002):
                        await workers[0].wait()
                if actor.log:  # the deadline may come before the call has left
                    await actor.ended.wait()
            assert await workers[0].echo(1) == 1
            assert _running(workers) == _pending(workers[0]) == 0

    run(kind, main())


def test_the_caller_need_not_wait_for_a_call_that_refuses_to_end(kind: str) -> None:
    async def main() -> None:
        async with team(kind, Waiter) as workers:
            actor = workers.instances[0]
            call = asyncio.create_task(workers[0].refuse_to_end())
            await actor.started.wait()
            call.cancel()
            with pytest.raises(asyncio.CancelledError):
                await call
            assert not actor.ended.is_set()
            actor.release.set()
            await actor.ended.wait()
            assert await workers[0].echo(2) == 2

    run(kind, main())


def test_a_call_cancelled_before_it_left_never_starts(kind: str) -> None:
    async def main() -> None:
        async with team(kind, Waiter) as workers:
            first = asyncio.create_task(workers[0].take("first"))
            second = asyncio.create_task(workers[0].take("second one"))
            third = asyncio.create_task(workers[0].take("third"))
            await asyncio.sleep(0)  # all stand in line for the connection
            second.cancel()
            await asyncio.gather(first, third)
            assert second.cancelled()
            assert workers.instances[0].log == [5, 5]

    run(kind, main())


def test_cancelling_while_a_large_argument_is_on_its_way(kind: str) -> None:
    async def main() -> None:
        async with team(kind, Waiter) as workers:
            large = bytes(16 << 20)
            await workers[0].echo(0)
            for turns in range(8):
                call = asyncio.create_task(workers[0].take(large))
                for _ in range(turns):
                    await asyncio.sleep(0)
                call.cancel()
                with suppress(asyncio.CancelledError):
                    await call
                assert await workers[0].echo(turns) == turns
            assert _running(workers) == _pending(workers[0]) == 0

    run(kind, main())


def test_cancelling_a_broadcast_waits_for_every_call(kind: str) -> None:
    async def main() -> None:
        async with team(kind, Waiter, 3) as workers:
            call = asyncio.create_task(workers.handles.wait())
            for actor in workers.instances:
                await actor.started.wait()
            call.cancel()
            with pytest.raises(asyncio.CancelledError):
                await call
            assert all(actor.ended.is_set() for actor in workers.instances)
            assert _running(workers) == 0

    run(kind, main())


def test_a_failed_broadcast_waits_for_every_call(kind: str) -> None:
    async def main() -> None:
        async with team(kind, Waiter, 3) as workers:
            first, *rest = workers.instances
            call = asyncio.create_task(workers.handles.wait())
            await first.started.wait()
            failing = asyncio.create_task(workers.handles[1:].fail_when_cancelled())
            for actor in rest:
                await actor.started.wait()
            failing.cancel()
            with pytest.raises(asyncio.CancelledError):
                await failing
            first.release.set()
            for actor in rest:
                actor.release.set()
            assert await call == ["released"] * 3

    run(kind, main())


def test_a_broadcast_that_is_cancelled_before_it_connected_ends(kind: str) -> None:
    async def main() -> None:
        async with team(kind, Waiter, 3) as workers:
            call = asyncio.create_task(workers.handles.wait())
            await asyncio.sleep(0)
            call.cancel()
            with pytest.raises(asyncio.CancelledError):
                await call
            assert await workers.handles.echo(1) == [1, 1, 1]
            assert [actor.log for actor in workers.instances] == [[], [], []]

    run(kind, main())


def test_errors_while_others_are_cancelled_are_reported_too(kind: str) -> None:
    async def main() -> None:
        async with team(kind, Waiter, 2) as workers:
            one, other = workers.instances
            call = asyncio.create_task(workers.handles.fail_one_after_the_other())
            await one.started.wait()
            await other.started.wait()
            one.release.set()
            with pytest.raises(ExceptionGroup, match="ranks 0, 1") as caught:
                await call
            assert [str(error) for error in caught.value.exceptions] == ["now", "while cancelling"]

    run(kind, main())


def test_calls_of_a_caller_whose_endpoint_closes_are_cancelled(kind: str) -> None:
    async def main() -> None:
        from collective.links import loop_endpoint

        async with team(kind, Waiter) as workers:
            actor = workers.instances[0]
            call = asyncio.create_task(workers[0].wait())
            await actor.started.wait()
            await loop_endpoint().aclose()
            with pytest.raises(LinkClosed, match=r"worker\[0\]\.wait"):
                await call
            await actor.ended.wait()
            assert actor.log == [None, "cancelled"]

    run(kind, main())


def test_an_actor_that_closes_tells_its_callers(kind: str) -> None:
    async def main() -> None:
        async with team(kind, Waiter, 2) as workers:
            actor = workers.instances[0]
            call = asyncio.create_task(workers[0].wait())
            await actor.started.wait()
            await workers.dispatchers[0].aclose()
            assert actor.log == [None, "cancelled"]
            with pytest.raises(ActorClosed, match=r"worker\[0\] has shut down; wait\(\) did not run to its end"):
                await call
            for _ in range(2):  # also over a connection of its own
                with pytest.raises(ActorClosed, match=r"worker\[0\] has shut down; echo"):
                    await workers[0].echo(1)
            with pytest.raises(ExceptionGroup) as caught:
                await workers.handles.echo(1)
            assert [type(error) for error in caught.value.exceptions] == [ActorClosed]
            assert await workers[1].echo(1) == 1
            await workers.dispatchers[0].aclose()

    run(kind, main())


def test_closing_an_actor_can_be_given_up(kind: str) -> None:
    async def main() -> None:
        async with team(kind, Waiter) as workers:
            actor = workers.instances[0]
            call = asyncio.create_task(workers[0].refuse_to_end())
            await actor.started.wait()
            async with workers[0].stay() as items:
                assert await anext(items) == 1
                closing = asyncio.create_task(workers.dispatchers[0].aclose())
                await asyncio.sleep(0)
                with pytest.raises(ActorClosed, match="echo"):  # what comes meanwhile is refused
                    await workers[0].echo(1)
                assert not closing.done()
                closing.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await closing
                with pytest.raises(ActorClosed, match="refuse_to_end"):
                    await call
                with pytest.raises(ActorClosed, match="stay"):
                    await anext(items)
            actor.release.set()
            await actor.ended.wait()

    run(kind, main())


def test_closing_does_not_wait_for_what_never_began(kind: str) -> None:
    async def main() -> None:
        async with team(kind, Waiter) as workers:
            loop = asyncio.get_running_loop()
            stillborn: list[asyncio.Task[Any]] = []

            def make(loop: asyncio.AbstractEventLoop, coro: Any, **options: Any) -> asyncio.Task[Any]:
                task = asyncio.Task(coro, loop=loop, **options)
                if coro.__qualname__ == "Running.run":
                    stillborn.append(task)
                    task.cancel()
                return task

            loop.set_task_factory(make)
            call = asyncio.create_task(workers[0].wait())
            while not stillborn or not stillborn[0].done():  # noqa: ASYNC110 (there is no event to wait for)
                await asyncio.sleep(0)
            loop.set_task_factory(None)
            await workers.dispatchers[0].aclose()
            with pytest.raises(ActorClosed):
                await call

    run(kind, main())


def test_nothing_is_kept_of_loops_that_have_ended() -> None:
    async def main() -> weakref.ref[Any]:
        async with team("memory", Waiter) as workers:
            await workers[0].echo(1)
            return weakref.ref(connection_to(workers[0]._target))

    connection = asyncio.run(main())
    gc.collect()
    assert connection() is None
