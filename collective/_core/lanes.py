"""Collectives that others than the members call, such as those over references: who orders them, and where they run.

Each call comes to every member by itself. Rank 0 takes the calls one after another, in the order in which they came to
it. For each it asks all members, down the tree of announcements, to prepare: to look at what they have and to take the
memory that they need. Their answers climb. Only where all are ready the call is issued, on all members at that place of
the one order; else it is refused everywhere with one error, and nothing has moved.

What is issued is in a scope of its own, named by the call: so it never pairs with what members call themselves, nor
waits for that, and one that fails breaks nothing else.

    down the tree    ("go", number, call)       prepare this call
                     ("end", number, error)     issue it, or refuse it
    up the tree      ("vote", number, error)    all below are ready, or one is not
"""

from __future__ import annotations

import asyncio
import hashlib
import pickle
from collections import deque
from contextvars import Context
from typing import TYPE_CHECKING, Any, TypeAlias

from collective._core import tree
from collective.errors import CollectiveError, CollectiveTimeout, GroupBroken
from collective.scopes import ROOT, Scope

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Sequence

    from collective._core.engine import Engine
    from collective._core.operations import Operation
    from collective.work import Work

    Prepare: TypeAlias = Callable[[Engine], Coroutine[Any, Any, Sequence[Operation]]]

LATER = 1.0
"""Seconds beyond the group's timeout after which rank 0 gives up on members that do not answer. Others with members
below them do so a little sooner, the deeper the sooner: each names those whom it waits for itself."""


class _Call:
    """A call that has come to this member. `result` is a list of what its operations give."""

    def __init__(self, what: str, where: str, prepare: Prepare) -> None:
        self.what = what
        self.where = where
        self.prepare = prepare
        self.result: asyncio.Future[list[Any]] = asyncio.get_running_loop().create_future()

    def fail(self, error: Exception) -> None:
        if not self.result.done():
            self.result.set_exception(error)
            self.result.exception()  # its caller may be gone

    def succeed(self, works: Sequence[Work[Any]]) -> None:
        """Take the results, once all are there."""
        if self.result.done() or not all(work.done() for work in works):
            return
        errors = [error for work in works if (error := work.exception()) is not None]
        if errors:
            self.fail(errors[0] if isinstance(errors[0], Exception) else CollectiveError(str(errors[0])))
        else:
            self.result.set_result([work.result() for work in works])


class _Turn:
    """The call that is being prepared now."""

    def __init__(self, number: int, call: bytes, waiting: set[int]) -> None:
        self.number = number
        self.call = call
        self.waiting = waiting
        """Who has not answered: this member, and those below it."""
        self.operations: Sequence[Operation] = ()
        self.preparing: asyncio.Task[None] | None = None
        self.timer: asyncio.TimerHandle | None = None
        self.answered = False


class Lane:
    """One member's part in one epoch.

    :param post: post a message to another rank's lane of the same epoch.
    """

    def __init__(self, engine: Engine, *, post: Callable[[int, tuple[Any, ...]], None]) -> None:
        self._engine = engine
        self._post = post
        self._rank = engine.rank
        self._children = tree.children(engine.rank, engine.size)
        self._patience = engine.timeout + LATER / (1 + tree.depth(engine.rank))
        self._calls: dict[bytes, _Call] = {}
        self._line: deque[bytes] = deque()
        self._number = 0
        self._turn: _Turn | None = None
        self._ended: Callable[[], Exception] | None = None

    async def run(self, call: bytes, what: str, where: str, prepare: Prepare) -> list[Any]:
        """Take part in a call, and return what its operations give.

        Cancelled on rank 0 before it is issued, it is withdrawn on all members; else it goes on, and nobody gets what
        comes of it. A caller that gives up therefore cancels it on all.

        :param call: names the call, on all members.
        :param what: what it is, for people, and `where` in whose code.
        :param prepare: is given the group's engine and returns this member's operations, of the same kinds on all
            members; an exception refuses the call on all of them. Not called where another had refused it before.

        Raises:
            The error of the member that refused it, and what operations raise.
        """
        self._check()
        entry = self._calls[call] = _Call(what, where, prepare)
        if self._rank == 0:
            self._line.append(call)
            self._advance()
        elif self._turn is not None and self._turn.call == call:
            self._prepare(self._turn, entry)
        try:
            await asyncio.wait([entry.result])
            return entry.result.result()
        except asyncio.CancelledError:
            self._withdraw(call)
            raise
        finally:
            del entry, prepare  # an error has this frame in its traceback, and would keep itself and its tensors

    def hear(self, message: tuple[Any, ...]) -> None:
        """Take a message of another member's lane."""
        kind, number = message[:2]
        turn = self._turn
        if self._ended is not None:
            return
        if kind == "go":
            self._begin(number, *message[2:])
        elif turn is None or turn.number != number:
            return  # an answer that is not waited for any more
        elif kind == "end":
            self._end(turn, message[2])
        else:
            self._take_vote(turn, *message[2:])

    def end(self, error: Callable[[], Exception]) -> None:
        """The epoch has ended: every call fails, each with an error of its own."""
        if self._ended is not None:
            return
        self._ended = error
        turn, self._turn = self._turn, None
        if turn is not None:
            self._dismiss(turn)
        calls, self._calls = self._calls, {}
        for entry in calls.values():
            entry.fail(error())
        self._line.clear()

    def _check(self) -> None:
        """Raise what ended the group, or this epoch of it."""
        fault = self._engine.fault() if self._ended is None else self._ended()
        try:
            if fault is not None:
                raise fault
        finally:
            del fault  # as in `run`

    # ------------------------------------------------------------------ the order

    def _advance(self) -> None:
        """On rank 0: have the next call in line prepared."""
        while self._turn is None and self._line and self._ended is None:
            self._number += 1
            self._begin(self._number, self._line.popleft())

    def _begin(self, number: int, call: bytes) -> None:
        turn = self._turn = _Turn(number, call, {self._rank, *self._children})
        for child in self._children:
            self._post(child, ("go", number, call))
        if self._rank == 0 or self._children:
            turn.timer = self._engine.loop.call_later(self._patience, self._overdue, turn)
        entry = self._calls.get(call)
        if entry is not None:
            self._prepare(turn, entry)

    def _prepare(self, turn: _Turn, entry: _Call) -> None:
        # In a context of its own: it is nobody's call, whose end would break the group.
        context = Context()
        turn.preparing = self._engine.loop.create_task(self._get_ready(turn, entry), context=context)

    async def _get_ready(self, turn: _Turn, entry: _Call) -> None:
        error: Exception | None = None
        try:
            turn.operations = await entry.prepare(self._engine)
        except Exception as failure:
            error = failure
        self._answer(turn, error)

    def _answer(self, turn: _Turn, error: Exception | None) -> None:
        """Give this member's own vote."""
        if error is not None:
            error = error.with_traceback(None)  # as in `run`
            error.add_note(f"on {self._engine.me}, for all members of group {self._engine.name!r}: nothing was moved")
        self._take_vote(turn, self._rank, _portable(error))

    def _take_vote(self, turn: _Turn, src: int, error: Exception | None) -> None:
        if turn is not self._turn or turn.answered:
            return
        turn.waiting.discard(src)
        if error is None and turn.waiting:
            return
        turn.answered = True
        if self._rank == 0:
            self._end(turn, error)
        else:
            self._post(tree.parent(self._rank), ("vote", turn.number, self._rank, error))

    def _end(self, turn: _Turn, error: Exception | None) -> None:
        for child in self._children:
            self._post(child, ("end", turn.number, error))
        self._turn = None
        entry = self._calls.pop(turn.call, None)
        if error is None:
            assert entry is not None
            self._issue(turn, entry)
        elif entry is not None:
            entry.fail(error)
        self._dismiss(turn)
        if self._rank == 0:
            self._advance()

    def _dismiss(self, turn: _Turn) -> None:
        """Stop what prepares it, and let go of what was prepared."""
        if turn.timer is not None:
            turn.timer.cancel()
        if turn.preparing is not None and turn.preparing is not asyncio.current_task():
            turn.preparing.cancel()
        turn.operations, turn.preparing = (), None

    def _issue(self, turn: _Turn, entry: _Call) -> None:
        operations, engine = turn.operations, self._engine
        root = hashlib.blake2b(turn.call, digest_size=ROOT).digest()
        scope = Scope(root, root, entry.what)
        # In a context of its own, as above.
        works = Context().run(lambda: [engine.submit(scope, each, entry.where) for each in operations])
        for work in works:
            work.add_done_callback(lambda _: entry.succeed(works))
        entry.succeed(works)

    def _withdraw(self, call: bytes) -> None:
        """The caller has given up."""
        turn = self._turn
        if call in self._line:
            self._line.remove(call)
        elif turn is not None and turn.call == call:
            # Rank 0 says for all: the caller has told that, too. What comes too late is issued, and nobody gets it.
            if self._rank == 0:
                # A consequence, which tells nobody why: who calls members leaves GroupBroken out beside other errors.
                reason = "the caller of a collective over references has given up"
                self._end(turn, GroupBroken(self._engine.name, reason, "call it again"))
            return
        self._calls.pop(call, None)

    def _overdue(self, turn: _Turn) -> None:
        if turn is not self._turn or turn.answered:
            return
        entry = self._calls.get(turn.call)
        what = entry.what if entry is not None else "a collective"
        missing = [self._engine.name_of(rank) for rank in sorted(turn.waiting)]
        self._take_vote(turn, self._rank, CollectiveTimeout(self._engine.name, what, self._patience, missing))


def _portable(error: Exception | None) -> Exception | None:
    """Return an error that goes to the other members: itself, where it can be pickled."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:  # whatever its __reduce__ raises: its name and text must do
        told = CollectiveError(f"{type(error).__name__}: {error}")
        for note in getattr(error, "__notes__", ()):
            told.add_note(note)
        return told
    return error
