"""What scopes cost: an allreduce of 8 bytes in a call's scope and in the default one, against another commit; and where
members call two scopes in other orders, against one that is agreed over links.

`GANGLINE_BEFORE` names the commit, one of this repository; without it there is nothing to compare the first two with.
"""

from __future__ import annotations

import io
import os
import shutil
import subprocess
import tarfile
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.report import Goal, Measure
from benchmarks.turns import ROOT, Entry, Plan, Sides

if TYPE_CHECKING:
    from collections.abc import Iterator

REPEAT = 20
RANKS = 2
ROW = 200
OURS, BEFORE, LINKS = "Gangline", "Gangline before", "Gangline, agreed over links"


def plans(before: str | None) -> Iterator[Plan]:
    """Yield what is measured."""
    for scope, what in (("call", "in a broadcast call"), ("default", "in the default scope")):
        entries = {side: Entry(side, "row", (scope, ROW)) for side in ((OURS, BEFORE) if before else (OURS,))}
        yield Plan(f"allreduce, 8 B, {what}", entries, [Goal(OURS, BEFORE, 1.05, interval=True)])
    entries = {OURS: Entry(OURS, "alternate", (ROW,)), LINKS: Entry(LINKS, "row", ("default", ROW))}
    yield Plan("two scopes in other orders, an allreduce of 8 B", entries, [Goal(OURS, LINKS, 1.5)])


def measure(repeat: int) -> list[Measure]:
    """Measure on two members."""
    with tempfile.TemporaryDirectory() as directory, Sides() as sides:
        for name in (OURS, LINKS):
            sides.add(name, "gangline_scopes", ours=True, ranks=RANKS)
            sides.ask(name, "form", sides.ask(name, "setup"), name == LINKS)
        before = os.environ.get("GANGLINE_BEFORE")
        if before is not None:
            sides.add(BEFORE, "gangline_scopes", ranks=RANKS, root=_checkout(before, Path(directory)))
            sides.ask(BEFORE, "form", sides.ask(BEFORE, "setup"), False)
        return [sides.measure(plan, repeat) for plan in plans(before)]


def _checkout(commit: str, directory: Path) -> Path:
    """Put the packages of a commit beside these benchmarks."""
    packages = ["collective", "actors", "scheduling"]
    archive = subprocess.run(["git", "archive", commit, *packages], cwd=ROOT, check=True, stdout=subprocess.PIPE)
    with tarfile.open(fileobj=io.BytesIO(archive.stdout)) as files:
        files.extractall(directory, filter="data")
    shutil.copytree(ROOT / "benchmarks", directory / "benchmarks")
    return directory
