"""What collectives between processes of one host cost: a group on "shm" against torch's Gloo and MPICH.

All have their inputs ready, and what the results go to (`out=`); beside that, Gangline with inputs of `group.empty`,
and with fresh results. A sample is one operation on rank 0, in a row of several. Then, without a peer: how long the
loop stalls during a large one, and what memory is left after many.
"""

from __future__ import annotations

import os
import tempfile
from itertools import count
from typing import TYPE_CHECKING

from benchmarks.operations import OPERATIONS
from benchmarks.report import Goal, Measure, Summary
from benchmarks.turns import Entry, Plan, Sides, mpiexec

if TYPE_CHECKING:
    from collections.abc import Iterator

REPEAT = 7
RANKS = (2, 4)
ROWS = {8: 200, 1 << 20: 20, 16 << 20: 4, 64 << 20: 2}
"""Bytes that each rank gives to an allreduce or allgather, or gets from a reduce_scatter; operations in a row."""
STALL_BYTES, STALL_RUNS, STALL_GOAL = 256 << 20, 20, 10e-3
MIXED, MIXED_GOAL = (1_000, 9_000), 32.0
"""Operations before the first look at the memory, and between that and the second; MiB that it may grow by."""

OURS = "Gangline"
EMPTY = "Gangline, group.empty"
FRESH = "Gangline, fresh results"
GLOO = "torch Gloo"
MPICH = "MPICH"


def goals(operation: str, nbytes: int, ranks: int) -> list[Goal]:
    """Return what the ratios may be."""
    if nbytes == 8:
        if ranks > 2:
            return []
        return [Goal(OURS, GLOO, 1 / 10 if operation == "allreduce" else 1 / 4)]
    return [
        Goal(OURS, GLOO, 1 / 5 if ranks == 2 else 1 / 3),
        Goal(OURS, MPICH, 1.5),
        Goal(EMPTY, MPICH, 1.2 if nbytes == 1 << 20 else 1.0),
    ]


def name(nbytes: int) -> str:
    """Return a size for people."""
    return f"{nbytes >> 20} MiB" if nbytes >= 1 << 20 else f"{nbytes} B"


def plans(ranks: int) -> Iterator[Plan]:
    """Yield what is measured with a number of ranks."""
    arrays = {OURS: "out", EMPTY: "empty", FRESH: "fresh"}
    for nbytes, row in ROWS.items():
        for operation in OPERATIONS:
            entries = {
                label: Entry(OURS, "collective", (operation, nbytes, kind, row)) for label, kind in arrays.items()
            }
            entries |= {label: Entry(label, "collective", (operation, nbytes, row)) for label in (GLOO, MPICH)}
            what = f"{operation}, {name(nbytes)}, {ranks} ranks"
            yield Plan(what, entries, goals(operation, nbytes, ranks))


def measure(repeat: int) -> list[Measure]:
    """Measure with each number of ranks."""
    measures = []
    for ranks in RANKS:
        with tempfile.TemporaryDirectory() as directory, Sides() as sides:
            sides.add(OURS, "gangline_ranks", ours=True, ranks=ranks)
            sides.ask(OURS, "form", sides.ask(OURS, "setup"))
            sides.add(GLOO, "gloo_ranks", os.path.join(directory, "store"), ranks, ranks=ranks)
            sides.add(MPICH, "mpich_ranks", ranks=ranks, launcher=mpiexec(ranks), needs=["mpi4py"])
            measures += [sides.measure(plan, repeat) for plan in plans(ranks)]
            if ranks == 2:
                alone = [stall(sides), *memory(sides)]
    return [*measures, *alone]


def stall(sides: Sides) -> Measure:
    """Measure how long the loop is blocked during a large allreduce: on each run the member where it was longest."""
    runs = zip(*sides.ask(OURS, "stall", STALL_BYTES, STALL_RUNS), strict=True)
    samples = [[max(gaps)] for gaps in runs]
    what = f"longest stall of the loop in an allreduce, {name(STALL_BYTES)}, 2 ranks"
    return Measure(what, "s", {OURS: Summary.of(samples)}, [Goal(OURS, None, STALL_GOAL)])


def memory(sides: Sides) -> list[Measure]:
    """Measure by how much resident memory grows over many operations, on the member where it grows most."""
    seeds = count()
    before, after = (sides.ask(OURS, "mixed", operations, next(seeds)) for operations in MIXED)
    kinds = ("shared pages shared out", "shared pages counted whole")
    grown = [[late[kind] - early[kind] for early, late in zip(before, after, strict=True)] for kind in (0, 1)]
    what = f"memory after {sum(MIXED):,} mixed operations, beyond that after {MIXED[0]:,}"
    return [
        Measure(f"{what}, {kind}", "MiB", {OURS: Summary.of([[max(growth)]])}, [Goal(OURS, None, MIXED_GOAL)])
        for kind, growth in zip(kinds, grown, strict=True)
    ]
