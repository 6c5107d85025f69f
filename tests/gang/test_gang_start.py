"""Starting is all or nothing: one error, which says who and at what, and nothing left behind."""

from __future__ import annotations

import asyncio
import os
import signal
import time

import numpy as np
import pytest
from gang_harness import Stopwatch, is_there, run

from actors import Actor, Gang, GangStartError, RemoteCancelled, RemoteError, RemoteTraceback, Role
from collective import GroupSpec
from scheduling import GangInfeasible, GangTimeout, Resources

SMALL = Resources(cpu=0.5)
PAIR = GroupSpec("pair", ("fine", "bad"), timeout=20.0)


class Refused(Exception):
    """An error whose constructor takes something else than its args."""

    def __init__(self, code: int, *, hint: str) -> None:
        super().__init__(f"code {code} ({hint})")
        self.code = code


class Fine(Actor):
    def __init__(self, log: str = "") -> None:
        self.log = log

    async def setup(self) -> None:
        if self.groups:
            await self.groups["pair"].allreduce(np.ones(1))  # never ends where another's setup fails
        self.note(f"setup {os.getpid()}")

    async def teardown(self) -> None:
        self.note("teardown")

    def note(self, what: str) -> None:
        if self.log:
            with open(self.log, "a") as file:
                file.write(f"{self.role}[{self.rank}] {what}\n")


class Bad(Actor):
    """Fails at a phase, on one rank."""

    def __init__(self, phase: str, how: str) -> None:
        self.phase, self.how = phase, how
        if phase == "constructor" and self.rank == 1:
            self.fail()

    async def setup(self) -> None:
        if self.phase == "setup" and self.rank == 1:
            self.fail()
        await asyncio.get_running_loop().create_future()

    def fail(self) -> None:
        match self.how:
            case "raise":
                raise Refused(7, hint="on purpose")
            case "exit":
                raise SystemExit(3)
            case "cancel":
                raise asyncio.CancelledError
            case "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            case "block":
                time.sleep(60)


async def start(runtime: str, *roles: Role, **options) -> None:
    async with Gang(*roles, runtime=runtime, name="team", **options):
        raise AssertionError("it started")


def bad(phase: str, how: str) -> tuple[Role[Fine], Role[Bad]]:
    return Role("fine", Fine, 1, resources=SMALL), Role("bad", Bad, 3, args=(phase, how), resources=SMALL)


@pytest.mark.parametrize("phase", ["constructor", "setup"])
def test_an_actor_that_raises_ends_the_start(runtime, phase):
    async def main():
        with pytest.raises(GangStartError) as caught:
            await start(runtime, *bad(phase, "raise"))
        error = caught.value
        assert (error.role, error.rank, error.phase) == ("bad", 1, phase)
        assert f"bad[1] failed in its {phase}: Refused: code 7 (on purpose)" in str(error)
        assert "gang 'team-" in str(error)
        assert type(error.__cause__) is Refused
        assert error.__cause__.code == 7
        assert isinstance(error.__cause__.__cause__, RemoteTraceback)
        assert "self.fail()" in str(error.__cause__.__cause__)

    run(main())


def test_a_setup_that_raises_ends_those_that_wait_for_it_in_a_group():
    # On inproc, where the group is quickly there; the next tests have it on Ray.
    async def main():
        with pytest.raises(GangStartError, match=r"bad\[1\] failed in its setup: Refused"):
            await start("inproc", *bad("setup", "raise"), groups=[PAIR])

    run(main())


@pytest.mark.parametrize(("how", "kind"), [("exit", RemoteError), ("cancel", RemoteCancelled)])
def test_what_would_end_a_loop_or_a_task_is_an_error_as_well(how, kind):
    async def main():
        with pytest.raises(GangStartError, match=r"bad\[1\] failed in its setup") as caught:
            await start("inproc", *bad("setup", how))
        assert isinstance(caught.value.__cause__, kind)

    run(main())


@pytest.mark.parametrize("phase", ["constructor", "setup"])
def test_an_actor_that_dies_ends_the_start(ray_session, phase):
    async def main():
        with pytest.raises(GangStartError, match=rf"bad\[1\] failed in its {phase}: ") as caught:
            await start("ray", *bad(phase, "kill"), groups=[PAIR] if phase == "setup" else [])
        assert caught.value.rank == 1

    run(main())


def test_an_actor_that_takes_too_long_ends_the_start(ray_session):
    async def main():
        watch = Stopwatch()
        # On a machine that is busy it may not have come to its setup.
        with pytest.raises(GangStartError, match=r"bad\[.\] failed in its .*: not done when start_timeout ended"):
            await start("ray", *bad("setup", "block"), start_timeout=4.0)
        assert 4.0 <= float(watch) < 9.0

    run(main())


def test_too_long_on_inproc_too_and_what_to_do_is_said():
    late = r"bad\[0\], bad\[1\], bad\[2\]"

    async def main():
        with pytest.raises(GangStartError, match=rf"waiting for {late}\); nothing had failed.*start_timeout="):
            await start("inproc", *bad("setup", "wait"), start_timeout=0.2)

    run(main())


class Unloadable:
    def __reduce__(self):
        return _refuse, ()


def _refuse() -> None:
    raise Refused(1, hint="not here")


def test_an_argument_that_cannot_be_loaded_ends_the_start(runtime):
    async def main():
        with pytest.raises(GangStartError, match=r"bad\[0\] failed in its constructor: NotPicklable.*code 1"):
            await start(runtime, Role("bad", Bad, 1, args=("", Unloadable()), resources=SMALL))

    run(main())


def test_those_that_were_set_up_are_torn_down(runtime, tmp_path):
    log = tmp_path / "log"

    class Late(Actor):
        async def setup(self) -> None:
            await asyncio.to_thread(self.wait)
            raise Refused(2, hint="late")

        def wait(self) -> None:
            while not log.exists() or log.read_text().count("setup") < 2:
                time.sleep(0.01)

    async def main():
        fine = Role("fine", Fine, 2, args=(str(log),), resources=SMALL)
        with pytest.raises(GangStartError, match="code 2"):
            await start(runtime, fine, Role("late", Late, 1, resources=SMALL))

    run(main())
    lines = log.read_text().splitlines()
    assert sorted(line.split()[0] for line in lines if "teardown" in line) == ["fine[0]", "fine[1]"]
    if runtime == "ray":
        pids = [int(line.split()[2]) for line in lines if "setup" in line]
        assert len(pids) == 2
        assert not any(map(is_there, pids))


@pytest.mark.parametrize("seconds", [0.01, 0.4, 1.2])
def test_a_start_that_is_cancelled_leaves_nothing(runtime, seconds):
    async def main():
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(seconds):
                await start(runtime, *bad("setup", "wait"))

    run(main())


def test_a_gang_that_can_never_fit(ray_session):
    async def main():
        watch = Stopwatch()
        with pytest.raises(GangInfeasible, match="bad"):
            await start("ray", Role("bad", Fine, 2, resources=Resources(cpu=100)))
        assert float(watch) < 5.0

    run(main())


def test_a_gang_that_does_not_fit_now_waits_its_time(ray_session):
    async def main():
        most = Resources(cpu=6)
        async with Gang(Role("first", Fine, resources=most), name="first"):
            watch = Stopwatch()
            with pytest.raises(GangTimeout, match="first"):
                await start("ray", Role("second", Fine, resources=most), start_timeout=1.0)
            assert 1.0 <= float(watch) < 5.0

    run(main())
