"""The CPU that 8 idle actors and the process that started them take: a gang in a group, against plain Ray async actors.

Both are there at the same time, on one Ray, and their processes are looked at over the same seconds.
"""

from __future__ import annotations

import os
import time
from pathlib import Path

from benchmarks.cluster import ray_cluster
from benchmarks.report import Goal, Measure, Summary
from benchmarks.turns import Sides

REPEAT = 3
ACTORS = 8
SECONDS = 20.0
SETTLE = 5.0
GOAL = 1.0
"""Percentage points that a gang may take more."""
OURS, RAY = "Gangline", "Ray"


def measure(repeat: int) -> list[Measure]:
    """Measure both over the same time."""
    with ray_cluster(2 * ACTORS) as address, Sides() as sides:
        sides.add(OURS, "gangline_idle", address, ACTORS, ours=True)
        sides.add(RAY, "ray_idle", address, ACTORS)
        processes = {side: sides.ask(side, "processes")[0] for side in (OURS, RAY)}
        time.sleep(SETTLE)
        samples: dict[str, list[list[float]]] = {side: [] for side in processes}
        for _ in range(repeat):
            began, before = time.monotonic(), {side: used(pids) for side, pids in processes.items()}
            time.sleep(SECONDS)
            after, took = {side: used(pids) for side, pids in processes.items()}, time.monotonic() - began
            for side, rows in samples.items():
                rows.append([100 * (after[side] - before[side]) / took])
    return [
        Measure(
            f"{ACTORS} idle actors and their driver, of one core over {SECONDS:.0f} s",
            "%",
            {side: Summary.of(rows) for side, rows in samples.items()},
            [Goal(OURS, RAY, GOAL, difference=True)],
        )
    ]


def used(pids: list[int]) -> float:
    """Return the seconds of CPU that processes have used, threads that have ended apart."""
    return sum(_used(pid) for pid in pids)


def _used(pid: int) -> float:
    nanoseconds = 0
    for task in Path(f"/proc/{pid}/task").iterdir():
        nanoseconds += int((task / "schedstat").read_text().split()[0])
    if nanoseconds:
        return nanoseconds / 1e9
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()  # a kernel without those statistics
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
