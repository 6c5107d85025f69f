"""What this machine lets this process use."""

from __future__ import annotations

import os
from pathlib import Path

_CGROUP = Path("/sys/fs/cgroup")


def count_cpus(cgroup: Path = _CGROUP) -> int:
    """Return how many CPUs this process may keep busy: by affinity and by the quota of its cgroup; at least 1."""
    affinity = len(os.sched_getaffinity(0))
    quota = _quota(cgroup)
    return affinity if quota is None else max(1, min(affinity, int(quota)))


def _quota(cgroup: Path) -> float | None:
    """Return the CPU quota of a container, by cgroup v2 or v1; None where there is none."""
    for limit, period in (("cpu.max", None), ("cpu/cpu.cfs_quota_us", "cpu/cpu.cfs_period_us")):
        try:
            words = (cgroup / limit).read_text().split()
            words += (cgroup / period).read_text().split() if period else []
        except OSError:
            continue  # the other version of cgroups, or none
        if words[0] in ("max", "-1"):
            return None
        return int(words[0]) / int(words[1])
    return None
