"""Tensors that plain Ray actors hand to two others, and what all sides that do so agree on."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import ray

from benchmarks.side import warmth

if TYPE_CHECKING:
    from collections.abc import Sequence

FREEING = 0.01
"""Seconds between two tensors, which are not counted: what was let go of is freed in them."""


def ray_first(giver: Any, takers: Sequence[Any], nbytes: int, count: int) -> list[float]:
    """Return the seconds in which each of a row of tensors reaches its first reader."""
    return [first for first, _ in _row(giver, takers, nbytes, count)]


def ray_further(giver: Any, takers: Sequence[Any], nbytes: int, count: int) -> list[float]:
    """Return the seconds that each of them then takes to the second."""
    return [further for _, further in _row(giver, takers, nbytes, count)]


def check(first: int, further: int, nbytes: int) -> None:
    """See that both readers had the whole tensor."""
    if first != nbytes + 1 or further != nbytes + 1:
        raise AssertionError(f"the readers of {nbytes} bytes counted {first} and {further}")


def _row(giver: Any, takers: Sequence[Any], nbytes: int, count: int) -> list[tuple[float, float]]:
    ray.get(giver.prepare.remote(nbytes))
    samples = []
    for _ in range(warmth(count) + count):
        samples.append(_hop(giver, takers, nbytes))
        time.sleep(FREEING)
    return samples[-count:]


def _hop(giver: Any, takers: Sequence[Any], nbytes: int) -> tuple[float, float]:
    start = time.perf_counter()
    ref = giver.give.remote()
    first = ray.get(takers[0].take.remote(ref))
    middle = time.perf_counter()
    further = ray.get(takers[1].take.remote(ref))
    end = time.perf_counter()
    check(first, further, nbytes)
    return middle - start, end - middle
