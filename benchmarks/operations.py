"""The collectives that are compared, the same on every side."""

from __future__ import annotations

OPERATIONS = ("allreduce", "allgather", "reduce_scatter")
ITEM = 4
"""Bytes of a float32."""


def lengths(operation: str, nbytes: int, ranks: int) -> tuple[int, int]:
    """Return how many float32 a rank gives and gets.

    `nbytes` is what it gives to an allreduce or allgather, and what it gets from a reduce_scatter.
    """
    one = nbytes // ITEM
    return {"allreduce": (one, one), "allgather": (one, one * ranks), "reduce_scatter": (one * ranks, one)}[operation]
