"""Calls that wait for each other in a circle: found by asking along the calls, and opened.

A call waits for its actor where that is still in its `setup`, or where other calls hold all of its worker threads. If
these wait in turn, by way of any number of actors, for the call itself, none of them ever goes on. So an actor with a
call that has waited for a while asks the actors that its own code waits for what they wait for (as Chandy, Misra and
Haas do: "Distributed deadlock detection", 1983); each asks on, with the way so far, and a circle is closed where the
way comes back to where it has been. What is found stays true: who waits in a circle does not go on by itself.

The youngest call of the circle opens it: one that waits for a `setup` is run before that has ended, else one that waits
for a thread fails.
"""

from __future__ import annotations

import asyncio
import inspect
import json
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from actors.errors import ActorError
from collective.errors import LinkError, PeerLost

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from actors._caller import Call, Connection
    from collective.abc import Endpoint

_ANSWER: Final = 5.0
"""Seconds that another actor is given to answer; without an answer no circle is found, and one asks again."""


class Held(NamedTuple):
    """A call that waits for its actor.

    :param place: what it waits for, unique among all actors.
    :param in_setup: whether that is the end of `setup`; else a worker thread.
    :param since: when it came, in nanoseconds.
    :param key: finds it again on its actor.
    :param call: it, and `behind` the calls that are before it, for people.
    """

    place: str
    in_setup: bool = False
    since: int = 0
    key: int = 0
    call: str = ""
    actor: str = ""
    behind: tuple[str, ...] = ()


def pack(number: int, way: Sequence[Held]) -> bytes:
    """Spell the question what a call waits for."""
    return json.dumps((number, way)).encode()


def unpack(data: Any) -> tuple[int, list[Held]]:
    """Read the question, or the answer."""
    number, way = json.loads(bytes(data))
    return number, [Held._make([*each[:-1], tuple(each[-1])]) for each in way]


def youngest(circle: Sequence[Held]) -> Held:
    """Return the call that opens a circle."""
    return max(circle, key=lambda held: (held.in_setup, held.since, held.place, held.key))


def describe(circle: Sequence[Held]) -> str:
    """Tell people what waits for what."""
    return "; ".join(
        f"{held.call}() waits for {held.actor}, whose worker threads are all held by {', '.join(held.behind)}"
        for held in circle
    )


async def circle_through(tasks: Sequence[asyncio.Task[Any]], endpoint: Endpoint, way: Sequence[Held]) -> list[Held]:
    """Return the calls of a circle that each of these tasks is in, by what it waits for; none where one is in none.

    :param endpoint: where their calls go out.
    :param way: how the question came here.
    """
    found: list[Held] = []
    for task in tasks:
        for call in _awaited(task, endpoint):
            if circle := await _ask(call, way):
                found += circle
                break
        else:
            return []
    return found


async def _ask(call: Call, way: Sequence[Held]) -> list[Held]:
    if not call.connection.live:
        return []
    question = call.connection.begin_question(pack(call.number, way))
    try:
        async with asyncio.timeout(_ANSWER):
            await question.leave()
            await question.reply
        return unpack(question.result())[1]
    except (TimeoutError, LinkError, PeerLost, ActorError):  # the call itself will tell
        return []
    finally:
        call.connection.forget(question)


def _awaited(task: asyncio.Task[Any], endpoint: Endpoint) -> list[Call]:
    """Return the calls that a task cannot go on without."""
    connections: dict[str, Connection] = endpoint.__dict__.get("_gangline_connections", {})
    calls: dict[object, list[Call]] = {}
    for connection in connections.values():
        for call in connection.calls:
            calls.setdefault(call.awaited, []).append(call)
        for call, reader in connection.readers.items():
            calls.setdefault(reader, []).append(call)
    return [call for future in _futures(task) for call in calls.get(future, ())]


def _futures(task: asyncio.Task[Any]) -> Iterator[object]:
    """Yield the futures that a task awaits: itself, by a task that it awaits, by `gather`, or by a TaskGroup.

    asyncio says so in private names only, until Python 3.14.
    """
    todo: list[Any] = [task]
    while todo:
        each = todo.pop()
        if each.done():
            continue
        yield each
        if isinstance(each, asyncio.Task):
            waiter = getattr(each, "_fut_waiter", None)
            todo += [waiter] if waiter is not None else []
            todo += _task_group_of(each)
        else:
            todo += getattr(each, "_children", ())


def _task_group_of(task: asyncio.Task[Any]) -> list[asyncio.Task[Any]]:
    """Return the tasks of the TaskGroup whose end a task waits for."""
    coroutine: Any = task.get_coro()
    while inspect.iscoroutine(inner := getattr(coroutine, "cr_await", None)):
        coroutine = inner
    frame = getattr(coroutine, "cr_frame", None)
    owner = frame.f_locals.get("self") if frame is not None else None
    return list(getattr(owner, "_tasks", ())) if isinstance(owner, asyncio.TaskGroup) else []
