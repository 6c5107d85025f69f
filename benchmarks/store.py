"""What a tensor costs from actor to actor by reference, against Ray objects and Ray Direct Transport over gloo.

A *hop*: an actor puts a plain array that it has, calls a second actor with the reference, and waits for its answer; the
second one takes the tensor that it refers to and looks at its last byte. The time to the first reader is all of that,
the copy of `put` too. The time to a further one is that of the same call to a third actor then, with the same
reference; where the first is measured, there is no third. Then the reference goes, and the next hop follows at once: a
stream of tensors, in which freeing and using memory again is part of what is measured, for every side. The first hops
of a row are not counted, so that the memory is warm. "Made in the store" is the same for an array of `store.empty`,
filled before the clock starts, as the plain one is: `put` copies nothing then.

Ray objects do exactly that by `ray.put`. A transport of two sides, as gloo is, can be used only by the process that
made the group, the driver: there the first actor returns the tensor and the driver passes its reference on at once,
without waiting in between, as Ray's documentation has it. The measures "by way of the driver" have all sides do so;
Gangline's driver has to wait for the reference there, so that its calls follow each other.
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
MADE = "Gangline, made in the store"
COPY = "a warm memcpy"
SMALL, LARGE = 4 << 10, 64 << 20
SMALL_ROW, LARGE_ROW, COPY_ROW = 40, 5, 10
"""Tensors in a row; puts and copies in a row."""


def plans() -> list[Plan]:
    """Return what is measured."""
    return [
        hop("4 KiB from actor to actor by reference", "first", SMALL, SMALL_ROW, 1 / 20),
        hop("64 MiB by reference, to the first reader", "first", LARGE, LARGE_ROW, 1 / 5, made=True),
        hop("64 MiB by reference, to a further reader", "further", LARGE, LARGE_ROW, 1 / 10),
        hop("4 KiB by way of the driver", "handed", SMALL, SMALL_ROW),
        Plan(
            "put of a plain array of 64 MiB",
            {OURS: Entry(OURS, "put", (LARGE, COPY_ROW)), COPY: Entry(OURS, "copy", (LARGE, COPY_ROW))},
            [Goal(OURS, COPY, 1.3)],
            LARGE,
        ),
    ]


def hop(what: str, request: str, nbytes: int, row: int, goal: float = 0, *, made: bool = False) -> Plan:
    """Return how to measure the way to a reader on every side; a goal is the same for both peers.

    :param made: measure beside it what is made in the store.
    """
    entries = {OURS: Entry(OURS, request, (nbytes, row))}
    if made:
        entries[MADE] = Entry(OURS, "made", (nbytes, row))
    entries |= {name: Entry(name, request, (nbytes, row)) for name in (OBJECTS, DIRECT)}
    return Plan(what, entries, [Goal(OURS, OBJECTS, goal), Goal(OURS, DIRECT, goal)] if goal else [])


def measure(repeat: int) -> list[Measure]:
    """Measure all sides in turns."""
    with ray_cluster(8) as address, Sides() as sides:
        sides.add(OURS, "gangline_store", address, ours=True)
        sides.add(OBJECTS, "ray_store", address)
        sides.add(DIRECT, "ray_direct_store", address)
        return [sides.measure(plan, repeat) for plan in plans()]
