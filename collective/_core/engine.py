"""One member's engine of a group: its epochs, the order of its collectives, and how they end."""

from __future__ import annotations

import asyncio
import contextlib
import math
from contextvars import Context
from functools import partial
from typing import TYPE_CHECKING, Any, Final
from weakref import ref

from collective import scopes, tensors
from collective._backends import settle
from collective._core import tree
from collective._core.agreement import Ended, Record
from collective._core.epoch import Epoch
from collective._core.fabric import Fabric
from collective._core.faults import LEFT, Faults
from collective._core.goodbyes import Goodbye, Relay
from collective._core.hearing import Hearing
from collective._core.operations import Barrier, BriefOperation, Operation
from collective._core.pipeline import Pending
from collective._core.resets import Resets
from collective._core.watchdog import Watchdog
from collective.errors import GroupClosed, GroupError, LinkBroken
from collective.scopes import Ending
from collective.types import GroupStatistics
from collective.work import Work

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Sequence

    from collective._core.operands import Spec
    from collective.abc import Endpoint
    from collective.scopes import CallScope, Scope
    from collective.types import Credential, Member

MOST: Final = 1 << 16
"""Collectives of a member that are called and not done."""
_REACHES: Final = 64
"""Kinds of calls for which a group keeps whether they reach all of its members."""


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
        default_scope: Scope = scopes.DEFAULT,
        recv_timeout: float | None = None,
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
        self.recv_timeout = recv_timeout
        self.token = f"{key}#{rank}"
        self.closed = False
        self.formed = False
        self._freeing: asyncio.Task[None] | None = None
        self._forget_parent: Callable[[], None] = _nothing
        self.me = f"rank {rank} ({members[rank]})"
        self.parts = scopes.parts_at(endpoint)
        self.default_scope = default_scope
        self.ended = Ended()
        self._reached: dict[scopes.Reach, bool] = {}
        self._holder: ref[CallScope] | None = None
        """The call that has called in the default scope last."""
        self.fabric = Fabric(endpoint, self.members, rank, key=key, credential=credential)
        self._hearing = Hearing(self)
        self.faults = Faults(self)
        self.fabric.on_message = self._hearing.hear
        self.fabric.on_data = self._hearing.take_data
        self.fabric.on_lost = self.faults.lose
        self.fabric.on_refused = self.faults.on_refused
        self.fabric.on_own_end = self.abandon
        self.fabric.on_exhausted = lambda reason: self.faults.break_everywhere(f"on {self.me} {reason}")
        self.resets = Resets(self)
        self.watchdog = Watchdog(self)
        self.current = Epoch(0, self)
        scopes.register(self)

    # ------------------------------------------------------------------ life

    @property
    def epoch(self) -> int:
        """The number of the current epoch."""
        return self.current.number

    async def open(self, *, patient: bool = False) -> None:
        """Form the group: all members call it. Cancel it to give up; a call that raises has abandoned the group.

        :param patient: wait for the others however long they take, not for the group's timeout.
        """
        try:
            self.fabric.serve()
            neighbours = tree.neighbours(self.rank, self.size)
            await asyncio.gather(*[self.fabric.spawn(self._reach(rank)) for rank in neighbours])
            await self.resets.open(patient=patient)
        except BaseException as error:
            # Who was cancelled when it had come to the last point may be the only one that does not hold it for formed.
            self.abandon(word=self.resets.joined and isinstance(error, asyncio.CancelledError))
            await self.fabric.closed()
            raise
        self.formed = True

    async def _reach(self, rank: int) -> None:
        try:
            await self.fabric.connect(rank)
        except LinkBroken as error:
            raise self.faults.peer_lost(rank, str(error)) from error

    async def aclose(self) -> None:
        """Leave the group. The others' later operations fail; those that this member finished do not.

        Whoever is cancelled here leaves the rest to a task of its own; whoever comes later waits for that.
        """
        if not self.closed:
            self.closed = True
            epoch = self.current
            done_before = epoch.done_before
            if not epoch.idle:
                epoch.plane.abandon()
            epoch.end(lambda: GroupClosed(self.name, "an operation was pending"), "it was closed")
            epoch.fault = epoch.fault or (lambda: GroupClosed(self.name, "an operation"))
            self.watchdog.close()
            self.part(done_before)
            self._freeing = self.loop.create_task(self._free(), context=Context())
        if self._freeing is not None:
            await asyncio.shield(self._freeing)

    async def _free(self) -> None:
        try:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(1.0):
                    await self.fabric.flush()
            await self.fabric.closed()
            await self.current.plane.aclose()
        finally:
            self.current.plane.abandon()  # where the loop is ending, and has cancelled this

    def part(self, done_before: int) -> None:
        """Say goodbye, unless the group is broken for all members for as long as it lives, and take part no more."""
        self._forget_parent()
        if self.faults.lost or self.faults.outlived is not None:
            self.fabric.end()
            return
        goodbyes = self.faults.goodbyes
        told = self.fabric.linked - {*goodbyes.neighbours, *self.faults.left}
        for rank in told:
            self.fabric.post(rank, ("left",))
        goodbyes.say(Goodbye(self.rank, self.current.number, done_before, tuple(told)))
        self.fabric.close()
        if goodbyes.parted:
            Relay(self.fabric, goodbyes)
        else:
            self.fabric.end()

    def abandon(self, *, word: bool = False) -> None:
        """Leave the group at once, without waiting and, unless `word`, without telling the others."""
        if self.closed:
            return
        self.closed = True
        if word:
            self.part(0)
        self.faults.break_off(self.current, lambda: GroupClosed(self.name, "an operation was pending"), "it was closed")
        self.watchdog.close()
        if not word:
            self._forget_parent()
            self.fabric.end(drop=True)

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

    def subgroup(self, ranks: Sequence[int], color: int, seq: int, scope: Scope) -> Engine:
        """Return an engine of a group of some of the members, this one among them; not open yet."""
        return Engine(
            self.endpoint,
            [self.members[rank] for rank in ranks],
            ranks.index(self.rank),
            name=f"{self.name}.split({color})",
            key=f"{self.key}/{self.current.number}.{seq}.{color}",
            credential=self.credential,
            backend=self.backend,
            timeout=self.timeout,
            recv_timeout=self.recv_timeout,
            default_scope=scope,
        )

    def is_reached(self, reach: scopes.Reach) -> bool:
        """Whether a call that reaches these actors reaches every member."""
        known = self._reached.get(reach)
        if known is None:
            if len(self._reached) >= _REACHES:
                self._reached.clear()
            known = self._reached[reach] = reach is None or all(
                member.role == reach[0] and member.rank in reach[1] for member in self.members
            )
        return known

    def announce_failed(self, scope: Scope, name: str, error: Exception, where: str) -> None:
        """Let the others learn that this member's call in a scope failed its own checks."""
        epoch = self.current
        if self.size == 1 or epoch.fault is not None or scope.root in self.ended:
            return
        what = f"{name}, which failed with {type(error).__name__}: {error}"
        work: Work[Any] = Work(what)
        work.add_done_callback(scopes.look_at)  # its caller has the error
        record = Record(f"failed on {self.rank}".encode(), what, where, True)
        if not scope.ends:
            self.faults.doom(epoch, scope.bytes, [([self.rank], f"{what} at {where}")])
        epoch.announce(Pending(-1, scope, record, Barrier(self.rank, self.size), work))

    def submit(self, scope: Scope, operation: Operation, where: str) -> Work[Any]:
        """Announce a collective in a scope and return its completion.

        Raises:
            GroupError: another call has unfinished collectives in a scope that it shares with this one, as the
                default scope, or too many have been called and not agreed.
        """
        epoch = self.current
        record = operation.record(where)
        work: Work[Any] = Work(f"{record.what} at {where}", stop=operation.stop)
        if epoch.fault is not None or scope.root in self.ended:
            return _refused(work, self._refusal(epoch, scope))
        part = scopes.current_part()
        if scope is self.default_scope:
            if (self._holder and self._holder()) is not part:
                self._claim(scope, part, work)
                self._holder = None if part is None else ref(part)
        elif part is not None and part.shares_scope:
            self._claim(scope, part, work)
        if len(epoch.pending) >= MOST:
            raise self._too_many(scope, work)
        pending = Pending(epoch.called, scope, record, operation, work, part)
        epoch.called += 1
        epoch.pending[pending.number] = pending
        for rank in list(self.faults.left):
            self.faults.fail_left(epoch, rank)
        if epoch.agreement.shows_briefs and isinstance(operation, BriefOperation):
            pending.brief = operation.brief()
        epoch.announce(pending)
        if not work.done():
            if part is not None:
                part.note(work, self, scope)
            if not pending.agreed:
                self.watchdog.add(pending)
        return work

    def _refusal(self, epoch: Epoch, scope: Scope) -> Exception:
        """Return the error of a collective that is called too late."""
        mismatch = epoch.mismatch(scope)
        if mismatch is not None:
            return mismatch
        ending = self.ended.get(scope.root)
        if ending is not None:
            return ending.ended(self.name, scope)
        assert epoch.fault is not None
        return epoch.fault()

    def _claim(self, scope: Scope, part: CallScope | None, work: Work[Any]) -> None:
        """Take a scope of several calls for one, unless another has unfinished collectives there: they might be mixed.

        Raises:
            GroupError: another has.
        """
        for entry in self.current.pending.values():
            if entry.scope.bytes == scope.bytes and entry.part is not part:
                raise GroupError(
                    f"{_name_of(part)} calls {work.description} in {scope.name} of group {self.name!r}, where "
                    f"{_name_of(entry.part)} has not finished {entry.work.description}: members may run the two in "
                    "other orders, and mix them. Await one before the other starts; or call all members at once, as in "
                    'gang["role"].method(), which gives each call a scope; or put each under a key of its own that is '
                    "equal on all members, `with group.scope(key):`"
                )

    def _too_many(self, scope: Scope, work: Work[Any]) -> GroupError:
        error = GroupError(
            f"{work.description} in {scope.name} of group {self.name!r}: {MOST} collectives are called here and not "
            "done; await some of them, or see why other members do not call them"
        )
        if scope.ends:
            self.end_scope(scope.root, Ending(self.rank, self.me, "", "", str(error)))
        else:
            self.break_everywhere(f"{self.me}: {error}")
        return error

    # ----------------------------------------------------------------- scopes

    def end_scope(self, root: bytes, ending: Ending) -> None:
        """End a call's scope on every member: what was agreed completes, and nothing else of it."""
        epoch = self.current
        if self.closed or epoch.fault is not None or not self.ended.add(root, ending):
            return
        self.faults.flood(("over", epoch.number, root, tuple(ending)))
        epoch.mailbox.end_scope(root, ending)
        epoch.end_scope(root, ending)

    def part_over(self, root: bytes) -> None:
        """This member's part in a call is over: nobody receives what is left of it."""
        self.current.mailbox.part_over(root)
        self.current.streams.part_over(root)

    # ------------------------------------------------------- sends and receives

    def send(self, scope: Scope, tensor: Any, spec: Spec, dst: int, tag: int) -> Work[None]:
        """Send a tensor of that spec to a rank."""
        epoch, scope = self.current, scopes.scope_of_messages(self, scope)
        error = self._silence(scope)
        if error is None and dst in self.faults.left:
            error = self.faults.peer_lost(dst, LEFT)
        if error is not None:
            return _refused(Work(f"send(dst={dst}, tag={tag})"), error)
        work = epoch.mailbox.send(scope, tensor, spec, dst, tag)
        part = scopes.current_part()
        if part is not None and not work.done():
            part.note_send(work, scope)
        return work

    def recv(self, scope: Scope, src: int, tag: int, out: Any) -> Work[Any]:
        """Receive the next tensor from a rank with a tag."""
        epoch, scope = self.current, scopes.scope_of_messages(self, scope)
        error = self._silence(scope)
        if error is not None:
            return _refused(Work(f"recv(src={src}, tag={tag})"), error)
        work = epoch.mailbox.recv(scope, src, tag, out)
        if src in self.faults.left:
            self.faults.fail_left(epoch, src)
        return work

    def _silence(self, scope: Scope) -> Exception | None:
        """Return the error of whatever is sent or received in a scope from now on; None while nothing forbids it."""
        ending = self.ended.get(scope.root)
        if ending is not None:
            return ending.ended(self.name, scope)
        fault = self.current.fault or self.current.doom
        return None if fault is None else fault()

    def empty(self, shape: tuple[int, ...], dtype: Any) -> Any:
        """Return a new array in memory of the data plane."""
        kind, name = tensors.kind_and_dtype(dtype)
        host_dtype = tensors.numpy_dtype(name)
        memory = self.current.plane.empty(math.prod(shape) * host_dtype.itemsize)
        return tensors.from_host(tensors.from_bytes(memory, shape, host_dtype), kind, dtype=name)

    def statistics(self) -> GroupStatistics:
        """Return what the group does and holds now."""
        epoch = self.current
        return GroupStatistics(
            epoch=epoch.number,
            collectives=epoch.called,
            pending_collectives=len(epoch.pending),
            pending_messages=epoch.mailbox.pending,
            buffered_bytes=epoch.mailbox.buffered_bytes,
        )

    # --------------------------------------------------------------- epochs

    def spawn(self, coroutine: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """Run a coroutine that is cancelled when the epoch ends, perhaps before its first step."""
        return self.current.spawn(coroutine)

    def adopt(self, subgroup: Engine) -> None:
        """Have a subgroup end with the current epoch; at once, if that has ended."""
        epoch = self.current
        if epoch.fault is not None:
            subgroup.faults.end_with_parent(self, str(epoch.fault()))
        elif not subgroup.closed:
            end = partial(subgroup.faults.end_with_parent, self)
            epoch.on_end.add(end)
            subgroup._forget_parent = partial(epoch.on_end.discard, end)

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
            self.faults.begin_reset(self.current, why)
        self.faults.raise_lost()

    def start_epoch(self) -> None:
        """Go on to the next epoch, which is yet to be opened: all members have come to the end of this one."""
        self.current.plane.abandon()
        self.current = Epoch(self.current.number + 1, self)
        self.ended.forget(self.default_scope.root)  # of a subgroup, whose default scope is that of a call
        self._hearing.epoch_started()

    def others(self) -> list[int]:
        """Every rank but this one."""
        return [rank for rank in range(self.size) if rank != self.rank]

    def name_of(self, rank: int) -> str:
        """How errors name a member."""
        return f"rank {rank} ({self.members[rank]})"


def _name_of(part: CallScope | None) -> str:
    return "code outside calls, as in setup()," if part is None else part.name


def _nothing() -> None:
    """Do nothing: a group that was not split from another."""


def _refused(work: Work[Any], error: Exception) -> Work[Any]:
    """Fail an operation that is called too late, and return it."""
    work._fail(error)
    part = scopes.current_part()
    if part is not None:
        part.note_failed(work)
    return work
