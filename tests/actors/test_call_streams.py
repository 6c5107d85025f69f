"""Async generators read from elsewhere."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from actor_harness import run, team

from actors import Actor, ActorClosed, NotPicklable, NotReady, RemoteCancelled
from actors._interface import Interface
from actors._protocol import AHEAD

if TYPE_CHECKING:
    from collections.abc import AsyncIterator


class Source(Actor):
    def __init__(self) -> None:
        self.yielded = 0
        self.log: list[str] = []
        self.stopped = asyncio.Event()
        self.never = asyncio.Event()

    async def rows(self, count: int, *, fail_at: int | None = None) -> AsyncIterator[Any]:
        try:
            for number in range(count):
                if number == fail_at:
                    raise ValueError(f"row {number}")
                self.yielded += 1
                yield number
        except GeneratorExit:
            self.log.append("exit")
            raise
        finally:
            async with asyncio.timeout(10):  # cleaning up may await, under a timeout of its own
                await asyncio.sleep(0)
            self.log.append("finally")
            self.stopped.set()

    async def blocks(self, count: int, size: int) -> AsyncIterator[np.ndarray]:
        for number in range(count):
            self.yielded += 1
            yield np.full(size, number, np.uint8)

    async def stuck(self) -> AsyncIterator[int]:
        try:
            yield 1
            await self.never.wait()
        except asyncio.CancelledError:
            self.log.append("cancelled")
            raise
        finally:
            self.log.append("finally")
            self.stopped.set()

    async def fails_to_leave(self) -> AsyncIterator[int]:
        try:
            for number in range(1000):
                yield number
        finally:
            raise OSError("in finally")

    async def cancels_itself(self) -> AsyncIterator[int]:
        yield 1
        raise asyncio.CancelledError

    async def unpicklable(self) -> AsyncIterator[Any]:
        yield 1
        yield (x for x in ())

    async def echo(self, value: Any) -> Any:
        return value


def test_a_stream_yields_in_order_and_ends(kind: str) -> None:
    async def main() -> None:
        async with team(kind, Source) as sources:
            async with sources[0].rows(100) as rows:
                assert [row async for row in rows] == list(range(100))
                assert [row async for row in rows] == []
            async with sources[0].call(Source.rows, 0) as rows:
                assert [row async for row in rows] == []
            async with sources[0].blocks(12, 1 << 20) as blocks:
                assert [int(block[-1]) async for block in blocks] == list(range(12))
            assert sources.instances[0].log == ["finally"] * 2

    run(kind, main())


def test_the_source_waits_for_its_reader(kind: str) -> None:
    async def main() -> None:
        async with team(kind, Source) as sources:
            actor = sources.instances[0]
            async with sources[0].rows(10_000) as rows:
                for number in range(100):
                    assert await anext(rows) == number
                    assert actor.yielded <= number + 1 + AHEAD + 1
                # As far ahead as it may be; a call that follows shows that it had the time.
                while actor.yielded < 100 + AHEAD // 2:
                    await sources[0].echo(0)
                for _ in range(20):
                    await sources[0].echo(0)
                assert actor.yielded <= 100 + AHEAD + 1
            assert actor.log == ["exit", "finally"]

    run(kind, main())


def test_leaving_ends_the_generator_where_it_awaits(kind: str) -> None:
    async def main() -> None:
        async with team(kind, Source) as sources:
            actor = sources.instances[0]
            async with sources[0].stuck() as rows:
                assert await anext(rows) == 1
                with pytest.raises(TimeoutError):
                    async with asyncio.timeout(0.01):
                        await anext(rows)
            assert actor.log == ["cancelled", "finally"]
            assert await sources[0].echo(3) == 3

    run(kind, main())


def test_leaving_by_an_error_or_cancellation_ends_it_too(kind: str) -> None:
    async def main() -> None:
        async with team(kind, Source) as sources:
            actor = sources.instances[0]

            async def fail() -> None:
                async with sources[0].rows(1000) as rows:
                    async for row in rows:
                        raise KeyError(row)

            with pytest.raises(KeyError):
                await fail()
            assert actor.log == ["exit", "finally"]

            entered = asyncio.Event()

            async def read() -> None:
                async with sources[0].stuck() as rows:
                    async for _ in rows:
                        entered.set()

            reader = asyncio.create_task(read())
            await entered.wait()
            actor.stopped.clear()
            reader.cancel()
            with pytest.raises(asyncio.CancelledError):
                await reader
            await actor.stopped.wait()

    run(kind, main())


def test_leaving_waits_for_nobody_once_the_deadline_has_passed(kind: str) -> None:
    """Kind: what runs in a task that is being cancelled waits for the other side."""

    class Stuck(Actor):
        def __init__(self) -> None:
            self.release = asyncio.Event()

        async def rows(self) -> AsyncIterator[int]:
            try:
                while True:
                    yield 1
            finally:
                await self.release.wait()

    async def main() -> None:
        async with team(kind, Stuck, 2) as actors:

            async def read(several: bool) -> None:
                async with asyncio.timeout(5) as scope, AsyncExitStack() as stack:
                    streams = [await stack.enter_async_context(actors[0].rows())]
                    if several:
                        streams += await stack.enter_async_context(actors.handles.rows())
                    async for _ in streams[-1]:
                        scope.reschedule(0)

            for several in (False, True):
                with pytest.raises(TimeoutError):
                    await read(several)
            for actor in actors.instances:
                actor.release.set()

    run(kind, main())


def test_a_stream_that_the_actor_lacks_is_refused(kind: str) -> None:
    """Kind: caller and actor disagree on what a method is, and one waits where the other does not answer."""

    class Other(Actor):
        async def rows(self) -> int: ...  # type: ignore[empty-body]

        async def missing(self) -> AsyncIterator[int]:
            yield 1

        async def echo(self, value: Any) -> AsyncIterator[Any]:
            yield value

    async def main() -> None:
        async with team(kind, Source) as sources:
            object.__setattr__(sources[0]._target, "interface", Interface.of(Other))
            for name, arguments in (("missing", ()), ("echo", (1,))):
                with pytest.raises(AttributeError, match=rf"worker\[0\] has no stream '{name}'"):
                    async with getattr(sources[0], name)(*arguments) as rows:
                        await anext(rows)
            with pytest.raises(AttributeError, match=r"worker\[0\] has no method 'rows'"):
                await sources[0].rows()

    run(kind, main())


def test_what_the_generator_raises_arrives(kind: str) -> None:
    async def main() -> None:
        async with team(kind, Source) as sources:
            seen = []
            with pytest.raises(ValueError, match="row 30") as caught:
                async with sources[0].rows(100, fail_at=30) as rows:
                    seen = [row async for row in rows]
            assert "in worker[0].rows" in caught.value.__notes__
            assert seen == []
            with pytest.raises(OSError, match="in finally"):
                async with sources[0].fails_to_leave() as rows:
                    await anext(rows)
            with pytest.raises(RemoteCancelled, match=r"worker\[0\]\.cancels_itself"):
                async with sources[0].cancels_itself() as rows:
                    assert [row async for row in rows]
            with pytest.raises(NotPicklable, match=r"an item of worker\[0\]\.unpicklable"):
                async with sources[0].unpicklable() as rows:
                    assert [row async for row in rows]
            with pytest.raises(NotPicklable, match=r"an argument of worker\[0\]\.rows"):
                async with sources[0].rows(x for x in ()):
                    pass
            assert await sources[0].echo(1) == 1

    run(kind, main())


def test_a_stalled_stream_delays_no_call(kind: str) -> None:
    async def main() -> None:
        async with team(kind, Source) as sources:
            async with sources[0].blocks(100, 1 << 20) as blocks:
                await anext(blocks)
                assert await asyncio.gather(*(sources[0].echo(n) for n in range(200))) == list(range(200))
                large = bytes(8 << 20)
                assert await sources[0].echo(large) == large
                assert sources.instances[0].yielded < 100
            assert await sources[0].echo(1) == 1

    run(kind, main())


def test_many_streams_at_once(kind: str) -> None:
    async def read(handle: Any, count: int) -> list[int]:
        async with handle.rows(count) as rows:
            return [row async for row in rows]

    async def main() -> None:
        async with team(kind, Source) as sources:
            read_all = await asyncio.gather(*(read(sources[0], count) for count in range(60)))
            assert read_all == [list(range(count)) for count in range(60)]

    run(kind, main())


def test_streams_of_a_role_are_in_rank_order(kind: str) -> None:
    async def main() -> None:
        async with team(kind, Source, 3) as sources:
            async with sources.handles.rows(50) as streams:
                assert len(streams) == 3
                assert [await anext(stream) for stream in streams] == [0, 0, 0]
                assert [row async for row in streams[1]] == list(range(1, 50))
            assert [actor.log[-1] for actor in sources.instances] == ["finally"] * 3
            async with sources.handles.rows.map([1, 2, 3]) as streams:
                assert [[row async for row in stream] for stream in streams] == [[0], [0, 1], [0, 1, 2]]

    run(kind, main())


def test_wrong_use_says_what_is_right() -> None:
    async def main() -> None:
        async with team("memory", Source, 2) as sources:
            with pytest.raises(TypeError, match=r"<Stream worker\[0\]\.rows> is not awaited; use `async with"):
                await sources[0].rows(1)
            with pytest.raises(TypeError, match="is not awaited; use `async with"):
                await sources.handles.rows(1)
            with pytest.raises(NotReady, match=r"<Stream worker\[0\]\.rows> has not been entered"):
                async for _ in sources[0].rows(1):
                    pass
            with pytest.raises(TypeError, match="missing 1 required positional argument: 'count'"):
                sources[0].rows()
            stream = sources[0].rows(1)
            async with stream:
                pass
            with pytest.raises(NotReady, match="was entered before"):
                async with stream:
                    pass
            async with sources[0].stuck() as rows:
                assert await anext(rows) == 1
                other = asyncio.create_task(anext(rows))
                await asyncio.sleep(0)
                with pytest.raises(RuntimeError, match="being read by another task"):
                    await anext(rows)
                other.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await other
            assert sources.instances[1].yielded == 0

    asyncio.run(main())


def test_an_actor_that_closes_ends_its_streams(kind: str) -> None:
    async def main() -> None:
        async with team(kind, Source) as sources:
            async with sources[0].stuck() as rows:
                assert await anext(rows) == 1
                closing = asyncio.create_task(sources.dispatchers[0].aclose())
                with pytest.raises(ActorClosed, match=r"worker\[0\] has shut down; stuck"):
                    await anext(rows)
            await closing
            assert sources.instances[0].log == ["cancelled", "finally"]
            with pytest.raises(ActorClosed):
                async with sources[0].rows(1) as rows:
                    await anext(rows)

    run(kind, main())


def test_a_reader_whose_endpoint_closes_ends_the_generator(kind: str) -> None:
    async def main() -> None:
        from collective.errors import LinkClosed
        from collective.links import loop_endpoint

        async with team(kind, Source) as sources:
            actor = sources.instances[0]
            async with sources[0].stuck() as rows:
                assert await anext(rows) == 1
                await loop_endpoint().aclose()
                with pytest.raises(LinkClosed):
                    await anext(rows)
            await actor.stopped.wait()
            assert actor.log == ["cancelled", "finally"]

    run(kind, main())
