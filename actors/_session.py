"""What one caller and one actor have between them, on the actor's side."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from actors import _protocol as protocol
from actors import _scopes, _waits
from actors._interface import STREAMING
from actors._pickling import dumps, dumps_error, loads
from actors._running import OWN_MODULES, Ending, Running
from actors.errors import ActorClosed
from collective.abc import LARGE
from collective.errors import LinkBroken, LinkError, WouldBlock
from collective.freight import Freight
from collective.scopes import reset_everywhere

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from actors._dispatch import Dispatcher
    from actors._threads import Workers
    from collective.abc import Buffer, Channel, Link, Message


class Session:
    """One connection of a caller: its channels, and its calls that run. Ends with its main channel."""

    def __init__(self, dispatcher: Dispatcher, on_end: Callable[[], None]) -> None:
        loop = asyncio.get_running_loop()
        self.role = dispatcher.role
        self.rank = dispatcher.rank
        self.running: dict[int, Running] = {}
        self.dispatcher = dispatcher
        self._on_end = on_end
        self._main: Channel | None = None
        self._bulk: asyncio.Future[Channel] = loop.create_future()
        self._streams: dict[int, asyncio.Future[Channel]] = {}
        self._newest = 0
        self._withdrawn: set[int] = set()
        self.freight = Freight()
        self.turn = asyncio.Lock()
        """Held by the reply that is copied though as much as may be waits to be sent: one of a session at a time."""

    @property
    def workers(self) -> Workers:
        """The actor's worker threads."""
        return self.dispatcher.workers

    @property
    def link(self) -> Link | None:
        """What it goes by."""
        return self.freight.link

    def attach(self, what: int, number: int, channel: Channel) -> None:
        """Take a channel that the caller opened."""
        if what == protocol.MAIN:
            self._main = channel
            self.freight.link = channel.link
            channel.link.on_close(lambda _: self.freight.lose())
            channel.subscribe(self._on_message, lambda _: self.end())
            return
        if what == protocol.BULK:
            channel.subscribe(lambda _: None, lambda _: self.end())
            waiting = self._bulk
        else:
            waiting = self.stream(number)
        if waiting.done():  # the call ended before its stream opened
            channel.close()
        else:
            waiting.set_result(channel)

    def stream(self, number: int) -> asyncio.Future[Channel]:
        """Return the channel of a stream, which the caller opens beside its request: whichever comes first."""
        waiting = self._streams.pop(number, None)
        if waiting is None:
            waiting = self._streams[number] = asyncio.get_running_loop().create_future()
        return waiting

    def reply_now(self, header: bytes, buffers: Sequence[Buffer]) -> bool:
        """Send a reply, if that needs no waiting."""
        main = self._main
        if main is None or protocol.nbytes(header, buffers) > LARGE:
            return False
        try:
            main.send_nowait(header, buffers)
        except WouldBlock:
            return False
        except LinkError:
            pass  # the caller is gone, and what it waited for has failed there
        return True

    async def reply(self, header: bytes, buffers: Sequence[Buffer]) -> None:
        """Send a reply; large ones go their own way, so that they delay no small one."""
        main = self._main
        assert main is not None
        try:
            if protocol.nbytes(header, buffers) > LARGE:
                main = await self._bulk
            await protocol.send(main, header, buffers)
        except LinkError:
            return  # the caller is gone, and what it waited for has failed there

    def end(self) -> None:
        """The caller is gone: cancel what it waits for."""
        for call in list(self.running.values()):
            call.end(Ending.LOST)
        for waiting in (self._bulk, *self._streams.values()):
            if not waiting.done():
                waiting.set_exception(LinkBroken("the caller is gone"))
                waiting.exception()  # nobody may be waiting
        self.close()
        self._on_end()

    def abandon(self) -> None:
        """Tell the caller of calls that will not end in time that the actor is closing."""
        for number, call in self.running.items():
            if call.stream is not None:
                call.stream.close()
            elif self._main is not None:
                self._main.post(*_error(number, ActorClosed(self.role, self.rank, call.method.name)))

    def close(self) -> None:
        """Close its channels; what was sent is still delivered."""
        for waiting in (self._bulk, *self._streams.values()):
            if waiting.done() and not waiting.cancelled() and waiting.exception() is None:
                waiting.result().close()
        if self._main is not None:
            self._main.close()

    def _on_message(self, message: Message) -> None:
        message = protocol.unload(message, self.dispatcher.endpoint, self.freight.link)
        kind, number = protocol.HEAD.unpack_from(message.header)
        if kind == protocol.CANCEL:
            self._cancel(number)
            return
        self._newest = number
        if self._withdrawn:
            cancelled = number in self._withdrawn
            self._withdrawn = {later for later in self._withdrawn if later > number}
            if cancelled:
                return
        if kind & protocol.KIND == protocol.CALL:
            self._call(number, message)
        elif kind & protocol.KIND == protocol.WAITS:
            self.dispatcher.question(self._answer(number, message))
        else:
            self.dispatcher.spawn(self._reset(number, message), name="resetting groups")

    def _call(self, number: int, message: Message) -> None:
        start = protocol.HEAD.size + 2
        length = int.from_bytes(message.header[start - 2 : start], "little")
        start += length & ~STREAMING
        wire = message.header[protocol.HEAD.size : start]
        method = self.dispatcher.methods.get(wire)
        if method is None or self.dispatcher.closing:
            name = wire[2:].decode(errors="replace")
            error: Exception
            if self.dispatcher.closing:
                error = ActorClosed(self.role, self.rank, name)
            else:
                kind = "stream" if length & STREAMING else "method"
                error = AttributeError(
                    f"{self.role}[{self.rank}] has no {kind} {name!r}; the handle is for another class"
                )
            refuse = self._refuse_stream if length & STREAMING else self._refuse
            self.dispatcher.spawn(refuse(number, error), name=name)
            return
        scope = None
        if message.header[0] & protocol.SCOPED:
            scope, start = _scopes.unpack(message.header, start, self.role, method.name)
        call = Running(self, number, method, protocol.body(message, start), scope)
        self.running[number] = call
        self.dispatcher.start_call(call)

    def _cancel(self, number: int) -> None:
        call = self.running.get(number)
        if call is not None:
            call.end(Ending.CANCELLED)
        elif number > self._newest:
            # It overtook its request, which may come, or may have been withdrawn before it left.
            self._withdrawn.add(number)
            if self._main is not None:
                self._main.post(*protocol.pack(protocol.CANCELLED, number, dumps([], "nothing")[0]))

    async def _answer(self, number: int, message: Message) -> None:
        asked, way = _waits.unpack(protocol.body(message)[0])
        call = self.running.get(asked)
        circle = await self.dispatcher.circle_of(call, way) if call is not None else []
        await self.reply(*protocol.pack(protocol.RESULT, number, *dumps(_waits.pack(asked, circle), "an answer")))

    async def _reset(self, number: int, message: Message) -> None:
        try:
            await reset_everywhere(loads(*protocol.body(message), "names of groups"))
        except Exception as error:
            await self._refuse(number, error)
        else:
            await self.reply(*protocol.pack(protocol.RESULT, number, *dumps(None, "nothing")))

    async def _refuse(self, number: int, error: Exception) -> None:
        await self.reply(*_error(number, error))

    async def _refuse_stream(self, number: int, error: Exception) -> None:
        """Refuse a stream on its own channel: its reader looks nowhere else."""
        try:
            channel = await self.stream(number)
            await channel.send(*_error(0, error))
        except LinkError:
            return  # the reader is gone, and knows
        channel.close()


def _error(number: int, error: Exception) -> tuple[bytes, Sequence[Buffer]]:
    return protocol.pack(protocol.ERROR, number, dumps((dumps_error(error, OWN_MODULES), []), "an error")[0])
