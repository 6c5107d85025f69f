"""Calls that wait for each other in a circle are told, or answered; calls that merely wait are left alone."""

from __future__ import annotations

import asyncio
import threading
from typing import TYPE_CHECKING, Any

import pytest
from gang_harness import run

from actors import Actor, CallDeadlock, Gang, Role, from_thread
from scheduling import Resources

if TYPE_CHECKING:
    from collections.abc import AsyncIterator


class Worker(Actor):
    def __init__(self) -> None:
        self.entered = threading.Event()
        self.gate = threading.Event()

    def inner(self) -> int:
        return self.rank

    def own(self) -> int:
        return from_thread.run(self.gang["w"][self.rank].inner)

    def around(self, left: int) -> int:
        """Call on, from one rank to the next."""
        peers = self.gang["w"]
        return from_thread.run(peers[(self.rank + 1) % len(peers)].around, left - 1) if left else self.rank

    def all_of_them(self) -> list[int]:
        return from_thread.run(self.gang["w"].inner)

    async def pass_on(self) -> int:
        return await self.gang["w"][0].inner()

    def by_an_async_method(self) -> int:
        return from_thread.run(self.gang["w"][1].pass_on)

    def by_tasks(self, how: str) -> Any:
        async def ask() -> Any:
            peer = self.gang["w"][1]
            if how == "gather":
                return await asyncio.gather(peer.nothing(), peer.pass_on())
            if how == "task":
                return await asyncio.create_task(peer.pass_on())
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(peer.nothing())
                tasks.create_task(peer.pass_on())

        return from_thread.run(ask)

    async def nothing(self) -> None: ...

    async def stream(self) -> AsyncIterator[int]:
        yield await self.gang["w"][0].inner()

    def by_a_stream(self) -> list[int]:
        async def read() -> list[int]:
            async with self.gang["w"][1].stream() as rows:
                return [row async for row in rows]

        return from_thread.run(read)

    def meet(self) -> int:
        """Call the other rank once its thread is held as well."""
        other = self.gang["w"][1 - self.rank]
        self.entered.set()
        from_thread.run(other.has_entered)
        return from_thread.run(other.inner)

    async def has_entered(self) -> None:
        await asyncio.to_thread(self.entered.wait)

    def later(self) -> None:
        """Leave a call to this actor behind, and stay."""

        async def leave() -> None:
            self.left = asyncio.create_task(self.gang["w"][self.rank].inner())

        from_thread.run(leave)
        from_thread.run(asyncio.sleep, 0.5)

    async def what_was_left(self) -> int:
        return await self.left

    def block(self) -> int:
        self.entered.set()
        assert self.gate.wait(10)
        return self.rank

    async def open_gate(self) -> None:
        self.gate.set()


def workers(count: int = 2, threads: int = 1) -> Role[Worker]:
    return Role("w", Worker, count, threads=threads, resources=Resources(cpu=0.1))


CIRCLES = [
    ("own", (), 1),
    ("around", (2,), 2),
    ("around", (5,), 5),
    ("all_of_them", (), 2),
    ("by_an_async_method", (), 2),
    ("by_a_stream", (), 2),
    ("by_tasks", ("gather",), 2),
    ("by_tasks", ("task",), 2),
    ("by_tasks", ("TaskGroup",), 2),
]


@pytest.mark.parametrize(("method", "arguments", "count"), CIRCLES)
def test_a_plain_method_that_waits_for_itself_is_told_so(runtime, method, arguments, count):
    """Kind: a call waits, by way of any others, for the thread that its own caller holds."""

    async def main():
        async with Gang(workers(count), runtime=runtime) as gang, asyncio.timeout(10):
            with pytest.raises((CallDeadlock, ExceptionGroup)) as caught:
                await getattr(gang["w"][0], method)(*arguments)
            error = caught.value
            while isinstance(error, ExceptionGroup):
                (error,) = error.exceptions
            assert isinstance(error, CallDeadlock)
            assert rf"w[0], whose worker threads are all held by w[0].{method}()" in str(error)
            assert "Role(threads=)" in str(error)
            assert await gang["w"].inner() == list(range(count))

    if runtime == "ray" and method != "around":
        pytest.skip("what is between the actors is the same on every runtime")
    run(main())


def test_of_two_callers_that_wait_for_each_other_one_goes_on():
    """Kind: the circle leads through threads that calls of different callers hold."""

    async def main():
        async with Gang(workers(), runtime="inproc") as gang, asyncio.timeout(10):
            calls = [gang["w"][0].meet(), gang["w"][1].meet()]
            results = await asyncio.gather(*calls, return_exceptions=True)
            assert sorted(type(result) for result in results if not isinstance(result, int)) == [CallDeadlock]
            (result,) = (result for result in results if isinstance(result, int))
            assert results.index(result) == 1 - result

    run(main())


def test_with_threads_enough_nothing_waits_for_itself():
    async def main():
        async with Gang(workers(2, threads=2), runtime="inproc") as gang, asyncio.timeout(10):
            assert await gang["w"][0].own() == 0
            assert await gang["w"][0].around(3) == 1
            with pytest.raises(CallDeadlock, match=r"w\[0\]\.around\(\), w\[0\]\.around\(\)"):
                await gang["w"][0].around(4)

    run(main())


def test_who_merely_waits_is_left_alone():
    """Kind: what looks like a circle is none: somebody at work, or a call that nobody waits for."""

    async def main():
        async with Gang(workers(), runtime="inproc") as gang, asyncio.timeout(10):
            zero, one = gang["w"]
            blocked = asyncio.create_task(one.block())
            await one.has_entered()
            waiting = [asyncio.create_task(zero.around(1)), asyncio.create_task(zero.inner())]
            await asyncio.sleep(0.5)  # some looks at it
            assert not any(call.done() for call in waiting)
            await one.open_gate()
            assert await asyncio.gather(blocked, *waiting) == [1, 1, 0]
            await zero.later()
            assert await zero.what_was_left() == 0

    run(main())


class Starting(Actor):
    """Calls in its `setup`; `ready` is the last thing that it does there."""

    ready = False

    async def is_ready(self) -> bool:
        return self.ready

    async def rows(self) -> AsyncIterator[int]:
        yield 1

    async def echo(self, what: str) -> str:
        return what

    def plain(self, what: str) -> str:
        return what


class Own(Starting):
    async def setup(self) -> None:
        own = self.gang["a"][self.rank]
        assert await own.echo("x") == "x"
        assert await own.plain("x") == "x"
        async with own.rows() as rows:
            assert [row async for row in rows] == [1]
        self.ready = True


class Round(Starting):
    async def setup(self) -> None:
        peers = self.gang["a"]
        assert await peers[(self.rank + 1) % len(peers)].plain("x") == "x"
        assert await peers.echo("x") == ["x"] * len(peers)
        async with peers.rows() as streams:
            for rows in streams:
                assert [row async for row in rows] == [1]
        self.ready = True


class Chain(Starting):
    async def setup(self) -> None:
        peers = self.gang["a"]
        if self.rank + 1 < len(peers):
            assert await peers[self.rank + 1].is_ready()
        else:
            await asyncio.sleep(0.5)  # some looks at it
        self.ready = True


@pytest.mark.parametrize("cls", [Own, Round, Chain])
@pytest.mark.parametrize("count", [1, 2, 3])
def test_calls_from_setup_are_answered(runtime, cls, count):
    """Kind: a call waits for a `setup` that waits, by way of any others, for the call. Others wait for its end."""

    async def main():
        async with Gang(Role("a", cls, count, resources=Resources(cpu=0.1)), runtime=runtime, start_timeout=30) as gang:
            assert await gang["a"].is_ready() == [True] * count

    if runtime == "ray" and (count, cls) != (2, Round):
        pytest.skip("what is between the actors is the same on every runtime")
    run(main())
