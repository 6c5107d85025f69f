"""Data planes between processes: what only they can show, such as dying and leaving."""

from __future__ import annotations

import os
import signal
import time
from typing import Any

import pytest
from plane_harness import finish, lines_until, start_members

between_processes = pytest.mark.parametrize("backend", ["shm", "gloo"])


def test_gloo_survivors_of_a_killed_process_get_away(tmp_path: Any) -> None:
    """Its peers' work fails or stays pending, abandoning returns at once, and so does leaving."""
    processes = start_members(
        "gloo",
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


@between_processes
@pytest.mark.parametrize("ending", ["plane.abandon()", "pass", "sys.exit(0)"])
def test_the_interpreter_exits_with_work_pending(tmp_path: Any, backend: str, ending: str) -> None:
    """One member never comes to an operation that the other has issued; whether abandoned or forgotten, both exit."""
    processes = start_members(
        backend,
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


@between_processes
def test_who_is_done_may_leave_while_others_still_receive(tmp_path: Any, backend: str) -> None:
    """Closing right after the own part of a broadcast cuts nobody off from theirs."""
    processes = start_members(
        backend,
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


@between_processes
def test_a_forked_child_leaves_the_parents_group_alone(tmp_path: Any, backend: str) -> None:
    """Neither its exit hooks nor its garbage collector touch connections and threads that are the parent's."""
    processes = start_members(
        backend,
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
