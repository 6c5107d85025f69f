"""Sides in processes of their own, and rounds in which they take turns."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from multiprocessing.connection import Listener, wait
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.report import INSTALL, Measure, Summary, is_ours

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from multiprocessing.connection import Connection

    from benchmarks.report import Goal

ROOT = Path(__file__).parent.parent
PATIENCE = 180.0
"""Seconds after which a side that does not answer has failed."""


class SideError(Exception):
    """A side failed; it is measured no more."""


class Missing(SideError):
    """A side cannot be measured here."""


class Side:
    """One or more processes that measure together when asked to; between requests they sleep.

    :param module: which of `benchmarks.sides` they run.
    :param ranks: how many processes there are.
    :param launcher: a command that starts all of them, given the command of one (as mpiexec does); by default each is
        started by itself.
    :param root: where they find the packages.
    :param needs: packages without which it is `Missing`, as it is without the launcher.

    Raises:
        Missing: a package is not installed. SideError: a process failed to start.
    """

    def __init__(
        self,
        module: str,
        *,
        ranks: int = 1,
        launcher: Sequence[str] = (),
        needs: Sequence[str] = (),
        root: Path = ROOT,
    ) -> None:
        commands = [command for command in launcher[:1] if shutil.which(command) is None]
        if commands or not all(importlib.util.find_spec(name) for name in needs):
            raise Missing(INSTALL)
        self.name = module
        self._root = root
        self._resources = contextlib.ExitStack()
        self._processes: list[subprocess.Popen[bytes]] = []
        self._connections: list[Connection] = []
        self._failed = False
        directory = self._resources.enter_context(tempfile.TemporaryDirectory(prefix="gangline-bench-"))
        self._log = self._resources.enter_context(open(os.path.join(directory, "log"), "w+b"))
        try:
            self._start(module, ranks, list(launcher), os.path.join(directory, "socket"))
        except BaseException:
            self._failed = True
            self.close()
            raise

    def ask(self, request: str, *arguments: Any) -> list[Any]:
        """Have every process do something at the same time and return their answers by rank.

        Raises:
            SideError: one of them failed.
        """
        for connection in self._connections:
            connection.send((request, arguments))
        answers = [self._receive(connection) for connection in self._connections]
        for done, answer in answers:
            if not done:
                raise SideError(f"{self.name}: {request}{arguments} failed:\n{answer}")
        return [answer for _, answer in answers]

    def close(self) -> None:
        """End the processes: in good order, unless they failed."""
        for connection in self._connections:
            with contextlib.suppress(OSError):
                connection.send(None)
            connection.close()
        for process in self._processes:
            try:
                process.wait(0 if self._failed else 30)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        self._resources.close()

    def __enter__(self) -> Side:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _start(self, module: str, ranks: int, launcher: list[str], socket: str) -> None:
        with Listener(socket, "AF_UNIX", backlog=ranks) as listener:
            for rank in range(1 if launcher else ranks):
                command = [*launcher, sys.executable, "-m", "benchmarks.side", module, socket, str(rank)]
                environ = os.environ | {"PYTHONPATH": str(self._root)}
                self._processes.append(
                    subprocess.Popen(command, stdout=self._log, stderr=self._log, cwd=self._root, env=environ)
                )
            ready = {}
            for _ in range(ranks):
                connection = self._accept(listener)
                self._connections.append(connection)
                ready[self._receive(connection)] = connection
        if sorted(ready) != list(range(ranks)):  # an mpiexec that is not of the MPI that the processes use
            raise self._failure(f"started as the ranks {sorted(ready)}, not as {ranks} ranks")
        self._connections = [ready[rank] for rank in range(ranks)]

    def _accept(self, listener: Listener) -> Connection:
        inner: Any = listener._listener  # type: ignore[attr-defined]  # it has no accept with a timeout
        inner._socket.settimeout(0.2)
        until = time.monotonic() + PATIENCE
        while time.monotonic() < until:
            try:
                connection: Connection = listener.accept()
                return connection
            except TimeoutError:
                if any(process.poll() is not None for process in self._processes):
                    break
        raise self._failure("did not start")

    def _receive(self, connection: Connection) -> Any:
        until = time.monotonic() + PATIENCE
        while time.monotonic() < until:
            if wait([connection], 1):
                with contextlib.suppress(EOFError, ConnectionError):
                    return connection.recv()
                break
        raise self._failure("ended" if time.monotonic() < until else f"did not answer within {PATIENCE:.0f} s")

    def _failure(self, what: str) -> SideError:
        self._failed = True
        for process in self._processes:  # its connection ends before it has said why
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(1)
        self._log.seek(0)
        tail = self._log.read().decode(errors="replace")[-2000:]
        return SideError(f"{self.name} {what}; its last words:\n{tail}")


@dataclass(frozen=True)
class Entry:
    """How one side is asked for a row of samples: `request(*arguments)`, answered by rank 0."""

    side: str
    request: str
    arguments: tuple[Any, ...] = ()


@dataclass(frozen=True)
class Plan:
    """A measure to be made: by the name that each side has in it, how to ask for it."""

    what: str
    entries: Mapping[str, Entry]
    goals: Sequence[Goal] = ()
    nbytes: int = 0


class Sides:
    """The sides of a benchmark by name, and why some cannot be there."""

    def __init__(self) -> None:
        self._sides: dict[str, Side] = {}
        self._absent: dict[str, str] = {}
        self._stack = contextlib.ExitStack()

    def add(self, name: str, module: str, *setup: Any, ours: bool = False, **options: Any) -> None:
        """Start a side and have it set up. A peer that is missing or fails is left out; our own failure is raised."""
        try:
            self._sides[name] = self._stack.enter_context(Side(module, **options))
            self._sides[name].ask("setup", *setup)
        except SideError as error:
            self.drop(name, error, ours)

    def ask(self, name: str, request: str, *arguments: Any) -> list[Any]:
        """Ask a side, as `Side.ask` does."""
        return self._sides[name].ask(request, *arguments)

    def drop(self, name: str, error: SideError, ours: bool) -> None:
        """Measure a peer no more."""
        if ours:
            raise error
        self._sides.pop(name, None)
        self._absent[name] = str(error) if isinstance(error, Missing) else "it failed"
        if not isinstance(error, Missing):
            print(error, file=sys.stderr)

    def measure(self, plan: Plan, repeat: int) -> Measure:
        """Have the sides take turns, each round in another order."""
        rounds: dict[str, list[list[float]]] = {label: [] for label in plan.entries}
        for number in range(repeat):
            labels = list(plan.entries)
            labels = labels[number % len(labels) :] + labels[: number % len(labels)]
            for label in labels if number % 2 else reversed(labels):
                self._take_turn(label, plan.entries[label], rounds[label])
        return Measure(
            plan.what,
            "s",
            {label: Summary.of(rows) for label, rows in rounds.items() if self._present(plan.entries[label])},
            plan.goals,
            {label: self._absent[entry.side] for label, entry in plan.entries.items() if not self._present(entry)},
            plan.nbytes,
        )

    def _take_turn(self, label: str, entry: Entry, rows: list[list[float]]) -> None:
        if self._present(entry):
            try:
                rows.append(self.ask(entry.side, entry.request, *entry.arguments)[0])
            except SideError as error:
                self.drop(entry.side, error, is_ours(label))

    def _present(self, entry: Entry) -> bool:
        return entry.side in self._sides

    def __enter__(self) -> Sides:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()


def mpiexec(ranks: int) -> list[str]:
    """Return the command that starts MPI processes; the one beside this Python goes first, as mpich's wheel has it."""
    beside = Path(sys.executable).parent / "mpiexec"
    return [str(beside) if beside.exists() else "mpiexec", "-n", str(ranks)]
