"""Tensors that the driver of plain Ray actors has one give and passes on to others."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import ray

from benchmarks.side import warmth

if TYPE_CHECKING:
    from collections.abc import Sequence


def ray_handed(giver: Any, takers: Sequence[Any], nbytes: int, count: int) -> list[tuple[float, float]]:
    """Return the seconds in which each of a row of tensors reaches its first reader, and then the second."""
    ray.get(giver.prepare.remote(nbytes))
    return [_hop(giver, takers, nbytes) for _ in range(warmth(count) + count)][-count:]


def check(first: int, further: int, nbytes: int) -> None:
    """See that both readers had the whole tensor."""
    if first != nbytes + 1 or further != nbytes + 1:
        raise AssertionError(f"the readers of {nbytes} bytes counted {first} and {further}")


def _hop(giver: Any, takers: Sequence[Any], nbytes: int) -> tuple[float, float]:
    start = time.perf_counter()
    ref = giver.give.remote()
    first = ray.get(takers[0].take.remote(ref))
    middle = time.perf_counter()
    further = ray.get(takers[1].take.remote(ref))
    end = time.perf_counter()
    check(first, further, nbytes)
    return middle - start, end - middle
