"""Calls that fail: what arrives, and that the actor lives on."""

from __future__ import annotations

import asyncio
import sys
import traceback
from typing import Any

import numpy as np
import pytest
from actor_harness import run, team

from actors import Actor, NotPicklable, NotReady, RemoteCancelled, RemoteError, RemoteTraceback
from actors._interface import Interface
from actors._session import Session
from collective.errors import CollectiveMismatch, GroupBroken, PeerLost


class Composed(Exception):
    """Composes its message, so that calling it with its args would compose it twice."""

    def __init__(self, name: str) -> None:
        super().__init__(f"no {name}")
        self.name = name


class Keyword(Exception):
    """Cannot be called with its args at all."""

    def __init__(self, *, code: int) -> None:
        super().__init__()
        self.code = code


class Holding(Exception):
    """Holds what cannot be pickled."""

    def __init__(self) -> None:
        super().__init__("holds a frame")
        self.frame = sys._getframe()


class Loud(BaseException):
    """Not an Exception."""


class Mute(Exception):
    def __str__(self) -> str:
        raise ValueError("mute")


class Unloadable:
    def __reduce__(self) -> Any:
        return _fail_to_load, ()


def _fail_to_load() -> None:
    raise ValueError("cannot be put together")


class Failing(Actor):
    async def fail(self, what: str) -> None:
        raise ERRORS[what]()

    def fail_plainly(self, what: str) -> None:
        raise ERRORS[what]()

    async def fail_on(self, ranks: list[int]) -> int:
        if self.rank in ranks:
            raise ValueError(f"rank {self.rank}")
        return self.rank

    async def fail_each(self, what: str) -> None:
        raise ERRORS[what]()

    async def hang(self, ranks: list[int]) -> None:
        if self.rank in ranks:
            raise ValueError("early")
        await asyncio.Event().wait()

    async def cancel_itself(self) -> None:
        raise asyncio.CancelledError

    async def result(self, what: str) -> Any:
        return {"lock": asyncio.Lock, "generator": lambda: (x for x in ()), "unloadable": Unloadable}[what]()

    async def take(self, what: Any) -> None: ...

    def returns_awaitable(self) -> Any:
        return self.cancel_itself()

    async def alive(self) -> bool:
        return True


def _chained() -> Exception:
    try:
        raise KeyError("inner")
    except KeyError as error:
        outer = RuntimeError("outer")
        outer.__cause__ = error
        return outer


def _local() -> Exception:
    class Local(Exception):
        pass

    return Local("from a function")


ERRORS: dict[str, Any] = {
    "value": lambda: ValueError("bad", 3),
    "key": lambda: KeyError("k"),
    "os": lambda: FileNotFoundError(2, "gone", "a/file"),
    "unicode": lambda: UnicodeDecodeError("utf-8", b"\xff", 0, 1, "bad"),
    "composed": lambda: Composed("luck"),
    "keyword": lambda: Keyword(code=7),
    "chained": _chained,
    "local": _local,
    "holding": Holding,
    "mute": Mute,
    "loud": lambda: Loud("loud"),
    "exit": lambda: SystemExit(3),
    "interrupt": KeyboardInterrupt,
    "generator_exit": GeneratorExit,
    "stop": lambda: StopIteration(5),
    "group": lambda: ExceptionGroup("several", [ValueError("a"), Composed("b")]),
    "broken": lambda: GroupBroken("dp", "a reason"),
    "lost": lambda: PeerLost("trainer", 1, "died", doing="fit"),
    "mismatch": lambda: CollectiveMismatch("dp", 3, [((0,), "sum"), ((1,), "max")]),
    "timeout": lambda: TimeoutError("late"),
}


@pytest.mark.parametrize("method", ["fail", "fail_plainly"])
@pytest.mark.parametrize(
    "what", ["value", "key", "os", "unicode", "composed", "keyword", "chained", "broken", "lost", "mismatch", "timeout"]
)
def test_an_error_arrives_as_its_own_type(what: str, method: str) -> None:
    expected = ERRORS[what]()

    async def main() -> None:
        async with team("memory", Failing) as actors:
            with pytest.raises(type(expected)) as caught:
                await getattr(actors[0], method)(what)
            error = caught.value
            assert type(error) is type(expected)
            assert str(error) == str(expected)
            assert error.args == expected.args
            notes = error.__dict__.pop("__notes__")
            assert error.__dict__ == expected.__dict__
            assert notes == [f"in worker[0].{method}"]
            assert isinstance(error.__cause__, RemoteTraceback)
            assert f"in {method}" in str(error.__cause__)
            assert "_running.py" not in str(error.__cause__)
            if what == "chained":
                assert "KeyError: 'inner'" in str(error.__cause__)
            assert await actors[0].alive()

    asyncio.run(main())


def test_errors_of_classes_that_only_the_actor_knows_arrive(kind: str) -> None:
    async def main() -> None:
        async with team(kind, Failing) as actors:
            with pytest.raises(Exception, match="from a function") as caught:
                await actors[0].fail("local")
            assert type(caught.value).__name__ == "Local"
            with pytest.raises(ExceptionGroup) as several:
                await actors[0].fail("group")
            first, second = several.value.exceptions  # Composed is in a group, where str() does not show it
            assert isinstance(first, ValueError)
            assert isinstance(second, Composed)
            assert (str(second), second.name) == ("no b", "b")

    run(kind, main())


@pytest.mark.parametrize(
    ("what", "name", "text"),
    [
        ("holding", "Holding", "holds a frame"),
        ("loud", "Loud", "loud"),
        ("exit", "SystemExit", "3"),
        ("interrupt", "KeyboardInterrupt", ""),
        ("generator_exit", "GeneratorExit", ""),
    ],
)
@pytest.mark.parametrize("method", ["fail", "fail_plainly"])
def test_what_cannot_travel_arrives_as_remote_error(what: str, name: str, text: str, method: str) -> None:
    async def main() -> None:
        async with team("memory", Failing) as actors:
            with pytest.raises(RemoteError) as caught:
                await getattr(actors[0], method)(what)
            assert caught.value.kind.rpartition(".")[2] == name
            assert text in caught.value.text
            assert caught.value.where == f"worker[0].{method}"
            assert name in str(caught.value.__cause__)
            assert await actors[0].alive()

    asyncio.run(main())


def test_an_error_without_a_text_arrives_too() -> None:
    async def main() -> None:
        async with team("memory", Failing) as actors:
            with pytest.raises(Mute):
                await actors[0].fail("mute")

    asyncio.run(main())


def test_stop_iteration_becomes_what_python_makes_of_it() -> None:
    async def main() -> None:
        async with team("memory", Failing) as actors:
            for method in ("fail", "fail_plainly"):
                with pytest.raises(RuntimeError, match="StopIteration"):
                    await getattr(actors[0], method)("stop")

    asyncio.run(main())


def test_the_remote_traceback_is_shown_with_the_error() -> None:
    async def main() -> None:
        async with team("memory", Failing) as actors:
            with pytest.raises(ValueError, match="bad") as caught:
                await actors[0].fail("value")
        shown = "".join(traceback.format_exception(caught.value))
        assert "raise ERRORS[what]()" in shown
        assert "in worker[0].fail" in shown

    asyncio.run(main())


def test_a_cancellation_that_nobody_asked_for_is_an_error(kind: str) -> None:
    async def main() -> None:
        async with team(kind, Failing) as actors:
            with pytest.raises(RemoteCancelled, match=r"worker\[0\]\.cancel_itself was cancelled on its own side"):
                await actors[0].cancel_itself()
            current = asyncio.current_task()
            assert current is not None
            assert not current.cancelling()

    run(kind, main())


def test_results_and_arguments_that_cannot_travel_say_so(kind: str) -> None:
    async def main() -> None:
        async with team(kind, Failing, 2) as actors:
            with pytest.raises(NotPicklable, match=r"the result of worker\[0\]\.result cannot travel.*generator"):
                await actors[0].result("generator")
            with pytest.raises(NotPicklable, match=r"the result of worker\[0\]\.result.*cannot be put together"):
                await actors[0].result("unloadable")
            with pytest.raises(NotPicklable, match=r"an argument of worker\[0\]\.take cannot travel"):
                await actors[0].take(x for x in ())
            with pytest.raises(NotPicklable, match=r"an argument of worker\[0\]\.take.*cannot be put together"):
                await actors[0].take(Unloadable())
            with pytest.raises(NotPicklable, match=r"an argument of worker\.take cannot travel"):
                await actors.handles.take(x for x in ())
            with pytest.raises(ExceptionGroup, match="ranks 0, 1") as caught:
                await actors.handles.result("unloadable")
            assert all(isinstance(error, NotPicklable) for error in caught.value.exceptions)
            assert await actors.handles.alive() == [True, True]

    run(kind, main())


def test_a_result_that_no_link_carries_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        async with team("memory", Failing) as actors:
            assert await actors[0].alive()
            send, refused = Session.reply_now, []

            def refuse_the_first(*args: Any) -> bool:
                if not refused:
                    refused.append(args)
                    raise ValueError("too many buffers")
                return send(*args)

            monkeypatch.setattr(Session, "reply_now", refuse_the_first)
            with pytest.raises(ValueError, match="too many buffers"):
                await actors[0].alive()
            assert await actors[0].alive()

    asyncio.run(main())


def test_a_plain_method_that_returns_an_awaitable_is_told_so() -> None:
    async def main() -> None:
        async with team("memory", Failing) as actors:
            with pytest.raises(TypeError, match="returned an awaitable; declare it with async def"):
                await actors[0].returns_awaitable()

    asyncio.run(main())


def test_a_failed_broadcast_names_method_role_and_ranks(kind: str) -> None:
    async def main() -> None:
        async with team(kind, Failing, 4) as actors:
            assert await actors.handles.fail_on([]) == [0, 1, 2, 3]
            with pytest.raises(ExceptionGroup, match=r"worker\.hang failed on rank 2 \(1 of 4\)") as caught:
                await actors.handles.hang([2])
            (error,) = caught.value.exceptions
            assert isinstance(error, ValueError)
            assert error.__notes__ == ["in worker[2].hang"]
            with pytest.raises(ExceptionGroup, match=r"worker\.fail_on failed on ranks? ") as caught:
                await actors.handles.fail_on([1, 3])
            for error in caught.value.exceptions:
                assert error.__notes__ == [f"in worker[{str(error)[-1]}].fail_on"]
            assert not any(session.running for d in actors.dispatchers for session in d._sessions.values())

    run(kind, main())


def test_group_broken_is_left_out_where_another_error_explains_it() -> None:
    async def main() -> None:
        async with team("memory", Failing, 2) as actors:
            with pytest.raises(ExceptionGroup) as caught:
                await actors.handles.fail_each.map(["broken", "value"])
            errors = caught.value.exceptions
            assert [type(error) for error in errors] == [ValueError]
            assert caught.value.__notes__ == ["in consequence worker[0].fail_each raised GroupBroken"]
            with pytest.raises(ExceptionGroup) as caught:
                await actors.handles.fail_each("broken")
            assert all(isinstance(error, GroupBroken) for error in caught.value.exceptions)

    asyncio.run(main())


def test_a_handle_for_another_class_is_refused_by_the_actor() -> None:
    class Other(Actor):
        async def other(self) -> None: ...

    async def main() -> None:
        async with team("memory", Failing) as actors:
            target = actors[0]._target
            object.__setattr__(target, "interface", Interface.of(Other))
            with pytest.raises(AttributeError, match=r"worker\[0\] has no method 'other'"):
                await actors[0].other()

    asyncio.run(main())


def test_an_actor_class_with_an_uncallable_method_is_refused() -> None:
    class Bad(Actor):
        def method() -> None: ...  # type: ignore[misc]

    with pytest.raises(TypeError, match=r"Bad\.method takes no self"):
        Interface.of(Bad)


def test_defaults_stay_with_the_actor() -> None:
    class Heavy(Actor):
        async def run(self, array: Any = np.zeros(100_000)) -> None: ...  # noqa: B008

    import pickle

    assert len(pickle.dumps(Interface.of(Heavy))) < 300
    with pytest.raises(NotReady):
        _ = Heavy().rank
