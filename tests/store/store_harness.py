"""What the tests of stores share: keepers in processes of their own."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import pickle
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from actors import Handle
from collective.links import default_host

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Iterator

HERE = Path(__file__).parent
LIMIT = 256 << 20


def run(main: Coroutine[Any, Any, Any], *, seconds: float = 20) -> Any:
    """Run a test; nothing may hang, nor fail in a callback."""

    async def bounded() -> Any:
        complaints: list[dict[str, Any]] = []
        asyncio.get_running_loop().set_exception_handler(lambda _, context: complaints.append(context))
        async with asyncio.timeout(seconds):
            result = await main
        assert not complaints, complaints
        return result

    return asyncio.run(bounded())


class Peer:
    """A keeper in a process of its own, as the test sees it."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        assert process.stdout is not None
        self.process = process
        self.target = pickle.loads(bytes.fromhex(process.stdout.readline()))

    @property
    def handle(self) -> Handle[Any]:
        """A handle of it; good for one loop after another."""
        return Handle(self.target)


@contextlib.contextmanager
def peers(*names: str, hosts: tuple[str, ...] = (), limit: int = LIMIT) -> Iterator[list[Peer]]:
    """Start keepers; hosts other than the first are reached over TCP."""
    path = os.pathsep.join((str(HERE), str(HERE.parent.parent)))
    started = [
        subprocess.Popen(
            [sys.executable, str(HERE / "store_peer.py"), name, host, str(limit)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": path},
        )
        for name, host in zip(names, hosts or (default_host(),) * len(names), strict=True)
    ]
    try:
        yield [Peer(process) for process in started]
    finally:
        for process in started:
            assert process.stdin is not None
            assert process.stdout is not None
            with contextlib.suppress(BrokenPipeError):
                process.stdin.close()
        for process in started:
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            process.stdout.close()


async def soon(
    condition: Callable[[], Coroutine[Any, Any, bool]], *, seconds: float = 5, collect: bool = True
) -> None:
    """Wait until something holds that messages on their way bring about."""
    deadline = time.monotonic() + seconds
    while not await condition():
        assert time.monotonic() < deadline, "it never came about"
        if collect:
            gc.collect()
        await asyncio.sleep(0.005)


async def holders(owner: Handle[Any]) -> list[str]:
    """Return who holds the entries of an owner, sorted; one entry after another."""
    entries = (await owner.statistics()).entries
    return [name for entry in entries for name in sorted(entry.holders)]


async def held_by(owner: Handle[Any], *names: str) -> None:
    """Wait until exactly these hold an owner's entries."""

    async def are() -> bool:
        return await holders(owner) == list(names)

    await soon(are)


async def is_empty(owner: Handle[Any]) -> None:
    """Wait until an owner has no entries, and nobody looks at what they were."""

    async def empty() -> bool:
        found = await owner.statistics()
        return not found.entries and not found.used

    await soon(empty)
