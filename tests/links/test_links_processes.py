"""Links between processes: deaths of every sort, forks, and a process that just ends."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import dataclasses
import json
import os
import signal
import socket
import statistics
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
from link_harness import KEY, channel_between, endpoint, pair, run
from link_peer import parse_address

from collective.errors import LinkBroken
from collective.links import open_endpoint

if TYPE_CHECKING:
    from collections.abc import Iterator

    from collective.abc import Channel
    from collective.types import Address

ROOT = Path(__file__).parents[2]


@contextlib.contextmanager
def peer(kind: str, directory: Path) -> Iterator[tuple[subprocess.Popen[str], Address]]:
    """Start a process that serves, and end it."""
    process = subprocess.Popen(
        [sys.executable, str(Path(__file__).with_name("link_peer.py")), kind, str(directory)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        yield process, parse_address(process.stdout.readline())
    finally:
        process.stdin.close()
        process.wait(10)
        process.stdout.close()


async def round_trip(channel: Channel, header: bytes = b"x") -> None:
    channel.send_nowait(header)
    assert (await channel.receive()).header == header


def test_a_killed_peer_is_told_at_once(socket_kind: str, loop: str, tmp_path: Path) -> None:
    with peer(socket_kind, tmp_path) as (process, address):

        async def main() -> None:
            async with await open_endpoint(kinds=()) as here:
                link = await here.connect(address, KEY)
                assert link.kind == socket_kind
                channel = link.open("echo")
                await round_trip(channel)
                sending = asyncio.create_task(link.open("hold").send(b"", [bytes(1 << 24)]))
                receiving = asyncio.create_task(channel.receive())
                await round_trip(link.open("echo"))
                process.send_signal(signal.SIGKILL)
                async with asyncio.timeout(5):
                    for task in (receiving, sending):
                        with pytest.raises(LinkBroken, match=r"connection ended|process died"):
                            await task
                assert link.closed
                with pytest.raises(LinkBroken, match=address.endpoint):
                    await here.connect(address, KEY)

        run(main, loop=loop)


def test_what_a_peer_sent_before_it_died_is_delivered(socket_kind: str, tmp_path: Path) -> None:
    with peer(socket_kind, tmp_path) as (_, address):

        async def main() -> None:
            async with await open_endpoint(kinds=()) as here:
                channel = (await here.connect(address, KEY)).open("say_and_die")
                for i in range(50):
                    assert (await channel.receive()).header == b"%d" % i
                with pytest.raises(LinkBroken):
                    await channel.receive()

        run(main)


@pytest.mark.parametrize("fork", ["python", "library"])
def test_a_child_that_outlives_its_parent_does_not_hide_the_death(fork: str, loop: str, tmp_path: Path) -> None:
    with peer("unix", tmp_path) as (_, address):

        async def main() -> None:
            async with await open_endpoint(kinds=()) as here:
                channel = (await here.connect(address, KEY)).open("fork_and_die", fork.encode())
                child = int((await channel.receive()).header)
                try:
                    async with asyncio.timeout(5):
                        with pytest.raises(LinkBroken, match=r"process died|connection ended"):
                            await channel.receive()
                finally:
                    os.kill(child, signal.SIGKILL)  # It was alive all the time, or this raises.

        run(main, loop=loop)


def test_a_forked_child_has_no_sockets_of_links(socket_kind: str, tmp_path: Path) -> None:
    with peer(socket_kind, tmp_path) as (_, address):

        async def main() -> None:
            async with await open_endpoint(kinds=()) as here:
                link = await here.connect(address, KEY)
                assert int((await link.open("note_sockets").receive()).header) == 2  # The listener and the link.
                assert (await link.open("fork_and_look").receive()).header == b"0"
                await round_trip(link.open("echo"))  # The parent has kept its own.

        run(main)


def test_a_forked_child_makes_links_of_its_own(socket_kind: str, tmp_path: Path) -> None:
    script = """
        import asyncio, os, sys
        from collective.links import loop_endpoint
        from link_peer import KEY, parse_address
        address = parse_address(sys.argv[1])

        async def call():
            channel = (await loop_endpoint().connect(address, KEY)).open("echo")
            channel.send_nowait(b"x")
            return (await channel.receive()).header

        async def main():
            first = await call()
            child = os.fork()
            if child == 0:
                asyncio.events._set_running_loop(None)
                os._exit(0 if asyncio.run(call()) == b"x" else 1)
            _, status = await asyncio.to_thread(os.waitpid, child, 0)
            assert status == 0, status
            return first + await call()

        assert asyncio.run(main()) == b"xx"
    """
    with peer(socket_kind, tmp_path) as (_, address):
        assert run_script(script, address) == ""


def run_script(script: str, address: Address, *options: str) -> str:
    """Run a script in a process of its own, and return what it wrote to standard error."""
    done = subprocess.run(
        [sys.executable, *options, "-c", textwrap.dedent(script), json.dumps(dataclasses.asdict(address))],
        env={**os.environ, "PYTHONPATH": f"{ROOT}:{Path(__file__).parent}"},
        stderr=subprocess.PIPE,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stderr


def test_loops_that_come_and_go_leave_nothing_open(socket_kind: str, tmp_path: Path) -> None:
    script = """
        import asyncio, gc, os, sys, threading, uvloop
        from collective.links import loop_endpoint
        from link_peer import KEY, parse_address
        address = parse_address(sys.argv[1])

        async def call():
            channel = (await loop_endpoint().connect(address, KEY)).open("echo")
            channel.send_nowait(b"x")
            assert (await channel.receive()).header == b"x"
            channel.send_nowait(b"its answer is never read")

        def often(run):
            for _ in range(30):
                run(call())

        often(asyncio.run)
        often(uvloop.run)
        thread = threading.Thread(target=often, args=(asyncio.run,))
        thread.start()
        thread.join()
        gc.collect()
        sockets = [fd for fd in os.listdir("/proc/self/fd") if os.path.exists(f"/proc/self/fd/{fd}")
                   and os.readlink(f"/proc/self/fd/{fd}").startswith("socket:")]
        assert not sockets, sockets
    """
    with peer(socket_kind, tmp_path) as (_, address):
        assert run_script(script, address, "-W", "error") == ""


@pytest.mark.parametrize("end", ["return", "exit", "_exit", "thread"])
def test_a_process_that_ends_with_open_links_says_nothing(socket_kind: str, tmp_path: Path, end: str) -> None:
    script = f"""
        import asyncio, os, sys, threading
        from collective.links import loop_endpoint
        from link_peer import KEY, parse_address
        address = parse_address(sys.argv[1])

        async def main(said):
            channel = (await loop_endpoint().connect(address, KEY)).open("echo")
            channel.subscribe(lambda message: None, lambda error: None)
            channel.send_nowait(b"x")
            holding = loop_endpoint()
            said.set()
            if "{end}" == "exit":
                sys.exit(0)
            if "{end}" == "_exit":
                os._exit(0)
            if "{end}" == "thread":
                await asyncio.Event().wait()

        said = threading.Event()
        if "{end}" == "thread":
            threading.Thread(target=lambda: asyncio.run(main(said)), daemon=True).start()
            said.wait()
        else:
            asyncio.run(main(said))
    """
    with peer(socket_kind, tmp_path) as (_, address):
        assert run_script(script, address) == ""


def test_a_process_that_ends_normally_leaves_no_file(tmp_path: Path) -> None:
    with peer("unix", tmp_path) as (process, _):
        assert len(os.listdir(tmp_path)) == 1
        assert process.stdin is not None
        process.stdin.close()
        assert process.wait(10) == 0
        assert os.listdir(tmp_path) == []


def drop_all_that_arrives(sock: socket.socket) -> None:
    """Make a socket deaf and dumb, as if its host had gone: a packet filter of one instruction, "return 0"."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 0)
    program = ctypes.create_string_buffer(b"\x06\0\0\0\0\0\0\0", 8)
    fprog = (1).to_bytes(8, sys.byteorder) + ctypes.addressof(program).to_bytes(8, sys.byteorder)
    sock.setsockopt(socket.SOL_SOCKET, 26, fprog)  # SO_ATTACH_FILTER


async def end_of_a_link_to_a_host_that_goes(*, talking: bool) -> str:
    """Return how the end of a link is explained whose other end falls silent."""
    async with await endpoint("tcp") as gone, await open_endpoint(kinds=()) as here:
        channel, far = await channel_between(await here.connect(gone.address, KEY), gone)
        drop_all_that_arrives(far.link.carrier._sock)  # type: ignore[attr-defined]
        if talking:
            channel.send_nowait(b"x")
        with pytest.raises(LinkBroken) as caught:
            await channel.receive()
        return str(caught.value)


def test_a_host_that_is_gone_is_told_and_a_process_that_is_busy_is_not(tmp_path: Path) -> None:
    """Both leave data unread for seconds; but the kernel of the busy one answers."""

    with peer("tcp", tmp_path) as (process, address):

        async def main() -> None:
            async with await open_endpoint(kinds=()) as here:
                busy = await here.connect(address, KEY)
                one = busy.open("echo")
                await round_trip(one)
                process.send_signal(signal.SIGSTOP)
                floods = [busy.open("hold", window=1 << 24) for _ in range(4)]
                sending = [asyncio.create_task(flood.send(b"", [bytes(1 << 23)])) for flood in floods]
                try:
                    ends = await asyncio.gather(
                        end_of_a_link_to_a_host_that_goes(talking=False),
                        end_of_a_link_to_a_host_that_goes(talking=True),
                    )
                    assert "timed out" in ends[0]
                    assert "does not answer" in ends[1]
                    await asyncio.sleep(1.5)  # Longer than TCP_USER_TIMEOUT=4000 let a busy peer live.
                    assert not busy.closed
                    assert not all(task.done() for task in sending)
                finally:
                    process.send_signal(signal.SIGCONT)
                await asyncio.gather(*sending)
                await round_trip(one)

        run(main)


# What waits does not slow what goes.


async def median_round_trip(channel: Channel, count: int) -> float:
    times = []
    for _ in range(count):
        started = time.perf_counter()
        await round_trip(channel)
        times.append(time.perf_counter() - started)
    return statistics.median(times)


async def compare(idle: Channel, stall: Channel, unread: Channel) -> None:
    """Measure by turns, so that whatever else the machine does falls on both."""
    blocked = 0
    ratios = []
    data = np.empty(1 << 30, np.uint8).data
    for _ in range(5):
        before = await median_round_trip(idle, 150)
        waiting = [asyncio.create_task(unread.send(b"", [data]))]
        waiting += [asyncio.create_task(stall.send(b"", [bytes(100_000)])) for _ in range(30)]
        await round_trip(idle)
        during = await median_round_trip(idle, 150)
        blocked += sum(not task.done() for task in waiting)
        for task in waiting:
            task.cancel()
        await asyncio.wait(waiting)
        ratios.append(during / before)
    assert blocked
    assert statistics.median(ratios) < 2, ratios


def test_what_is_stalled_does_not_slow_the_rest(socket_kind: str, tmp_path: Path) -> None:
    with peer(socket_kind, tmp_path) as (_, address):

        async def main() -> None:
            async with await open_endpoint(kinds=()) as here:
                link = await here.connect(address, KEY)
                await compare(link.open("echo"), link.open("hold"), link.open("hold"))

        run(main, loop="uvloop")


def test_what_is_stalled_does_not_slow_the_rest_in_one_process() -> None:
    async def main() -> None:
        from link_peer import echo, hold

        async with pair("memory") as both:
            both.there.serve("echo", echo)
            both.there.serve("hold", hold)
            await compare(both.link.open("echo"), both.link.open("hold"), both.link.open("hold"))

    run(main)


def test_a_large_message_that_flows_lets_small_messages_through(socket_kind: str, tmp_path: Path) -> None:
    with peer(socket_kind, tmp_path) as (_, address):

        async def main() -> None:
            async with await open_endpoint(kinds=()) as here:
                link = await here.connect(address, KEY)
                bulk, small = link.open("sink"), link.open("echo")
                await round_trip(small)
                sending = asyncio.create_task(bulk.send(b"", [np.ones(1 << 28, np.uint8).data]))
                trips = 0
                while not sending.done():
                    await round_trip(small)
                    trips += 1
                await sending
                assert trips > 20

        run(main, loop="uvloop")
