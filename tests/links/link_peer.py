"""A process at the other end of a link. It tells its address on standard output, and lives until its input ends."""

from __future__ import annotations

import asyncio
import ctypes
import dataclasses
import json
import os
import sys
import time
from typing import TYPE_CHECKING

import uvloop

from collective.links import open_endpoint
from collective.types import Address, Credential

if TYPE_CHECKING:
    from collective.abc import Channel, Message

KEY = Credential("gang", b"k" * 32)


def echo(channel: Channel) -> None:
    def on_message(message: Message) -> None:
        channel.send_nowait(message.header, message.buffers)

    channel.subscribe(on_message, lambda _: None)


def hold(channel: Channel) -> None:
    """Keep a channel and read nothing of it."""
    held.append(channel)


def keep(channel: Channel) -> None:
    """Receive, keep what came, and say that it did."""

    def on_message(message: Message) -> None:
        kept.append(message)
        channel.send_nowait(b"kept")

    channel.subscribe(on_message, lambda _: None)


def give_and_die(channel: Channel) -> None:
    """Send a large buffer, and die when the other end has it."""
    giving.append(asyncio.create_task(channel.send(b"given", [b"g" * (3 << 20)])))
    channel.subscribe(lambda _: os._exit(0), lambda _: None)


def sink(channel: Channel) -> None:
    channel.subscribe(lambda _: None, lambda _: None)


def say_and_die(channel: Channel) -> None:
    for i in range(50):
        channel.send_nowait(b"%d" % i, [bytes(1000)])
    os._exit(0)


def fork_and_die(channel: Channel) -> None:
    """Leave a child behind that outlives this process, made by os.fork() or behind Python's back."""
    fork = os.fork if channel.payload == b"python" else ctypes.CDLL(None).fork
    child = fork()
    if child == 0:
        time.sleep(60)
        os._exit(0)
    channel.send_nowait(b"%d" % child)
    os._exit(0)


def fork_and_look(channel: Channel) -> None:
    """Tell how many of the noted sockets a forked child has."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.write(writer, b"%d" % len(sockets_of_links & sockets()))
        os._exit(0)
    os.waitpid(child, 0)
    channel.send_nowait(os.read(reader, 100))


def note_sockets(channel: Channel) -> None:
    """Remember which sockets belong to links and listeners: those that were not there at the start."""
    sockets_of_links.update(sockets() - sockets_at_start)
    channel.send_nowait(b"%d" % len(sockets_of_links))


def sockets() -> set[str]:
    found = set()
    for fd in os.listdir("/proc/self/fd"):
        try:
            target = os.readlink(f"/proc/self/fd/{fd}")
        except FileNotFoundError:
            continue
        if target.startswith("socket:"):
            found.add(target)
    return found


held: list[Channel] = []
kept: list[Message] = []
giving: list[asyncio.Task[None]] = []
sockets_of_links: set[str] = set()
sockets_at_start: set[str] = set()


async def main(kind: str, directory: str) -> None:
    await asyncio.sleep(0)
    sockets_at_start.update(sockets())
    async with await open_endpoint(kinds=(kind,), directory=directory) as endpoint:
        endpoint.grant(KEY)
        for serve in (echo, hold, keep, give_and_die, sink, say_and_die, fork_and_die, fork_and_look, note_sockets):
            endpoint.serve(serve.__name__, serve)
        sys.stdout.write(json.dumps(dataclasses.asdict(endpoint.address)) + "\n")
        sys.stdout.flush()
        over = asyncio.Event()
        asyncio.get_running_loop().add_reader(0, over.set)
        await over.wait()


def parse_address(line: str) -> Address:
    fields = json.loads(line)
    if fields["tcp"] is not None:
        fields["tcp"] = tuple(fields["tcp"])
    return Address(**fields)


if __name__ == "__main__":
    uvloop.run(main(sys.argv[1], sys.argv[2]))
