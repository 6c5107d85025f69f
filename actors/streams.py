"""Async generators of actors, read from elsewhere."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack
from typing import TYPE_CHECKING, Any, Generic, NoReturn, TypeVar, overload

from actors import _fates, _scopes
from actors import _protocol as protocol
from actors._caller import Failure, connection_to, read_failure
from actors._pickling import Beside, dumps, loads
from actors.errors import NotReady, RemoteCancelled
from collective.errors import LinkError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from types import TracebackType
    from typing import Self

    from actors._caller import Call
    from actors._interface import Method
    from actors._target import Target
    from collective import scopes
    from collective.abc import Channel, Message

T = TypeVar("T")

_USE = "use `async with handle.method(...) as items: async for item in items: ...`"


class Stream(Generic[T]):
    """An async generator that runs on an actor: `async with handle.rows() as rows: async for row in rows: ...`.

    Entering starts it, in order with calls. It runs ahead of the reader by at most 16 items and a mebibyte, then waits.
    Leaving ends it where it stands, with a CancelledError where it awaits and GeneratorExit where it yields, and waits
    until its `finally` blocks have run, on the actor; a task that is being cancelled, by a deadline or otherwise, does
    not wait for that. What it raises is raised here, by the iteration or by leaving.
    Good for one pass, by one task at a time.
    """

    def __init__(
        self,
        target: Target,
        method: Method,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        scope: scopes.Call | None = None,
    ) -> None:
        self._target = target
        self._method = method
        self._scope = scope or _scopes.entered_for(target)
        self._arguments: tuple[tuple[Any, ...], dict[str, Any]] | None = (args, kwargs)
        self._pickle: tuple[bytes, list[Any]] | None = None
        self._call: Call | None = None
        self._channel: Channel | None = None
        self._reading = False
        self._ended = False
        self._left = False
        """Whether what is still to come is dropped as it comes."""
        self._taken = 0

    async def __aenter__(self) -> Self:
        if self._pickle is None:
            self._take({})
        assert self._pickle is not None
        (data, buffers), self._pickle = self._pickle, None
        self._call = call = connection_to(self._target).begin(self._method, data, buffers, self._scope)
        try:
            await call.leave()
            if call.reply.done():
                call.result()
            self._channel = call.connection.open_stream(call)
        except BaseException:
            call.cancel(forget=True)
            raise
        # Replies come over the stream's own channel; its end tells of the link's.
        call.connection.forget(call)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()

    def __aiter__(self) -> Self:
        self._entered()
        return self

    async def __anext__(self) -> T:
        channel = self._entered()
        if self._ended:
            raise StopAsyncIteration
        if self._reading:
            raise RuntimeError(f"{self!r} is being read by another task; one at a time")
        self._reading = True
        try:
            message = await self._receive(channel)
        finally:
            self._reading = False
        if message is None:
            raise StopAsyncIteration
        self._taken += 1
        if self._taken == protocol.AHEAD // 2:
            channel.post(protocol.HEAD.pack(protocol.CREDIT, self._taken))
            self._taken = 0
        item: T = loads(message[0], message[1], "an item", self._name)
        return item

    async def aclose(self) -> None:
        """End the generator and wait for its end; what its `finally` blocks raise is raised here. Idempotent."""
        channel, self._arguments = self._channel, None
        if channel is None or self._left:
            return
        try:
            if not self._ended:
                self.stop()
                # A deadline that has passed, or a cancellation, is not to wait for the actor's end of it.
                while not _cancelling() and await self._receive(channel) is not None:
                    pass
        finally:
            ended, self._ended = self._ended, True
            self._left = not ended and not self._reading  # cancelled
            if self._left:
                self._drop_rest(channel)
            else:
                channel.close()

    def stop(self) -> None:
        """Tell the generator to end, without waiting; items that are on their way can still be read."""
        if self._channel is not None and not self._ended:
            self._channel.post(protocol.HEAD.pack(protocol.STOP, 0))

    if not TYPE_CHECKING:  # a type checker shall refuse it

        def __await__(self) -> NoReturn:
            raise TypeError(f"{self!r} is not awaited; {_USE}")

    def __repr__(self) -> str:
        return f"<Stream {self._name}>"

    def _drop_rest(self, channel: Channel) -> None:
        """Take what is still to come, so that refs in it arrive and are given up, until the generator has ended."""
        assert self._call is not None
        endpoint = self._call.connection.endpoint

        def drop(message: Message) -> None:
            if protocol.unload(message, endpoint, channel.link).header[0] & protocol.KIND != protocol.ITEM:
                channel.close()

        channel.subscribe(drop, lambda _: channel.close())

    def _take(self, pickles: dict[tuple[int, int], tuple[bytes, list[Any]]]) -> None:
        """Pickle the arguments as they are now.

        :param pickles: by their places in memory, those of streams that may have the very same.
        """
        if self._arguments is None:
            raise NotReady(f"{self!r} was entered before; call {self._method.name}() again for another pass")
        arguments, self._arguments = self._arguments, None
        key = id(arguments[0]), id(arguments[1])
        if key not in pickles:
            pickles[key] = dumps(arguments, f"an argument of {self._name}")
        self._pickle = pickles[key]

    @property
    def _name(self) -> str:
        return f"{self._target}.{self._method.name}"

    def _entered(self) -> Channel:
        if self._channel is None:
            raise NotReady(f"{self!r} has not been entered; {_USE}")
        return self._channel

    async def _receive(self, channel: Channel) -> Any:
        """Return the pickle of the next item, or None after the last one."""
        assert self._call is not None
        connection = self._call.connection
        connection.readers[self._call] = asyncio.current_task()
        try:
            message = protocol.unload(await channel.receive(), connection.endpoint, channel.link)
        except LinkError as error:
            self._ended = True
            translated = connection.translate(error, self._method.name)
            raise await _fates.explain(translated, connection.target) from error
        finally:
            connection.readers.pop(self._call, None)
        kind = message.header[0] & protocol.KIND
        if kind == protocol.ITEM:
            return protocol.body(message)
        self._ended = True
        if kind == protocol.END:
            return None
        failure: Failure = read_failure(kind, message, self._name)
        raise failure.error or RemoteCancelled(self._name)


def _cancelling() -> bool:
    """Return whether the running task is being cancelled, `asyncio.timeout` included."""
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0


class Streams(Generic[T]):
    """The streams of the actors of one role, in rank order: `async with handles.rows() as streams: ...`.

    A sequence of Streams. Entering it enters all of them, and leaving it leaves all; one alone may also be entered
    by itself. To read several at once, give each a task.
    """

    def __init__(self, streams: Sequence[Stream[T]]) -> None:
        self._streams = tuple(streams)
        self._stack = AsyncExitStack()

    async def __aenter__(self) -> Self:
        self._take()
        try:
            async with AsyncExitStack() as stack:
                for stream in self._streams:
                    await stack.enter_async_context(stream)
                self._stack = stack.pop_all()
        finally:
            for stream in self._streams:
                stream._pickle = None
        return self

    def _take(self) -> None:
        """Take the arguments of all, as they are now: the last is entered when others have run."""
        pickles: dict[tuple[int, int], tuple[bytes, list[Any]]] = {}
        for stream in self._streams:
            stream._take(pickles)
        for _, beside in pickles.values():
            if type(beside) is Beside:
                beside.take(None)

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for stream in self._streams:
            stream.stop()
        await self._stack.__aexit__(kind, error, trace)

    def __len__(self) -> int:
        return len(self._streams)

    @overload
    def __getitem__(self, index: int) -> Stream[T]: ...
    @overload
    def __getitem__(self, index: slice) -> Streams[T]: ...
    def __getitem__(self, index: int | slice) -> Stream[T] | Streams[T]:
        found = self._streams[index]
        return Streams(found) if isinstance(found, tuple) else found

    def __iter__(self) -> Iterator[Stream[T]]:
        return iter(self._streams)

    if not TYPE_CHECKING:

        def __await__(self) -> NoReturn:
            raise TypeError(f"{self!r} is not awaited; use `async with ... as streams`, then `async for` on each")

    def __repr__(self) -> str:
        return f"<Streams {', '.join(map(repr, self._streams))}>"
