"""Sends and receives of one member in one epoch: ordered by (scope, source, destination, tag) and by nothing else.

A small message goes at once and is buffered at the receiver, up to a budget for each pair. So does a larger one where
both share memory: its sender puts it there, and what the receiver gets is a private mapping of that, or a copy in its
`out`. Any other is offered: the receiver pulls it when a recv has matched it, and it travels on a channel of its own,
straight into the result's memory, or is put into shared memory then, off the loop, where it is too large to copy on it.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from contextvars import Context
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from collective import tensors
from collective._core.budget import Budget
from collective._core.messages import NOTHING, Arrival, Offer, Recv, Unfinished, deliver, line_of, misfit
from collective._core.offload import LONG, offload
from collective._core.operands import Spec, as_bytes, copies, flat
from collective._links.arena import arena
from collective.abc import LARGE
from collective.errors import BackendError, CollectiveError, LinkError
from collective.scopes import DEFAULT, ROOT, Ending, current_call
from collective.work import Work

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Sequence

    from collective._core.agreement import Ended
    from collective._core.fabric import Fabric
    from collective._core.messages import Line
    from collective._gate import Gate
    from collective.abc import Channel, Message
    from collective.scopes import Call, Parts, Scope

EAGER = 16 << 20
"""Bytes that a sender has buffered at one receiver before it offers small messages too."""
LENT = 8 << 20
"""Bytes that a sender has in shared memory for one receiver before it offers larger messages."""
PATIENCE = 0.1
"""Seconds that a recv of a call waits before its source is asked whether its part in the call is over."""

_logger = logging.getLogger("collective")


class Mailbox:
    """One member's sends and receives.

    :param me: how errors name this member.
    :param fabric: what the bytes of larger messages go by.
    :param tell: post a message to another rank's mailbox of the same epoch.
    :param spawn: run a coroutine that ends with the epoch.
    :param on_failure: called with (rank, error) where a member cannot be reached.
    :param on_cut_off: called with the rank of a member that ended a transfer of bytes before its end.
    :param group: the group's name.
    :param parts: the actor's parts in calls.
    :param ended: the scopes that have ended in the group.
    :param on_waiting: called now and then while receives of calls wait.
    :param recv_timeout: seconds that a recv may wait; None: for ever.
    :param overdue: returns the error of a recv that has waited so long, by its source and description.
    """

    def __init__(
        self,
        rank: int,
        *,
        me: str,
        epoch: int,
        fabric: Fabric,
        tell: Callable[[int, tuple[Any, ...], Sequence[Any]], None],
        spawn: Callable[[Coroutine[Any, Any, None]], object],
        on_failure: Callable[[int, Exception], None],
        on_cut_off: Callable[[int], None],
        group: str,
        parts: Parts,
        ended: Ended,
        on_waiting: Callable[[], None],
        recv_timeout: float | None = None,
        overdue: Callable[[int, str], Exception] | None = None,
    ) -> None:
        self._rank = rank
        self._me = me
        self._group = group
        self._ended = ended
        self._parts = parts
        self._on_waiting = on_waiting
        self._asking: asyncio.TimerHandle | None = None
        self._asked: set[tuple[int, bytes]] = set()
        self._epoch = epoch
        self._fabric = fabric
        self._tell = tell
        self._spawn = spawn
        self._on_failure = on_failure
        self._on_cut_off = on_cut_off
        self._recv_timeout = recv_timeout
        self._overdue = overdue
        self._loop = asyncio.get_running_loop()
        self._over = False
        """Whether nothing is sent or received any more."""
        self._arrivals = 0
        self._cut_off: set[int] = set()
        self._arrived: dict[tuple[int, Line], deque[Arrival]] = {}
        self._wanted: dict[tuple[int, Line], deque[Recv]] = {}
        self._matched: dict[tuple[int, int], Arrival] = {}
        self._incoming: set[Channel] = set()
        """On which the bytes of messages come."""
        self._active: set[Unfinished] = set()
        self._offers: dict[int, Offer] = {}
        self._tickets = 0
        self._eager = Budget(EAGER)
        self._lent = Budget(LENT)

    def send(self, scope: Scope, tensor: Any, spec: Spec, dst: int, tag: int) -> Work[None]:
        """Send a tensor of that spec."""
        nbytes, line = spec.nbytes, line_of(scope, tag)
        if nbytes <= LARGE and self._eager.spend(dst, nbytes):
            data = as_bytes(flat(tensor))
            if dst == self._rank:
                data = data.copy()
                self._arrive(Arrival(dst, line, spec, data, data, budget=self._eager))
            else:
                self._tell(dst, ("eager", line, tuple(spec)), [data.data] if nbytes else [])
            return _sent(spec, dst, tag)
        if LARGE < nbytes <= LONG and self._lend(tensor, spec, dst, ("lent", line, tuple(spec))):
            return _sent(spec, dst, tag)
        self._tickets += 1
        offer = self._offers[self._tickets] = Offer(
            dst, tag, tensor, spec=spec, scope=scope, call=current_call()
        )
        self._active.add(offer)
        if dst == self._rank:
            self._arrive(Arrival(dst, line, spec, ticket=self._tickets))
        else:
            self._tell(dst, ("offer", line, tuple(spec), self._tickets), [])
        return offer.work

    def recv(self, scope: Scope, src: int, tag: int, out: Any) -> Work[Any]:
        """Receive the next message from a rank with a tag."""
        recv = Recv(src, tag, out, scope=scope, call=current_call(), withdraw=self._give_up)
        work = recv.begin()
        self._active.add(recv)
        self._wanted.setdefault((src, recv.line), deque()).append(recv)
        self._pair(src, recv.line)
        if recv.ended:
            return work
        if scope.ends:
            self._ask_later()
        if self._recv_timeout is not None:
            # In a context of its own, as in `_ask_later`.
            recv.timer = self._loop.call_later(self._recv_timeout, self._expire, recv, context=Context())
        return work

    def hear(self, src: int, message: tuple[Any, ...], buffers: Sequence[memoryview]) -> None:
        """Take a message of another member's mailbox."""
        kind = message[0]
        if kind == "eager":
            _, line, spec = message
            data = np.frombuffer(buffers[0], np.uint8) if buffers else np.empty(0, np.uint8)
            self._arrive(Arrival(src, line, Spec(*spec), data, data, budget=self._eager))
        elif kind == "lent":
            _, line, spec = message
            data = np.frombuffer(buffers[0], np.uint8)
            self._arrive(Arrival(src, line, Spec(*spec), data, data, buffers[0], budget=self._lent))
        elif kind == "given":
            arrival = self._matched.pop((src, message[1]), None)
            if arrival is not None:
                arrival.coming, arrival.shared = np.frombuffer(buffers[0], np.uint8), buffers[0]
                self._land(arrival)
        elif kind == "failed":
            arrival = self._matched.pop((src, message[1]), None)
            if arrival is not None:
                self._refuse(arrival, message[2])
        elif kind == "offer":
            _, line, spec, ticket = message
            self._arrive(Arrival(src, line, Spec(*spec), ticket=ticket))
        elif kind == "pull":
            offer = self._offers.pop(message[1], None)
            if offer is not None:
                self._spawn(self._transfer(message[1], offer))
        elif kind == "part?":
            self._parts.when_over(message[1], partial(self._tell, src, ("part.", message[1]), []))
        elif kind == "part.":
            self._sender_over(src, message[1])
        elif kind == "unread":
            self._fail_unread(message[1])
        elif kind == "taken":
            (self._eager if message[1] == "eager" else self._lent).regain(src, message[2])

    def take_data(self, src: int, ticket: int, channel: Channel) -> None:
        """Take the channel on which a pulled message comes."""
        arrival = self._matched.get((src, ticket))
        if arrival is None:
            self._fabric.forget(channel)
            return
        memory = arrival.coming.data
        self._incoming.add(channel)

        def forget() -> None:
            self._incoming.discard(channel)
            self._fabric.forget(channel)

        def on_message(message: Message) -> None:
            forget()
            if self._matched.pop((src, ticket), None) is None:
                return  # it came when nothing was pending any more
            data = np.frombuffer(message.buffers[0], np.uint8)
            if data.ctypes.data != arrival.coming.ctypes.data:  # a small one comes in memory of its own
                arrival.coming = data
            self._land(arrival)

        def on_end(error: Exception) -> None:
            forget()
            self._end_transfer(src)

        channel.subscribe(on_message, on_end, lambda header, sizes: [memory])

    def end(self, error: Callable[[], Exception]) -> None:
        """Fail what is pending, each with an error of its own, and hold nothing any more."""
        self._over = True
        for pending in list(self._active):
            self._fail(pending, error())
        for channel in self._incoming:
            self._fabric.forget(channel)  # what still comes is nobody's
        self._incoming.clear()
        self._arrived.clear()
        self._wanted.clear()
        self._matched.clear()
        self._offers.clear()
        if self._asking is not None:
            self._asking.cancel()
            self._asking = None

    def end_scope(self, root: bytes, ending: Ending) -> None:
        """Fail what is pending in a scope that has ended, and hold nothing of it any more."""
        for recv in self._recvs(root):
            self._fail(recv, ending.ended(self._group, recv.scope))
        for offer in [offer for offer in self._offers.values() if offer.scope.root == root]:
            self._fail(offer, ending.ended(self._group, offer.scope))
        self._wanted = {at: waiting for at, waiting in self._wanted.items() if not _is_of(root, at[1])}
        self._offers = {at: offer for at, offer in self._offers.items() if offer.scope.root != root}
        self._drop(root)

    def part_over(self, root: bytes) -> None:
        """This member's part in a call is over: drop what it has not received, and tell who waits for that."""
        unread = self._drop(root)
        if unread:
            _logger.warning(
                "%s: %d messages of a call that is over here were never received, from ranks %s",
                self._me,
                len(unread),
                ", ".join(map(str, sorted({arrival.src for arrival in unread}))),
            )

    def waiting_calls(self) -> list[Call | None]:
        """Return the calls whose sends and receives wait here for other members."""
        recvs = [recv.call for waiting in self._wanted.values() for recv in waiting]
        return recvs + [offer.call for offer in self._offers.values()]

    def waiting(self) -> list[tuple[str, Scope]]:
        """Return what waits here for other members, and in which scopes."""
        recvs = [(recv.description, recv.scope) for waiting in self._wanted.values() for recv in waiting]
        return recvs + [(offer.description, offer.scope) for offer in self._offers.values()]

    def waits_for(self, rank: int) -> bool:
        """Whether something pending can only end by an act of that rank."""
        unmatched = any(src == rank for (src, _), recvs in self._wanted.items() if recvs)
        return unmatched or rank in self._cut_off or any(offer.dst == rank for offer in self._offers.values())

    @property
    def pending(self) -> int:
        """Sends and receives that are not done."""
        return len(self._active)

    @property
    def buffered_bytes(self) -> int:
        """Bytes of messages that no recv has asked for."""
        arrivals = (arrival for waiting in self._arrived.values() for arrival in waiting)
        return sum(arrival.spec.nbytes for arrival in arrivals if arrival.budget is not None)

    def _lend(self, tensor: Any, spec: Spec, dst: int, message: tuple[Any, ...]) -> bool:
        """Send a message by way of memory that is shared with its receiver; False where there is none to have now."""
        if dst == self._rank or spec.device != "cpu" or not self._fabric.shares_memory(dst):
            return False
        if not self._lent.spend(dst, spec.nbytes):
            return False
        memory = None
        try:
            memory = self._copy_to_share(tensor, spec)
        finally:
            if memory is None:
                self._lent.regain(dst, spec.nbytes)
        if memory is None:
            return False
        self._fabric.lend(dst, ("mail", self._epoch, message), memory)
        return True

    @staticmethod
    def _copy_to_share(tensor: Any, spec: Spec, gate: Gate | None = None) -> memoryview | None:
        try:
            memory = arena().allocate(spec.nbytes).memory
        except MemoryError:
            return None
        shared = np.frombuffer(memory, np.uint8)
        if gate is None:
            np.copyto(shared, as_bytes(flat(tensor)))
        else:
            gate.copy(shared, as_bytes(flat(tensor, gate)))
        return memory

    def _recvs(self, root: bytes, src: int | None = None) -> list[Recv]:
        """Return the receives in a scope that wait for a message, or for the bytes of one."""
        waiting = [recv for (of, line), recvs in self._wanted.items() if _is_of(root, line) for recv in recvs]
        if src is None:
            takers = [arrival.taker for arrival in self._matched.values()]
            return waiting + [taker for taker in takers if taker is not None and taker.scope.root == root]
        return [recv for recv in waiting if recv.src == src]

    def _drop(self, root: bytes) -> list[Arrival]:
        """Drop the messages in a scope that no recv has taken, and return them."""
        dropped: list[Arrival] = []
        for at in [at for at in self._arrived if _is_of(root, at[1])]:
            dropped += self._arrived.pop(at)
        for arrival in dropped:
            self._let_go(arrival)
        return dropped

    def _let_go(self, arrival: Arrival) -> None:
        self._count_taken(arrival)
        if arrival.ticket is not None:
            if arrival.src == self._rank:
                self._fail_unread(arrival.ticket)
            else:
                self._tell(arrival.src, ("unread", arrival.ticket), [])

    def _fail_unread(self, ticket: int) -> None:
        """A message waits to be received by a part of a call that is over."""
        offer = self._offers.pop(ticket, None)
        if offer is not None:
            cause = "its part in the call is over, and has not received this"
            ending = Ending(offer.dst, f"rank {offer.dst}", "", "", cause)
            self._fail(offer, ending.ended(self._group, offer.scope))

    def _ask_later(self) -> None:
        """Ask, in a while, whether the senders that receives wait for are there at all."""
        if self._asking is None:
            loop = asyncio.get_running_loop()
            # In a context of its own: it must not keep that of a call, which is over when nothing holds it any more.
            self._asking = loop.call_later(PATIENCE, self._ask, context=Context())

    def _ask(self) -> None:
        self._asking = None
        of_calls = [recv for recvs in self._wanted.values() for recv in recvs if recv.scope.ends]
        waiting = {(recv.src, recv.scope.root) for recv in of_calls}
        lasting = {recv.call.id for recv in of_calls if recv.call is not None and recv.call.reach is None}
        for src, root in waiting - self._asked:
            if root in lasting:
                continue
            if src == self._rank:
                self._parts.when_over(root, partial(self._sender_over, src, root))
            else:
                self._tell(src, ("part?", root), [])
        self._asked = waiting
        if waiting:
            self._on_waiting()
            self._ask_later()

    def _sender_over(self, src: int, root: bytes) -> None:
        """A member's part in a call is over: it sends nothing more in its scope."""
        self._asked.discard((src, root))
        cause = "its part in the call is over, and it has sent nothing more"
        for recv in self._recvs(root, src):
            self._wanted[src, recv.line].remove(recv)
            if not self._wanted[src, recv.line]:
                del self._wanted[src, recv.line]
            self._fail(recv, Ending(src, f"rank {src}", "", "", cause).ended(self._group, recv.scope))

    def _succeed(self, unfinished: Unfinished, result: Any) -> None:
        self._retire(unfinished)
        unfinished.succeed(result)

    def _fail(self, unfinished: Unfinished, error: Exception) -> None:
        self._retire(unfinished)
        unfinished.fail(error)

    def _retire(self, unfinished: Unfinished) -> None:
        self._active.discard(unfinished)
        if isinstance(unfinished, Recv) and unfinished.timer is not None:
            unfinished.timer.cancel()

    def _arrive(self, arrival: Arrival) -> None:
        self._arrivals += 1
        arrival.number = self._arrivals
        if self._keep(arrival):
            self._pair(arrival.src, arrival.line)

    def _keep(self, arrival: Arrival) -> bool:
        """Keep a message for the next recv, unless nobody receives in its scope any more; return whether it is kept."""
        line = arrival.line
        if isinstance(line, tuple):
            root = line[0][:ROOT]
            if root != DEFAULT.root:
                if self._parts.is_over(root) or root in self._ended:
                    self._let_go(arrival)
                    return False
                self._parts.touched.add(root)
        waiting = self._arrived.setdefault((arrival.src, line), deque())
        later = (place for place, other in enumerate(waiting) if other.number > arrival.number)
        waiting.insert(next(later, len(waiting)), arrival)
        return True

    def _pair(self, src: int, line: Line) -> None:
        key = (src, line)
        arrived = self._arrived.get(key)
        wanted = self._wanted.get(key)
        while arrived and wanted:
            recv, arrival = wanted.popleft(), arrived[0]
            unfit = misfit(recv, arrival.spec) or self._make_room(arrival)
            if unfit is not None:
                self._fail(recv, unfit)  # the message stays for the next recv
                continue
            arrived.popleft()
            arrival.taker, recv.arrival = recv, arrival
            if arrival.ticket is not None:
                self._pull(arrival)
            elif arrival.failure:
                self._fail(recv, BackendError(f"{recv.description}: {arrival.failure}"))
            elif arrival.data is not None:
                self._land(arrival)
            # else it was pulled for a recv that was given up, and is on its way
        if not arrived:
            self._arrived.pop(key, None)
        if not wanted:
            self._wanted.pop(key, None)

    @staticmethod
    def _make_room(arrival: Arrival) -> MemoryError | None:
        """Take memory for an offered message; return the error where there is none."""
        if arrival.ticket is not None:
            try:
                # Of its own, also where the recv has an `out`: that is the caller's again as soon as it gives up.
                arrival.coming = np.empty(arrival.spec.nbytes, np.uint8)
            except MemoryError as error:
                return error
        return None

    def _pull(self, arrival: Arrival) -> None:
        ticket, arrival.ticket = arrival.ticket, None
        assert ticket is not None
        if arrival.src == self._rank:
            self._spawn(self._copy(self._offers.pop(ticket), arrival))
            return
        self._matched[arrival.src, ticket] = arrival
        self._tell(arrival.src, ("pull", ticket), [])

    async def _copy(self, offer: Offer, arrival: Arrival) -> None:
        """Move an offered message to oneself."""

        gate = offer.gate

        def copy() -> None:
            gate.copy(arrival.coming, as_bytes(flat(offer.tensor, gate)))

        try:
            if offer.spec.nbytes > LONG:
                await offload(copy)
            else:
                copy()
            gate.check()
        except Exception as error:  # a device's
            self._refuse(arrival, self._fail_send(offer, error))
        else:
            self._succeed(offer, None)
            self._land(arrival)

    async def _transfer(self, ticket: int, offer: Offer) -> None:
        """Send an offered message's bytes to the member that pulled it."""
        try:
            await self._move(ticket, offer)
        except Exception as error:  # a device's, or no memory: this message alone cannot be sent
            self._tell(offer.dst, ("failed", ticket, self._fail_send(offer, error)), [])

    async def _move(self, ticket: int, offer: Offer) -> None:
        gate = offer.gate
        if self._fabric.shares_memory(offer.dst):
            memory = await offload(lambda: self._copy_to_share(offer.tensor, offer.spec, gate))
            gate.check()
            if memory is not None:
                self._fabric.lend(offer.dst, ("mail", self._epoch, ("given", ticket)), memory)
                self._succeed(offer, None)
                return
        if copies(offer.tensor, offer.spec) > LONG:
            data = await offload(lambda: flat(offer.tensor, gate))
            gate.check()
        else:
            data = flat(offer.tensor)
        try:
            channel = await self._fabric.open_data(offer.dst, (self._epoch, "mail", ticket))
        except CollectiveError as error:
            self._on_failure(offer.dst, error)
            return
        cut = partial(self._fabric.cut, channel)
        gate.stops.add(cut)
        try:
            gate.check()
            await channel.send(b"", [as_bytes(data).data])
        except LinkError:
            gate.check()
            self._end_transfer(offer.dst)
        else:
            self._succeed(offer, None)
        finally:
            gate.stops.discard(cut)
            self._fabric.forget(channel)

    def _fail_send(self, offer: Offer, error: Exception) -> str:
        """End a send by its own error; return what its receiver is told."""
        self._fail(offer, error)
        cause = offer.error  # another where that has stopped it
        return f"{offer.description} on {self._me} failed: {type(cause).__name__}: {cause}"

    def _refuse(self, arrival: Arrival, failure: str) -> None:
        """Fail the recv of a message whose bytes will not come; the next recv where that one was given up."""
        arrival.failure, arrival.coming = failure, NOTHING
        if arrival.taker is None:
            self._pair(arrival.src, arrival.line)
        else:
            self._fail(arrival.taker, BackendError(f"{arrival.taker.description}: {failure}"))

    def _end_transfer(self, rank: int) -> None:
        """Take note that bytes to or from a member will not come through.

        It is no loss: its epoch has ended, or it has closed the group, or the link is gone, and each is told otherwise.
        """
        self._cut_off.add(rank)
        self._on_cut_off(rank)

    def _land(self, arrival: Arrival) -> None:
        """Give an arrival whose bytes have come to its taker, or keep it for the next recv."""
        arrival.data = arrival.coming
        recv = arrival.taker
        if recv is None:
            self._pair(arrival.src, arrival.line)
        elif recv.ended:
            return  # its scope has ended, and `out` is the caller's
        elif (recv.out is not None and arrival.spec.nbytes > LONG) or not tensors.loaded(arrival.spec.kind):
            delivering = offload(partial(deliver, arrival, recv.out, recv.gate.fill))
            delivering.add_done_callback(partial(self._delivered, arrival, recv))
        else:
            delivered: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
            try:
                delivered.set_result(deliver(arrival, recv.out))
            except Exception as error:  # a library that is missing here, or no memory: the caller's to hear
                delivered.set_exception(error)
            self._delivered(arrival, recv, delivered)

    def _delivered(self, arrival: Arrival, recv: Recv, delivered: asyncio.Future[Any]) -> None:
        error = delivered.exception()
        if arrival.taker is not recv or recv.ended:
            return  # it was given up meanwhile
        self._count_taken(arrival)
        arrival.taker = None  # which holds it: no cycle shall keep a sender's memory
        if error is None:
            self._succeed(recv, delivered.result())
        else:
            assert isinstance(error, Exception)
            self._fail(recv, error)

    def _count_taken(self, arrival: Arrival) -> None:
        budget, arrival.budget = arrival.budget, None
        if budget is None:
            return
        taken = budget.take(arrival.src, arrival.spec.nbytes)
        if arrival.src == self._rank:
            budget.regain(arrival.src, taken)
        elif taken:
            self._tell(arrival.src, ("taken", "eager" if budget is self._eager else "lent", taken), [])

    def _give_up(self, recv: Recv) -> bool:
        """Withdraw a recv that nobody awaits any more; its message, if any, goes to the next recv. False: it failed."""
        if recv.error is not None:
            return False
        recv.stop()
        recv.ended = True
        self._retire(recv)
        if self._over:
            return True
        key, arrival = (recv.src, recv.line), recv.arrival
        if arrival is None:
            wanted = self._wanted.get(key, ())
            if recv in wanted:
                self._wanted[key].remove(recv)
            return True
        recv.arrival = arrival.taker = None
        if self._keep(arrival):
            # Soon: others may be given up in this turn too, and have the earlier messages.
            self._loop.call_soon(self._pair, *key)
        return True

    def _expire(self, recv: Recv) -> None:
        """A recv has waited for as long as it may."""
        work = recv.work
        if not recv.ended and self._give_up(recv) and work is not None:
            assert self._overdue is not None, "there is a timeout"
            work._fail(self._overdue(recv.src, recv.description))


def _sent(spec: Spec, dst: int, tag: int) -> Work[None]:
    """Return the Work of a send that is done."""
    work: Work[None] = Work(f"send({spec}, dst={dst}, tag={tag})")
    work._succeed(None)
    return work


def _is_of(root: bytes, line: Line) -> bool:
    return isinstance(line, tuple) and line[0][:ROOT] == root
