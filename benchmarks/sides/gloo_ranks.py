"""Ranks of torch's Gloo, a process each."""

from __future__ import annotations

import warnings
from datetime import timedelta
from typing import TYPE_CHECKING

import torch
from torch import distributed

from benchmarks.operations import lengths
from benchmarks.side import time_row

if TYPE_CHECKING:
    from collections.abc import Callable

    from benchmarks.side import Turns


def main(turns: Turns) -> None:
    """Be a rank."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore", FutureWarning)  # newer torch has other names for the same, older has not
    kept: dict[tuple[str, int], Callable[[], object]] = {}

    def setup(store: str, ranks: int) -> None:
        patience = timedelta(seconds=60)
        distributed.init_process_group(
            "gloo", init_method=f"file://{store}", rank=turns.rank, world_size=ranks, timeout=patience
        )

    def collective(operation: str, nbytes: int, count: int) -> list[float]:
        if (operation, nbytes) not in kept:
            kept.clear()
            kept[operation, nbytes] = prepare(operation, nbytes)
        distributed.barrier()
        return time_row(kept[operation, nbytes], count)

    turns.serve({"setup": setup, "collective": collective})
    distributed.destroy_process_group()


def prepare(operation: str, nbytes: int) -> Callable[[], object]:
    """Return an operation with its tensors ready."""
    given, got = (torch.ones(length) for length in lengths(operation, nbytes, distributed.get_world_size()))
    calls: dict[str, Callable[[], object]] = {
        "allreduce": lambda: distributed.all_reduce(got.copy_(given)),  # it works in place, and the input stays here
        "allgather": lambda: distributed.all_gather_into_tensor(got, given),
        "reduce_scatter": lambda: distributed.reduce_scatter_tensor(got, given),
    }
    return calls[operation]
