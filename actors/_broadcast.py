"""One call to several actors: all of them return, or the others are cancelled and one error tells who failed."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any, Final

from actors import _fates
from actors import _protocol as protocol
from actors._caller import Failure, connection_to
from collective.errors import GroupBroken, ScopeEnded

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from actors._caller import Call
    from actors._interface import Method
    from actors._target import Target
    from collective import scopes
    from collective.abc import Buffer, Message

SETTLE: Final = 5.0
"""Seconds that a failed or cancelled broadcast waits for its calls to end, and then for groups to be reset."""


async def broadcast(
    targets: Sequence[Target],
    method: Method,
    pickles: Iterable[tuple[bytes, Sequence[Buffer]]],
    scope: scopes.Call | None = None,
) -> list[Any]:
    """Call a method of several actors of one role, with one pickle of arguments each; return results in their order.

    Calls that have one Beside in common have one copy of it in common. What `pickles` is an iterator of is let go of.

    The first failure cancels the other calls; so does cancelling this. Both wait until every call has ended, at most
    SETTLE seconds, and reset the groups that were left broken, before the error or the cancellation goes on. A second
    cancellation ends that waiting.

    Raises:
        ExceptionGroup: what the calls raised, in rank order. ScopeEnded and GroupBroken are left out, and told in a
            note, where another member's error explains them.
    """
    pairs = zip(targets, pickles, strict=True)
    calls = [connection_to(target).begin(method, *pickle, scope) for target, pickle in pairs]
    departures = [asyncio.ensure_future(call.leave()) for call in calls if call.place is not None]
    notes: list[str] = []
    try:
        if not await _all_returned(calls):
            notes = await _wind_up(calls)
    except asyncio.CancelledError:
        await _wind_up(calls)
        raise
    finally:
        for departure in departures:
            departure.cancel()
        for call in calls:
            call.connection.forget(call)
    results, errors = [], {}
    for call in calls:
        if not call.reply.done():
            continue
        outcome = call.outcome()
        if isinstance(outcome, Failure):
            if outcome.error is not None:
                errors[call] = outcome.error
            continue
        try:
            results.append(call.result())
        except Exception as error:  # it cannot be unpickled here
            errors[call] = error
    errors = {call: await _fates.explain(each, call.connection.target) for call, each in errors.items()}
    if errors or len(results) < len(calls):
        raise _error(calls, errors, notes)
    return results


def _failed(reply: Message | Failure) -> bool:
    return isinstance(reply, Failure) or reply.header[0] & protocol.KIND != protocol.RESULT


async def _all_returned(calls: Sequence[Call]) -> bool:
    """Wait until all calls have returned, or one has failed; return which."""
    if not calls:
        return True
    verdict: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
    waiting = len(calls)

    def ended(outcome: Message | Failure) -> None:
        nonlocal waiting
        waiting -= 1
        if not verdict.done():
            if _failed(outcome):
                verdict.set_result(False)
            elif not waiting:
                verdict.set_result(True)

    for call in calls:
        call.awaited = verdict
        call.on_end = ended
        if call.reply.done():
            ended(call.reply.result())
    return await verdict


async def _wind_up(calls: Sequence[Call]) -> list[str]:
    """Cancel what still runs, wait for its end, and reset the groups left broken; return what went wrong with that."""
    for call in calls:
        call.cancel(forget=False)
    _, unsettled = await asyncio.wait([call.reply for call in calls], timeout=SETTLE)
    notes = [
        f"{call.connection.target} had not ended {SETTLE:g} s after it was cancelled"
        for call in calls
        if call.reply in unsettled
    ]
    resets = []
    for call in calls:
        outcome = call.outcome() if call.reply.done() else None
        if isinstance(outcome, Failure) and outcome.broken:
            resets.append(call.connection.begin_reset(outcome.broken))
    if resets:
        notes += await _finish_resets(resets)
    return notes


async def _finish_resets(resets: Sequence[Call]) -> list[str]:
    departures = [asyncio.ensure_future(reset.leave()) for reset in resets if reset.place is not None]
    try:
        await asyncio.wait([reset.reply for reset in resets], timeout=SETTLE)
    finally:
        for departure in departures:
            departure.cancel()
        for reset in resets:
            reset.connection.forget(reset)
    notes = []
    for reset in resets:
        outcome = reset.outcome() if reset.reply.done() else Failure(TimeoutError(f"no answer within {SETTLE:g} s"))
        if isinstance(outcome, Failure):
            notes.append(f"groups that {reset.connection.target} left broken could not be reset: {outcome.error}")
    return notes


def _error(calls: Sequence[Call], errors: dict[Call, Exception], notes: Sequence[str]) -> ExceptionGroup[Exception]:
    role, method = calls[0].connection.target.role, calls[0].method
    causes = {call: error for call, error in errors.items() if not _is_consequence(error)}
    consequences = [call for call in errors if call not in causes] if causes else []
    shown = causes or errors
    failed = ", ".join(str(call.connection.target.rank) for call in shown)
    group = ExceptionGroup(
        f"{role}.{method} failed on rank{'s' if len(shown) > 1 else ''} {failed} ({len(shown)} of {len(calls)})",
        [_noted(error, str(call)) for call, error in shown.items()],
    )
    if consequences:
        raised = ", ".join(f"{call} raised {type(errors[call]).__name__}" for call in consequences)
        group.add_note(f"in consequence {raised}")
    for note in notes:
        group.add_note(note)
    return group


def _is_consequence(error: BaseException) -> bool:
    """Whether another member's failure explains it; of what a task group raises, all."""
    if isinstance(error, BaseExceptionGroup):
        return all(map(_is_consequence, error.exceptions))
    return isinstance(error, GroupBroken | ScopeEnded)


def _noted(error: Exception, where: str) -> Exception:
    """Name the actor in a note, where that did not come along with the error."""
    note = f"in {where}"
    if note not in getattr(error, "__notes__", ()):
        error.add_note(note)
    return error
