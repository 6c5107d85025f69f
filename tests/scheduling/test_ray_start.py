"""Starting Ray, in a process of its own."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

import scheduling
from scheduling import _ray_start as ray_start

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

ROOT = Path(scheduling.__file__).parents[1]


@pytest.fixture
def tmp_folder() -> Iterator[Path]:
    folder = tempfile.mkdtemp(prefix="gl-")  # pytest's own paths are too long for Ray's sockets
    yield Path(folder)
    shutil.rmtree(folder)


@pytest.fixture
def run(tmp_folder: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run a program that sees no Ray of others."""

    def run(program: str, **environment: str) -> subprocess.CompletedProcess[str]:
        clean = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
        return subprocess.run(
            [sys.executable, "-c", program],
            cwd=ROOT,
            env={**clean, "RAY_TMPDIR": str(tmp_folder), **environment},
            capture_output=True,
            text=True,
            timeout=100,
            check=False,
        )

    return run


@pytest.fixture
def dead_address() -> Iterator[str]:
    """An address where nothing listens, and nothing will."""
    with socket.socket() as taken:  # bound, not listening
        taken.bind(("127.0.0.1", 0))
        yield "{}:{}".format(*taken.getsockname())


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


START = """
import asyncio, os, signal, sys, warnings
import psutil
from scheduling import Demand, GangInfeasible, Resources, ensure_ray, pack, reserve
from scheduling.machine import count_cpus

asked = count_cpus() + 3

async def first():
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        async with asyncio.TaskGroup() as tasks:                # two gangs at once: one Ray
            for _ in range(2):
                tasks.create_task(ensure_ray(asked - 0.5))
    assert "torch" not in sys.modules
    import ray
    assert ray.is_initialized()
    assert ray.cluster_resources()["CPU"] == asked, ray.cluster_resources()
    (warning,) = caught
    assert warning.category.__name__ == "CpusOversubscribed", warning
    assert f"{asked} CPUs" in str(warning.message), warning

async def second():
    # The Ray was started from another loop, whose threads are gone.
    await ensure_ray(asked + 100)                               # and is not stretched
    reservation = await reserve([Demand("a", asked)], pack(), start_timeout=20, name="g")
    await reservation.release()
    for resources in (Resources(custom={"tape": 1}), Resources(cpu=asked + 1)):
        try:
            await reserve([Demand("a", 1, resources)], pack(), start_timeout=100, name="g")
        except GangInfeasible as error:
            assert error.shortages[0].resources == resources
        else:
            raise AssertionError("it fits")

asyncio.run(first())
asyncio.run(second())
print(*(child.pid for child in psutil.Process().children(recursive=True)), flush=True)
os.kill(os.getpid(), signal.SIGTERM)
"""


def test_starts_a_one_machine_ray_that_ends_with_the_process(
    tmp_folder: Path, run: Callable[..., subprocess.CompletedProcess[str]], dead_address: str
) -> None:
    (tmp_folder / "ray").mkdir()
    (tmp_folder / "ray" / "ray_current_cluster").write_text(dead_address)  # as a crashed `ray start` leaves it
    done = run(START)
    assert done.returncode == 128 + signal.SIGTERM, done.stderr
    assert f":{dead_address.rpartition(':')[2]}, does not answer; starting another" in done.stderr
    assert "SIGTERM" not in done.stderr
    assert "Token authentication" not in done.stderr
    pids = [int(pid) for pid in done.stdout.splitlines()[-1].split()]
    assert pids
    assert not any(alive(pid) for pid in pids)


REFUSED = """
import asyncio
from scheduling import RayUnavailable, ensure_ray
try:
    asyncio.run(ensure_ray(1))
except RayUnavailable as error:
    print(error)
"""


def test_says_which_ray_does_not_answer(
    run: Callable[..., subprocess.CompletedProcess[str]], dead_address: str
) -> None:
    done = run(REFUSED, RAY_ADDRESS=dead_address)
    assert done.returncode == 0, done.stderr
    assert f"(RAY_ADDRESS is {dead_address!r})" in done.stdout


def test_refuses_ray_client(run: Callable[..., subprocess.CompletedProcess[str]]) -> None:
    done = run(REFUSED, RAY_ADDRESS="ray://127.0.0.1:10001")
    assert "gangs cannot use Ray Client" in done.stdout, done.stderr


def test_sigterm_ends_the_process_in_order(restored_sigterm: None) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    ray_start._exit_on_sigterm()
    with pytest.raises(SystemExit, match="143"):
        signal.raise_signal(signal.SIGTERM)


def test_a_handler_of_sigterm_stays(restored_sigterm: None) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    ray_start._exit_on_sigterm()
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_IGN


@pytest.fixture
def restored_sigterm() -> Iterator[None]:
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)
