"""What the tests of links share: endpoints that are connected, and a loop that forgives nothing."""

from __future__ import annotations

import asyncio
import contextlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import uvloop

from collective.abc import WINDOW, Channel, Endpoint, Link, Message
from collective.links import open_endpoint
from collective.types import Credential

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Coroutine

KINDS = ("memory", "shm", "unix", "tcp")
SOCKETS = ("shm", "unix", "tcp")
LOOPS = ("asyncio", "uvloop")
KEY = Credential("gang", b"k" * 32)

T = TypeVar("T")


def run(main: Callable[[], Coroutine[Any, Any, T]], *, loop: str = "asyncio", seconds: float = 30) -> T:
    """Run a coroutine function; what nobody looked at, such as an exception in a callback, fails the test."""

    async def strict() -> T:
        complaints: list[dict[str, Any]] = []
        asyncio.get_running_loop().set_exception_handler(lambda _, context: complaints.append(context))
        async with asyncio.timeout(seconds):
            result = await main()
        await asyncio.sleep(0)
        assert not complaints, complaints
        return result

    return uvloop.run(strict()) if loop == "uvloop" else asyncio.run(strict())


@dataclass
class Pair:
    """Two endpoints and the link that `here` opened to `there`."""

    here: Endpoint
    there: Endpoint
    link: Link
    ports: int = 0

    async def channel(self, *, window: int = WINDOW) -> tuple[Channel, Channel]:
        """Open a channel, and return both of its ends."""
        self.ports += 1
        return await channel_between(self.link, self.there, f"port-{self.ports}", window=window)


async def channel_between(
    link: Link, there: Endpoint, port: str = "port", *, window: int = WINDOW
) -> tuple[Channel, Channel]:
    """Open a channel over a link, and return both of its ends."""
    arrived: asyncio.Future[Channel] = asyncio.get_running_loop().create_future()
    there.serve(port, arrived.set_result)
    return link.open(port, window=window), await arrived


async def endpoint(kind: str, **options: Any) -> Endpoint:
    """Open an endpoint that grants everything to KEY."""
    opened = await open_endpoint(kinds=(kind,), **options)
    opened.grant(KEY)
    return opened


@contextlib.asynccontextmanager
async def pair(kind: str) -> AsyncIterator[Pair]:
    """Connect two endpoints over one kind of link."""
    async with await endpoint(kind) as here, await endpoint(kind) as there:
        link = await here.connect(there.address, KEY)
        assert link.kind == kind
        yield Pair(here, there, link)


async def talk(link: Link, there: Endpoint, port: str = "port") -> None:
    """Open a channel and send a message each way."""
    one, other = await channel_between(link, there, port)
    one.send_nowait(b"ping")
    assert (await other.receive()).header == b"ping"
    other.send_nowait(b"pong")
    assert (await one.receive()).header == b"pong"
    one.close()


async def pass_on(one: Channel, other: Channel, *buffers: bytes | memoryview | bytearray) -> Message:
    """Send a message and receive it."""
    sending = asyncio.create_task(one.send(b"header", buffers))
    message = await other.receive()
    await sending
    return message


async def until(condition: Callable[[], bool]) -> None:
    """Let the loop run until a condition holds; the test's timeout bounds this."""
    while not condition():  # noqa: ASYNC110  # Conditions of any kind, of code that knows nothing of this test.
        await asyncio.sleep(0.001)


async def turns(count: int = 20) -> None:
    """Let the loop go round some times, for what needs no waiting."""
    for _ in range(count):
        await asyncio.sleep(0)
