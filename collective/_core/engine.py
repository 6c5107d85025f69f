"""One member's engine of a group: its epochs, the order of its collectives, and how they end."""

from __future__ import annotations

import asyncio
import contextlib
import math
from functools import partial
from typing import TYPE_CHECKING, Any

from collective import scopes, tensors
from collective._backends import settle
from collective._core import tree
from collective._core.agreement import Briefs, Metas, Record
from collective._core.epoch import Epoch
from collective._core.fabric import Fabric
from collective._core.faults import LEFT, Faults
from collective._core.hearing import Hearing
from collective._core.operations import BriefOperation, Disagreement, Operation
from collective._core.pipeline import Pending
from collective._core.resets import Resets
from collective.errors import GroupClosed, LinkBroken
from collective.types import GroupStatistics
from collective.work import Work

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Sequence

    from collective._core.operands import Spec
    from collective.abc import Endpoint
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
        self.fabric = Fabric(endpoint, self.members, rank, key=key, credential=credential)
        self._hearing = Hearing(self)
        self.fabric.on_message = self._hearing.hear
        self.fabric.on_data = self._hearing.take_data
        self.fabric.on_lost = self.lose
        self.fabric.on_own_end = self.abandon
        self.faults = Faults(self)
        self.resets = Resets(self)
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
            await self.resets.open()
        except BaseException:
            self.abandon()
            raise

    async def _reach(self, rank: int) -> None:
        try:
            await self.fabric.connect(rank)
        except LinkBroken as error:
            raise self.faults.peer_lost(rank, str(error)) from error

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
        if not self.faults.lost:  # else the group is broken on all, for as long as it lives
            self.faults.flood(("leave", epoch.number, done_before), everyone=True)
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
        self.faults.break_off(self.current, lambda: GroupClosed(self.name, "an operation was pending"), "it was closed")
        self.fabric.close()

    def fault(self) -> Exception | None:
        """Return the error that every operation raises now, or None."""
        return None if self.current.fault is None else self.current.fault()

    def lose(self, rank: int, cause: str) -> None:
        """Take note that a member died; everything that is pending raises PeerLost, and every later operation."""
        self.faults.lose(rank, cause)

    def break_everywhere(self, reason: str) -> None:
        """Break the group on every member, until all reset it."""
        self.faults.break_everywhere(reason)

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
            work._fail(self.faults.error_at(epoch, place))
            return work
        pending = Pending(place, operation, work)
        epoch.pending[place] = pending
        for rank in list(self.faults.left):
            self.faults.fail_left(epoch, rank)
        shows = epoch.agreement.shows_briefs
        brief = operation.brief() if shows and isinstance(operation, BriefOperation) else None
        epoch.announce(place, record, operation.meta, brief)
        if not work.done():
            scopes.note(work, self)
            if not pending.agreed:
                pending.timer = self.loop.call_later(self.timeout, self.faults.on_overdue, epoch, pending)
        return work

    def on_agreed(self, epoch: Epoch, place: int, metas: Metas, briefs: Briefs = None) -> None:
        """All members agreed on a place."""
        pending = epoch.pending.get(place)
        if pending is None:
            return
        pending.agreed = True
        operation = pending.operation
        if pending.timer is not None:
            pending.timer.cancel()
        try:
            operation.agree(metas)
        except Disagreement as error:
            what = operation.describe()
            self.faults.on_mismatch(epoch, place, [([rank], f"{what}: {said}") for rank, said in enumerate(error.said)])
            return
        if briefs is not None and isinstance(operation, BriefOperation) and operation.is_settled_by(briefs):
            epoch.pipeline.settle(pending, partial(operation.settle, briefs))
        else:
            epoch.pipeline.add(pending)

    # ------------------------------------------------------- sends and receives

    def send(self, tensor: Any, spec: Spec, dst: int, tag: int) -> Work[None]:
        """Send a tensor of that spec to a rank."""
        epoch = self.current
        if epoch.fault is not None:
            return self._failed(f"send(dst={dst}, tag={tag})", epoch.fault())
        if dst in self.faults.left:
            return self._failed(f"send(dst={dst}, tag={tag})", self.faults.peer_lost(dst, LEFT))
        return epoch.mailbox.send(tensor, spec, dst, tag)

    def recv(self, src: int, tag: int, out: Any) -> Work[Any]:
        """Receive the next tensor from a rank with a tag."""
        epoch = self.current
        if epoch.fault is not None:
            return self._failed(f"recv(src={src}, tag={tag})", epoch.fault())
        work = epoch.mailbox.recv(src, tag, out)
        if src in self.faults.left:
            self.faults.fail_left(epoch, src)
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

    # --------------------------------------------------------------- epochs

    def spawn(self, coroutine: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """Run a coroutine that is cancelled when the epoch ends, perhaps before its first step."""
        return self.current.spawn(coroutine)

    def at_end_of_epoch(self, callback: Callable[[str], None]) -> None:
        """Call back with the reason when the epoch ends; at once, if it has."""
        if self.current.fault is not None:
            callback(str(self.current.fault()))
        else:
            self.current.on_end.append(callback)

    async def reset(self) -> None:
        """Drop what is pending and start a new epoch, together with every other member."""
        if self.closed:
            raise GroupClosed(self.name, "reset()")
        if self.faults.outlived is not None:
            raise self.faults.outlived()
        await self.resets.reset()

    async def reset_everywhere(self) -> None:
        """Have every member reset, and return once all have. Does nothing where the group is not broken."""
        await self.resets.reset_everywhere()

    def end_epoch(self, why: str) -> None:
        """End the current epoch, on every member where it was not broken; raise PeerLost where no other can follow."""
        if not self.current.broken:
            self.faults.take_break(self.current, why)
        self.faults.raise_lost()

    def start_epoch(self) -> None:
        """Go on to the next epoch, which is yet to be opened."""
        self.current = Epoch(self.current.number + 1, self)
        self._hearing.epoch_started()

    def others(self) -> list[int]:
        """Every rank but this one."""
        return [rank for rank in range(self.size) if rank != self.rank]

    def name_of(self, rank: int) -> str:
        """How errors name a member."""
        return f"rank {rank} ({self.members[rank]})"
