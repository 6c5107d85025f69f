"""Tensors that the driver of plain Ray actors has one give and passes on to others."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import ray

from benchmarks.side import warmth

if TYPE_CHECKING:
    from collections.abc import Sequence


def ray_handed(giver: Any, takers: Sequence[Any], nbytes: int, count: int) -> list[list[float]]:
    """Return the seconds in which each of a row of tensors reaches its readers, one after another."""
    ray.get(giver.prepare.remote(nbytes))
    return [_hop(giver, takers, nbytes) for _ in range(warmth(count) + count)][-count:]


def check(found: int, nbytes: int) -> None:
    """See that a reader had the whole tensor."""
    if found != nbytes + 1:
        raise AssertionError(f"a reader of {nbytes} bytes counted {found}")


def _hop(giver: Any, takers: Sequence[Any], nbytes: int) -> list[float]:
    samples = []
    start = time.perf_counter()
    ref = giver.give.remote()
    for taker in takers:
        found = ray.get(taker.take.remote(ref))
        samples.append(time.perf_counter() - start)
        check(found, nbytes)
        start = time.perf_counter()
    return samples
