"""What a tensor costs from actor to actor by reference, against Ray objects and Ray Direct Transport over gloo.

The driver of each side has one actor give a tensor, and hands the reference to another actor, which looks at its last
byte. The time to the first reader is that of both; the time to a further one is what a second actor takes after it.
The memory is warm: what was let go of is free before the next tensor is given.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from benchmarks.cluster import ray_cluster
from benchmarks.report import Goal
from benchmarks.turns import Entry, Plan, Sides

if TYPE_CHECKING:
    from benchmarks.report import Measure

REPEAT = 9
OURS, OBJECTS, DIRECT = "Gangline", "Ray objects", "Ray Direct Transport"
COPY = "a warm memcpy"
SMALL, LARGE = 4 << 10, 64 << 20
SMALL_ROW, LARGE_ROW, COPY_ROW = 40, 5, 10
"""Tensors in a row; puts and copies in a row."""


def plans() -> list[Plan]:
    """Return what is measured."""
    return [
        hop("4 KiB from actor to actor by reference", "first", SMALL, SMALL_ROW, 1 / 20),
        hop("64 MiB by reference, to the first reader", "first", LARGE, LARGE_ROW, 1 / 5),
        hop("64 MiB by reference, to a further reader", "further", LARGE, LARGE_ROW, 1 / 10),
        Plan(
            "put of a plain array of 64 MiB",
            {OURS: Entry(OURS, "put", (LARGE, COPY_ROW)), COPY: Entry(OURS, "copy", (LARGE, COPY_ROW))},
            [Goal(OURS, COPY, 1.3)],
            LARGE,
        ),
    ]


def hop(what: str, request: str, nbytes: int, row: int, goal: float) -> Plan:
    """Return how to measure the way to a reader on every side; the goal is the same for both peers."""
    entries = {name: Entry(name, request, (nbytes, row)) for name in (OURS, OBJECTS, DIRECT)}
    return Plan(what, entries, [Goal(OURS, OBJECTS, goal), Goal(OURS, DIRECT, goal)])


def measure(repeat: int) -> list[Measure]:
    """Measure all sides in turns."""
    with ray_cluster(8) as address, Sides() as sides:
        sides.add(OURS, "gangline_store", address, ours=True)
        sides.add(OBJECTS, "ray_store", address)
        sides.add(DIRECT, "ray_direct_store", address)
        return [sides.measure(plan, repeat) for plan in plans()]
