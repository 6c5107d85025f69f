"""How fast 4 producers feed 2 consumers: sends in a group, against the same through Ray objects.

In every round each producer makes an array for each consumer, and each consumer touches what it got of every producer.
A sample is the time of one round, as many rounds on end take it; Ray is given several rounds at once, as its users do.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from benchmarks.cluster import ray_cluster
from benchmarks.report import Goal
from benchmarks.turns import Entry, Plan, Sides

if TYPE_CHECKING:
    from benchmarks.report import Measure

REPEAT = 9
PRODUCERS, CONSUMERS = 4, 2
ROWS = {64 << 10: (100, 1 / 10), 1 << 20: (60, 1 / 8), 8 << 20: (15, 1 / 3)}
"""Bytes that each producer makes in a round; rounds on end, and what the ratio of their times may be."""
OURS, RAY = "Gangline", "Ray objects"


def measure(repeat: int) -> list[Measure]:
    """Measure both in turns."""
    with ray_cluster(8) as address, Sides() as sides:
        sides.add(OURS, "gangline_n_to_m", address, PRODUCERS, CONSUMERS, ours=True)
        sides.add(RAY, "ray_n_to_m", address, PRODUCERS, CONSUMERS)
        plans = [
            Plan(
                f"{PRODUCERS} producers to {CONSUMERS} consumers, {name(nbytes)} a producer",
                {side: Entry(side, "feed", (nbytes, row)) for side in (OURS, RAY)},
                [Goal(OURS, RAY, goal)],
                PRODUCERS * nbytes,
            )
            for nbytes, (row, goal) in ROWS.items()
        ]
        return [sides.measure(plan, repeat) for plan in plans]


def name(nbytes: int) -> str:
    """Return a size for people."""
    return f"{nbytes >> 20} MiB" if nbytes >= 1 << 20 else f"{nbytes >> 10} KiB"
