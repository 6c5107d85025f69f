"""How the operations of a group end badly, and how every member learns of it.

A member dies, leaves, breaks the group, disagrees with the others, or does not come in time. Each of these ends an
epoch, or cuts it: then what was called before the cut still completes, and nothing after it.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

from collective._core import rollcall
from collective._core.goodbyes import Goodbye, Goodbyes
from collective._core.pipeline import LIBRARY_GRACE
from collective._core.rollcall import RollCall
from collective.errors import CollectiveTimeout, GroupBroken, LinkClosed, OutOfResources, PeerLost
from collective.scopes import ROOT, Ending

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from collective._core.agreement import Calls
    from collective._core.engine import Engine
    from collective._core.epoch import Epoch
    from collective._core.pipeline import Pending

LEFT = "it closed the group"
"""Why a member is lost that closed its group in good order."""


class Faults:
    """One member's knowledge of what went wrong in its group.

    :ivar lost: why each member that died did.
    :ivar left: the place, in the order that all agreed on, up to which each member that closed the group has finished.
    :ivar outlived: makes the error of a group whose parent has ended its epoch: it is broken for good.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self.lost: dict[int, str] = {}
        self.left: dict[int, int] = {}
        self.outlived: Callable[[], Exception] | None = None
        self.goodbyes = Goodbyes(engine.rank, engine.size, loop=engine.loop, post=engine.fabric.pass_on)
        self._unheard: dict[int, Goodbye] = {}
        """Goodbyes whose members say them on their own links as well, where this member has not heard them yet."""
        self._heard: set[int] = set()
        """Who has said goodbye on its own link, and not yet along the tree."""
        self._roll = RollCall(
            engine.rank,
            self.goodbyes.neighbours,
            answer=self._waits_for,
            post=engine.fabric.post,
            spawn=engine.fabric.spawn,
            timeout=engine.timeout,
        )

    # ---------------------------------------------------------------- breaks

    def break_everywhere(self, reason: str) -> None:
        """Break the group on every member, until all reset it."""
        engine = self._engine
        if not engine.closed and not engine.current.broken:
            self.take_break(engine.current, reason)

    def take_break(self, epoch: Epoch, reason: str) -> None:
        """Break an epoch here, and tell the neighbours in the tree, which tell theirs."""
        name = self._engine.name

        def error() -> GroupBroken:
            return GroupBroken(name, reason)

        self.break_off(epoch, error, reason)
        self._engine.resets.fail(error)
        self.flood(("break", epoch.number, reason))

    def begin_reset(self, epoch: Epoch, reason: str) -> None:
        """End an epoch here, by a reset: what this member has finished completes on the others."""
        error, place = partial(GroupBroken, self._engine.name, reason), epoch.done_before
        self._engine.resets.fail(error)
        self.break_off(epoch, error, reason, abandon=not epoch.idle)
        self.flood(("cut", epoch.number, place, reason))

    def take_reset(self, epoch: Epoch, place: int, reason: str) -> None:
        """Another member has ended an epoch by a reset, and finished what was agreed before a place."""
        if epoch.reset_at is not None and epoch.reset_at <= place:
            return  # it is known, by this member's neighbours too
        epoch.reset_at = place
        self.flood(("cut", epoch.number, place, reason))
        error = partial(GroupBroken, self._engine.name, reason)
        self._engine.resets.fail(error)
        epoch.cut(place, error)

    def doom(self, epoch: Epoch, scope: bytes, calls: Calls) -> None:
        """Take note, and tell the others, that an epoch will break: a call that nobody can pair with was refused.

        Its member may reset the group at once: what the others have called there says why it failed all the same.
        """
        if epoch.fault is None and epoch.doom is None:
            ((rank,), what), *_ = calls
            name, reason = self._engine.name, f"{self._engine.name_of(rank)} called {what}"
            epoch.doom = lambda: GroupBroken(name, reason)
            epoch.note_mismatch(scope, epoch.agreed, calls)
            epoch.mailbox.end(epoch.doom)
            self.flood(("doom", epoch.number, scope, calls))

    def break_off(self, epoch: Epoch, error: Callable[[], Exception], why: str, *, abandon: bool = True) -> None:
        """End an epoch at this member; from then on every operation raises the error.

        :param abandon: whether its data plane ends at once; else it does with the group, or with the next epoch.
        """
        epoch.fault = error
        epoch.end(error, why)
        if abandon:
            epoch.plane.abandon()

    def end_with_parent(self, parent: Engine, why: str) -> None:
        """Break for good: the group that this one was split from ended its epoch, or this member has closed it."""
        engine = self._engine
        if not engine.closed and self.outlived is None:
            if parent.closed:  # the others' epoch goes on
                engine.part(engine.current.done_before)
            reason = f"group {parent.name!r}, which it was split from, ended its epoch ({why})"
            self.outlived = lambda: GroupBroken(engine.name, reason, "reset the parent and split it again")
            self.break_off(engine.current, self.outlived, reason)
            engine.resets.fail(self.outlived)
            if not parent.closed:
                engine.fabric.end(drop=True)

    # ------------------------------------------------------ deaths and leaving

    def lose(self, rank: int, cause: str) -> None:
        """Take note that a member died; everything that is pending raises PeerLost, and every later operation."""
        engine = self._engine
        if engine.closed or rank in self.lost or rank == engine.rank:
            return
        if rank in self._heard or not self.goodbyes.needs(rank):  # it had said goodbye before its link ended
            self.hear_farewell(rank)
            return
        self.lost[rank] = cause
        error = partial(self.peer_lost, rank, cause)
        self.break_off(engine.current, error, str(error()))
        engine.resets.lose(error)
        if len(self.lost) == 1:
            # Each part of the tree that the dead cut off has a neighbour of theirs in it, whose link to them ended. The
            # first loss breaks the group for all: telling of more would cost a message a pair where a gang ends.
            self.flood(("lost", rank, cause))

    def peer_lost(self, rank: int, cause: str) -> PeerLost:
        """Return the error that names a member and why it is gone."""
        member = self._engine.members[rank]
        return PeerLost(member.role, member.rank, cause, doing=f"work of group {self._engine.name!r}")

    def raise_lost(self) -> None:
        """Raise PeerLost where a member has died or closed the group."""
        for rank, cause in (self.lost | dict.fromkeys(self.left, LEFT)).items():
            raise self.peer_lost(rank, cause)

    def on_refused(self, rank: int, cause: str) -> None:
        """A member that lives takes nothing for this group: it has left, and its goodbye is on the way.

        Before the group is formed it has given up that, without a word.
        """
        if not self._engine.formed:
            self.lose(rank, cause)

    def hear_goodbyes(self, src: int, said: list[tuple[Any, ...]]) -> None:
        """Take what a neighbour in the tree has passed on."""
        for goodbye in self.goodbyes.hear(src, said):
            if self._engine.rank in goodbye.told and goodbye.rank not in self._heard:
                self._unheard[goodbye.rank] = goodbye  # what it had sent here itself may be on the way
            else:
                self._take_leave(goodbye)

    def hear_farewell(self, rank: int) -> None:
        """Take note that a member has said goodbye on its own link, or that this link has ended."""
        goodbye = self._unheard.pop(rank, None)
        if goodbye is not None:
            self._take_leave(goodbye)
        else:
            self._heard.add(rank)

    def _take_leave(self, goodbye: Goodbye) -> None:
        rank = goodbye.rank
        epoch = self._engine.current
        self.left[rank] = goodbye.place if goodbye.epoch == epoch.number else 0
        self._engine.resets.fail(partial(self.peer_lost, rank, LEFT))
        self.fail_left(epoch, rank)
        epoch.lane.end(partial(self.peer_lost, rank, LEFT))
        epoch.streams.peer_left(rank)

    def fail_left(self, epoch: Epoch, rank: int) -> None:
        """Fail what needs a member that has closed its group: what it has not finished of what all agreed on."""
        # Also where the epoch was cut already: it may have to be cut before that.
        if not epoch.broken and (epoch.needs(self.left[rank]) or epoch.mailbox.waits_for(rank)):
            epoch.cut(self.left[rank], partial(self.peer_lost, rank, LEFT))

    def on_drained(self, epoch: Epoch) -> None:
        """Nothing is pending: an epoch that was cut ends where nothing can come before the cut any more."""
        if epoch.drained and epoch.fault is not None:
            self.break_off(epoch, epoch.fault, str(epoch.fault()), abandon=epoch.reset_at is None or not epoch.idle)

    # ------------------------------------------------------------ what failed

    def on_library_failed(self, epoch: Epoch, pending: Pending, error: BaseException) -> None:
        """Break the group for an error below, unless the loss of a peer explains it within a moment."""
        engine = self._engine
        if epoch is not engine.current or pending.work.done():
            return

        def tell() -> None:
            if epoch is engine.current and not pending.work.done():
                epoch.pending.pop(pending.number, None)
                pending.work._fail(error)
                self.break_everywhere(f"{pending.work.description} failed on {engine.me}: {error}")

        engine.loop.call_later(LIBRARY_GRACE, tell)

    def on_transfer_failed(self, epoch: Epoch, rank: int, error: Exception) -> None:
        """A rank could not be reached for the bytes of a message."""
        if epoch is not self._engine.current or epoch.fault is not None:
            return
        if isinstance(error, LinkClosed):
            self._engine.abandon()  # it is this member's own endpoint that has ended, and nobody else is lost
        elif isinstance(error, OutOfResources):
            self.break_everywhere(f"on {self._engine.me} {error}")
        else:
            self.lose(rank, str(error))

    def on_transfer_ended(self, epoch: Epoch, rank: int) -> None:
        """A rank has ended the channel of a message in the middle; of why, only its leaving may have been told."""
        if epoch is self._engine.current and rank in self.left:
            self.fail_left(epoch, rank)

    # --------------------------------------------------------------- timeouts

    def on_overdue(self, epoch: Epoch, pending: Pending) -> None:
        """A collective has waited for the group's timeout."""
        if not pending.work.done():
            epoch.spawn(self._call_roll(epoch, pending))

    def overdue_recv(self, src: int, description: str) -> CollectiveTimeout:
        """Return the error of a recv that has waited for as long as it may. It alone ends: the group goes on."""
        engine = self._engine
        assert engine.recv_timeout is not None, "without one nothing is overdue"
        return CollectiveTimeout(
            engine.name, description, engine.recv_timeout, [engine.name_of(src)], lone=True
        )

    async def _call_roll(self, epoch: Epoch, pending: Pending) -> None:
        engine, scope = self._engine, pending.scope
        ahead = sum(each.number < pending.number for each in epoch.waiting_in(scope.bytes))
        said = await self._roll.ask((epoch.number, scope.bytes))
        if pending.work.done():
            return
        behind = {rank: named for rank, (count, named) in sorted(said.items()) if count <= ahead}
        if not behind:  # who does not answer is named only where nobody that answers is behind
            behind = {rank: ["something that it does not tell"] for rank in range(engine.size) if rank not in said}
        missing = tuple(engine.name_of(rank) for rank in behind)
        waiting = tuple(
            f"{engine.name_of(rank)} waits for {', '.join(named) or 'nothing'}" for rank, named in behind.items()
        )
        if pending.agreed or not behind:  # all have come by now: the verdict is on its way
            engine.watchdog.again(pending, rollcall.AGAIN)
        elif scope.ends and scope.root not in engine.ended:
            operation, _, line = pending.work.description.rpartition(" at ")
            cause = f"it timed out after {engine.timeout:g} s, waiting for {', '.join(missing)}"
            engine.end_scope(
                scope.root,
                Ending(engine.rank, engine.me, operation, line, cause, engine.timeout, missing, waiting),
            )
            # Should rank 0 not say that it has ended, nothing in the group goes on.
            engine.watchdog.again(pending, engine.timeout)
        else:
            self.time_out(epoch, pending.work.description, missing, waiting)

    def _waits_for(self, question: tuple[int, bytes]) -> tuple[int, list[str]]:
        """Return how many collectives wait here in a scope of an epoch, and the names of some that wait in any."""
        number, scope = question
        epoch = self._engine.current
        waiting = epoch.waiting_in(scope) if number == epoch.number else []
        pending = [(each.work.description, each.scope) for each in epoch.pending.values()] + epoch.mailbox.waiting()
        pending.sort(key=lambda each: each[1].root != scope[:ROOT])  # what is of the same call tells most
        named = [f"{description} in {where.name}" for description, where in pending]
        more = [f"{len(named) - rollcall.NAMED} more"] if len(named) > rollcall.NAMED else []
        return len(waiting), named[: rollcall.NAMED] + more

    def time_out(self, epoch: Epoch, description: str, missing: Sequence[str], waiting: Sequence[str]) -> None:
        """End an epoch in which some members did not come in time, here and at the neighbours in the tree."""
        engine = self._engine
        reason = f"{description} timed out after {engine.timeout:g} s, waiting for {', '.join(missing)}"
        for entry in epoch.pending.values():
            entry.fail(
                CollectiveTimeout(engine.name, entry.work.description, engine.timeout, missing, pending=waiting)
            )
        self.break_off(epoch, lambda: GroupBroken(engine.name, reason), reason)
        self.flood(("timeout", epoch.number, description, tuple(missing), tuple(waiting)))

    def hear_roll(self, src: int, message: tuple[Any, ...]) -> None:
        """Take a ("roll?" | "roll.", ...) message: what a member waits for, or a question for that."""
        self._roll.hear(src, message)

    # ---------------------------------------------------------------- telling

    def flood(self, message: tuple[Any, ...], src: int | None = None) -> None:
        """Post a message to the neighbours in the tree, less those that are lost and whom it came from."""
        for rank in self.goodbyes.neighbours:
            if rank != src and rank not in self.lost:
                self._engine.fabric.post(rank, message)
