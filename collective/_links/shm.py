"""Links over shared memory, between processes of one host: a ring in each direction, looked after by the poller."""

from __future__ import annotations

import os
from dataclasses import replace
from time import perf_counter
from typing import TYPE_CHECKING, ClassVar

from collective._links.listening import LocalKind
from collective._links.outlook import Outlook, several_cpus
from collective._links.poller import Poller, join, leave
from collective._links.stream import StreamCarrier, rest_of
from collective._links.switching import SwitchingCarrier
from collective._links.wire import WireError

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable

    from collective._links.carrier import Carrier
    from collective._links.region import Region
    from collective.types import Address

_TURN = 1 << 20
"""Bytes that one callback moves in one direction before it lets the loop go on."""
_MOMENT = 1e-3
"""Seconds after which a callback that reads much does so, too."""
_PUBLISH = 32 << 10
"""Bytes after which the reader gives room back though there is more to read, so that the writer goes on beside it."""


class ShmCarrier(SwitchingCarrier):
    """A ring in each direction, beside a unix socket that tells of the other end's death."""

    def __init__(self, sock: socket.socket, where: str, *, dialed: bool) -> None:
        super().__init__(sock, where, dialed=dialed)
        self._more = False
        """Whether writing stopped, though there was room, to let the loop go on."""
        self._taking = False
        """Whether it hands over what has come: callbacks that run within that are not to begin it anew."""
        self._dying = ""
        self._poller: Poller
        self.awake = False
        self.outlook = Outlook(possible=self._peer_pid() != os.getpid() and several_cpus())

    def _use(self, region: Region) -> None:
        self._poller = join(self._loop)
        self._loop.add_reader(self._descriptor, self._socket_readable)
        self._poller.wake(self)

    # Writing.

    def flush(self) -> None:
        if not self._switched:
            super().flush()
        elif not self._parked and not self._more and not self._closed and not self._unwritable:
            self._put_frames()

    def write_now(self, frame: bytes) -> bool:
        region = self._region
        if region is None or not self._switched or self._parked or self._more or self._closed or self._unwritable:
            return False
        try:
            if not region.writer.write(frame):
                return False
        except WireError:
            return False  # The writing of frames that waited meets it again, and tells.
        self.outlook.sent = True
        if not self.awake:
            self._poller.expect(self)
        return True

    def _put_frames(self) -> bool:
        """Put frames into the ring until there are none or it is full. Return whether any went."""
        assert self._source is not None
        assert self._region is not None
        next_frame, writer = self._source.next_frame, self._region.writer
        self._more = False
        budget = _TURN
        try:
            while (frame := next_frame()) is not None:
                pieces, size, owner = frame
                if writer.room(size) >= size:
                    for piece in pieces:
                        writer.put(piece)
                elif (count := writer.fill(pieces)) < size:  # All of it may fit by now: the reader goes on meanwhile.
                    if count:
                        writer.publish()
                        budget -= count
                    self._parked, self._parked_owner = rest_of(pieces, count), owner
                    break
                writer.publish()
                if owner is not None:
                    owner.written()
                    budget -= owner.copied
                budget -= size
                if budget <= 0:
                    self._more = True
                    break
        except WireError as error:
            self._unwritable = f"it does not speak this protocol ({error})"
            self._parked, self._parked_owner = [], None
            self._loop.call_soon(self._ended, self._unwritable)
            return False
        if self._parked or self._more:
            self._poller.wake(self)  # Also where not a byte went: it asks for room before it sleeps.
        if budget == _TURN:
            return False
        self.outlook.sent = True
        if not self.awake:
            self._poller.expect(self)
        return True

    def _put_parked(self) -> bool:
        """Put the rest of a frame that did not fit, and then others. Return whether any went."""
        assert self._region is not None
        writer = self._region.writer
        try:
            count = writer.fill(self._parked)
        except WireError as error:
            self._ended(f"it does not speak this protocol ({error})")
            return True
        if not count:
            return False
        self._parked = rest_of(self._parked, count)
        writer.publish()
        if not self._parked:
            owner, self._parked_owner = self._parked_owner, None
            if owner is not None:
                owner.written()
            self._put_frames()
        return True

    def linger(self, until: Callable[[], bool]) -> None:
        if self.awake and not self._taking:
            self._poller.linger(self, until)

    # What the poller calls.

    def poll(self) -> bool:
        found = self._take_frames()
        if self._parked and not self._closed:
            found = self._put_parked() or found
        elif self._more and not self._closed:
            found = self._put_frames() or found
        return found

    def _take_frames(self) -> bool:
        """Hand over what has come. Return whether that was anything; the end counts."""
        source, there = self._source, self._region
        assert source is not None
        assert there is not None
        reader = there.reader
        budget, unpublished, stop = _TURN, 0, 0.0
        self._taking = True
        try:
            while available := reader.available():
                targets = source.targets()
                count = reader.take(targets, available)
                del targets  # Nobody but its receiver may hold a message's memory.
                unpublished += count
                if unpublished > _PUBLISH:
                    reader.publish()
                    unpublished = 0
                    now = perf_counter()
                    stop = stop or now + _MOMENT
                    if now > stop:  # To memory that is touched for the first time it takes ten times as long.
                        budget = 0
                source.received(count)
                if self._closed:
                    return True
                budget -= count
                if budget <= 0 or source.stopped:
                    break
        except WireError as error:
            self._ended(f"it does not speak this protocol ({error})")
            return True
        finally:
            self._taking = False
        if unpublished:
            reader.publish()
        if budget == _TURN:
            if self._dying:
                self._ended(self._dying)
                return True
            return False
        self.outlook.sent = False
        return True

    def stirred(self) -> bool:
        there = self._region
        assert there is not None
        return bool(there.reader.moved() or (self._parked and there.writer.moved()) or self._dying or self._more)

    def say_asleep(self) -> None:
        assert self._region is not None
        self._region.reader.say_asleep()
        if self._parked:
            self._region.writer.say_waiting()

    def say_awake(self) -> None:
        assert self._region is not None
        self._region.reader.say_awake()
        self._region.writer.say_awake()

    def _woken(self) -> None:
        self.outlook.woken()
        try:
            self.poll()
        finally:
            if not self.awake and not self._closed:
                self._poller.served(self)

    # The socket, and death.

    def _socket_readable(self) -> None:
        assert self.sharing is not None
        try:
            rang = self.sharing.look()
        except WireError as error:
            self._ended(f"it does not speak this protocol ({error})")
            return
        if rang and not self._closed:
            self._woken()

    def _rung(self) -> None:
        if not self._closed:
            self._poller.wake(self)

    def _socket_ended(self, cause: str) -> None:
        self._die(cause)

    def _process_died(self) -> None:
        if self._fallen_back:
            super()._process_died()
        elif not self._closed:
            self._peer_dead = True
            self._close_process()
            if not self._switched:
                self._negotiate()  # Its answer may be there, and in the memory what it said.
            if self._switched:
                self._die("its process died")
            elif self._fallen_back:
                super()._process_died()
            elif not self._closed:
                self._ended("its process died")

    def _die(self, cause: str) -> None:
        """Take what the other end had published, and then the end."""
        if self._closed or self._dying:
            return
        self._dying = cause
        self._loop.remove_reader(self._descriptor)  # An end stays readable for ever.
        self._poller.wake(self)

    def close(self) -> None:
        if self._switched and not self._closed:
            leave(self._loop, self._poller, self)
        super().close()


class ShmKind(LocalKind):
    """A unix socket over which links switch to shared memory."""

    name: ClassVar[str] = "shm"

    def listen(self, accept: Callable[[Carrier], None], address: Address) -> Address:
        return replace(address, host=self._host, shm=self._listen_locally(accept))

    def _path(self, address: Address) -> str | None:
        return address.shm

    def _carrier(self, sock: socket.socket, where: str, *, dialed: bool) -> StreamCarrier:
        return ShmCarrier(sock, where, dialed=dialed)
