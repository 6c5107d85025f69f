"""What a call costs: to another actor, to several, with an array; and where there are more actors than cores."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from benchmarks.cluster import ray_cluster
from benchmarks.report import Goal
from benchmarks.turns import Entry, Plan, Sides

if TYPE_CHECKING:
    from benchmarks.report import Measure

REPEAT = 15
OURS = "Gangline"
GRAPHS = "Ray Compiled Graphs"
ROW = 400
"""Small calls in a row."""
ARRAYS = {1 << 20: 20, 16 << 20: 5}
"""Bytes of an argument; calls in a row."""
CROWDING = 4
"""Actors for each core."""


def plans() -> list[Plan]:
    """Return what is measured of each side."""
    one = (ROW,)
    return [
        Plan(
            "actor to actor, 1 B (Compiled Graphs: from the driver)",
            {
                OURS: Entry(OURS, "actor", one),
                "xoscar": Entry("xoscar", "actor", one),
                "Ray": Entry("Ray", "actor", one),
                GRAPHS: Entry(GRAPHS, "driver", one),
                "Monarch": Entry("Monarch", "actor", one),
            },
            [
                Goal(OURS, "xoscar", 1 / 10),
                Goal(OURS, "Ray", 1 / 50),
                Goal(OURS, GRAPHS, 1 / 3),
            ],
        ),
        Plan(
            "driver to actor, 1 B",
            {
                OURS: Entry(OURS, "driver", one),
                "xoscar": Entry("xoscar", "driver", one),
                "Ray": Entry("Ray", "driver", one),
                "Ray, plain actor": Entry("Ray", "driver_threaded", one),
                "Monarch": Entry("Monarch", "driver", one),
            },
            [Goal(OURS, "Ray", 1 / 30), Goal(OURS, "Ray, plain actor", 1 / 30)],
        ),
        Plan(
            "driver to 3 actors and gather, 1 B",
            {
                OURS: Entry(OURS, "gather", one),
                "Ray, plain actor": Entry("Ray", "gather", one),
                GRAPHS: Entry(GRAPHS, "gather", one),
                "Monarch": Entry("Monarch", "gather", one),
            },
            [Goal(OURS, GRAPHS, 1 / 2)],
        ),
        *(
            Plan(
                f"actor to actor with an array of {nbytes >> 20} MiB",
                {name: Entry(name, "array", (nbytes, row)) for name in (OURS, "xoscar", "Ray")},
                [Goal(OURS, "xoscar", 1 / 5), Goal(OURS, "Ray", 1 / 5)],
                nbytes,
            )
            for nbytes, row in ARRAYS.items()
        ),
    ]


def measure(repeat: int) -> list[Measure]:
    """Measure all sides in turns."""
    with ray_cluster(8) as address:
        with Sides() as sides:
            sides.add(OURS, "gangline_calls", address, ours=True)
            sides.add("xoscar", "xoscar_calls", needs=["xoscar"])
            sides.add("Ray", "ray_calls", address)
            sides.add(GRAPHS, "graph_calls", address)
            sides.add("Monarch", "monarch_calls", needs=["monarch"])
            measures = [sides.measure(plan, repeat) for plan in plans()]
        return [*measures, crowd(address, repeat)]


def crowd(address: str, repeat: int) -> Measure:
    """Measure calls among more actors than there are cores, over each kind of link."""
    actors = CROWDING * len(os.sched_getaffinity(0))
    kinds = {OURS: "shm", f"{OURS}, over unix sockets": "unix"}
    with Sides() as sides:
        for name, kind in kinds.items():
            sides.add(name, "gangline_crowd", address, kind, actors, ours=True)
        plan = Plan(
            f"{actors} actors, {CROWDING} for each core, each calling the next",
            {name: Entry(name, "ring", (ROW,)) for name in kinds},
            [Goal(OURS, f"{OURS}, over unix sockets", 1.0)],
        )
        return sides.measure(plan, repeat)
