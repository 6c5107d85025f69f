"""One member's engine of a group: its epochs, the order of its collectives, and how they end."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from collections import deque
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from collective import scopes
from collective._backends import make_plane
from collective._core import tree
from collective._core.agreement import Agreement, Calls, Metas, Record
from collective._core.fabric import Fabric
from collective._core.mailbox import Mailbox
from collective._core.offload import LONG, offload
from collective._core.operations import Disagreement, Operation
from collective._core.rounds import Rounds
from collective.abc import PlaneContext
from collective.errors import (
    CollectiveError,
    CollectiveMismatch,
    CollectiveTimeout,
    GroupBroken,
    GroupClosed,
    PeerLost,
)
from collective.types import GroupStatistics
from collective.work import Work

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Sequence

    from collective._core.operands import Spec
    from collective.abc import Channel, DataPlane, Endpoint
    from collective.types import Credential, Member

LIBRARY_GRACE = 0.5
"""Seconds that an error of a library below waits for the loss of a peer to explain it."""
ROLL_CALL = 1.0
"""Seconds that members have to say how far they have come when a collective times out."""


@dataclass(slots=True, eq=False)
class _Pending:
    """A collective that is not done."""

    place: int
    operation: Operation
    work: Work[Any]
    timer: asyncio.TimerHandle | None = None
    issued: bool = False


class Epoch:
    """What lives for one epoch of a group: after it, nothing of it is delivered."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.next_place = 0
        self.pending: dict[int, _Pending] = {}
        self.queue: deque[_Pending] = deque()
        self.staging: asyncio.Future[None] | None = None
        self.tasks: set[asyncio.Task[Any]] = set()
        self.fault: Callable[[], Exception] | None = None
        self.mismatch: tuple[int, Calls] | None = None
        self.on_end: list[Callable[[str], None]] = []
        self.agreement: Agreement
        self.mailbox: Mailbox
        self.plane: DataPlane


class Engine:
    """One member's engine of one group.

    :param key: names the group on all members and nowhere else.
    :param backend: a data plane's name.
    """

    def __init__(
        self,
        endpoint: Endpoint,
        members: Sequence[Member],
        rank: int,
        *,
        name: str,
        key: str,
        credential: Credential,
        backend: str,
        timeout: float,
    ) -> None:
        self.loop = asyncio.get_running_loop()
        self.endpoint = endpoint
        self.members = tuple(members)
        self.rank = rank
        self.size = len(members)
        self.name = name
        self.key = key
        self.credential = credential
        self.backend = backend
        self.timeout = timeout
        self.token = f"{key}#{rank}"
        self.closed = False
        self.me = f"rank {rank} ({members[rank]})"
        self._outlived: Callable[[], Exception] | None = None
        self._fabric = Fabric(endpoint, self.members, rank, key=key, credential=credential)
        self._fabric.on_message = self._hear
        self._fabric.on_data = self._take_data
        self._fabric.on_lost = partial(self.lose, tell=True)
        self._rounds = Rounds(rank, self.size, loop=self.loop, post=self._fabric.post)
        self._early: list[Callable[[], None]] = []
        self._lost: dict[int, str] = {}
        self._left: dict[int, int] = {}
        self._resetting: asyncio.Task[None] | None = None
        self._questions = itertools.count()
        self._roll: dict[tuple[int, int], asyncio.Future[int]] = {}
        self._acks: dict[tuple[int, int], asyncio.Future[None]] = {}
        self._epoch = self._make_epoch(0)
        scopes.register(self)

    # ------------------------------------------------------------------ life

    @property
    def epoch(self) -> int:
        """The number of the current epoch."""
        return self._epoch.number

    async def open(self) -> None:
        """Form the group: all members call it. Bounded by nothing but a loss; cancel it to give up."""
        try:
            self._fabric.serve()
            await self._fabric.connect(tree.neighbours(self.rank, self.size))
            await self._epoch.plane.open()
            await self._round("open", 0)
        except BaseException:
            self.abandon()
            raise

    async def aclose(self) -> None:
        """Leave the group. The others' later operations fail; those that this member finished do not."""
        if self.closed:
            return
        self.closed = True
        epoch = self._epoch
        if any(entry.issued for entry in epoch.pending.values()):
            epoch.plane.abandon()
        self._end(epoch, lambda: GroupClosed(self.name, "an operation was pending"), "it was closed")
        if epoch.fault is None:
            self._flood(("leave", epoch.number, epoch.next_place), everyone=True)
            epoch.fault = lambda: GroupClosed(self.name, "an operation")
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(1.0):
                await self._fabric.flush()
        self._fabric.close()
        await epoch.plane.aclose()

    def abandon(self) -> None:
        """Leave the group at once, without a word to the others."""
        if self.closed:
            return
        self.closed = True
        self._break(self._epoch, lambda: GroupClosed(self.name, "an operation was pending"), "it was closed")
        self._fabric.close()

    def fault(self) -> Exception | None:
        """Return the error that every operation raises now, or None."""
        return None if self._epoch.fault is None else self._epoch.fault()

    # ----------------------------------------------------------- collectives

    @property
    def next_place(self) -> int:
        """The place that the next collective takes."""
        return self._epoch.next_place

    def enter_scope(self, work: Work[Any]) -> None:
        """Make a Work that is unfinished at the bad end of its call break the group."""
        scopes.note(work, self)

    def subgroup(self, ranks: Sequence[int], color: int, place: int) -> Engine:
        """Return an engine of a group of some of the members, this one among them; not open yet."""
        return Engine(
            self.endpoint,
            [self.members[rank] for rank in ranks],
            ranks.index(self.rank),
            name=f"{self.name}.split({color})",
            key=f"{self.key}/{self._epoch.number}.{place}.{color}",
            credential=self.credential,
            backend=self.backend,
            timeout=self.timeout,
        )

    def take_place(self) -> int:
        """Take the next place of this member's collectives."""
        place = self._epoch.next_place
        self._epoch.next_place += 1
        return place

    def announce_failed(self, place: int, name: str, error: Exception, where: str) -> None:
        """Let the others learn that this member's call at a place failed its own checks."""
        if self.size == 1 or self._epoch.fault is not None:
            return
        what = f"{name}, which failed with {type(error).__name__}: {error}"
        self._epoch.agreement.announce(place, Record(f"failed on {self.rank}".encode(), what, where, True))

    def submit(self, place: int, operation: Operation, where: str) -> Work[Any]:
        """Announce a collective at a place and return its completion."""
        epoch = self._epoch
        record = operation.record(where)
        work: Work[Any] = Work(f"{record.what} at {where}")
        if epoch.fault is not None:
            work._fail(self._fault_at(epoch, place))
            return work
        pending = _Pending(place, operation, work)
        epoch.pending[place] = pending
        scopes.note(work, self)
        if self.size > 1:
            pending.timer = self.loop.call_later(self.timeout, self._overdue, epoch, pending)
        for rank in list(self._left):
            self._fail_left(epoch, rank)
        epoch.agreement.announce(place, record, operation.meta)
        return work

    def _agreed(self, epoch: Epoch, place: int, metas: Metas) -> None:
        pending = epoch.pending.get(place)
        if pending is None:
            return
        if pending.timer is not None:
            pending.timer.cancel()
        try:
            pending.operation.agree(metas)
        except Disagreement as error:
            what = pending.operation.describe()
            self._mismatch(epoch, place, [([rank], f"{what}: {said}") for rank, said in enumerate(error.said)])
            return
        epoch.queue.append(pending)
        self._pump(epoch)

    def _pump(self, epoch: Epoch) -> None:
        """Issue what was agreed, in order; one whose input takes long to stage holds up those behind it."""
        while epoch.queue and epoch.staging is None:
            pending = epoch.queue[0]
            if pending.operation.stage_bytes > LONG:
                epoch.staging = offload(pending.operation.stage)
                epoch.staging.add_done_callback(partial(self._staged, epoch))
                return
            epoch.queue.popleft()
            try:
                pending.operation.stage()
            except Exception as error:  # out of memory, a device's error: the others wait for this member
                self._library_failed(epoch, pending, error)
                return
            self._issue(epoch, pending)

    def _staged(self, epoch: Epoch, staging: asyncio.Future[None]) -> None:
        epoch.staging = None
        if epoch is not self._epoch or (epoch.fault is not None and not epoch.queue):
            staging.exception()
            return
        pending = epoch.queue.popleft()
        error = staging.exception()
        if error is not None:
            self._library_failed(epoch, pending, error)
            return
        self._issue(epoch, pending)
        self._pump(epoch)

    def _issue(self, epoch: Epoch, pending: _Pending) -> None:
        pending.issued = True
        try:
            completion = pending.operation.issue(epoch.plane)
        except Exception as error:  # as above
            self._library_failed(epoch, pending, error)
            return
        if completion is None:
            self._moved(epoch, pending, None)
        else:
            asyncio.ensure_future(completion).add_done_callback(partial(self._moved, epoch, pending))

    def _moved(self, epoch: Epoch, pending: _Pending, completion: asyncio.Future[Any] | None) -> None:
        if completion is not None:
            if completion.cancelled():
                return
            error = completion.exception()
            if error is not None:
                self._library_failed(epoch, pending, error)
                return
        if pending.work.done():
            return
        if pending.operation.long_finish:
            offload(pending.operation.finish).add_done_callback(partial(self._finished, epoch, pending))
        else:
            finished: asyncio.Future[Any] = self.loop.create_future()
            try:
                finished.set_result(pending.operation.finish())
            except Exception as error:  # this member alone cannot take its result; the others have theirs
                finished.set_exception(error)
            self._finished(epoch, pending, finished)

    def _finished(self, epoch: Epoch, pending: _Pending, finished: asyncio.Future[Any]) -> None:
        epoch.pending.pop(pending.place, None)
        error = finished.exception()
        if error is None:
            pending.work._succeed(finished.result())
        else:
            pending.work._fail(error)

    # ------------------------------------------------------- sends and receives

    def send(self, tensor: Any, spec: Spec, dst: int, tag: int) -> Work[None]:
        """Send a tensor of that spec to a rank."""
        epoch = self._epoch
        if epoch.fault is None and dst in self._left:
            self.lose(dst, _LEFT)
        if epoch.fault is not None:
            return self._failed(f"send(dst={dst}, tag={tag})", epoch.fault())
        return epoch.mailbox.send(tensor, spec, dst, tag)

    def recv(self, src: int, tag: int, out: Any) -> Work[Any]:
        """Receive the next tensor from a rank with a tag."""
        epoch = self._epoch
        if epoch.fault is not None:
            return self._failed(f"recv(src={src}, tag={tag})", epoch.fault())
        work = epoch.mailbox.recv(src, tag, out)
        if src in self._left:
            self._fail_left(epoch, src)
        return work

    def statistics(self) -> GroupStatistics:
        """Return what the group does and holds now."""
        epoch = self._epoch
        return GroupStatistics(
            epoch=epoch.number,
            collectives=epoch.next_place,
            pending_collectives=len(epoch.pending),
            pending_messages=epoch.mailbox.pending,
            buffered_bytes=epoch.mailbox.buffered_bytes,
        )

    def _failed(self, description: str, error: Exception) -> Work[Any]:
        work: Work[Any] = Work(description)
        work._fail(error)
        return work

    # --------------------------------------------------------------- trouble

    def break_everywhere(self, reason: str) -> None:
        """Break the group on every member, until all reset it."""
        if not self.closed and self._epoch.fault is None:
            self._take_break(self._epoch, reason)

    def lose(self, rank: int, cause: str, *, tell: bool = False) -> None:
        """Take note that a member died; everything that is pending raises PeerLost, and every later operation.

        :param tell: whether the other members may not know it yet.
        """
        if self.closed or rank in self._lost or rank == self.rank:
            return
        if rank in self._left and cause != _LEFT:
            return  # it had said goodbye before its link ended
        self._lost[rank] = cause
        member = self.members[rank]

        def error() -> PeerLost:
            return PeerLost(member.role, member.rank, cause, doing=f"work of group {self.name!r}")

        self._break(self._epoch, error, str(error()))
        self._rounds.fail(error)
        for (_, other), ack in self._acks.items():
            if other == rank and not ack.done():
                ack.set_result(None)
        if tell:
            # The neighbours of a dead member tell all the others: its part of the tree is cut off.
            self._flood(("lost", rank, cause), everyone=True)

    def _take_break(self, epoch: Epoch, reason: str) -> None:
        self._break(epoch, lambda: GroupBroken(self.name, reason), reason)
        self._flood(("break", epoch.number, reason))

    def _break(self, epoch: Epoch, error: Callable[[], Exception], why: str) -> None:
        epoch.fault = error
        self._end(epoch, error, why)
        epoch.plane.abandon()

    def end_with_parent(self, parent: str, why: str) -> None:
        """Break for good: the group that this one was split from ended its epoch."""
        if not self.closed:
            reason = f"group {parent!r}, which it was split from, ended its epoch ({why})"
            self._outlived = lambda: GroupBroken(self.name, reason, "reset the parent and split it again")
            self._break(self._epoch, self._outlived, reason)

    def spawn(self, coroutine: Coroutine[Any, Any, None]) -> None:
        """Run a coroutine that is cancelled when the epoch ends."""
        self._spawn(self._epoch, coroutine)

    def at_end_of_epoch(self, callback: Callable[[str], None]) -> None:
        """Call back with the reason when the epoch ends; at once, if it has."""
        if self._epoch.fault is not None:
            callback(str(self._epoch.fault()))
        else:
            self._epoch.on_end.append(callback)

    def _end(self, epoch: Epoch, error: Callable[[], Exception], why: str) -> None:
        """Fail what is pending in an epoch."""
        epoch.agreement.end()
        epoch.queue.clear()
        pending, epoch.pending = epoch.pending, {}
        for entry in pending.values():
            if entry.timer is not None:
                entry.timer.cancel()
            entry.work._fail(error())
        epoch.mailbox.end(error)
        for task in epoch.tasks:
            task.cancel()
        for callback in epoch.on_end:
            callback(why)
        epoch.on_end.clear()

    def _fault_at(self, epoch: Epoch, place: int) -> Exception:
        if epoch.mismatch is not None and epoch.mismatch[0] == place:
            return CollectiveMismatch(self.name, *epoch.mismatch)
        assert epoch.fault is not None
        return epoch.fault()

    def _mismatch(self, epoch: Epoch, place: int, calls: Calls) -> None:
        epoch.mismatch = (place, calls)
        epoch.agreement.end()
        reason = f"its members disagreed at place {place}"
        entry = epoch.pending.pop(place, None)
        if entry is not None:
            if entry.timer is not None:
                entry.timer.cancel()
            entry.work._fail(CollectiveMismatch(self.name, place, calls))
        # What was agreed before this place still completes, on every member; nothing of it is abandoned before.
        before = [entry.work for entry in epoch.pending.values() if entry.place < place]
        later = {number: epoch.pending.pop(number) for number in list(epoch.pending) if number > place}
        for entry in later.values():
            if entry.timer is not None:
                entry.timer.cancel()
            entry.work._fail(GroupBroken(self.name, reason))
        epoch.fault = lambda: GroupBroken(self.name, reason)
        if not before:
            self._break(epoch, epoch.fault, reason)
        else:
            epoch.mailbox.end(epoch.fault)

    def _library_failed(self, epoch: Epoch, pending: _Pending, error: BaseException) -> None:
        """Break the group for an error below, unless the loss of a peer explains it within a moment."""
        if epoch is not self._epoch or pending.work.done():
            return

        def tell() -> None:
            if epoch is self._epoch and not pending.work.done():
                epoch.pending.pop(pending.place, None)
                pending.work._fail(error)
                self.break_everywhere(f"{pending.work.description} failed on {self.me}: {error}")

        self.loop.call_later(LIBRARY_GRACE, tell)

    def _transfer_failed(self, epoch: Epoch, rank: int, error: Exception) -> None:
        if epoch is self._epoch and epoch.fault is None:
            self.lose(rank, str(error), tell=True)

    # ------------------------------------------------------------- timeouts

    def _overdue(self, epoch: Epoch, pending: _Pending) -> None:
        if epoch is self._epoch and epoch.fault is None:
            self._spawn(epoch, self._call_roll(epoch, pending))

    async def _call_roll(self, epoch: Epoch, pending: _Pending) -> None:
        """Ask every member how far it has come, and break the group naming those that are behind."""
        question = next(self._questions)
        answers = {rank: self.loop.create_future() for rank in self._others()}
        self._roll.update({(question, rank): answer for rank, answer in answers.items()})
        for rank in answers:
            self._fabric.post(rank, ("roll?", question, epoch.number))
        try:
            await asyncio.wait(answers.values(), timeout=ROLL_CALL)
        finally:
            for rank in answers:
                del self._roll[question, rank]
        if pending.work.done() or epoch.fault is not None:
            return
        behind = [rank for rank, answer in answers.items() if not answer.done() or answer.result() <= pending.place]
        if behind:
            self._flood(("timeout", epoch.number, pending.work.description, behind), everyone=True)
            self._time_out(epoch, pending.work.description, behind)
        else:  # all have come by now: the verdict is on its way
            pending.timer = self.loop.call_later(ROLL_CALL, self._overdue, epoch, pending)

    def _others(self) -> list[int]:
        return [rank for rank in range(self.size) if rank != self.rank]

    def _time_out(self, epoch: Epoch, description: str, behind: list[int]) -> None:
        missing = [f"rank {rank} ({self.members[rank]})" for rank in behind]
        reason = f"{description} timed out after {self.timeout:g} s, waiting for {', '.join(missing) or 'a member'}"
        for entry in epoch.pending.values():
            entry.work._fail(CollectiveTimeout(self.name, entry.work.description, self.timeout, missing))
        self._break(epoch, lambda: GroupBroken(self.name, reason), reason)

    # --------------------------------------------------------------- resets

    async def reset(self) -> None:
        """Drop what is pending and start a new epoch, together with every other member."""
        if self.closed:
            raise GroupClosed(self.name, "reset()")
        if self._outlived is not None:
            raise self._outlived()
        if self._resetting is None:
            self._resetting = self.loop.create_task(self._reset())
            self._resetting.add_done_callback(self._reset_done)
        await asyncio.shield(self._resetting)

    def _reset_done(self, task: asyncio.Task[None]) -> None:
        self._resetting = None
        if not task.cancelled():
            task.exception()  # whoever awaits reset() is told

    async def _reset(self) -> None:
        old = self._epoch
        if old.fault is None:
            self._take_break(old, f"{self.me} called reset()")
        self._raise_lost()
        if old.mismatch is not None:
            self._break(old, lambda: GroupBroken(self.name, "it was reset"), "it was reset")
        number = old.number + 1
        await self._round("reset", number)
        self._left.clear()
        epoch = self._epoch = self._make_epoch(number)
        early, self._early = self._early, []
        for deliver in early:
            deliver()
        try:
            await epoch.plane.open()
        except CollectiveError as error:
            self._raise_lost()
            self._take_break(epoch, f"it could not be opened again on {self.me}: {error}")
            raise
        await self._round("open", number)

    async def reset_everywhere(self) -> None:
        """Have every member reset, and return once all have. Does nothing where the group is not broken."""
        if self._epoch.fault is None and self._resetting is None:
            return
        self._raise_lost()
        target = self._epoch.number + (self._epoch.fault is not None)
        question = next(self._questions)
        acks = {rank: self.loop.create_future() for rank in self._others()}
        self._acks.update({(question, rank): ack for rank, ack in acks.items()})
        try:
            for rank in acks:
                self._fabric.post(rank, ("reset!", question, target))
            await self._reset_to(target)
            if acks:
                await asyncio.wait(acks.values(), timeout=self.timeout)
        finally:
            for rank in acks:
                del self._acks[question, rank]
        self._raise_lost()

    async def _reset_to(self, target: int) -> None:
        while self._epoch.number < target or self._resetting is not None:
            await self.reset()

    async def _reset_for(self, rank: int, question: int, target: int) -> None:
        with contextlib.suppress(CollectiveError):  # the asking member's own reset raises the same
            await self._reset_to(target)
        self._fabric.post(rank, ("reset.", question))

    async def _round(self, phase: str, number: int) -> None:
        """Wait until every member has come to this point."""
        self._raise_lost()
        try:
            async with asyncio.timeout(self.timeout):
                await self._rounds.join(phase, number)
        except TimeoutError:
            missing = [f"rank {rank} ({self.members[rank]})" for rank in self._rounds.missing(phase, number)]
            raise CollectiveTimeout(self.name, f"{phase} of epoch {number}", self.timeout, missing) from None

    def _raise_lost(self) -> None:
        for rank, cause in self._lost.items():
            member = self.members[rank]
            raise PeerLost(member.role, member.rank, cause, doing=f"reset of group {self.name!r}")

    # -------------------------------------------------------------- messages

    def _hear(self, src: int, message: tuple[Any, ...], buffers: list[memoryview]) -> None:
        kind = message[0]
        if kind == "lost":
            self.lose(message[1], message[2])
        elif kind == "round":
            self._rounds.hear(src, message)
        elif kind == "roll?":
            _, question, number = message
            reached = self._epoch.next_place if number == self._epoch.number else 0
            self._fabric.post(src, ("roll.", question, reached))
        elif kind == "roll.":
            answer = self._roll.get((message[1], src))
            if answer is not None and not answer.done():
                answer.set_result(message[2])
        elif kind == "reset!":
            self._fabric.spawn(self._reset_for(src, message[1], message[2]))
        elif kind == "reset.":
            ack = self._acks.get((message[1], src))
            if ack is not None and not ack.done():
                ack.set_result(None)
        else:
            self._hear_in_epoch(src, message, buffers)

    def _hear_in_epoch(self, src: int, message: tuple[Any, ...], buffers: list[memoryview]) -> None:
        kind, number, *rest = message
        epoch = self._epoch
        if number > epoch.number:
            self._early.append(partial(self._hear_in_epoch, src, message, buffers))
        elif number < epoch.number or epoch.fault is not None:
            return
        elif kind == "agree":
            epoch.agreement.hear(rest[0])
        elif kind == "mail":
            epoch.mailbox.hear(src, rest[0], buffers)
        elif kind == "plane":
            epoch.plane.hear(src, rest[0])
        elif kind == "break":
            self._take_break(epoch, rest[0])
        elif kind == "timeout":
            self._time_out(epoch, rest[0], rest[1])
        elif kind == "leave":
            self._left[src] = rest[0]
            self._fail_left(epoch, src)

    def _fail_left(self, epoch: Epoch, rank: int) -> None:
        """Fail what needs a member that has closed its group."""
        if epoch.fault is None and (
            any(place >= self._left[rank] for place in epoch.pending) or epoch.mailbox.waits_for(rank)
        ):
            self.lose(rank, _LEFT)

    def _take_data(self, src: int, ticket: tuple[int, int], channel: Channel) -> None:
        number, place = ticket
        if number == self._epoch.number and self._epoch.fault is None:
            self._epoch.mailbox.take_data(src, place, channel)
        else:
            self._fabric.forget(channel)  # it was pulled in an epoch that has ended

    def _flood(self, message: tuple[Any, ...], *, everyone: bool = False) -> None:
        ranks = range(self.size) if everyone else tree.neighbours(self.rank, self.size)
        for rank in ranks:
            if rank != self.rank and rank not in self._lost:
                self._fabric.post(rank, message)

    def _make_epoch(self, number: int) -> Epoch:
        epoch = Epoch(number)
        post = self._fabric.post
        epoch.agreement = Agreement(
            self.rank,
            self.size,
            loop=self.loop,
            post=lambda rank, message: post(rank, ("agree", number, message)),
            on_agreed=partial(self._agreed, epoch),
            on_mismatch=partial(self._mismatch, epoch),
        )
        epoch.mailbox = Mailbox(
            self.rank,
            epoch=number,
            fabric=self._fabric,
            tell=lambda rank, message, buffers: post(rank, ("mail", number, message), buffers),
            spawn=partial(self._spawn, epoch),
            on_failure=partial(self._transfer_failed, epoch),
        )
        epoch.plane = make_plane(
            self.backend,
            PlaneContext(
                group=self.name,
                key=f"{self.key}@{number}",
                rank=self.rank,
                size=self.size,
                tell=lambda rank, message: post(rank, ("plane", number, message)),
                timeout=self.timeout,
            ),
        )
        return epoch

    def _spawn(self, epoch: Epoch, coroutine: Coroutine[Any, Any, None]) -> None:
        task = self._fabric.spawn(coroutine)
        epoch.tasks.add(task)
        task.add_done_callback(epoch.tasks.discard)


_LEFT = "it closed the group"
