"""The calling side: connections to actors, and the calls that wait on them.

A call leaves in the caller's own coroutine and its reply is handed to it by a future: no task of its own, no lock,
and where the connection has credit no waiting. Where it has to wait (for the connection, for credit, behind a call that
waits) it takes its place in the connection's line at once, so that calls start in the order in which they were made.
"""

from __future__ import annotations

import asyncio
from collections import deque
from itertools import count
from typing import TYPE_CHECKING, Any, Final
from weakref import ref

from actors import _fates, _scopes
from actors import _protocol as protocol
from actors._context import current
from actors._pickling import Beside, dumps, loads, loads_error
from actors._target import Target, note_closed
from actors.errors import ActorClosed, NotReady, RemoteCancelled
from collective.abc import LARGE
from collective.errors import (
    HandshakeError,
    LinkClosed,
    LinkError,
    OutOfResources,
    PeerLost,
    PortRefused,
    WouldBlock,
    WrongLoop,
)
from collective.freight import Freight
from collective.links import loop_endpoint

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from actors._interface import Method
    from collective import scopes
    from collective.abc import Buffer, Channel, Endpoint, Link, Message
    from collective.freight import Shipment

_numbers: Final = count(1)


class Failure:
    """How a call ended without a result: its error (None: its caller cancelled it), and what groups it left broken."""

    __slots__ = ("broken", "error")

    def __init__(self, error: Exception | None, broken: Sequence[str] = ()) -> None:
        self.error = error
        self.broken = broken


class Call:
    """One call on its way. `place` is its place in line until it has left; `reply` is its Message or its Failure."""

    __slots__ = (
        "_aside",
        "_beside",
        "_header",
        "_shipment",
        "awaited",
        "connection",
        "method",
        "number",
        "on_end",
        "place",
        "reply",
        "sent",
    )

    def __init__(
        self,
        connection: Connection,
        number: int,
        method: str,
        header: bytes,
        aside: Sequence[Buffer],
        beside: Sequence[Buffer] = (),
    ) -> None:
        self.connection = connection
        self.number = number
        self.method = method
        self.reply: asyncio.Future[Message | Failure] = connection.loop.create_future()
        self.awaited: asyncio.Future[Any] = self.reply
        """What its caller awaits."""
        self.on_end: Callable[[Message | Failure], None] | None = None
        """Called at once when it has ended: a callback of `reply` would wait for the loop's next turn."""
        self.place: asyncio.Future[None] | None = None
        self.sent = False
        self._header = header
        self._aside = aside
        self._beside = beside
        self._shipment: Shipment | None = None
        if type(beside) is Beside and beside.refs:
            self._header, self._shipment = protocol.load(header, beside.refs, connection.freight)

    def __str__(self) -> str:
        return f"{self.connection.target}.{self.method}"

    def leave_now(self, channel: Channel) -> bool:
        """Send the request, if that needs no waiting."""
        parts = (*self._aside, *self._beside)
        if protocol.nbytes(self._header, parts) > LARGE:
            return False
        try:
            channel.send_nowait(self._header, parts)
        except WouldBlock:
            return False
        self.sent = True
        self._aside = self._beside = ()
        return True

    def take(self, *, must: bool = False) -> None:
        """Copy what its caller could change of the request; where it need not, it does as far as there is room."""
        if type(self._beside) is Beside:
            self._beside.take(self.connection.link, must=must)

    async def leave(self) -> None:
        """Wait in line, for the connection and for credit, and send the request. Failing to is its reply."""
        place, connection = self.place, self.connection
        if place is None:
            return
        try:
            await place
            channel = await connection.channel()
            if channel is not None and not self.reply.done():
                # Nothing of this connection's is on its way.
                self.take(must=True)
                self.sent = True
                await channel.send(self._header, (*self._aside, *self._beside))
        except Exception as error:  # whatever it is, who waits for the reply must not wait for ever
            self._lost()
            connection.end_call(self, error)
        except asyncio.CancelledError as cancelled:
            if hasattr(cancelled, "withdrawn"):
                self._lost()
            raise
        finally:
            self.drop_unsent()
            self._aside = self._beside = ()
            self.place = None
            connection.step_out(place)

    def drop_unsent(self) -> None:
        """Let go of refs in a request that did not leave, and will not."""
        if not self.sent:
            self._lost()

    def _lost(self) -> None:
        if self._shipment is not None:
            self._shipment.lost()

    def cancel(self, *, forget: bool) -> None:
        """Have the actor cancel it. With `forget` nobody waits for the reply, which else tells that it has ended."""
        self.connection.cancel(self, forget=forget)

    def end(self, outcome: Message | Failure) -> None:
        """Take the reply, if it is the first, and somebody waits for it."""
        if not self.reply.done():
            self.reply.set_result(outcome)
            if self.on_end is not None:
                self.on_end(outcome)

    def result(self) -> Any:
        """Return what the actor returned, or raise what it raised. The call must have ended."""
        reply = self.outcome()
        if isinstance(reply, Failure):
            raise reply.error or RemoteCancelled(str(self))
        return loads(*protocol.body(reply), "the result", self)

    def outcome(self) -> Message | Failure:
        """Return the reply of a call that has ended, an error being put together."""
        reply = self.reply.result()
        if isinstance(reply, Failure):
            return reply
        kind = reply.header[0] & protocol.KIND
        return reply if kind == protocol.RESULT else read_failure(kind, reply, str(self))


class Connection:
    """The channels from one endpoint to one actor. Belongs to a loop; ends with its link, or with the actor.

    :param dialer: the endpoint, where it is an actor's; None where it is the loop's own.
    """

    def __init__(
        self, target: Target, endpoint: Endpoint, dialer: Endpoint | None, table: dict[str, Connection]
    ) -> None:
        self.loop = asyncio.get_running_loop()
        self.target = target
        self.dialer = dialer
        self.link: Link | None = None
        self.freight = Freight()
        self.endpoint = endpoint
        self._table = table
        self._number = next(_numbers)
        self._main: Channel | None = None
        self._bulk: Channel | None = None
        self._calls: dict[int, Call] = {}
        self.readers: dict[Call, asyncio.Task[Any] | None] = {}
        """Calls of streams, and the tasks that wait for their next items."""
        self._call_numbers = count(1)
        self._line: deque[asyncio.Future[None]] = deque()
        self._ended: Exception | None = None

    @property
    def calls(self) -> list[Call]:
        """The calls that have not ended."""
        return list(self._calls.values())

    @property
    def live(self) -> bool:
        """Whether calls can be made; another connection must be made where not."""
        return self._ended is None

    def begin(
        self, method: Method, data: bytes, buffers: Sequence[Buffer], scope: scopes.Call | None = None
    ) -> Call:
        """Make a call: its request has left when this returns, or has its place in line and what it carries is taken.

        That happens later where more than the arena's limit waits to leave. The caller holds no argument any more.
        """
        number = next(self._call_numbers)
        kind, tail = protocol.CALL, method.wire
        if scope is not None:
            kind, tail = kind | protocol.SCOPED, tail + _scopes.pack(scope)
        header, aside = protocol.pack(kind, number, data, tail=tail)
        return self._begin(Call(self, number, method.name, header, aside, buffers))

    def begin_reset(self, tokens: Sequence[str]) -> Call:
        """Have the actor reset groups that a call of its left broken."""
        number = next(self._call_numbers)
        data, _ = dumps(list(tokens), "groups to reset")
        header, buffers = protocol.pack(protocol.RESET, number, data)
        return self._begin(Call(self, number, "group.reset", header, buffers))

    def begin_question(self, question: bytes) -> Call:
        """Ask the actor what a call waits for, as `actors._waits` has it."""
        number = next(self._call_numbers)
        return self._begin(Call(self, number, "(waits)", *protocol.pack(protocol.WAITS, number, question)))

    def _begin(self, call: Call) -> Call:
        self._calls[call.number] = call
        if self._line or self._main is None or not call.leave_now(self._main):
            call.take()
            call.place = place = self.loop.create_future()
            self._line.append(place)
            if self._line[0] is place:
                place.set_result(None)
        return call

    def step_out(self, place: asyncio.Future[None]) -> None:
        """Give up a place in line; the first of the line is the one that may send."""
        self._line.remove(place)
        if self._line and not self._line[0].done():
            self._line[0].set_result(None)

    async def channel(self) -> Channel | None:
        """Return the channel for requests, connecting at the first use; None where the connection has ended."""
        if self._main is None and self._ended is None:
            try:
                self._open(await self.endpoint.connect(self.target.address, self.target.credential))
            except LinkError as error:
                self._end(error)
        return self._main if self._ended is None else None

    def open_stream(self, call: Call) -> Channel:
        """Open the channel of a stream whose request has left."""
        if self.link is None:
            raise LinkClosed(f"the link to {self.target} is gone")
        return self.link.open(self.target.port, protocol.OPENING.pack(protocol.STREAM, self._number, call.number))

    def cancel(self, call: Call, *, forget: bool) -> None:
        if forget or not call.sent:
            self._calls.pop(call.number, None)
        call.drop_unsent()
        if call.reply.done() and not call.reply.cancelled():  # cancelled: by the cancellation of who awaited it
            return
        if not call.sent:
            call.end(Failure(None))
        elif self._main is not None:
            self._main.post(protocol.HEAD.pack(protocol.CANCEL, call.number))

    def forget(self, call: Call) -> None:
        """Take a call that has ended by other means off the books."""
        self._calls.pop(call.number, None)
        call.drop_unsent()

    def end_call(self, call: Call, error: Exception) -> None:
        """Let a call fail because its channel or link did."""
        self._calls.pop(call.number, None)
        if not call.reply.done():
            call.end(Failure(self.translate(error, call.method)))

    def translate(self, error: Exception, method: str) -> Exception:
        """Turn the end of a link or channel into what it means for a call."""
        target = self.target
        if isinstance(error, OutOfResources):
            return OutOfResources(error.resource, error.who, f"{error.doing}, for {target}.{method}()")
        if not isinstance(error, LinkError):
            return error
        link_lives = self.link is not None and not self.link.closed
        translated: Exception
        if isinstance(error, WrongLoop):
            translated = NotReady(
                f"{target}.{method}(): this handle is used on another event loop than the gang of {target} runs on, "
                f"which shares this process with it; use it there, or start the gang here (in tests, give fixtures and "
                f"tests the same loop)"
            )
        elif isinstance(error, HandshakeError):
            translated = HandshakeError(f"{target}.{method}(): {error}")
        elif link_lives or isinstance(error, PortRefused) or target.has_closed:
            translated = ActorClosed(target.role, target.rank, method)
        elif isinstance(error, LinkClosed):
            translated = LinkClosed(f"{target}.{method}(): the endpoint that it was called from has closed")
        else:
            translated = PeerLost(target.role, target.rank, str(error), doing=method)
        translated.__cause__ = error
        return translated

    def _open(self, link: Link) -> None:
        self.link = self.freight.link = link
        port = self.target.port
        self._main = link.open(port, protocol.OPENING.pack(protocol.MAIN, self._number, 0))
        self._bulk = link.open(port, protocol.OPENING.pack(protocol.BULK, self._number, 0))
        self._main.subscribe(self._on_reply, self._on_main_end)
        self._bulk.subscribe(self._on_reply, self._end)
        link.on_close(self._end)
        link.on_close(lambda _: self.freight.lose())

    def _on_reply(self, message: Message) -> None:
        message = protocol.unload(message, self.endpoint, self.link)
        _, number = protocol.HEAD.unpack_from(message.header)
        call = self._calls.pop(number, None)
        if call is not None:
            call.end(message)

    def _on_main_end(self, error: Exception) -> None:
        # In good order the actor closes both; a large reply may still be on its way, so the calls wait for the other.
        self._ended = self._ended or error
        if self.link is not None and not self.link.closed:
            note_closed([self.target.uid])
        self._drop()

    def _end(self, error: Exception) -> None:
        self._ended = self._ended or error
        self._drop()
        for call in list(self._calls.values()):
            self.end_call(call, self._ended)
        for channel in (self._main, self._bulk):
            if channel is not None:
                channel.close()

    def _drop(self) -> None:
        if self._table.get(self.target.key) is self:
            del self._table[self.target.key]


def connection_to(target: Target) -> Connection:
    """Return the connection to an actor from where this code runs: from its actor, or else from its event loop.

    Raises:
        NotReady: no event loop runs here.
    """
    try:
        loop = asyncio.get_running_loop()
    except RuntimeError as error:
        raise NotReady(f"a call to {target} needs a running event loop: use it under asyncio.run") from error
    context = current.get()
    dialer = context.endpoint if context is not None and context.loop is loop else None
    last = target.route[0]()
    if last is None or last.dialer is not dialer or last.loop is not loop or not last.live:
        last = _find_connection(target, dialer)
        target.route[0] = ref(last)
    return last


def _find_connection(target: Target, dialer: Endpoint | None) -> Connection:
    endpoint = loop_endpoint() if dialer is None else dialer
    # Kept on the endpoint, so that both go together: a table of endpoints would hold them by way of their links.
    table: dict[str, Connection] | None = endpoint.__dict__.get("_gangline_connections")
    if table is None:
        table = endpoint.__dict__["_gangline_connections"] = {}
    connection = table.get(target.key)
    if connection is None:
        connection = table[target.key] = Connection(target, endpoint, dialer, table)
    return connection


async def call(target: Target, method: Method, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Call a method of an actor, known to people as `name`, and return its result.

    Cancelling it cancels the method, without waiting for the method to end.
    """
    data, buffers = dumps((args, kwargs), "an argument", name)
    del args, kwargs  # what nobody holds need not be copied; and an error, which `made` keeps, has this frame in it
    made = connection_to(target).begin(method, data, buffers, _scopes.entered_for(target))
    del data, buffers
    try:
        if made.place is not None:
            await made.leave()
        elif (link := made.connection.link) is not None:
            link.linger(made.reply.done)
        await made.reply
    except BaseException:
        made.cancel(forget=True)
        raise
    try:
        return made.result()
    except PeerLost as lost:
        raise await _fates.explain(lost, target) from lost.__cause__


def read_failure(kind: int, message: Message, doing: str) -> Failure:
    """Put together how a call ended: by an error, or by being cancelled."""
    record = loads(*protocol.body(message), f"the error of {doing}")
    if kind == protocol.CANCELLED:
        return Failure(None, record)
    error, broken = record
    return Failure(error if isinstance(error, Exception) else loads_error(error, doing), broken)
