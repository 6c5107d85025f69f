"""Ranks of MPICH, started by mpiexec. They spin inside an operation, and sleep between turns."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from mpi4py import MPI

from benchmarks.operations import lengths
from benchmarks.side import time_row

if TYPE_CHECKING:
    from collections.abc import Callable

    from benchmarks.side import Turns

COMM = MPI.COMM_WORLD


def main(turns: Turns) -> None:
    """Be a rank: the one that MPI says."""
    turns.rank = COMM.rank
    kept: dict[tuple[str, int], Callable[[], object]] = {}

    def setup() -> None: ...

    def collective(operation: str, nbytes: int, count: int) -> list[float]:
        if (operation, nbytes) not in kept:
            kept.clear()
            kept[operation, nbytes] = prepare(operation, nbytes)
        COMM.Barrier()
        return time_row(kept[operation, nbytes], count)

    turns.serve({"setup": setup, "collective": collective})


def prepare(operation: str, nbytes: int) -> Callable[[], object]:
    """Return an operation with its arrays ready."""
    given, got = (np.ones(length, np.float32) for length in lengths(operation, nbytes, COMM.size))
    calls: dict[str, Callable[[], object]] = {
        "allreduce": lambda: COMM.Allreduce(given, got),
        "allgather": lambda: COMM.Allgather(given, got),
        "reduce_scatter": lambda: COMM.Reduce_scatter_block(given, got),
    }
    return calls[operation]
