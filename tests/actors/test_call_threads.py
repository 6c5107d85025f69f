"""Plain methods, which run in worker threads, and their way back to the loop."""

from __future__ import annotations

import asyncio
import contextvars
import threading
import time
from typing import Any

import pytest
from actor_harness import run, team

from actors import Actor, ActorClosed, NotReady, from_thread
from actors._threads import Job, Workers
from collective.errors import OutOfResources

LABEL: contextvars.ContextVar[str] = contextvars.ContextVar("label", default="none")


class Blocking(Actor):
    def __init__(self) -> None:
        self.loop_thread = threading.get_ident()
        self.gate = threading.Event()
        self.entered = threading.Event()
        self.together = threading.Barrier(2)
        self.never = asyncio.Event()
        self.loop_entered = asyncio.Event()
        self.log: list[Any] = []

    def thread(self) -> tuple[bool, bool, str]:
        here = threading.current_thread()
        return here.ident == self.loop_thread, here.daemon, here.name

    def block(self, what: Any = None) -> str:
        self.entered.set()
        assert self.gate.wait(10)
        self.log.append(what)
        return "unblocked"

    def meet(self) -> int:
        return self.together.wait(10)

    async def on_loop(self, value: int, *, times: int = 1) -> tuple[int, bool]:
        await asyncio.sleep(0)
        return value * times, threading.get_ident() == self.loop_thread

    async def fail_on_loop(self) -> None:
        raise KeyError("on loop")

    async def exit_on_loop(self) -> None:
        raise SystemExit(4)

    async def label(self) -> str:
        return LABEL.get()

    async def hang_on_loop(self) -> None:
        self.loop_entered.set()
        await self.never.wait()

    def back(self, value: int) -> tuple[int, bool]:
        return from_thread.run(self.on_loop, value, times=2)

    def back_failing(self) -> str:
        with pytest.raises(KeyError):
            from_thread.run(self.fail_on_loop)
        with pytest.raises(SystemExit):
            from_thread.run(self.exit_on_loop)
        return "caught"

    def back_with_context(self) -> str:
        LABEL.set("mine")
        return from_thread.run(self.label)

    def back_hanging(self) -> None:
        try:
            from_thread.run(self.hang_on_loop)
        except asyncio.CancelledError:
            self.log.append("cancelled")
            try:
                from_thread.run(self.label)
            except asyncio.CancelledError:
                self.log.append("cancelled again")
            raise

    def back_to_a_peer(self, handle: Any) -> Any:
        return from_thread.run(handle.thread)

    def own_loop(self, handle: Any) -> Any:
        async def main() -> Any:
            return await handle.echo(5)

        return asyncio.run(main())

    def from_a_thread_of_its_own(self) -> None:
        raised: list[BaseException] = []

        def work() -> None:
            try:
                from_thread.run(self.label)
            except NotReady as error:
                raised.append(error)

        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
        raise raised[0]

    async def misuse(self) -> None:
        from_thread.run(self.label)

    def misuse_on_loop(self) -> None:
        from_thread.run(self.misuse)

    async def echo(self, value: Any) -> Any:
        return value


async def _set(event: threading.Event) -> None:
    assert await asyncio.to_thread(event.wait, 10)


def test_plain_methods_run_off_the_loop_in_one_daemon_thread(kind: str) -> None:
    async def main() -> None:
        async with team(kind, Blocking) as actors:
            seen = {await actors[0].thread() for _ in range(3)}
            assert seen == {(False, True, "worker[0] worker 1")}

    run(kind, main())


def test_a_blocked_method_does_not_block_the_loop(kind: str) -> None:
    async def main() -> None:
        async with team(kind, Blocking) as actors:
            actor = actors.instances[0]
            calls = [asyncio.create_task(actors[0].block(number)) for number in range(3)]
            await _set(actor.entered)
            assert await actors[0].echo(1) == 1
            assert actor.log == []
            actor.gate.set()
            assert await asyncio.gather(*calls) == ["unblocked"] * 3
            assert actor.log == [0, 1, 2]

    run(kind, main())


def test_more_threads_run_more_at_once(kind: str) -> None:
    async def main() -> None:
        async with team(kind, Blocking, threads=2) as actors:
            assert sorted(await asyncio.gather(actors[0].meet(), actors[0].meet())) == [0, 1]

    run(kind, main())


def test_threads_must_be_positive() -> None:
    async def main() -> None:
        with pytest.raises(ValueError, match=r"worker\[0\]: threads is 0"):
            async with team("memory", Blocking, threads=0):
                pass

    asyncio.run(main())


def test_from_thread_runs_on_the_loop(kind: str) -> None:
    async def main() -> None:
        async with team(kind, Blocking, 2) as actors:
            assert await actors[0].back(4) == (8, True)
            assert await actors[0].back_failing() == "caught"
            assert await actors[0].back_with_context() == "mine"
            assert await actors[0].back_with_context() == "mine"
            assert LABEL.get() == "none"
            assert await actors[0].back_to_a_peer(actors[1]) == (False, True, "worker[1] worker 1")

    run(kind, main())


def test_a_plain_method_may_run_a_loop_of_its_own() -> None:
    async def main() -> None:
        async with team("unix", Blocking, 2) as actors:
            assert await actors[0].own_loop(actors[1]) == 5
            assert await actors[0].own_loop(actors[1]) == 5

    run("unix", main())


def test_from_thread_elsewhere_says_why_not() -> None:
    async def main() -> None:
        async with team("memory", Blocking) as actors:
            with pytest.raises(NotReady, match="does not run in a plain method"):
                await actors[0].misuse()
            with pytest.raises(NotReady, match="does not run in a plain method"):
                await actors[0].from_a_thread_of_its_own()
            with pytest.raises(NotReady, match="runs on the actor's loop already; await it"):
                await actors[0].misuse_on_loop()

    asyncio.run(main())
    with pytest.raises(NotReady, match=r"from_thread\.run\(Blocking\.label\)"):
        from_thread.run(Blocking.label, None)  # type: ignore[arg-type]


def test_cancelling_a_blocked_call_returns_at_once(kind: str) -> None:
    async def main() -> None:
        async with team(kind, Blocking) as actors:
            actor = actors.instances[0]
            first = asyncio.create_task(actors[0].block("first"))
            await _set(actor.entered)
            queued = asyncio.create_task(actors[0].block("queued"))
            last = asyncio.create_task(actors[0].block("last"))
            await actors[0].echo(0)
            first.cancel()
            queued.cancel()
            await asyncio.wait([first, queued])
            assert first.cancelled()
            assert queued.cancelled()
            assert actor.log == []
            await actors[0].echo(0)  # the actor has heard of it
            actor.gate.set()
            assert await last == "unblocked"
            # What ran went on to its end, its result dropped; what waited never started; the order was kept.
            assert actor.log == ["first", "last"]

    run(kind, main())


def test_a_failed_broadcast_does_not_wait_for_threads(kind: str) -> None:
    async def main() -> None:
        async with team(kind, Blocking, 2) as actors:
            begun = time.monotonic()
            call = asyncio.create_task(actors.handles.block())
            for actor in actors.instances:
                await _set(actor.entered)
            call.cancel()
            with pytest.raises(asyncio.CancelledError):
                await call
            assert [actor.log for actor in actors.instances] == [[], []]
            assert time.monotonic() - begun < 4  # of the 5 seconds that it waits for calls which do not end
            for actor in actors.instances:
                actor.gate.set()

    run(kind, main())


def test_cancelling_reaches_what_waits_in_from_thread(kind: str) -> None:
    async def main() -> None:
        async with team(kind, Blocking) as actors:
            actor = actors.instances[0]
            call = asyncio.create_task(actors[0].back_hanging())
            await actor.loop_entered.wait()
            call.cancel()
            with pytest.raises(asyncio.CancelledError):
                await call
            assert await actors[0].thread()  # the thread is free again
            assert actor.log == ["cancelled", "cancelled again"]

    run(kind, main())


def test_an_actor_that_closes_waits_for_its_threads(kind: str) -> None:
    async def main() -> None:
        async with team(kind, Blocking) as actors:
            actor = actors.instances[0]
            call = asyncio.create_task(actors[0].block("it"))
            await _set(actor.entered)
            closing = asyncio.create_task(actors.dispatchers[0].aclose())
            with pytest.raises(ActorClosed, match="block"):
                await call
            assert not closing.done()
            actor.gate.set()
            await closing
            assert actor.log == ["it"]

    run(kind, main())


def test_a_plain_method_for_which_there_is_no_thread_is_an_error_and_later_ones_run(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The kind: out of threads is an error at the call, never a hang."""

    def refuse(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    async def main() -> None:
        workers = Workers("an actor", 1)
        with monkeypatch.context() as patch:
            patch.setattr(threading.Thread, "start", refuse)
            with pytest.raises(OutOfResources, match=r"an actor .* no threads left to run a plain method"):
                workers.submit(Job(lambda: 1))
        job = Job(lambda: 2)
        workers.submit(job)
        assert await job.result == (2, None)
        await workers.aclose()

    asyncio.run(main())
