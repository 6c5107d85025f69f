"""However a gang ends, it is gone within 5 seconds, and nobody's error is lost."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time

import pytest
import ray
from gang_harness import Stopwatch, is_there, logged, run

from actors import Actor, ActorClosed, Gang, Role
from scheduling import Resources

SMALL = Resources(cpu=0.5)
BOUND = 5.0


class Worker(Actor):
    def __init__(self, log: str = "") -> None:
        self.log = log

    async def pid(self) -> int:
        return os.getpid()

    async def wait(self) -> None:
        try:
            await asyncio.get_running_loop().create_future()
        finally:
            self.note("call ended")

    async def insist(self) -> None:
        while True:
            try:
                await asyncio.sleep(3600)
            except asyncio.CancelledError:
                self.note("refused to end")

    async def block(self) -> None:
        time.sleep(60)  # noqa: ASYNC251  that is the point

    def block_thread(self) -> None:
        time.sleep(60)

    async def teardown(self) -> None:
        self.note("teardown")

    def note(self, what: str) -> None:
        if self.log:
            with open(self.log, "a") as file:
                file.write(f"{self.rank} {what}\n")


class Stubborn(Worker):
    async def teardown(self) -> None:
        await asyncio.sleep(3600)


class Clumsy(Worker):
    async def teardown(self) -> None:
        if self.rank:
            raise ValueError(f"no teardown on rank {self.rank}")


def workers(cls: type[Worker] = Worker, count: int = 2, log: object = "") -> Role[Worker]:
    return Role("worker", cls, count, args=(str(log),), resources=SMALL)


def test_every_teardown_has_run_and_every_process_is_gone(runtime, tmp_path):
    log = tmp_path / "log"

    async def main():
        async with Gang(workers(log=log), runtime=runtime) as gang:
            pids = await gang["worker"].pid()
            watch = Stopwatch()
        if runtime == "ray":
            assert not any(map(is_there, pids))
        assert float(watch) < BOUND

    run(main())
    assert sorted(log.read_text().splitlines()) == ["0 teardown", "1 teardown"]


def test_calls_end_before_teardown(runtime, tmp_path):
    log = tmp_path / "log"

    async def main():
        async with Gang(workers(log=log), runtime=runtime) as gang:
            call = asyncio.create_task(gang["worker"][0].wait())
            await gang["worker"][0].pid()  # after the call, which has started then
        with pytest.raises(ActorClosed):
            await call
        with pytest.raises(ActorClosed):
            await gang["worker"][0].pid()

    run(main())
    assert [line for line in log.read_text().splitlines() if line[0] == "0"] == ["0 call ended", "0 teardown"]


def test_an_exception_passes_through(runtime):
    async def main():
        with pytest.raises(ZeroDivisionError):
            async with Gang(workers(), runtime=runtime):
                raise ZeroDivisionError

    run(main())


def test_a_cancellation_passes_through(runtime, tmp_path):
    log = tmp_path / "log"

    async def main():
        entered = asyncio.Event()

        async def stay() -> None:
            async with Gang(workers(log=log), runtime=runtime) as gang:
                entered.set()
                await gang["worker"].wait()

        task = asyncio.create_task(stay())
        async with asyncio.timeout(60):
            await entered.wait()
        task.cancel()
        watch = Stopwatch()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert float(watch) < BOUND

    run(main())
    assert sorted(line for line in log.read_text().splitlines() if "teardown" in line) == ["0 teardown", "1 teardown"]


def test_what_teardown_raises_is_raised(runtime):
    async def main():
        with pytest.raises(ExceptionGroup, match="teardown of gang 'team'") as caught:
            async with Gang(workers(Clumsy, 3), runtime=runtime, name="team"):
                pass
        assert sorted(str(error) for error in caught.value.exceptions) == [
            "no teardown on rank 1",
            "no teardown on rank 2",
        ]
        for error in caught.value.exceptions:
            assert any("in its teardown" in note for note in error.__notes__)

    run(main())


def test_what_teardown_raises_is_noted_on_an_exception_that_passes_through(runtime):
    async def main():
        with logged("actors") as records, pytest.raises(ZeroDivisionError) as caught:
            async with Gang(workers(Clumsy), runtime=runtime, name="team"):
                raise ZeroDivisionError
        assert caught.value.__notes__ == [
            "gang 'team': then a teardown failed: ValueError: no teardown on rank 1",
        ]
        assert [record.exc_info[1].args for record in records if record.exc_info] == [("no teardown on rank 1",)]

    run(main())


@pytest.mark.parametrize("method", ["insist", "block_thread", "block"])
def test_an_actor_that_does_not_let_go_is_ended(ray_session, tmp_path, method):
    log = tmp_path / "log"

    async def main():
        with logged("actors") as records:
            async with Gang(workers(log=log)) as gang:
                pids = await gang["worker"].pid()
                call = asyncio.create_task(getattr(gang["worker"][1], method)())
                if method != "block":
                    await gang["worker"][1].pid()
                else:
                    await asyncio.sleep(0.1)  # that call blocks all that come after it
                watch = Stopwatch()
            assert float(watch) < BOUND
        assert not any(map(is_there, pids))
        with pytest.raises(ConnectionError if method == "block" else (ConnectionError, ActorClosed)):
            await call
        if method == "block":
            assert any("worker[1] did not end" in record.getMessage() for record in records)

    run(main())
    assert "0 teardown" in log.read_text()


def test_a_teardown_that_does_not_end_is_ended(runtime):
    async def main():
        with logged("actors") as records:
            async with Gang(workers(Stubborn), runtime=runtime):
                watch = Stopwatch()
            assert 2.0 < float(watch) < BOUND
        (said,) = [record.getMessage() for record in records]
        assert "worker[0], worker[1] did not end within the 2.5 s that there are for teardown" in said

    run(main())


def test_cancelling_the_end_makes_it_hurry(runtime):
    async def main():
        gang = Gang(workers(Stubborn), runtime=runtime)
        await gang.__aenter__()
        ending = asyncio.create_task(gang.aclose())
        watch = Stopwatch()
        await asyncio.sleep(0)
        ending.cancel()
        with pytest.raises(asyncio.CancelledError):
            await ending
        assert float(watch) < 2.0
        await gang.aclose()

    run(main())


class Deaf(Worker):
    """Refuses to be cancelled, until told to listen."""

    ears = asyncio.Event()

    async def teardown(self) -> None:
        while not Deaf.ears.is_set():
            try:
                await Deaf.ears.wait()
            except asyncio.CancelledError:
                self.note("refused to end")


def test_code_that_cannot_be_cancelled_does_not_hold_up_the_end():
    async def main():
        Deaf.ears = asyncio.Event()
        with logged("actors"):
            async with Gang(workers(Deaf), runtime="inproc"):
                watch = Stopwatch()
            assert float(watch) < BOUND
        Deaf.ears.set()
        await asyncio.gather(*(asyncio.all_tasks() - {asyncio.current_task()}), return_exceptions=True)

    run(main())


def test_one_process_that_ray_fails_to_kill_keeps_no_other(ray_session, monkeypatch):
    """Kind: a step of the end that fails skips the steps after it, or cuts short those beside it."""
    kill, killed = ray.kill, []

    def kill_but_the_first(actor, **options):
        killed.append(actor)
        if len(killed) == 1:
            raise RuntimeError("GCS is busy")
        kill(actor, **options)

    async def main():
        gang = Gang(workers(count=3))
        async with gang:
            pids = await gang["worker"].pid()
            monkeypatch.setattr(ray, "kill", kill_but_the_first)
            with pytest.raises(ExceptionGroup) as caught:
                await gang.aclose()
        (error,) = caught.value.exceptions
        assert isinstance(error, RuntimeError)
        assert str(error) == "GCS is busy"
        assert not any(map(is_there, pids))
        # The placement group as well, or the fixture of this folder complains.

    run(main())


DRIVER = """
import asyncio, sys
from actors import Actor, Gang, Role
from scheduling import Resources

class Noting(Actor):
    def __init__(self, path):
        self.path = path

    async def teardown(self):
        with open(self.path, "a") as file:
            file.write("teardown")

async def main():
    async with Gang(Role("a", Noting, 1, args=(sys.argv[1],), resources=Resources(cpu=0.1))):
        print("up", flush=True)
        await asyncio.get_running_loop().create_future()

asyncio.run(main())
"""


def test_sigterm_runs_teardown_in_a_driver_that_joined_a_cluster(ray_session, tmp_path):
    """Kind: a way of ending that only a Ray of our own is prepared for."""
    path = ":".join(map(os.path.abspath, sys.path))
    environment = os.environ | {"RAY_ADDRESS": ray.get_runtime_context().gcs_address, "PYTHONPATH": path}
    command = [sys.executable, "-c", DRIVER, str(tmp_path / "log")]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as driver:
        assert driver.stdout.readline() == "up\n"
        driver.terminate()
        assert driver.wait(20) == 128 + signal.SIGTERM
    assert (tmp_path / "log").read_text() == "teardown"
