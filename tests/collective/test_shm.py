"""The data plane "shm": how its members meet, sleep, die and let go."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from plane_harness import all_of, finish, held, lines_until, make_planes, opened, start_members, until_held

from collective._backends import MEMBERS, plane_within_a_host, settle
from collective._backends import _shm_steps as steps
from collective._backends.shm import ShmPlane
from collective.errors import BackendError
from collective.formation import choose_backend
from collective.types import Address, Member, ReduceOp

if TYPE_CHECKING:
    from collections.abc import Sequence

LARGE = 1 << 19
"""Elements of a float64 array that the worker moves."""


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


async def use(size: int, *, abandon: bool, large: bool) -> None:
    planes = make_planes("shm", size)
    await asyncio.gather(*(plane.open() for plane in planes))
    length = LARGE if large else 10
    await all_of([p.allreduce(np.ones(length), np.empty(length), ReduceOp.SUM) for p in planes])
    if abandon:
        for each in (length, 1):
            planes[0].allreduce(np.ones(each), np.empty(each), ReduceOp.SUM)
        for plane in planes:
            plane.abandon()
    else:
        await asyncio.gather(*(plane.aclose() for plane in planes))


def test_a_thousand_groups_leave_nothing_behind() -> None:
    async def main() -> None:
        for abandon in (False, True):
            await use(2, abandon=abandon, large=True)
        before = held()
        for number in range(50):
            await use(3, abandon=number % 2 == 0, large=True)
        await until_held(before)
        used = resident()
        for number in range(1000):
            await use(2, abandon=number % 2 == 0, large=False)
        await until_held(before)
        assert resident() - used < 16 << 20

    asyncio.run(main())


def test_giving_up_the_meeting_leaves_nothing_behind() -> None:
    async def main() -> None:
        before = held()
        for rank in (0, 1):
            for give_up in ("abandon", "cancel"):
                plane = make_planes("shm", 3)[rank]
                opening = asyncio.create_task(plane.open())
                await asyncio.sleep(0.01)
                if give_up == "abandon":
                    plane.abandon()
                    with pytest.raises(BackendError, match="abandoned while it was being formed"):
                        await opening
                else:
                    opening.cancel()
                    with pytest.raises(asyncio.CancelledError):
                        await opening
                    plane.abandon()
        await until_held(before)

    asyncio.run(main())


async def meet_with(change: Any) -> list[BaseException | None]:
    """Open a group of two whose rank 1 hears another message than rank 0 told; return what both openings raised."""
    planes = make_planes("shm", 2)
    hear = planes[1].hear
    planes[1].hear = lambda rank, message: hear(rank, change(message))  # type: ignore[method-assign]
    try:
        async with asyncio.timeout(10):
            return await asyncio.gather(*(plane.open() for plane in planes), return_exceptions=True)  # type: ignore[return-value]
    finally:
        for plane in planes:
            plane.abandon()


def test_who_cannot_show_the_token_gets_nothing() -> None:
    """Rank 0 turns it away, whose meeting fails then, and with it that of rank 0."""

    def garble(message: bytes) -> bytes:
        return message[:36] + bytes(32) + message[68:]

    async def main() -> None:
        errors = await meet_with(garble)
        assert all(isinstance(error, BackendError) for error in errors), errors
        assert "ended the meeting" in str(errors[1])

    asyncio.run(main())


def test_memory_without_the_nonce_is_refused() -> None:
    async def main() -> None:
        errors = await meet_with(lambda message: message[:68] + bytes(32))
        assert all(isinstance(error, BackendError) for error in errors), errors
        assert "not rank 0's memory" in str(errors[1])

    asyncio.run(main())


def test_strangers_at_the_socket_do_not_hold_up_the_meeting() -> None:
    async def main() -> None:
        strangers: list[socket.socket] = []

        def knock(message: bytes) -> bytes:
            for said in (b"", b"x" * 10, b"\1\0\0\0" + bytes(32), b"\0" * 36):
                stranger = socket.socket(socket.AF_UNIX)
                stranger.connect("\0gangline-" + message[4:36].decode())
                stranger.sendall(said)
                strangers.append(stranger)
            return message

        assert await meet_with(knock) == [None, None]
        for stranger in strangers:
            assert stranger.recv(100) == b""
            stranger.close()

    asyncio.run(main())


def test_a_forked_child_drops_memory_and_descriptors() -> None:
    async def main() -> None:
        before = set(os.listdir("/proc/self/fd"))  # And the child drops what links of other tests still have.
        async with opened("shm", 2) as planes:
            child = os.fork()
            if child == 0:
                os._exit(0 if before.issuperset(os.listdir("/proc/self/fd")) and held()[1] == 0 else 1)
            assert os.waitstatus_to_exitcode((await asyncio.to_thread(os.waitpid, child, 0))[1]) == 0
            outs = [np.empty(LARGE) for _ in planes]
            await all_of([p.allreduce(np.ones(LARGE), o, ReduceOp.SUM) for p, o in zip(planes, outs, strict=True)])
            assert (outs[0] == 2).all()

    asyncio.run(main())


def test_the_segment_does_not_grow_with_tensors() -> None:
    async def main() -> None:
        async with opened("shm", 2) as planes:
            for length in (10, LARGE, 8 * LARGE):
                arrays = [np.ones(length) for _ in planes]
                await all_of([p.allreduce(a, a, ReduceOp.SUM) for p, a in zip(planes, arrays, strict=True)])
            (nbytes,) = {plane._segment.geometry.nbytes for plane in planes}  # type: ignore[attr-defined]
            assert nbytes < 8 << 20

    asyncio.run(main())


def test_a_queue_of_short_operations_does_not_hold_up_the_loop() -> None:
    """They are short one by one only; the last one is long, and the worker's."""

    async def main() -> None:
        async with opened("shm", 2) as planes:
            lengths = [1 << 17] * 40 + [3, 4 * LARGE]
            arrays = [[np.full(length, rank + place) for place, length in enumerate(lengths)] for rank in (0, 1)]
            turns = 0
            works = [
                asyncio.ensure_future(plane.allreduce(array, array, ReduceOp.SUM))
                for plane, mine in zip(planes, arrays, strict=True)
                for array in mine
            ]
            while not all(work.done() for work in works):
                await asyncio.sleep(0)
                turns += 1
            for mine in arrays:
                assert all((array == 2 * place + 1).all() for place, array in enumerate(mine))
            assert turns > 10

    asyncio.run(main())


def test_what_was_read_in_place_is_passed_on_by_nobody_once_its_owner_has_given_up() -> None:
    """A member that lends its input may have posted its last phase while others still read: its call may fail then."""

    async def main() -> None:
        async with opened("shm", 2) as planes:
            lender, reader = planes
            lent, out = lender.empty(3 << 20), np.zeros(3 << 20, np.uint8)
            lent[:] = 1
            assert isinstance(lender, ShmPlane)
            assert isinstance(reader, ShmPlane)
            lender.broadcast(lent, 0)
            segment, others = reader._segment, lender._segment
            assert segment is not None
            assert others is not None
            reading = steps.broadcast(segment, out, 0)
            assert next(reading) == steps.POST
            segment.post()
            while others.phase < 2:  # noqa: ASYNC110 (there is no event to wait for)
                await asyncio.sleep(0)
            assert next(reading) == steps.REST
            lender.abandon()
            lent[:] = 2
            assert next(reading) == steps.REST
            with pytest.raises(BackendError, match="rank 0 gave up while its input was read in place"):
                next(reading)
            assert set(out.tolist()) == {1, 2}, "the test has not read what was changed"

    asyncio.run(main())


def test_a_step_that_fails_stops_the_member(monkeypatch: pytest.MonkeyPatch) -> None:
    """Later phases would pair with other operations of the others."""

    async def main() -> None:
        planes = make_planes("shm", 2)
        await asyncio.gather(*(plane.open() for plane in planes))
        with pytest.raises(BackendError, match="shm: ValueError"):
            await planes[0].broadcast(np.empty(10, np.uint8)[:5].reshape(5, 1), 0)
        out = np.zeros(3)
        works = [asyncio.ensure_future(p.allreduce(np.ones(3), out, ReduceOp.SUM)) for p in planes]
        done, _ = await asyncio.wait(works, timeout=0.2)
        assert not done
        assert not out.any()
        for plane in planes:
            plane.abandon()

    asyncio.run(main())


@pytest.mark.parametrize(
    ("hosts", "backend"),
    [
        (["a", "a"], "shm"),
        (["a", "b"], "gloo"),
        (["", ""], "gloo"),
        (["a", "b", "a"], "two-level"),
        (["", "a", "a", ""], "two-level"),
        (["a"] * (MEMBERS + 1), "gloo"),
        ([*["a"] * (MEMBERS + 1), "b"], "gloo"),
    ],
)
def test_what_auto_stands_for_between_processes(hosts: Sequence[str], backend: str) -> None:
    members = [
        Member("w", rank, Address(str(rank), host, tcp=("127.0.0.1", rank + 1))) for rank, host in enumerate(hosts)
    ]
    assert choose_backend("auto", members) == backend
    assert choose_backend("gloo", members) == "gloo"
    assert settle("two-level", hosts) == backend
    assert settle("shm", hosts) == "shm"


def test_more_members_than_descriptors_are_refused() -> None:
    async def main() -> None:
        plane = make_planes("shm", MEMBERS + 1)[0]
        plane._context.tell = None  # type: ignore[attr-defined]
        with pytest.raises(BackendError, match="at most 128"):
            await plane.open()

    assert plane_within_a_host(MEMBERS) == "shm"


# Processes: what only they can show.


@pytest.mark.parametrize("inline", [0, 1 << 30], ids=["on the worker", "on the loop"])
@pytest.mark.parametrize("size", [2, 3])
def test_no_wake_up_is_lost(tmp_path: Any, size: int, inline: int) -> None:
    """Members that never spin sleep in every phase, and race with those that wake them."""
    processes = start_members(
        "shm",
        tmp_path,
        size,
        f"""
        from collective._backends import _shm_driver
        plane._driver._loop_spin = plane._driver._worker_spin = _shm_driver._Spin(0.0)
        _shm_driver.INLINE = {inline}
        out = np.empty(1)
        for turn in range(5_000):
            for _ in range(rank * turn % 7):
                pass
            await plane.allreduce(np.full(1, turn + rank), out, ReduceOp.SUM)
            assert out[0] == turn * size + sum(range(size))
        await plane.aclose()
        """,
    )
    assert finish(processes, 100) == [0] * size


def test_survivors_of_a_killed_process_get_away(tmp_path: Any) -> None:
    """Abandoning returns at once, also while the worker sleeps, and so does leaving."""
    processes = start_members(
        "shm",
        tmp_path,
        3,
        """
        large = np.ones(1 << 20)
        await plane.allreduce(large, large, ReduceOp.SUM)
        if rank == 2:
            say("ready")
            await asyncio.sleep(1000)
        kept = [np.zeros(1 << 20), np.zeros(1)]
        works = [plane.allreduce(each, each, ReduceOp.SUM) for each in (large, np.ones(1))]
        say("ready")
        await asyncio.to_thread(sys.stdin.read, 1)
        assert not any(work.done() for work in works)
        started = time.monotonic()
        plane.abandon()
        say("abandoned", time.monotonic() - started)
        thread = plane._driver._worker
        assert thread.join(1.0)
        assert "gangline-group" not in open("/proc/self/maps").read()
        await plane.aclose()
        """,
    )
    try:
        for process in processes:
            lines_until(process, "ready")
        os.kill(processes[2].pid, signal.SIGKILL)
        processes[2].wait()
        started = time.monotonic()
        for process in processes[:2]:
            assert process.stdin is not None
            process.stdin.write("x")
            process.stdin.flush()
        for process in processes[:2]:
            assert float(lines_until(process, "abandoned").split()[1]) < 0.1
            lines_until(process, "left")
        assert time.monotonic() - started < 3
    finally:
        assert finish(processes, 10) == [0, 0, -signal.SIGKILL]


def test_large_and_small_operations_between_processes(tmp_path: Any) -> None:
    """Of every sort, in one order, with results that differ from turn to turn."""
    processes = start_members(
        "shm",
        tmp_path,
        3,
        """
        random = np.random.default_rng(5)
        for turn in range(60):
            length = int(random.choice([0, 1, 1000, 40_000, 700_001]))
            arrays = [random.integers(0, 100, length).astype(float) for _ in range(size)]
            total = sum(arrays)
            counts = [length // 3, 0, length - length // 3]
            reduced, top = np.empty(length), np.empty(length)
            part, gathered = np.empty(counts[rank]), np.empty(length * size)
            shared = arrays[1].copy() if rank == 1 else np.zeros(length)
            got = [np.zeros(length * (src + 1), np.uint8) for src in range(size)]
            works = [
                plane.allreduce(arrays[rank], reduced, ReduceOp.SUM),
                plane.reduce(arrays[rank], top if rank == 2 else None, ReduceOp.SUM, 2),
                plane.reduce_scatter(arrays[rank], part, ReduceOp.SUM, counts),
                plane.allgather(arrays[rank].view(np.uint8), gathered.view(np.uint8), [8 * length] * size),
                plane.broadcast(shared.view(np.uint8), 1),
                plane.alltoall([np.full(length * (rank + 1), 7 * rank + dst, np.uint8) for dst in range(size)], got),
            ]
            for work in works:
                await work
            assert (reduced == total).all()
            assert rank != 2 or (top == total).all()
            start = sum(counts[:rank])
            assert (part == total[start : start + counts[rank]]).all()
            assert (gathered == np.concatenate(arrays)).all()
            assert (shared == arrays[1]).all()
            assert all((array == 7 * src + rank).all() for src, array in enumerate(got))
        await plane.aclose()
        """,
    )
    assert finish(processes, 100) == [0, 0, 0]
