"""Calls that succeed, and calls that are refused before anything moves."""

from __future__ import annotations

import asyncio
import contextlib
import copy
import functools
import pickle
from typing import TYPE_CHECKING, Any

import cloudpickle
import pytest
from actor_harness import run, team

from actors import Actor, Handle, Handles, NotReady
from actors._pickling import dumps, loads
from actors.actor import connect, create

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator


class Worker(Actor):
    """Notes the order in which its methods start."""

    def __init__(self) -> None:
        self.started: list[Any] = []
        self.in_init = (self.role, self.rank)
        self.gate = asyncio.Event()

    async def note(self, what: Any, *, size: int = 0) -> tuple[int, Any]:
        self.started.append(what)
        return self.rank, what

    async def noted(self) -> list[Any]:
        return self.started

    async def keep(self, what: Any, payload: bytes) -> int:
        self.started.append(what)
        return len(payload)

    def plain(self, what: Any) -> Any:
        self.started.append(what)
        return what

    @staticmethod
    def double(number: int) -> int:
        return 2 * number

    @classmethod
    async def class_name(cls) -> str:
        return cls.__name__

    async def wait(self) -> str:
        self.started.append("waiting")
        await self.gate.wait()
        return "waited"

    async def open_gate(self) -> None:
        self.gate.set()

    async def count(self) -> int:
        return len(self.started)

    async def index(self, value: int) -> int:
        return value

    async def relay(self, handle: Handle[Worker], what: str) -> tuple[int, str]:
        return await handle.note(what)

    async def where(self) -> tuple[str, int]:
        return self.role, self.rank

    @property
    def secret(self) -> int:
        return 1

    def _private(self) -> None: ...


def test_methods_of_every_kind_return_their_result(kind: str) -> None:
    async def main() -> None:
        async with team(kind, Worker) as workers:
            worker = workers[0]
            assert await worker.note("a") == (0, "a")
            assert await worker.call(Worker.note, "b", size=3) == (0, "b")
            assert await worker.plain([1, "x"]) == [1, "x"]
            assert await worker.double(21) == 42
            assert await worker.class_name() == "Worker"
            assert await worker.call(Worker.plain, None) is None
            assert workers.instances[0].in_init == ("worker", 0)

    run(kind, main())


def test_calls_start_in_the_order_in_which_they_were_made(kind: str) -> None:
    async def main() -> None:
        async with team(kind, Worker) as workers:
            worker = workers[0]
            large = bytes(3 << 20)
            expected = list(range(40))
            calls = []
            for what in expected:  # the first ones find no connection yet, and some fill the channel's window
                made = worker.keep(what, large) if what % 8 == 3 else worker.note(what)
                calls.append(asyncio.create_task(made))
            await asyncio.gather(*calls)
            assert await worker.noted() == expected

    run(kind, main())


def test_plain_methods_run_one_at_a_time_in_call_order(kind: str) -> None:
    async def main() -> None:
        async with team(kind, Worker) as workers:
            results = await asyncio.gather(*(workers[0].plain(what) for what in range(50)))
            assert results == workers.instances[0].started == list(range(50))

    run(kind, main())


def test_a_broadcast_starts_in_order_with_single_calls(kind: str) -> None:
    async def main() -> None:
        async with team(kind, Worker, 2) as workers:
            calls = [
                asyncio.create_task(workers[1].note("first")),
                asyncio.create_task(workers.handles.note("all")),
                asyncio.create_task(workers[1].note("last")),
            ]
            await asyncio.gather(*calls)
            assert await workers[1].noted() == ["first", "all", "last"]

    run(kind, main())


def test_calls_interleave_where_they_await(kind: str) -> None:
    async def main() -> None:
        async with team(kind, Worker) as workers:
            waiting = asyncio.create_task(workers[0].wait())
            await workers[0].note("meanwhile")
            assert not waiting.done()
            await workers[0].open_gate()
            assert await waiting == "waited"

    run(kind, main())


def test_broadcast_and_map_answer_in_rank_order(kind: str) -> None:
    async def main() -> None:
        async with team(kind, Worker, 3) as workers:
            assert await workers.handles.note("x") == [(0, "x"), (1, "x"), (2, "x")]
            assert await workers.handles.call(Worker.note, "y", size=1) == [(0, "y"), (1, "y"), (2, "y")]
            assert await workers.handles.note.map("abc") == [(0, "a"), (1, "b"), (2, "c")]
            assert await workers.handles.plain.map(iter([7, 8, 9])) == [7, 8, 9]
            assert await workers.handles[1:].note("z") == [(1, "z"), (2, "z")]
            assert await workers.handles[:0].note("z") == []

    run(kind, main())


def test_map_takes_one_item_for_each_actor() -> None:
    async def main() -> None:
        async with team("memory", Worker, 2) as workers:
            with pytest.raises(ValueError, match=r"worker\.note\.map: 3 items for 2 actors"):
                workers.handles.note.map([1, 2, 3])
            assert await workers.handles.count() == [0, 0]

    asyncio.run(main())


def test_handles_are_a_sequence() -> None:
    async def main() -> None:
        async with team("memory", Worker, 3) as workers:
            handles = workers.handles
            assert len(handles) == 3
            assert [handle.rank for handle in handles] == [0, 1, 2]
            assert [handle.rank for handle in reversed(handles)] == [2, 1, 0]
            assert handles[-1] == workers[2]
            assert workers[1] in handles
            assert isinstance(handles[1:], Handles)
            assert handles[1:][0].rank == 1
            assert handles.role == workers[0].role == "worker"
            with pytest.raises(IndexError, match=r"worker\[3\]"):
                handles[3]
            # What a sequence has as methods, an actor may have too.
            assert await handles.index(5) == [5, 5, 5]
            assert "worker[1]" in repr(workers[1])
            assert "worker[0, 1, 2]" in repr(handles)

    asyncio.run(main())


def test_an_unknown_name_is_an_error_at_the_call() -> None:
    async def main() -> None:
        async with team("memory", Worker, 2) as workers:
            for handle in (workers[0], workers.handles):
                with pytest.raises(AttributeError, match=r"worker \(Worker\): no method 'notte'.*did you mean 'note'"):
                    _ = handle.notte
                with pytest.raises(AttributeError, match="'_private' is private"):
                    _ = handle._private
                with pytest.raises(AttributeError, match="no method 'secret'"):
                    _ = handle.secret
                with pytest.raises(AttributeError, match="'setup' belongs to the actor itself"):
                    _ = handle.setup
                with pytest.raises(AttributeError, match="worker"):
                    handle.call(asyncio.sleep, 1)
                with pytest.raises(TypeError, match=r"call\(Trainer\.fit"):
                    handle.call("note", 1)

    asyncio.run(main())


def test_arguments_that_do_not_fit_are_python_s_own_error_at_the_call() -> None:
    async def main() -> None:
        async with team("memory", Worker, 2) as workers:
            local: Any = create(Worker, (), {}, role="worker", rank=0)
            for wrong in (
                lambda actor: actor.note(),
                lambda actor: actor.note(1, 2),
                lambda actor: actor.note(1, sise=2),
                lambda actor: actor.plain(what=1, other=2),
                lambda actor: actor.wait(1),
            ):
                with pytest.raises(TypeError) as expected:
                    wrong(local)
                for handle in (workers[0], workers.handles):
                    with pytest.raises(TypeError) as raised:
                        wrong(handle)
                    assert str(raised.value) == str(expected.value)
            with pytest.raises(TypeError, match="missing 1 required positional argument: 'payload'"):
                workers.handles.keep.map([1, 2])
            assert workers.instances[0].started == []

    asyncio.run(main())


def test_a_handle_is_picklable_light_and_equal_to_itself(kind: str) -> None:
    async def main() -> None:
        async with team(kind, Worker, 2) as workers:
            for library in (pickle, cloudpickle):
                data = library.dumps(workers.handles)
                assert len(data) < 4096
                again = pickle.loads(data)
                assert again == workers.handles
                assert hash(again) == hash(workers.handles)
                assert await again.note("there") == [(0, "there"), (1, "there")]
            handle = pickle.loads(pickle.dumps(workers[1]))
            assert handle == workers[1] == copy.deepcopy(handle) == copy.copy(handle)
            assert handle != workers[0]
            assert len({handle, workers[1], workers[0]}) == 2
            key = handle._target.credential.key
            assert repr(key)[2:12] not in repr(handle) + repr(handle._target)

    run(kind, main())


def test_actors_call_each_other_and_themselves(kind: str) -> None:
    async def main() -> None:
        async with team(kind, Worker, 2) as workers:
            assert await workers[0].relay(workers[1], "over") == (1, "over")
            assert await workers[0].relay(workers[0], "self") == (0, "self")

    run(kind, main())


def test_a_handle_serves_every_loop_of_a_process() -> None:
    """As in Ray workers, where each task may `asyncio.run` something of its own."""

    async def main() -> None:
        async with team("unix", Worker) as workers:
            handle = workers[0]

            def elsewhere(number: int) -> Any:
                async def call() -> Any:
                    return await handle.note(number)

                return asyncio.run(call())

            for number in range(5):
                assert await asyncio.to_thread(elsewhere, number) == (0, number)

    run("unix", main())


def test_a_call_without_a_loop_says_so() -> None:
    async def main() -> Handle[Any]:
        async with team("memory", Worker) as workers:
            return workers[0]

    handle = asyncio.run(main())
    coroutine = handle.note(1)
    with pytest.raises(NotReady, match="needs a running event loop"):
        coroutine.send(None)


def test_ray_actor_is_what_the_runtime_gave() -> None:
    async def main() -> None:
        async with team("memory", Worker, native=lambda: "the actor") as workers:
            assert workers[0].ray_actor == "the actor"
        async with team("memory", Worker) as workers:
            with pytest.raises(NotReady, match=r"worker\[0\] is no Ray actor"):
                _ = workers[0].ray_actor

    asyncio.run(main())


def test_an_actor_knows_its_place_when_the_host_has_told_it() -> None:
    loose = Actor()
    for name in ("rank", "role", "groups", "gang"):
        with pytest.raises(NotReady, match=f"Actor.{name}: no gang made this"):
            getattr(loose, name)

    actor = create(Actor, (), {}, role="reader", rank=2)
    assert (actor.role, actor.rank) == ("reader", 2)
    for name in ("groups", "gang"):
        with pytest.raises(NotReady, match=rf"reader\[2\]\.{name} is not there in __init__"):
            getattr(actor, name)
    groups: dict[str, Any] = {"dp": object()}
    connect(actor, groups=groups, gang={})
    assert actor.groups is groups
    assert actor.gang == {}


def through(function: Any) -> Any:
    @functools.wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        return function(*args, **kwargs)

    return wrapper


def injecting(function: Any) -> Any:
    @functools.wraps(function)
    async def wrapper(self: Any, *args: Any, **kwargs: Any) -> Any:
        return await function(self, "injected", *args, **kwargs)

    return wrapper


class Adding:
    """A callable that is no function: Python does not bind it."""

    async def __call__(self, number: int) -> int:
        return number + 1


class Binding:
    """A descriptor of somebody's own."""

    def __init__(self, function: Any) -> None:
        self.function = function

    def __get__(self, instance: Any, owner: type) -> Any:
        return functools.partial(self.function, instance)


class Decorated(Actor):
    async def base(self, mode: str, number: int) -> Any:
        return self.rank, mode, number

    half = functools.partialmethod(base, "half")

    @staticmethod
    async def free(mode: str, number: int) -> Any:
        return mode, number

    freed = functools.partialmethod(free, "freed")

    @functools.singledispatchmethod
    async def kind(self, what: object) -> str:
        return "object"

    @kind.register
    async def _(self, what: int) -> str:
        return "int"

    @kind.register
    def _(self, what: str) -> str:
        return "str"

    @through
    @through
    async def wrapped(self, number: int) -> Any:
        return self.rank, number

    @staticmethod
    @through
    async def static(number: int) -> int:
        return number

    @classmethod
    @through
    async def of_class(cls, number: int) -> Any:
        return cls.__name__, number

    @injecting
    async def injected(self, what: str, number: int) -> Any:
        return what, number

    adding = Adding()
    partial = functools.partial(abs)
    largest = max

    @Binding
    def bound(self, number: int) -> Any:
        return self.rank, number

    @functools.lru_cache  # noqa: B019
    def cached(self, number: int) -> Any:
        return self.rank, number

    @functools.cached_property
    def value(self) -> int:
        raise AssertionError("no call made it")

    def generated(self, number: int) -> Iterator[int]:
        yield from range(number)

    def expression(self, number: int) -> Any:
        return (each for each in range(number))

    @through
    async def rows(self, number: int) -> AsyncIterator[int]:
        for each in range(number):
            yield each

    @contextlib.asynccontextmanager
    async def context(self) -> AsyncIterator[int]:
        yield 1

    async def call(self, number: int = 0, *, more: int = 0) -> int:
        return number + more


def test_methods_are_what_decorators_and_descriptors_make_of_them(kind: str) -> None:
    """Kind: a method is read off the class in another way than Python binds it."""

    async def main() -> None:
        async with team(kind, Decorated) as actors:
            actor = actors[0]
            for name, expected in (
                ("half", (0, "half", 3)),
                ("freed", ("freed", 3)),
                ("kind", "int"),
                ("wrapped", (0, 3)),
                ("static", 3),
                ("of_class", ("Decorated", 3)),
                ("injected", ("injected", 3)),
                ("adding", 4),
                ("partial", 3),
                ("bound", (0, 3)),
                ("cached", (0, 3)),
                ("generated", [0, 1, 2]),
                ("expression", [0, 1, 2]),
                ("call", 3),
            ):
                assert await getattr(actor, name)(3) == expected, name
                assert await getattr(actors.handles, name)(3) == [expected], name
            assert await actor.kind("x") == "str"
            assert await actor.kind([]) == "object"
            assert await actor.largest(1, 2) == 2
            assert await actor.wrapped(number=3) == (0, 3)
            async with actor.rows(3) as rows:
                assert [row async for row in rows] == [0, 1, 2]
            for made in (actor.call(Decorated.call, 1, more=2), actor.call(1, more=2), actor.call(more=3)):
                assert await made == 3
            assert await actor.call() == 0
            assert await actor.call(Decorated.wrapped, 3) == (0, 3)
            with pytest.raises(AttributeError, match="no method 'value'"):
                _ = actor.value
            with pytest.raises(TypeError, match=r"context is a stream but returned .*no async generator"):
                async with actor.context() as rows:
                    await anext(rows)

    run(kind, main())


def test_a_class_of_main_with_a_method_that_dispatches_travels() -> None:
    """Kind: what a decorator keeps beside a method cannot be pickled by value."""

    class Local(Actor):
        @functools.singledispatchmethod
        async def kind(self, what: object) -> str:
            return "object"

        @kind.register
        async def _(self, what: int) -> str:
            return "int"

    data, buffers = dumps(Local, "a class", in_call=False)
    made: Any = create(loads(data, buffers, "a class"), (), {}, role="worker", rank=0)
    assert [asyncio.run(made.kind(what)) for what in (1, "x")] == ["int", "object"]
