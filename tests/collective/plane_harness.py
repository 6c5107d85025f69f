"""Data planes for tests: in one process, and in several."""

from __future__ import annotations

import asyncio
import gc
import itertools
import os
import subprocess
import sys
import textwrap
import time
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from collective._backends import make_plane
from collective.abc import PlaneContext

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Sequence

    from collective.abc import DataPlane

HOSTS = "abbacab"
"""Names of the hosts on which the members of every group pretend to be, by rank."""

_keys = itertools.count()


def make_planes(backend: str, size: int) -> list[DataPlane]:
    """Make the planes of a group whose members are all on the running loop."""
    loop, key = asyncio.get_running_loop(), f"planes-{next(_keys)}"
    planes: list[DataPlane] = []

    def tell_from(src: int) -> Callable[[int, bytes], None]:
        def tell(dst: int, message: bytes) -> None:
            loop.call_soon(lambda: planes[dst].hear(src, message))

        return tell

    for rank in range(size):
        context = PlaneContext(
            group="g", key=key, rank=rank, size=size, tell=tell_from(rank), timeout=30.0, hosts=tuple(HOSTS[:size])
        )
        planes.append(make_plane(backend, context))
    return planes


@asynccontextmanager
async def opened(backend: str, size: int) -> AsyncIterator[list[DataPlane]]:
    planes = make_planes(backend, size)
    await asyncio.gather(*(plane.open() for plane in planes))
    try:
        yield planes
    finally:
        await asyncio.gather(*(plane.aclose() for plane in planes))


async def all_of(completions: Sequence[Awaitable[None]]) -> None:
    await asyncio.gather(*completions)


def held() -> tuple[int, int, int]:
    """Return the numbers of descriptors, of mappings of groups' memory, and of threads."""
    gc.collect()
    maps = Path("/proc/self/maps").read_text().count("memfd:gangline-group")
    return len(os.listdir("/proc/self/fd")), maps, len(os.listdir("/proc/self/task"))


async def until_held(most: tuple[int, int, int]) -> None:
    """Wait until no more is held than that: workers end soon after they were told to."""
    deadline = time.monotonic() + 30
    while True:
        left = held()
        if all(now <= then for now, then in zip(left, most, strict=True)):
            return
        assert time.monotonic() < deadline, f"descriptors, mappings, threads: {left}, where there were {most}"
        await asyncio.sleep(0.01)


_MEMBER = """
import asyncio, os, pickle, struct, sys, time
import numpy as np
from collective._backends import make_plane
from collective.abc import PlaneContext
from collective.errors import BackendError
from collective.types import ReduceOp

def say(*words):
    print(*words, flush=True)

async def connect():
    rank, size, directory, backend = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4]
    hosts = tuple(sys.argv[5])
    loop = asyncio.get_running_loop()
    path = lambda r: os.path.join(directory, f"s{r}")
    planes = []
    async def serve(reader, writer):
        src, length = struct.unpack("II", await reader.readexactly(8))
        planes[0].hear(src, await reader.readexactly(length))
        writer.close()
    server = await asyncio.start_unix_server(serve, path(rank))
    tasks = set()
    async def tell(dst, message):
        while not os.path.exists(path(dst)):
            await asyncio.sleep(0.01)
        _, writer = await asyncio.open_unix_connection(path(dst))
        writer.write(struct.pack("II", rank, len(message)) + message)
        await writer.drain()
        writer.close()
    tell_soon = lambda dst, message: tasks.add(loop.create_task(tell(dst, message)))
    context = PlaneContext("g", "k", rank, size, tell_soon, 30.0, hosts=hosts)
    planes.append(make_plane(backend, context))
    await planes[0].open()
    if tasks:
        await asyncio.wait(tasks)
    server.close()
    return rank, size, planes[0]
"""


def start_members(backend: str, directory: object, size: int, body: str) -> list[subprocess.Popen[str]]:
    """Start processes that connect, then run `body`: the inside of an async function with rank, size and plane."""
    source = _MEMBER + "async def main():\n    rank, size, plane = await connect()\n"
    source += textwrap.indent(textwrap.dedent(body), "    ") + "\nasyncio.run(main())\nsay('left')\n"
    return [
        subprocess.Popen(
            [sys.executable, "-W", "error", "-c", source, str(rank), str(size), str(directory), backend, HOSTS[:size]],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(size)
    ]


def lines_until(process: subprocess.Popen[str], word: str) -> str:
    """Read lines of its output until one starts with a word; return that."""
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith(word):
            return line
    assert process.stderr is not None
    raise AssertionError(f"ended before saying {word!r}: {process.stderr.read()}")


def finish(processes: Sequence[subprocess.Popen[str]], within: float) -> list[int]:
    """Wait for processes; kill what is left. Return their exit codes."""
    deadline = time.monotonic() + within
    try:
        return [process.wait(max(0.1, deadline - time.monotonic())) for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.communicate()
