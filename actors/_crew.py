"""The gang's side of the conversation with its hosts: who has come up, who is lost, who has finished a phase."""

from __future__ import annotations

import asyncio
import logging
import os
from functools import partial
from typing import TYPE_CHECKING

from actors import _fates
from actors._control import Introduction, Lost, Order, Phase, Report, pack, unpack
from actors._pickling import loads_error
from actors.errors import GangStartError
from collective.errors import LinkError, PeerLost

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from actors.abc import Launch, Process, ProcessId
    from collective.abc import Buffer, Channel, Message
    from collective.types import Address

TEARDOWN_SECONDS = 2.5
"""What `teardown` may take, the calls that it waits for included, before its process is killed."""
CLOSE_SECONDS = 1.0
"""What a host may take to let go of its groups and links."""
_SECOND_HAND = 0.5
"""Seconds that a report of somebody else's death waits for that death to be told at first hand."""

_logger = logging.getLogger("actors")


class Seat:
    """One actor as the gang sees it."""

    def __init__(self, launch: Launch) -> None:
        self.launch = launch
        self.process: Process | None = None
        self.identity: ProcessId | None = None
        self.channel: Channel | None = None
        self.address: Address
        self.phase = Phase.LAUNCH
        self.lost: str | None = None
        self.mourned = False
        self.leaving = False

    @property
    def up(self) -> bool:
        """Whether its host takes orders."""
        return self.channel is not None and self.lost is None and not self.leaving

    def __str__(self) -> str:
        return str(self.launch)


class Step:
    """A phase that some seats have yet to finish. `done` ends when all have; by an exception, where none may fail."""

    def __init__(self, phase: Phase, seats: Iterable[Seat], *, strict: bool) -> None:
        self.phase = phase
        self.waiting = dict.fromkeys(seats)
        self.errors: list[Exception] = []
        self.done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._strict = strict
        self._settle()

    def finish(self, seat: Seat) -> None:
        """A seat is through with it, or gone."""
        self.waiting.pop(seat, None)
        self._settle()

    def fail(self, seat: Seat, error: Exception) -> None:
        """A seat has failed in it."""
        self.errors.append(error)
        if self._strict:
            if not self.done.done():
                self.done.set_exception(error)
                self.done.exception()  # who waits raises it; where start was cut short, nobody does
        else:
            self.finish(seat)

    def _settle(self) -> None:
        if not self.waiting and not self.done.done():
            self.done.set_result(None)


class Crew:
    """All seats of a gang. What it does is done by callbacks and by who awaits its methods; it has no tasks."""

    def __init__(self, gang: str, launches: Sequence[Launch]) -> None:
        self.gang = gang
        self.seats = [Seat(launch) for launch in launches]
        self._by_place = {(seat.launch.role, seat.launch.rank): seat for seat in self.seats}
        self._loop = asyncio.get_running_loop()
        self._step = Step(Phase.CONSTRUCTOR, self.seats, strict=True)
        self._starting = True

    def __getitem__(self, place: tuple[str, int]) -> Seat:
        return self._by_place[place]

    def welcome(self, channel: Channel) -> None:
        """Take the channel that a host opened."""
        note = unpack(channel.payload)
        seat = self._by_place.get((note.role, note.rank)) if isinstance(note, Introduction) else None
        if seat is None or seat.channel is not None:
            _logger.warning("gang %s: a stranger reported: %s", self.gang, note)
            channel.close()
            return
        seat.channel = channel
        seat.address = note.address
        seat.phase = Phase.CONSTRUCTOR
        seat.identity = note.process
        self._identify(seat)
        channel.subscribe(
            lambda message: self._hear(seat, message),
            lambda error: self._lose(seat, f"its connection ended ({error})", error),
        )
        # Ordered, not begun by the host alone: an actor that dies in its constructor is known to have come that far.
        channel.post(pack(Order(Phase.CONSTRUCTOR)))

    def forget(self) -> None:
        """All is over: nobody asks any more how processes ended."""
        for seat in self.seats:
            _fates.known.pop(seat.launch.uid, None)

    def watch(self, processes: Sequence[Process]) -> None:
        """Take the processes of the seats, in their order, and hear of their deaths."""
        for seat, process in zip(self.seats, processes, strict=True):
            seat.process = process
            self._identify(seat)
            process.ended.add_done_callback(partial(self._on_end, seat))

    def _identify(self, seat: Seat) -> None:
        if seat.process is None or seat.identity is None:
            return
        seat.process.identify(seat.identity)
        if (fate := seat.process.fate) is not None:
            _fates.known[seat.launch.uid] = fate

    # Starting.

    async def constructed(self) -> None:
        """Wait until every actor is constructed.

        Raises:
            GangStartError: one is not, and will not be.
        """
        await asyncio.shield(self._step.done)

    async def perform(self, phase: Phase, buffers: Sequence[Buffer] = ()) -> None:
        """Have every host do a phase, and wait until all have.

        Raises:
            GangStartError: one has failed.
        """
        self._step = Step(phase, self.seats, strict=True)
        note = pack(Order(phase))
        await asyncio.gather(*(self._order(seat, note, phase, buffers) for seat in self.seats))
        await asyncio.shield(self._step.done)

    def started(self) -> None:
        """From now on a loss is told to the survivors, and no longer the end of the start."""
        self._starting = False

    def overdue(self, seconds: float) -> GangStartError:
        """Return the error for a start that took longer than it may."""
        late = list(self._step.waiting)
        first = late[0]
        problem = (
            f"not done when start_timeout ended, {seconds:g} s after the start began (waiting for {_list(late)}); "
            "nothing had failed: if it is merely slow, raise Gang(start_timeout=...) "
            f"(the load here is {os.getloadavg()[0]:.0f} on {os.cpu_count()} CPUs)"
        )
        return GangStartError(self.gang, first.launch.role, first.launch.rank, first.phase.value, problem)

    # Ending.

    async def dismiss(self, hurry: asyncio.Future[None]) -> list[Exception]:
        """Have the actors tear down and their hosts leave, within bounds; return what failed in `teardown`.

        :param hurry: once done, nothing is waited for any more.
        """
        self._starting = False
        errors = await self._end_phase(Phase.TEARDOWN, TEARDOWN_SECONDS, hurry)
        await self._end_phase(Phase.CLOSE, CLOSE_SECONDS, hurry)
        for seat in self.seats:
            seat.leaving = True
        return errors

    async def _end_phase(self, phase: Phase, seconds: float, hurry: asyncio.Future[None]) -> list[Exception]:
        step = self._step = Step(phase, [seat for seat in self.seats if seat.up], strict=False)
        note = pack(Order(phase))
        for seat in list(step.waiting):
            seat.phase = phase
            assert seat.channel is not None
            seat.channel.post(note)
            # Done with closing is who has closed the connection.
            seat.leaving = phase is Phase.CLOSE
        await asyncio.wait([step.done, hurry], timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
        if step.waiting and not hurry.done():
            text = "gang %s: %s did not end within the %g s that there are for %s; killing what is left"
            _logger.warning(text, self.gang, _list(step.waiting), seconds, phase.value)
        for seat in step.waiting:
            seat.leaving = True
        return step.errors

    # What the hosts say.

    async def _order(self, seat: Seat, note: bytes, phase: Phase, buffers: Sequence[Buffer]) -> None:
        seat.phase = phase
        assert seat.channel is not None
        try:
            await seat.channel.send(note, buffers)
        except LinkError as error:
            self._lose(seat, f"its connection ended ({error})", error)

    def _hear(self, seat: Seat, message: Message) -> None:
        note = unpack(message.header)
        assert isinstance(note, Report)
        step = self._step
        if note.phase is not step.phase:
            return  # of a phase that was cut short
        if note.error is None:
            step.finish(seat)
            return
        error = loads_error(note.error, f"{seat} in its {note.phase.value}")
        if not self._starting:
            step.fail(seat, error)
            return
        wrapped = self._wrap(seat, f"{type(error).__name__}: {error}", error)
        if isinstance(error, PeerLost):
            self._loop.call_later(_SECOND_HAND, step.fail, seat, wrapped)
        else:
            step.fail(seat, wrapped)

    def _on_end(self, seat: Seat, ended: asyncio.Future[Exception]) -> None:
        if not ended.cancelled():
            error = ended.result()
            self._lose(seat, str(error), error)

    def _lose(self, seat: Seat, cause: str, error: Exception) -> None:
        if seat.leaving:
            self._step.finish(seat)
            return
        if seat.lost is not None:
            return
        seat.lost = cause
        fate = seat.process.fate if seat.process is not None else None
        if fate is None or fate.done():
            self._tell_loss(seat, error)
            return
        fate.add_done_callback(lambda _: self._tell_loss(seat, error))
        self._loop.call_later(_fates.SECONDS, self._tell_loss, seat, error)

    def _tell_loss(self, seat: Seat, error: Exception) -> None:
        if seat.mourned or seat.lost is None:
            return
        seat.mourned = True
        cause, fate = seat.lost, seat.process.fate if seat.process is not None else None
        if fate is not None and fate.done() and fate.result():
            cause = f"{fate.result()} ({cause})"
        if self._starting:
            self._step.fail(seat, self._wrap(seat, cause, error))
            return
        # As text: who keeps log records must not keep the gang.
        _logger.warning("gang %s: %s was lost: %s", self.gang, str(seat), cause)
        self._step.finish(seat)
        note = pack(Lost(seat.launch.role, seat.launch.rank, cause))
        for other in self.seats:
            if other.up and other.channel is not None:
                other.channel.post(note)

    def _wrap(self, seat: Seat, problem: str, error: Exception) -> GangStartError:
        wrapped = GangStartError(self.gang, seat.launch.role, seat.launch.rank, seat.phase.value, problem)
        wrapped.__cause__ = error
        return wrapped


def _list(seats: Iterable[Seat]) -> str:
    names = list(map(str, seats))
    return ", ".join(names[:10]) + (f" and {len(names) - 10} more" if len(names) > 10 else "")
