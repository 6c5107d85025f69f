"""How the members of a group come to share memory: rank 0 makes it and hands out descriptors over a unix socket.

Rank 0 tells each member, over its link, the socket's name, a token to show there, and a nonce to find in the memory.
So rank 0 knows that who asks is a member, and the member that it got what rank 0 made. The socket is an abstract one,
which leaves no file behind, and is closed when all have met.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import secrets
import socket
from hmac import compare_digest
from typing import TYPE_CHECKING, Any, Final

from collective._backends import MEMBERS
from collective._backends._shm_segment import Geometry, Segment, create_memory, is_genuine
from collective._links import rights
from collective.errors import BackendError, OutOfResources

if TYPE_CHECKING:

    from collective.abc import PlaneContext

_BYTES: Final = 32
"""Of a name, a token and a nonce."""
_COME, _FAIL = b"come", b"fail"
_READY, _GO = b"r", b"g"


class Meeting:
    """One member's way to its segment."""

    def __init__(self, context: PlaneContext) -> None:
        self._context = context
        self._invited: asyncio.Future[bytes] | None = None
        self._heard: list[bytes] = []
        self._made: Segment | None = None
        self._given_up = False

    def hear(self, message: bytes) -> None:
        """Take what another member's meeting told."""
        self._heard.append(message)
        if self._invited is not None and not self._invited.done():
            self._invited.set_result(message)

    def take(self) -> Segment | None:
        """Return the segment, which is the caller's from now on; None where the meeting was given up."""
        made, self._made = self._made, None
        return made

    def give_up(self) -> None:
        """Keep no segment, also none that is yet to be made. Idempotent."""
        self._given_up = True
        made = self.take()
        if made is not None:
            made.close()

    def _keep(self, segment: Segment) -> None:
        # Not returned: who awaits it may be cancelled in the very turn in which it is made.
        self._made = segment
        if self._given_up:
            self.give_up()

    async def meet(self) -> None:
        """Wait for all members and make this one's segment, for `take`. Raises: BackendError."""
        context = self._context
        if context.size > MEMBERS:  # a descriptor of each goes to each in one message, and the kernel takes 253
            raise BackendError(f"shm: at most {MEMBERS} members share memory, and group {context.group!r} has more")
        self._invited = asyncio.get_running_loop().create_future()
        for message in self._heard[:1]:
            self._invited.set_result(message)
        meeting = asyncio.ensure_future(self._host() if context.rank == 0 else self._visit())
        try:
            # Rank 0 hears only of failures, which end its own waiting.
            awaited: list[asyncio.Future[Any]] = [meeting, *([self._invited] if context.rank == 0 else [])]
            await asyncio.wait(awaited, return_when=asyncio.FIRST_COMPLETED)
            if not meeting.done():
                raise BackendError(self._invited.result().removeprefix(_FAIL).decode())
            meeting.result()
        except (BackendError, OSError) as error:
            why = OutOfResources.of(error, f"its process ({os.getpid()})", "take the group's memory") or error
            text = f"shm: rank {context.rank} of group {context.group!r} cannot share memory: {why}"
            failure = error if isinstance(error, BackendError) else BackendError(text)
            for rank in range(1, context.size) if context.rank == 0 else [0]:
                context.tell(rank, _FAIL + str(failure).encode())
            if failure is error:
                raise
            raise failure from error
        finally:
            await _end(meeting)
            self._invited.cancel()

    async def _host(self) -> None:
        loop, context, geometry = asyncio.get_running_loop(), self._context, Geometry(self._context.size)
        name, nonce = secrets.token_hex(_BYTES // 2).encode(), secrets.token_bytes(_BYTES)
        tokens = {rank: secrets.token_bytes(_BYTES) for rank in range(1, context.size)}
        guests: dict[int, socket.socket] = {}
        strangers: set[socket.socket] = set()
        """Who has not said yet which member it is."""
        everyone = asyncio.Event()
        greeting: set[asyncio.Task[None]] = set()

        async def greet(guest: socket.socket) -> None:
            try:
                said = await _read(guest, 4 + _BYTES)
                rank = int.from_bytes(said[:4], "little")
                if rank not in guests and compare_digest(tokens.get(rank, b""), said[4:]):
                    strangers.discard(guest)
                    guests[rank] = guest
                    if len(guests) == len(tokens):
                        everyone.set()
                    return
            except OSError:  # a stranger, or a member that died and whose link tells of it
                pass
            strangers.discard(guest)
            guest.close()

        def dismiss() -> None:
            for guest in (*guests.values(), *strangers):
                guest.close()

        async def receive(listener: socket.socket) -> None:
            while True:
                await _readable(listener)
                try:  # not by the loop, which would lose it where this is cancelled meanwhile
                    guest, _ = listener.accept()
                except BlockingIOError:  # it has gone again
                    continue
                guest.setblocking(False)
                strangers.add(guest)
                task = asyncio.ensure_future(greet(guest))
                greeting.add(task)
                task.add_done_callback(greeting.discard)

        with contextlib.ExitStack() as stack:
            listener = stack.enter_context(_unix_socket())
            listener.bind(_abstract(name))
            listener.listen(socket.SOMAXCONN)
            stack.callback(dismiss)
            for rank, token in tokens.items():
                context.tell(rank, _COME + name + token + nonce)
            receiving = asyncio.ensure_future(receive(listener))
            try:
                await _first(asyncio.ensure_future(everyone.wait()), receiving)
            finally:
                for task in (receiving, *greeting):
                    await _end(task)
            memory = create_memory(geometry, nonce)
            stack.callback(os.close, memory)
            bells = _make_bells(context.size)
            segment = _segment(geometry, 0, memory, bells)
            stack.push(lambda kind, *_: segment.close() if kind is not None else None)
            for guest in guests.values():
                socket.send_fds(guest, [_COME], [memory, *bells])
            for guest in guests.values():
                await _read(guest, len(_READY))
            for guest in guests.values():
                await loop.sock_sendall(guest, _GO)
        self._keep(segment)

    async def _visit(self) -> None:
        loop, context, geometry = asyncio.get_running_loop(), self._context, Geometry(self._context.size)
        assert self._invited is not None
        invitation = await self._invited
        if not invitation.startswith(_COME):
            raise BackendError(invitation.removeprefix(_FAIL).decode())
        name, token, nonce = (invitation[4 + i * _BYTES : 4 + (i + 1) * _BYTES] for i in range(3))
        with contextlib.ExitStack() as stack:
            host = stack.enter_context(_unix_socket())
            await loop.sock_connect(host, _abstract(name))
            await loop.sock_sendall(host, context.rank.to_bytes(4, "little") + token)
            await _readable(host)
            said, descriptors = rights.receive(host, len(_COME), 1 + context.size)
            if said != _COME or len(descriptors) != 1 + context.size:
                rights.close_all(descriptors)
                if said == _COME:  # The kernel drops those that do not fit.
                    raise OSError(errno.EMFILE, f"of {1 + context.size} descriptors {len(descriptors)} fit")
                raise ConnectionError("rank 0 ended the meeting")
            memory, *bells = descriptors
            stack.callback(os.close, memory)
            if not is_genuine(memory, geometry, nonce):
                rights.close_all(bells)
                raise ConnectionError("what it was given is not rank 0's memory")
            segment = _segment(geometry, context.rank, memory, bells)
            stack.push(lambda kind, *_: segment.close() if kind is not None else None)
            await loop.sock_sendall(host, _READY)
            await _read(host, len(_GO))
        self._keep(segment)


def _segment(geometry: Geometry, rank: int, memory: int, bells: list[int]) -> Segment:
    try:
        return Segment(geometry, rank, memory, bells)
    except BaseException:
        rights.close_all(bells)
        raise


def _make_bells(count: int) -> list[int]:
    bells: list[int] = []
    with contextlib.ExitStack() as undo:
        for _ in range(count):
            bells.append(os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK))
            undo.callback(os.close, bells[-1])
        undo.pop_all()
    return bells


def _abstract(name: bytes) -> str:
    return f"\0gangline-{name.decode()}"


def _unix_socket() -> socket.socket:
    made = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    made.setblocking(False)
    return made


async def _readable(sock: socket.socket) -> None:
    loop = asyncio.get_running_loop()
    readable: asyncio.Future[None] = loop.create_future()

    def ready() -> None:
        if not readable.done():
            readable.set_result(None)

    loop.add_reader(sock.fileno(), ready)
    try:
        await readable
    finally:
        loop.remove_reader(sock.fileno())


async def _read(sock: socket.socket, count: int) -> bytes:
    """Read so many bytes. Raises: ConnectionError, where the other end closed before."""
    said = b""
    while len(said) < count:
        more = await asyncio.get_running_loop().sock_recv(sock, count - len(said))
        if not more:
            raise ConnectionError("a member ended the meeting")
        said += more
    return said


async def _first(awaited: asyncio.Task[bool], beside: asyncio.Task[None]) -> None:
    """Wait for one task; an error of the other, which does not end by itself, ends the wait."""
    try:
        await asyncio.wait([awaited, beside], return_when=asyncio.FIRST_COMPLETED)
        if beside.done():
            beside.result()
    finally:
        await _end(awaited)


async def _end(task: asyncio.Task[object]) -> None:
    """Cancel a task and wait for its end."""
    task.cancel()
    await asyncio.wait([task])
    if not task.cancelled():
        task.exception()  # its result was looked at, or does not matter any more
