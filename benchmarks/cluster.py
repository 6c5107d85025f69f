"""A Ray of a benchmark's own, and how its sides join it."""

from __future__ import annotations

import contextlib
import logging
from typing import TYPE_CHECKING, Any

import ray

if TYPE_CHECKING:
    from collections.abc import Iterator

STORE = 4 << 30
"""Bytes of its object store."""
QUIET: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}


@contextlib.contextmanager
def ray_cluster(cpus: int) -> Iterator[str]:
    """Run one, with more CPUs than there are where need be, and give its address to sides that are started inside.

    It is this process's, since the sides inherit from its environment how to join.
    """
    ray.init(address="local", num_cpus=cpus, include_dashboard=False, object_store_memory=STORE, **QUIET)
    try:
        yield ray.get_runtime_context().gcs_address
    finally:
        ray.shutdown()


def join(address: str, **options: Any) -> None:
    """Join it, as a driver of its own."""
    ray.init(address=address, **QUIET, **options)
