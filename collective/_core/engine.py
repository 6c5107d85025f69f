"""One member's engine of a group: its epochs, the order of its collectives, and how they end."""

from __future__ import annotations

import asyncio
import contextlib
import math
from functools import partial
from typing import TYPE_CHECKING, Any

from collective import scopes, tensors
from collective._backends import settle
from collective._core import rollcall, tree
from collective._core.agreement import Briefs, Calls, Metas, Record
from collective._core.epoch import Epoch
from collective._core.fabric import Fabric
from collective._core.operations import Disagreement, Operation
from collective._core.pipeline import LIBRARY_GRACE, Pending
from collective._core.resets import Resets
from collective._core.rollcall import RollCall
from collective.abc import Message
from collective.errors import (
    CollectiveMismatch,
    CollectiveTimeout,
    GroupBroken,
    GroupClosed,
    LinkBroken,
    LinkClosed,
    PeerLost,
)
from collective.types import GroupStatistics
from collective.work import Work

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Sequence

    from collective._core.operands import Spec
    from collective.abc import Channel, Endpoint
    from collective.types import Credential, Member


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
        self.backend = settle(backend, [member.address.host for member in members])
        self.timeout = timeout
        self.token = f"{key}#{rank}"
        self.closed = False
        self.me = f"rank {rank} ({members[rank]})"
        self._outlived: Callable[[], Exception] | None = None
        self.fabric = Fabric(endpoint, self.members, rank, key=key, credential=credential)
        self.fabric.on_message = self._hear
        self.fabric.on_data = self._take_data
        self.fabric.on_lost = self.lose
        self.fabric.on_own_end = self.abandon
        self._early: list[Callable[[], None]] = []
        self._lost: dict[int, str] = {}
        self._left: dict[int, int] = {}
        self._resets = Resets(self)
        self._roll = RollCall(self.fabric.post)
        self.current = Epoch(0, self)
        scopes.register(self)

    # ------------------------------------------------------------------ life

    @property
    def epoch(self) -> int:
        """The number of the current epoch."""
        return self.current.number

    async def open(self) -> None:
        """Form the group: all members call it. Cancel it to give up; a call that raises has abandoned the group."""
        try:
            self.fabric.serve()
            await asyncio.gather(*map(self._reach, tree.neighbours(self.rank, self.size)))
            await self._resets.open()
        except BaseException:
            self.abandon()
            raise

    async def _reach(self, rank: int) -> None:
        try:
            await self.fabric.connect(rank)
        except LinkBroken as error:
            raise self._peer_lost(rank, str(error)) from error

    async def aclose(self) -> None:
        """Leave the group. The others' later operations fail; those that this member finished do not."""
        if self.closed:
            return
        self.closed = True
        epoch = self.current
        done_before = min(epoch.pending, default=epoch.next_place)
        if any(entry.issued for entry in epoch.pending.values()):
            epoch.plane.abandon()
        epoch.end(lambda: GroupClosed(self.name, "an operation was pending"), "it was closed")
        epoch.fault = epoch.fault or (lambda: GroupClosed(self.name, "an operation"))
        if not self._lost:  # else the group is broken on all, for as long as it lives
            self._flood(("leave", epoch.number, done_before), everyone=True)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(1.0):
                await self.fabric.flush()
        self.fabric.close()
        await epoch.plane.aclose()

    def abandon(self) -> None:
        """Leave the group at once, without a word to the others."""
        if self.closed:
            return
        self.closed = True
        self._break(self.current, lambda: GroupClosed(self.name, "an operation was pending"), "it was closed")
        self.fabric.close()

    def fault(self) -> Exception | None:
        """Return the error that every operation raises now, or None."""
        return None if self.current.fault is None else self.current.fault()

    # ----------------------------------------------------------- collectives

    @property
    def hosts(self) -> Sequence[str] | None:
        """The host of each rank; None where all are on one."""
        named = [member.address.host for member in self.members]
        return named if len(set(named)) > 1 else None

    @property
    def next_place(self) -> int:
        """The place that the next collective takes."""
        return self.current.next_place

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
            key=f"{self.key}/{self.current.number}.{place}.{color}",
            credential=self.credential,
            backend=self.backend,
            timeout=self.timeout,
        )

    def companion(self, generation: int) -> Engine:
        """Return an engine of a group of the same members, for what others than they call; not open yet."""
        return Engine(
            self.endpoint,
            self.members,
            self.rank,
            name=self.name,
            key=f"{self.key}/{self.current.number}.lane.{generation}",
            credential=self.credential,
            backend=self.backend,
            timeout=self.timeout,
        )

    def take_place(self) -> int:
        """Take the next place of this member's collectives."""
        place = self.current.next_place
        self.current.next_place += 1
        return place

    def announce_failed(self, place: int, name: str, error: Exception, where: str) -> None:
        """Let the others learn that this member's call at a place failed its own checks."""
        epoch = self.current
        if self.size == 1 or epoch.refuses(place):
            return
        what = f"{name}, which failed with {type(error).__name__}: {error}"
        epoch.announce(place, Record(f"failed on {self.rank}".encode(), what, where, True))

    def submit(self, place: int, operation: Operation, where: str) -> Work[Any]:
        """Announce a collective at a place and return its completion."""
        epoch = self.current
        record = operation.record(where)
        work: Work[Any] = Work(f"{record.what} at {where}")
        if epoch.refuses(place):
            work._fail(self._fault_at(epoch, place))
            return work
        pending = Pending(place, operation, work)
        epoch.pending[place] = pending
        for rank in list(self._left):
            self._fail_left(epoch, rank)
        epoch.announce(place, record, operation.meta, operation.brief() if epoch.shows_briefs else None)
        if not work.done():
            scopes.note(work, self)
            if not pending.agreed:
                pending.timer = self.loop.call_later(self.timeout, self._overdue, epoch, pending)
        return work

    def on_agreed(self, epoch: Epoch, place: int, metas: Metas, briefs: Briefs = None) -> None:
        """All members agreed on a place."""
        pending = epoch.pending.get(place)
        if pending is None:
            return
        pending.agreed = True
        if pending.timer is not None:
            pending.timer.cancel()
        try:
            pending.operation.agree(metas)
        except Disagreement as error:
            what = pending.operation.describe()
            self.on_mismatch(epoch, place, [([rank], f"{what}: {said}") for rank, said in enumerate(error.said)])
            return
        if briefs is not None and pending.operation.is_settled_by(briefs):
            epoch.pipeline.settle(pending, briefs)
        else:
            epoch.pipeline.add(pending)

    # ------------------------------------------------------- sends and receives

    def send(self, tensor: Any, spec: Spec, dst: int, tag: int) -> Work[None]:
        """Send a tensor of that spec to a rank."""
        epoch = self.current
        if epoch.fault is not None:
            return self._failed(f"send(dst={dst}, tag={tag})", epoch.fault())
        if dst in self._left:
            return self._failed(f"send(dst={dst}, tag={tag})", self._peer_lost(dst, _LEFT))
        return epoch.mailbox.send(tensor, spec, dst, tag)

    def recv(self, src: int, tag: int, out: Any) -> Work[Any]:
        """Receive the next tensor from a rank with a tag."""
        epoch = self.current
        if epoch.fault is not None:
            return self._failed(f"recv(src={src}, tag={tag})", epoch.fault())
        work = epoch.mailbox.recv(src, tag, out)
        if src in self._left:
            self._fail_left(epoch, src)
        return work

    def empty(self, shape: tuple[int, ...], dtype: Any) -> Any:
        """Return a new array in memory of the data plane."""
        kind, name = tensors.kind_and_dtype(dtype)
        host_dtype = tensors.numpy_dtype(name)
        memory = self.current.plane.empty(math.prod(shape) * host_dtype.itemsize)
        return tensors.from_host(memory.view(host_dtype).reshape(shape), kind, dtype=name)

    def statistics(self) -> GroupStatistics:
        """Return what the group does and holds now."""
        epoch = self.current
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
        if not self.closed and not self.current.broken:
            self._take_break(self.current, reason)

    def lose(self, rank: int, cause: str) -> None:
        """Take note that a member died; everything that is pending raises PeerLost, and every later operation."""
        if self.closed or rank in self._lost or rank == self.rank:
            return
        if rank in self._left:
            return  # it had said goodbye before its link ended
        self._lost[rank] = cause
        error = partial(self._peer_lost, rank, cause)
        self._break(self.current, error, str(error()))
        self._resets.lose(rank, error)
        if len(self._lost) == 1:
            # Each part of the tree that the dead cut off has a neighbour of theirs in it, whose link to them ended. The
            # first loss breaks the group for all: telling of more would cost a message a pair where a gang ends.
            self._flood(("lost", rank, cause))

    def _peer_lost(self, rank: int, cause: str) -> PeerLost:
        member = self.members[rank]
        return PeerLost(member.role, member.rank, cause, doing=f"work of group {self.name!r}")

    def _take_break(self, epoch: Epoch, reason: str) -> None:
        def error() -> GroupBroken:
            return GroupBroken(self.name, reason)

        self._break(epoch, error, reason)
        self._resets.fail(error)
        self._flood(("break", epoch.number, reason))

    def _break(self, epoch: Epoch, error: Callable[[], Exception], why: str) -> None:
        epoch.fault = error
        epoch.end(error, why)
        epoch.plane.abandon()

    def end_with_parent(self, parent: str, why: str) -> None:
        """Break for good: the group that this one was split from ended its epoch."""
        if not self.closed:
            reason = f"group {parent!r}, which it was split from, ended its epoch ({why})"
            self._outlived = lambda: GroupBroken(self.name, reason, "reset the parent and split it again")
            self._break(self.current, self._outlived, reason)

    def end_with(self, error: Callable[[], Exception]) -> None:
        """Leave the group for good, at once: what is pending raises `error()`."""
        if not self.closed:
            self._break(self.current, error, str(error()))
            self.abandon()

    def spawn(self, coroutine: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """Run a coroutine that is cancelled when the epoch ends, perhaps before its first step."""
        return self.current.spawn(coroutine)

    def at_end_of_epoch(self, callback: Callable[[str], None]) -> None:
        """Call back with the reason when the epoch ends; at once, if it has."""
        if self.current.fault is not None:
            callback(str(self.current.fault()))
        else:
            self.current.on_end.append(callback)

    def _fault_at(self, epoch: Epoch, place: int) -> Exception:
        if place in epoch.mismatches:
            return CollectiveMismatch(self.name, place, epoch.mismatches[place])
        assert epoch.fault is not None
        return epoch.fault()

    def on_mismatch(self, epoch: Epoch, place: int, calls: Calls) -> None:
        """The members called different things at a place."""
        epoch.mismatches[place] = calls
        entry = epoch.pending.pop(place, None)
        if entry is not None:
            entry.fail(CollectiveMismatch(self.name, place, calls))
        self._cut(epoch, place, lambda: GroupBroken(self.name, f"its members disagreed at place {place}"))

    def _cut(self, epoch: Epoch, place: int, error: Callable[[], Exception]) -> None:
        """Break an epoch from a place on: what comes before it still completes, once all members have called it."""
        epoch.cut(place, error)
        for entry in epoch.take_from(place):
            entry.fail(error())
        epoch.mailbox.end(error)
        self.on_drained(epoch)

    def on_drained(self, epoch: Epoch) -> None:
        """Nothing is pending: an epoch that was cut ends where nothing can come before the cut any more."""
        if epoch.drained and epoch.fault is not None:
            self._break(epoch, epoch.fault, str(epoch.fault()))

    def on_library_failed(self, epoch: Epoch, pending: Pending, error: BaseException) -> None:
        """Break the group for an error below, unless the loss of a peer explains it within a moment."""
        if epoch is not self.current or pending.work.done():
            return

        def tell() -> None:
            if epoch is self.current and not pending.work.done():
                epoch.pending.pop(pending.place, None)
                pending.work._fail(error)
                self.break_everywhere(f"{pending.work.description} failed on {self.me}: {error}")

        self.loop.call_later(LIBRARY_GRACE, tell)

    def on_transfer_failed(self, epoch: Epoch, rank: int, error: Exception) -> None:
        """A rank could not be reached for the bytes of a message."""
        if epoch is not self.current or epoch.fault is not None:
            return
        if isinstance(error, LinkClosed):
            self.abandon()  # it is this member's own endpoint that has ended, and nobody else is lost
        else:
            self.lose(rank, str(error))

    def on_transfer_ended(self, epoch: Epoch, rank: int) -> None:
        """A rank has ended the channel of a message in the middle; of why, only its leaving may have been told."""
        if epoch is self.current and rank in self._left:
            self._fail_left(epoch, rank)

    # ------------------------------------------------------------- timeouts

    def _overdue(self, epoch: Epoch, pending: Pending) -> None:
        if not pending.work.done():
            epoch.spawn(self._call_roll(epoch, pending))

    async def _call_roll(self, epoch: Epoch, pending: Pending) -> None:
        behind = await self._roll.behind(self.others(), epoch.number, pending.place)
        if pending.work.done():
            return
        if behind:
            self._flood(("timeout", epoch.number, pending.work.description, behind), everyone=True)
            self._time_out(epoch, pending.work.description, behind)
        else:  # all have come by now: the verdict is on its way
            pending.timer = self.loop.call_later(rollcall.WAIT, self._overdue, epoch, pending)

    def _time_out(self, epoch: Epoch, description: str, behind: list[int]) -> None:
        missing = [self.name_of(rank) for rank in behind]
        reason = f"{description} timed out after {self.timeout:g} s, waiting for {', '.join(missing)}"
        for entry in epoch.pending.values():
            entry.fail(CollectiveTimeout(self.name, entry.work.description, self.timeout, missing))
        self._break(epoch, lambda: GroupBroken(self.name, reason), reason)

    # --------------------------------------------------------------- epochs

    async def reset(self) -> None:
        """Drop what is pending and start a new epoch, together with every other member."""
        if self.closed:
            raise GroupClosed(self.name, "reset()")
        if self._outlived is not None:
            raise self._outlived()
        await self._resets.reset()

    async def reset_everywhere(self) -> None:
        """Have every member reset, and return once all have. Does nothing where the group is not broken."""
        await self._resets.reset_everywhere()

    def end_epoch(self, why: str) -> None:
        """End the current epoch, on every member where it was not broken; raise PeerLost where no other can follow."""
        if not self.current.broken:
            self._take_break(self.current, why)
        self.raise_lost()

    def start_epoch(self) -> None:
        """Go on to the next epoch, which is yet to be opened."""
        self.current = Epoch(self.current.number + 1, self)
        early, self._early = self._early, []
        for deliver in early:
            deliver()

    def raise_lost(self) -> None:
        """Raise PeerLost where a member has died or closed the group."""
        for rank, cause in (self._lost | dict.fromkeys(self._left, _LEFT)).items():
            raise self._peer_lost(rank, cause)

    def others(self) -> list[int]:
        """Every rank but this one."""
        return [rank for rank in range(self.size) if rank != self.rank]

    def name_of(self, rank: int) -> str:
        """How errors name a member."""
        return f"rank {rank} ({self.members[rank]})"

    # -------------------------------------------------------------- messages

    def _hear(self, src: int, message: tuple[Any, ...], buffers: list[memoryview]) -> None:
        kind = message[0]
        if kind == "lost":
            self.lose(message[1], message[2])
        elif kind == "leave":
            self._take_leave(src, message[1], message[2])
        elif kind in ("round", "reset!", "reset."):
            self._resets.hear(src, message)
        elif kind == "roll?":
            self._roll.answer(src, message, self.current.number, self.current.next_place)
        elif kind == "roll.":
            self._roll.hear(src, message)
        else:
            self._hear_in_epoch(src, message, buffers)

    def _hear_in_epoch(self, src: int, message: tuple[Any, ...], buffers: list[memoryview]) -> None:
        kind, number, *rest = message
        epoch = self.current
        if number > epoch.number:
            self._early.append(partial(self._hear_in_epoch, src, message, buffers))
        elif number < epoch.number:
            return
        elif kind == "agree":
            epoch.agreement.hear(rest[0])  # which has ended where nothing can be agreed any more
        elif epoch.broken:
            return
        elif kind == "mail":
            if epoch.fault is None:
                epoch.mailbox.hear(src, rest[0], buffers)
        elif kind == "flow":
            epoch.flows.hear(src, rest[0], Message(rest[1], buffers))
        elif kind == "plane":
            epoch.plane.hear(src, rest[0])
        elif kind == "stream":
            epoch.streams.hear(src, rest[0], rest[1])
        elif kind == "lane":
            epoch.lane.hear(rest[0])
        elif kind == "break":
            self._take_break(epoch, rest[0])
        elif kind == "timeout":
            self._time_out(epoch, rest[0], rest[1])

    def _take_leave(self, rank: int, number: int, place: int) -> None:
        """Take note that a member closes its group after its operations up to a place."""
        self._left[rank] = place if number == self.current.number else 0
        self._resets.fail(partial(self._peer_lost, rank, _LEFT))
        self._fail_left(self.current, rank)
        self.current.streams.peer_left(rank)

    def _fail_left(self, epoch: Epoch, rank: int) -> None:
        """Fail what needs a member that has closed its group."""
        # Also where the epoch was cut already: it may have to be cut before that.
        if not epoch.broken and (
            any(place >= self._left[rank] for place in epoch.pending) or epoch.mailbox.waits_for(rank)
        ):
            self._cut(epoch, self._left[rank], partial(self._peer_lost, rank, _LEFT))

    def _take_data(self, src: int, ticket: tuple[int, str, Any], channel: Channel) -> None:
        number, kind, what = ticket
        epoch = self.current
        if number > epoch.number:
            self._early.append(partial(self._take_data, src, ticket, channel))
        elif number < epoch.number or epoch.broken:
            self.fabric.forget(channel)  # it was opened in an epoch that has ended
        elif kind == "flow":
            epoch.flows.take(src, what, channel)
        elif epoch.fault is not None:
            self.fabric.forget(channel)  # only collectives before the cut still complete
        elif kind == "mail":
            epoch.mailbox.take_data(src, what, channel)
        elif kind == "stream":
            epoch.streams.take_channel(src, what, channel)

    def _flood(self, message: tuple[Any, ...], *, everyone: bool = False) -> None:
        ranks = range(self.size) if everyone else tree.neighbours(self.rank, self.size)
        for rank in ranks:
            if rank != self.rank and rank not in self._lost:
                self.fabric.post(rank, message)


_LEFT = "it closed the group"
