"""What is left in the file system by processes that were killed, and what is swept of it by the next that listens."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from link_harness import KEY, endpoint, run, talk

from collective._links import directories
from collective.links import open_endpoint

if TYPE_CHECKING:
    from collections.abc import Iterator

PEER = """
import asyncio, sys
from collective.links import open_endpoint
async def main():
    made = await open_endpoint(kinds=("unix", "shm"), directory=sys.argv[1])
    print("ready", flush=True)
    await asyncio.sleep(600)
asyncio.run(main())
"""


@pytest.fixture
def place() -> Iterator[Path]:
    """A directory whose path is short enough for sockets in directories of directories."""
    with tempfile.TemporaryDirectory() as made:
        yield Path(made)


def listens_in(directory: Path) -> subprocess.Popen[str]:
    """Start a process that listens on two sockets in a directory."""
    process = subprocess.Popen(
        [sys.executable, "-c", PEER, str(directory)],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


def kill(process: subprocess.Popen[str]) -> None:
    process.kill()
    process.wait()
    assert process.stdout is not None
    process.stdout.close()


def sockets_in(directory: Path) -> list[Path]:
    return sorted(directory.rglob("s"))


@pytest.mark.parametrize("gang", [False, True], ids=["alone", "in the directory of a gang"])
def test_the_next_endpoint_sweeps_what_killed_processes_left(gang: bool, place: Path) -> None:
    """Sockets on which nobody listens any more go, in directories of their own and in those of gangs."""
    within = Path(tempfile.mkdtemp(prefix="gangline-", dir=place)) if gang else place
    dead, living = listens_in(within), listens_in(within)
    kill(dead)
    assert len(sockets_in(place)) == 4

    async def main() -> None:
        async with await open_endpoint(kinds=("unix",), directory=str(place)):
            assert len(sockets_in(place)) == 3
            living.send_signal(signal.SIGSTOP)
            async with await open_endpoint(kinds=("unix",), directory=str(place)):
                assert len(sockets_in(place)) == 4
            kill(living)
        async with await open_endpoint(kinds=("shm",), directory=str(place)):
            assert len(sockets_in(place)) == 1
            assert not gang or not within.exists()

    run(main)
    assert not list(place.iterdir())


def test_what_lives_answers_even_where_the_kernel_does_not_list_it(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A socket of another network namespace is in no list, and is asked."""
    monkeypatch.setattr(directories, "_listening", set)

    async def main() -> None:
        async with await endpoint("unix", directory=str(place)) as there, await endpoint("unix") as here:
            async with await open_endpoint(kinds=("unix",), directory=str(place)):
                assert len(sockets_in(place)) == 2
            await talk(await here.connect(there.address, KEY), there)

    run(main)


def test_where_nothing_can_be_looked_for_endpoints_start_all_the_same(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: str) -> list[str]:
        raise PermissionError(f"{path} is not to be read")

    monkeypatch.setattr(directories.os, "listdir", refuse)

    async def main() -> None:
        async with await endpoint("unix", directory=str(place)) as there, await endpoint("unix") as here:
            await talk(await here.connect(there.address, KEY), there)

    run(main)
    with os.scandir(place) as left:
        assert not list(left)


def test_only_what_looks_like_one_of_these_is_swept(place: Path) -> None:
    """A directory is left alone that holds anything else, is another host's, or may be one that is just being made."""
    kill(listens_in(place))
    left, other = sorted(path.parent for path in sockets_in(place))
    (left / "precious").touch()
    other.rename(elsewhere := place / "gangline-zzzzzz-another")
    for name in ("gangline-empty", "gangline-precious/a/b", "gangline-sockets", "other"):
        (place / name).mkdir(parents=True)
    (place / "gangline-link").symlink_to(elsewhere, target_is_directory=True)
    (place / "gangline-file").touch()
    stray = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    stray.bind(str(place / "gangline-sockets" / "s"))
    before = sorted(place.rglob("*"))

    async def main() -> None:
        async with await open_endpoint(kinds=("unix",), directory=str(place)):
            pass

    run(main)
    stray.close()
    assert sorted(place.rglob("*")) == before
    old = 0
    for name in ("gangline-empty", "gangline-precious"):
        os.utime(place / name, (old, old))
    run(main)
    assert sorted(place.rglob("*")) == [path for path in before if path.name != "gangline-empty"]


def test_endpoints_that_start_together_leave_each_other_alone(place: Path) -> None:
    """One that is being made is never taken for one left behind."""
    failures: list[BaseException] = []

    def listen() -> None:
        try:
            for _ in range(100):
                listener, path = directories.listen(str(place), 100)
                with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as dialer:
                    dialer.connect(path)
                listener.close()
                directories.remove(path)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=listen) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert not list(place.iterdir())
