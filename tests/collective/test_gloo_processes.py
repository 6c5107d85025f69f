"""The gloo data plane between processes: what only they can show, such as dying and leaving."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from collections.abc import Sequence


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
    rank, size, directory = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
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
    context = PlaneContext("g", "k", rank, size, lambda dst, m: tasks.add(loop.create_task(tell(dst, m))), 30.0)
    planes.append(make_plane("gloo", context))
    await planes[0].open()
    if tasks:
        await asyncio.wait(tasks)
    server.close()
    return rank, size, planes[0]
"""


def start_members(directory: object, size: int, body: str) -> list[subprocess.Popen[str]]:
    """Start processes that connect, then run `body`: the inside of an async function with rank, size and plane."""
    source = _MEMBER + "async def main():\n    rank, size, plane = await connect()\n"
    source += textwrap.indent(textwrap.dedent(body), "    ") + "\nasyncio.run(main())\nsay('left')\n"
    return [
        subprocess.Popen(
            [sys.executable, "-W", "error", "-c", source, str(rank), str(size), str(directory)],
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


def test_survivors_of_a_killed_process_get_away(tmp_path: Any) -> None:
    """Its peers' work fails or stays pending, abandoning returns at once, and so does leaving."""
    processes = start_members(
        tmp_path,
        3,
        """
        large = np.ones(1 << 20)
        await plane.allreduce(large, large, ReduceOp.SUM)
        if rank == 2:
            say("ready")
            await asyncio.sleep(1000)
        work = plane.allreduce(large, large, ReduceOp.SUM)
        say("ready")
        try:
            await asyncio.wait_for(asyncio.shield(work), 20)
        except BackendError as error:
            say("failed", error)
        started = time.monotonic()
        plane.abandon()
        say("abandoned", time.monotonic() - started)
        """,
    )
    try:
        for process in processes:
            lines_until(process, "ready")
        os.kill(processes[2].pid, signal.SIGKILL)
        for process in processes[:2]:
            assert "gloo: " in lines_until(process, "failed")
            assert float(lines_until(process, "abandoned").split()[1]) < 0.5
        started = time.monotonic()
        for process in processes[:2]:
            lines_until(process, "left")
        assert time.monotonic() - started < 5
    finally:
        assert finish(processes, 10) == [0, 0, -signal.SIGKILL]


@pytest.mark.parametrize("ending", ["plane.abandon()", "pass", "sys.exit(0)"])
def test_the_interpreter_exits_with_work_pending(tmp_path: Any, ending: str) -> None:
    """One member never comes to an operation that the other has issued; whether abandoned or forgotten, both exit."""
    processes = start_members(
        tmp_path,
        2,
        f"""
        small, large = np.ones(1), np.ones(1 << 20)
        await plane.allreduce(small, small, ReduceOp.SUM)
        if rank == 0:
            works = [plane.allreduce(small, small, ReduceOp.SUM), plane.allreduce(large, large, ReduceOp.SUM)]
        say("issued")
        await asyncio.to_thread(sys.stdin.read, 1)
        {ending}
        """,
    )
    try:
        for process in processes:
            lines_until(process, "issued")
        started = time.monotonic()
        for process in processes:  # the one with work pending goes first
            assert process.stdin is not None
            process.stdin.write("x")
            process.stdin.flush()
            assert process.wait(20) == 0, process.stderr and process.stderr.read()
        assert time.monotonic() - started < 10
    finally:
        finish(processes, 10)


def test_who_is_done_may_leave_while_others_still_receive(tmp_path: Any) -> None:
    """Closing right after the own part of a broadcast cuts nobody off from theirs."""
    processes = start_members(
        tmp_path,
        2,
        """
        for size_now in (10, 1 << 16, 8 << 20):
            array = np.full(size_now, 7 if rank == 0 else 0, np.uint8)
            await plane.broadcast(array, 0)
            assert (array == 7).all()
        await plane.aclose()
        """,
    )
    assert finish(processes, 60) == [0, 0]


def test_a_forked_child_leaves_the_parents_group_alone(tmp_path: Any) -> None:
    """Neither its exit hooks nor its garbage collector touch connections and threads that are the parent's."""
    processes = start_members(
        tmp_path,
        2,
        """
        import atexit, gc, warnings
        warnings.simplefilter("ignore")  # of forking with threads
        child = os.fork()
        if child == 0:
            atexit._run_exitfuncs()
            del plane
            gc.collect()
            os._exit(0)
        assert os.waitpid(child, 0)[1] == 0
        total = np.ones(300_000)
        await plane.allreduce(total, total, ReduceOp.SUM)
        assert (total == 2).all()
        await plane.aclose()
        """,
    )
    assert finish(processes, 60) == [0, 0]
