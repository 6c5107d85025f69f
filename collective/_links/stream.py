"""Links over sockets. Writing happens in the caller's context, reading straight into where the bytes belong."""

from __future__ import annotations

import asyncio
import os
import socket
import struct
from typing import TYPE_CHECKING

from collective._links import forks, processes
from collective._links.carrier import Carrier, FrameSource
from collective._links.options import tune, unanswered
from collective.errors import LinkBroken

if TYPE_CHECKING:
    from collective._links.wire import Piece, Written

_TURN = 1 << 20
"""Bytes that one callback moves before it lets the loop go on: some tenths of a millisecond."""
_WATCH_SECONDS = 1.0
_UCRED = struct.Struct("3i")


class StreamCarrier(Carrier):
    """A connected socket, non-blocking, of either family."""

    def __init__(self, sock: socket.socket, where: str) -> None:
        sock.setblocking(False)
        self.kind = "unix" if sock.family == socket.AF_UNIX else "tcp"  # type: ignore[misc]
        self.where = where
        self._sock = sock
        self._descriptor = sock.fileno()
        self._loop = asyncio.get_running_loop()
        self._source: FrameSource | None = None
        self._parked: list[Piece] = []
        self._parked_owner: Written | None = None
        self._writing = False
        self._unwritable = ""
        self._process: processes.Watch | None = None
        self._process_dead = False
        self._watch: asyncio.TimerHandle | None = None
        self._closed = False
        tune(sock)
        forks.hold(self)

    # The handshake.

    def put(self, data: bytes) -> None:
        try:
            count = self._sock.send(data)
        except OSError as error:
            raise LinkBroken(f"{self.where}: {cause_of(error)}") from error
        if count != len(data):
            raise LinkBroken(f"{self.where}: it does not read")

    async def take(self, count: int) -> bytes:
        data = b""
        while len(data) < count:
            try:
                part = await self._loop.sock_recv(self._sock, count - len(data))
            except OSError as error:
                raise LinkBroken(f"{self.where}: {cause_of(error)}") from error
            if not part:
                raise LinkBroken(f"{self.where}: connection ended")
            data += part
        return data

    # The multiplexer.

    def start(self, source: FrameSource) -> None:
        self._source = source
        if self._closed:
            return
        self._loop.add_reader(self._descriptor, self._readable)
        if self._sock.family == socket.AF_UNIX:
            self._watch_process()
        else:
            self._watch_host()

    @property
    def idle(self) -> bool:
        return not self._parked

    def flush(self) -> None:
        if not self._parked and not self._closed and not self._unwritable and self._source is not None:
            self._write()

    def _write(self) -> None:
        assert self._source is not None
        next_frame, sock = self._source.next_frame, self._sock
        budget = _TURN
        while budget > 0:
            frame = next_frame()
            if frame is None:
                self._stop_writing()
                return
            pieces, size, owner = frame
            try:
                count = sock.send(pieces[0]) if len(pieces) == 1 else sock.sendmsg(pieces)
            except (BlockingIOError, InterruptedError):
                count = 0
            except OSError as error:
                self._write_failed(error)
                return
            if count < size:
                self._parked = rest_of(pieces, count)
                self._parked_owner = owner
                self._start_writing()
                return
            if owner is not None:
                owner.written()
            budget -= size
        self._start_writing()

    def _writable(self) -> None:
        if self._parked:
            try:
                count = self._sock.sendmsg(self._parked)
            except (BlockingIOError, InterruptedError):
                return
            except OSError as error:
                self._write_failed(error)
                return
            self._parked = rest_of(self._parked, count)
            if self._parked:
                return
            owner, self._parked_owner = self._parked_owner, None
            if owner is not None:
                owner.written()
        self._write()

    def _start_writing(self) -> None:
        if not self._writing:
            self._writing = True
            self._loop.add_writer(self._descriptor, self._writable)

    def _stop_writing(self) -> None:
        if self._writing:
            self._writing = False
            self._loop.remove_writer(self._descriptor)

    def _write_failed(self, error: OSError) -> None:
        # The other end may have sent more before it went: the end is told once that is read.
        self._unwritable = cause_of(error)
        self._parked, self._parked_owner = [], None
        self._stop_writing()
        self._loop.call_soon(self._readable)

    def detach(self) -> None:
        self._parked = [bytes(piece) for piece in self._parked]

    def _readable(self) -> None:
        source = self._source
        assert source is not None
        budget = _TURN
        while not self._closed:
            targets = source.targets()
            try:
                if len(targets) == 1:
                    count = self._sock.recv_into(targets[0])
                else:
                    count = self._sock.recvmsg_into(targets)[0]
            except (BlockingIOError, InterruptedError):
                if self._process_dead or self._unwritable:
                    self._ended(self._unwritable or "its process died")
                return
            except OSError as error:
                self._ended(cause_of(error))
                return
            if not count:
                self._ended("connection ended")
                return
            room = sum(map(len, targets))
            del targets  # Nobody but its receiver may hold a message's memory.
            source.received(count)
            budget -= count
            dying = self._process_dead or bool(self._unwritable)
            if (count < room and not dying) or source.stopped:
                return
            if budget <= 0:
                if dying and not self._closed:
                    self._loop.call_soon(self._readable)
                return

    def _ended(self, cause: str) -> None:
        assert self._source is not None
        self._source.carrier_ended(cause)

    # The other process, and its host.

    def _watch_host(self) -> None:
        """Learn when the other host is gone while it owes us an answer. While it does not, the kernel asks it."""
        if self._closed:
            return
        if unanswered(self._sock):
            self._ended("its host does not answer")
        else:
            self._watch = self._loop.call_later(_WATCH_SECONDS, self._watch_host)

    def _watch_process(self) -> None:
        """Learn at once when the other process dies, even if a forked child of it keeps the socket open."""
        pid = self._peer_pid()
        if pid <= 0 or pid == os.getpid():
            return  # Zero: in a process namespace that is not visible from here.
        try:
            self._process = processes.watch(pid, self._loop, self._process_died)
        except ProcessLookupError:
            self._loop.call_soon(self._process_died)
        except OSError:
            return  # A kernel or sandbox without pidfds, or no descriptors left: the socket's end has to do.

    def _peer_pid(self) -> int:
        """Return the process at the other end of a unix socket, 0 where it is not visible from here."""
        credentials = self._sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size)
        return int(_UCRED.unpack(credentials)[0])

    def _process_died(self) -> None:
        if not self._closed:
            self._process_dead = True
            self._close_process()
            self._readable()

    def _close_process(self) -> None:
        if self._process is not None:
            self._process.close()

    # The end.

    def finish(self) -> None:
        try:
            self._sock.shutdown(socket.SHUT_WR)
        except OSError as error:
            self._unwritable = cause_of(error)

    def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        forks.release(self)
        if not self._loop.is_closed():
            self._loop.remove_reader(self._descriptor)
            self._loop.remove_writer(self._descriptor)
        if self._watch is not None:
            self._watch.cancel()
        self._close_process()
        self._parked, self._parked_owner = [], None
        self._sock.close()

    def drop(self) -> None:
        """Close the descriptors in a forked child."""
        self._closed = True
        os.close(self._sock.detach())


def rest_of(pieces: list[Piece], count: int) -> list[Piece]:
    """Return what is left of pieces after the first `count` bytes."""
    for index, piece in enumerate(pieces):
        if count < len(piece):
            return [memoryview(piece)[count:], *pieces[index + 1 :]]
        count -= len(piece)
    return []


def cause_of(error: OSError) -> str:
    """Say what an error of a socket means for a link."""
    if isinstance(error, BrokenPipeError | ConnectionResetError):
        return "connection ended"
    if isinstance(error, ConnectionRefusedError):
        return "connection refused"
    return error.strerror or type(error).__name__
