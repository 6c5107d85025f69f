"""How fast 4 producers feed 2 consumers rows: a RowStream, against Ray objects and Redis streams.

In every round each producer makes a block of rows, and each consumer gets as many rows, in one batch. The RowStream
takes the rows of all producers in turn, agrees on the rounds and bounds the memory; the peers hand on the halves of
each block. A sample is the time of one round, as many rounds on end take it; Ray is given several rounds at once. The
Redis server is on loopback, keeps all in memory, and is asked once a block by a producer, and for several at once by a
consumer.
"""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING

from benchmarks.cluster import ray_cluster
from benchmarks.n_to_m import CONSUMERS, PRODUCERS, name
from benchmarks.report import Goal
from benchmarks.turns import Entry, Missing, Plan, Sides

if TYPE_CHECKING:
    from benchmarks.report import Measure

REPEAT = 9
ROWS = {64 << 10: (300, 1 / 10, 1 / 2.5), 1 << 20: (60, 1 / 8, 1 / 2), 8 << 20: (15, 1 / 3, 1 / 1.5)}
"""Bytes that each producer makes in a round; rounds on end, and what the ratios of their times may be."""
OURS, RAY, REDIS = "Gangline", "Ray objects", "Redis streams"


def measure(repeat: int) -> list[Measure]:
    """Measure all in turns."""
    with ray_cluster(8) as address, Sides() as sides:
        sides.add(OURS, "gangline_rows", address, PRODUCERS, CONSUMERS, ours=True)
        sides.add(RAY, "ray_n_to_m", address, PRODUCERS, CONSUMERS)
        if shutil.which("redis-server") is None:
            sides.drop(REDIS, Missing("apt-get install redis-server"), False)
        else:
            sides.add(REDIS, "redis_rows", PRODUCERS, CONSUMERS, needs=("redis",))
        plans = [
            Plan(
                f"{PRODUCERS} producers of rows to {CONSUMERS} consumers, {name(nbytes)} a producer",
                {side: Entry(side, "feed", (nbytes, row)) for side in (OURS, RAY, REDIS)},
                [Goal(OURS, RAY, ray), Goal(OURS, REDIS, redis)],
                PRODUCERS * nbytes,
            )
            for nbytes, (row, ray, redis) in ROWS.items()
        ]
        return [sides.measure(plan, repeat) for plan in plans]
