"""A Ray of several small nodes for the tests of this folder that need one."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture(scope="module")
def three_nodes(private_ray: None) -> Iterator[None]:
    """Connect to a Ray of three nodes: 2 CPUs in zone a; 2 CPUs and 2 disks, and 1 CPU, in zone b."""
    import ray
    from ray.cluster_utils import Cluster

    cluster = Cluster()
    try:
        cluster.add_node(num_cpus=2, labels={"zone": "a"}, include_dashboard=False)
        cluster.add_node(num_cpus=2, labels={"zone": "b"}, resources={"disk": 2})
        cluster.add_node(num_cpus=1, labels={"zone": "b"})
        ray.init(address=cluster.address, logging_level=logging.ERROR, log_to_driver=False)
        yield
    finally:
        ray.shutdown()
        cluster.shutdown()
