"""How a link switches from its unix socket to shared memory, once the handshake is done.

The dialer makes the memory and sends its descriptors with an offer; the acceptor maps it and answers with the nonce
that it reads there, which proves to the dialer that both see the same memory. Where either end cannot do its part, the
link goes on over the socket, and its kind is "unix".
"""

from __future__ import annotations

import contextlib
import os
import socket
import struct
from abc import abstractmethod
from typing import TYPE_CHECKING

from collective._links import region, rights, ring
from collective._links.sharing import Sharing
from collective._links.stream import StreamCarrier, cause_of
from collective._links.wire import WAKE, WireError

if TYPE_CHECKING:
    from collective._links.carrier import FrameSource
    from collective._links.region import Region

_OFFER = struct.Struct("<8sQ")
_ANSWER = struct.Struct(f"<8sQ{region.NONCE}s")
_MAGIC = b"gangshm\2"
_NONE = bytes(region.NONCE)


class SwitchingCarrier(StreamCarrier):
    """A unix socket that gives way to shared memory. What then happens there is the subclass's."""

    def __init__(self, sock: socket.socket, where: str, *, dialed: bool) -> None:
        super().__init__(sock, where)
        self.kind = "shm"  # type: ignore[misc]
        self._dialed = dialed
        self._came = b""
        self._came_descriptors: list[int] = []
        self._region: Region | None = None
        self._switched = False
        self._fallen_back = False
        self._peer_dead = False

    @abstractmethod
    def _use(self, region: Region) -> None:
        """Read and write there from now on; the socket brings descriptors, and tells of the other end's death."""

    @abstractmethod
    def _rung(self) -> None:
        """Take note that the other end has called to wake this one."""

    @abstractmethod
    def _socket_ended(self, cause: str) -> None:
        """Take note that the socket has told of the other end's death."""

    def start(self, source: FrameSource) -> None:
        self._source = source
        if self._closed:
            return
        self._loop.add_reader(self._descriptor, self._negotiate)
        if self._dialed:
            self._offer()
        self._watch_process()

    def _offer(self) -> None:
        if not ring.usable():
            self._offer_nothing()
            return
        memory = -1
        try:
            self._region, memory = region.create(self._wake)
            socket.send_fds(self._sock, [_OFFER.pack(_MAGIC, region.SIZE)], [memory])
        except OSError:
            self._offer_nothing()
        finally:
            if memory >= 0:
                os.close(memory)

    def _offer_nothing(self) -> None:
        """Propose to stay with the socket, where memory could not be made, or its descriptor not be sent."""
        self._drop_region()
        try:
            self._sock.send(_OFFER.pack(_MAGIC, 0))
        except OSError as error:
            self._loop.call_soon(self._ended, cause_of(error))

    def _wake(self) -> None:
        """Wake the other end: a byte on the socket, which costs no descriptor as an eventfd would."""
        # Full: it has not read the last ones, and will wake. Ended: the socket tells of that itself.
        with contextlib.suppress(OSError):
            self._sock.send(WAKE)

    def _negotiate(self) -> None:
        """Take the offer, or the answer to it, as much of it as has come."""
        wanted = (_ANSWER if self._dialed else _OFFER).size - len(self._came)
        try:
            data, descriptors = rights.receive(self._sock, wanted, 1)
        except (BlockingIOError, InterruptedError):
            return
        except OSError as error:
            self._ended(cause_of(error))
            return
        self._came_descriptors += descriptors
        self._came += data
        if not data:
            self._ended("connection ended")
        elif len(data) == wanted:
            try:
                self._take_answer() if self._dialed else self._take_offer()
            except WireError as error:
                self._ended(f"it does not speak this protocol ({error})")

    def _take_offer(self) -> None:
        magic, size = _OFFER.unpack(self._came)
        if magic != _MAGIC:
            raise WireError("what arrived is no offer of memory")
        descriptors, self._came_descriptors = self._came_descriptors, []
        nonce = _NONE
        if size == region.SIZE and ring.usable():
            try:
                self._region = region.adopt(descriptors, self._wake)
                nonce = self._region.nonce
            except OSError:
                nonce = _NONE  # The answer says so, and both ends stay with the socket.
        else:
            rights.close_all(descriptors)
        try:
            self._sock.send(_ANSWER.pack(_MAGIC, size, nonce))
        except OSError as error:
            self._ended(cause_of(error))
            return
        self._go_on(nonce != _NONE)

    def _take_answer(self) -> None:
        magic, _, nonce = _ANSWER.unpack(self._came)
        if magic != _MAGIC:
            raise WireError("what arrived is no answer to an offer of memory")
        if self._came_descriptors:
            raise WireError("descriptors came with the answer to an offer of memory, which has none")
        if nonce != _NONE and (self._region is None or nonce != self._region.nonce):
            raise WireError("it sees other memory than this end")
        self._go_on(nonce != _NONE)

    def _go_on(self, switch: bool) -> None:
        assert self._source is not None
        if switch:
            assert self._region is not None
            self._switched = True
            self.sharing = Sharing(self._sock, self._source.urge, self._socket_ended, self._rung)
            self._use(self._region)
        else:
            self._drop_region()
            self._fallen_back = True
            self.kind = "unix"  # type: ignore[misc]
            self._loop.add_reader(self._descriptor, self._readable)
        self.flush()

    def flush(self) -> None:
        if self._fallen_back:
            super().flush()

    def close(self) -> None:
        if self._closed:
            return
        if self.sharing is not None:
            process = self._process.descriptor if self._process is not None else -1
            self.sharing.close(process, dead=self._peer_dead)
        self._drop_region()
        self._drop_descriptors()
        super().close()

    def drop(self) -> None:
        super().drop()
        self._drop_descriptors()
        if self.sharing is not None:
            self.sharing.drop()
        if self._region is not None:
            self._region.close()

    def _drop_descriptors(self) -> None:
        rights.close_all(self._came_descriptors)
        self._came_descriptors = []

    def _drop_region(self) -> None:
        there, self._region = self._region, None
        if there is not None:
            there.close()
