"""A call as the actor runs it: from the arguments to the reply, and how it ends otherwise."""

from __future__ import annotations

import asyncio
import enum
import inspect
import pickle
from collections.abc import AsyncGenerator
from types import CoroutineType, GeneratorType
from typing import TYPE_CHECKING, Any, NamedTuple

from actors import _protocol as protocol
from actors._interface import Kind
from actors._pickling import PROTOCOL, Beside, dumps, dumps_error, loads
from actors._threads import Job
from actors.errors import ActorClosed, RemoteCancelled
from collective.errors import LinkError
from collective.freight import Ref
from collective.scopes import CallScope

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from actors._session import Session
    from collective import scopes
    from collective.abc import Buffer, Channel, Message
    from collective.freight import Shipment

OWN_MODULES = frozenset({"actors._running", "actors._threads"})
"""Whose frames a remote traceback does not start with."""


class Served(NamedTuple):
    """A method of the live actor."""

    name: str
    where: str
    kind: Kind
    function: Callable[..., Any]
    wire: bytes | None = None
    """What requests call it; None where it is for the actor as a member of a group, and no method of its class."""


class Ending(enum.Enum):
    """Why the call layer ends a call."""

    CANCELLED = "its caller cancelled it"
    STOPPED = "its reader left the stream"
    LOST = "its caller is gone"
    CLOSING = "the actor shuts down"


class Running:
    """One call on an actor, from its request to its reply. Its `run` is a task of its own."""

    __slots__ = (
        "_body",
        "_ending",
        "_job",
        "_scope",
        "_started",
        "method",
        "number",
        "session",
        "stream",
        "task",
        "where",
    )

    def __init__(
        self,
        session: Session,
        number: int,
        method: Served,
        body: tuple[Any, Sequence[memoryview]],
        scope: scopes.Call | None,
    ) -> None:
        self.session = session
        self._scope = scope
        self.number = number
        self.method = method
        self.where = method.where
        self.task: asyncio.Task[None] | None = None
        self.stream: Channel | None = None
        self._body = body
        self._job: Job | None = None
        self._started = False
        self._ending: Ending | None = None

    def end(self, why: Ending) -> None:
        """Cancel it. A shutdown cancels again what did not end at its first cancellation."""
        if self._ending is not None and why is not Ending.CLOSING:
            return
        self._ending = self._ending or why
        if self.task is None:
            self.session.dispatcher.release(self)
        # A task cancelled before its first step would end without a reply.
        elif self._started:
            self.task.cancel()

    @property
    def job(self) -> Job | None:
        """What it is in a worker thread, or in line for one."""
        return self._job

    async def run(self) -> None:
        """Run the method, then reply."""
        self._started = True
        result: Any = None
        taken: tuple[bytes, list[Any]] | None = None
        part = CallScope(self._scope, self.session.dispatcher.endpoint, self.where)
        try:
            with part:
                try:
                    if self._ending is not None:
                        raise asyncio.CancelledError
                    if self.method.kind is Kind.STREAM:
                        self.stream = await self.session.stream(self.number)
                    args, kwargs = loads(*self._body, "an argument", self.where)
                    self._body = (b"", ())
                    if self.method.kind is Kind.ASYNC:
                        result = self.method.function(*args, **kwargs)
                        # A wrapper around an async method may return what is none.
                        if type(result) is CoroutineType or _is_to_be_awaited(result):
                            result = await result
                    elif self.stream is None:
                        taken = await self._in_thread(args, kwargs)
                    else:
                        await self._generate(self.stream, args, kwargs)
                    del args, kwargs
                except BaseException as error:  # SystemExit too: it is the method's outcome, not the end of the actor
                    kind, data, buffers = self._failure(error, part)
                else:
                    kind, data, buffers = self._success(result) if taken is None else (protocol.RESULT, *taken)
            del result, taken  # What nobody holds any more need not be copied.
            # From here on it has ended, and nothing cancels it.
            self.session.running.pop(self.number, None)
            if kind != protocol.RESULT:
                await part.settle()
            part.finish()
            try:
                await self._reply(kind, data, buffers)
            except Exception as error:  # more than a link carries; whatever it is, the caller must not wait for ever
                await self._reply(*self._error(error, ()))
        finally:
            if self._job is not None:
                self._job.let_go()
                self._job = None  # It refers to this object.
            self.session.dispatcher.ended(self)

    async def _in_thread(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[bytes, list[Any]]:
        """Run a plain method in a worker thread, which takes its result before it turns to the next one."""
        function = self.method.function
        self._job = job = Job(lambda: self._taken(_in_full(function(*args, **kwargs))))
        self.session.workers.submit(job)
        self.session.dispatcher.watch()
        try:
            value, error = await job.result
        except asyncio.CancelledError:
            await job.cancel()
            raise
        if error is not None:
            raise error
        taken: tuple[bytes, list[Any]] = value
        return taken

    def _taken(self, result: Any) -> tuple[bytes, list[Any]]:
        """Take the result of a plain method, in its thread; where there is no room for it, have the thread wait."""
        if _is_to_be_awaited(result):
            if inspect.iscoroutine(result):
                result.close()
            raise TypeError(
                f"{self.where} is a plain method but returned an awaitable; declare it with async def, "
                "and a decorator of it with functools.wraps"
            )
        data, beside = dumps(result, "the result", self.where)
        del result
        if type(beside) is Beside and not beside.take(self.session.link) and self._job is not None:
            self._job.hold()
        return data, beside

    async def _generate(self, channel: Channel, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        flow = _Flow(self, channel)
        generator: AsyncGenerator[Any, Any] = self.method.function(*args, **kwargs)
        if not isinstance(generator, AsyncGenerator):
            raise TypeError(f"{self.where} is a stream but returned {generator!r}, which is no async generator")
        try:
            async for item in generator:
                data, buffers = dumps(item, "an item", self.where)
                del item
                if type(buffers) is Beside:
                    buffers.take(channel.link, must=True)  # One at a time; and it may wait long for its reader.
                await flow.take()
                header, aside, shipment = self._pack(protocol.ITEM, 0, data, buffers)
                parts = (*aside, *buffers)
                del data, aside, buffers
                try:
                    await protocol.send(channel, header, parts)
                except asyncio.CancelledError as cancelled:
                    if shipment is not None and hasattr(cancelled, "withdrawn"):
                        shipment.lost()
                    raise
                del parts
        finally:
            # Cancelling has ended the loop above; its mark would now upset timeouts in the generator's own clean-up.
            if self.task is not None:
                while self.task.cancelling():
                    self.task.uncancel()
            await generator.aclose()

    def _pack(
        self, kind: int, number: int, data: bytes, beside: Sequence[Buffer]
    ) -> tuple[bytes, Sequence[Buffer], Shipment | None]:
        """Return a message's header, its pickle where that is a buffer of its own, and the refs that it has in it."""
        header, aside = protocol.pack(kind, number, data)
        if type(beside) is Beside and beside.refs:
            header, shipment = protocol.load(header, beside.refs, self.session.freight)
            return header, aside, shipment
        return header, aside, None

    def _success(self, result: Any) -> tuple[int, bytes, Sequence[Buffer]]:
        if self.stream is not None:
            return protocol.END, b"", ()
        try:
            return protocol.RESULT, *dumps(result, "the result", self.where)
        except Exception as error:
            return self._error(error, ())

    def _failure(self, error: BaseException, part: CallScope) -> tuple[int, bytes, Sequence[Buffer]]:
        """Turn how the method ended into a reply; its scope ends, groups that it left in mid-collective are broken."""
        reason = "was cancelled" if isinstance(error, asyncio.CancelledError) else f"raised {type(error).__name__}"
        broken = part.abandon(f"{self.where} {reason}")
        if not isinstance(error, asyncio.CancelledError):
            return self._error(error, broken)
        if self._ending is None:
            return self._error(RemoteCancelled(self.where).with_traceback(error.__traceback__), broken)
        if self._ending is Ending.CLOSING:
            return self._error(ActorClosed(self.session.role, self.session.rank, self.method.name), broken)
        if self._ending is Ending.STOPPED:
            return protocol.END, b"", ()
        return protocol.CANCELLED, *dumps(broken, "names of groups")

    def _error(self, error: BaseException, broken: Sequence[str]) -> tuple[int, bytes, Sequence[Buffer]]:
        # Nothing of a user's is in it, and no module is imported for it: this must not fail as what it tells of did.
        return protocol.ERROR, pickle.dumps((dumps_error(error, OWN_MODULES), list(broken)), PROTOCOL), ()

    async def _reply(self, kind: int, data: bytes, beside: Sequence[Buffer]) -> None:
        header, aside, shipment = self._pack(kind, self.number, data, beside)
        if self.stream is None:
            try:
                if not self.session.reply_now(header, (*aside, *beside)):
                    await self._reply_later(header, aside, beside)
            except BaseException:
                if shipment is not None:
                    shipment.lost()
                raise
            return
        try:
            await self.stream.send(header, (*aside, *beside))
        except LinkError:
            return  # the reader is gone, and knows
        finally:
            self.stream.close()

    async def _reply_later(self, header: bytes, aside: Sequence[Buffer], beside: Sequence[Buffer]) -> None:
        """Send a reply of which nothing may change while it waits to leave."""
        session = self.session
        if type(beside) is not Beside or beside.take(session.link):
            await session.reply(header, (*aside, *beside))
            return
        async with session.turn:
            beside.take(session.link, must=True)
            if self._job is not None:
                self._job.let_go()
            await session.reply(header, (*aside, *beside))


def _is_to_be_awaited(value: Any) -> bool:
    return inspect.isawaitable(value) and not isinstance(value, Ref)


def _in_full(value: Any) -> Any:
    """Run a generator to its end, where the plain method runs: it cannot travel, what it yields can."""
    if isinstance(value, GeneratorType) and not inspect.isawaitable(value):
        return list(value)
    return value


class _Flow:
    """How many more items a stream may send before its reader has taken some."""

    def __init__(self, call: Running, channel: Channel) -> None:
        self._call = call
        self._credit = protocol.AHEAD
        self._refill: asyncio.Future[None] | None = None
        channel.subscribe(self._on_message, self._on_end)

    async def take(self) -> None:
        while not self._credit:
            self._refill = asyncio.get_running_loop().create_future()
            await self._refill
        self._credit -= 1

    def _on_message(self, message: Message) -> None:
        kind, items = protocol.HEAD.unpack_from(message.header)
        if kind == protocol.STOP:
            self._call.end(Ending.STOPPED)
            return
        self._credit += items
        if self._refill is not None and not self._refill.done():
            self._refill.set_result(None)

    def _on_end(self, error: Exception) -> None:
        self._call.end(Ending.LOST)
