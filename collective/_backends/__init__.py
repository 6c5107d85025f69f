"""Data planes, one a file; this is the only place that chooses one by name."""

from __future__ import annotations

import contextlib
import importlib
import platform
import sys
from collections import Counter
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from collective.abc import DataPlane, PlaneContext

NAMES = ("gloo", "memory", "shm", "two-level")
IN_PROCESS = ("memory",)
"""Those that connect members inside one process only."""
MEMBERS = 128
"""The most members of a group that share memory."""
_SLOW_IMPORTS = dict.fromkeys(("gloo", "two-level"), "collective._backends._gloo_mesh")


def make_plane(name: str, context: PlaneContext) -> DataPlane:
    """Return a data plane that is yet to be opened. Imports nothing heavy: that is for `DataPlane.open`, off the loop.

    Raises:
        ValueError: no data plane has that name.
    """
    if name == "memory":
        from collective._backends.memory import MemoryPlane

        return MemoryPlane(context)
    if name == "gloo":
        from collective._backends.gloo import GlooPlane

        return GlooPlane(context)
    if name == "shm":
        from collective._backends.shm import ShmPlane

        return ShmPlane(context)
    if name == "two-level":
        from collective._backends.two_level import TwoLevelPlane

        return TwoLevelPlane(context)
    raise ValueError(f"group {context.group!r}: unknown backend {name!r}; known are {', '.join(NAMES)}")


def plane_within_a_host(size: int) -> str:
    """Return the name of the data plane for so many members in processes of one host; the same on all of them."""
    suits = sys.platform == "linux" and platform.machine() == "x86_64" and size <= MEMBERS
    return "shm" if suits else "gloo"


def plane_between(hosts: Sequence[str]) -> str:
    """Return the name of the data plane for members in processes, given each one's host; the same on all of them.

    :param hosts: as `Address.host` names them; "" where that is not known.
    """
    if len(set(hosts)) == 1 and "" not in hosts:
        return plane_within_a_host(len(hosts))
    most = max(Counter(host for host in hosts if host).values(), default=1)
    return "two-level" if 1 < most <= MEMBERS else "gloo"


def settle(name: str, hosts: Sequence[str]) -> str:
    """Return what a data plane comes to on these hosts: two levels where there are two, else the one that there is."""
    return plane_between(hosts) if name == "two-level" else name


def planes_of(name: str, hosts: Sequence[str]) -> tuple[str, ...]:
    """Return the names of what a settled data plane moves data by, as `DataPlane.backends` on rank 0."""
    if name != "two-level":
        return (name,)
    return tuple(dict.fromkeys((plane_within_a_host(list(hosts).count(hosts[0]) if hosts[0] else 1), "gloo")))


def preload(names: Iterable[str]) -> None:
    """Import what these data planes will import when they open; blocks for seconds, so run it in a thread.

    What fails here fails again, and is reported, when the data plane opens.
    """
    for name in names:
        if name in _SLOW_IMPORTS:
            with contextlib.suppress(ImportError):
                importlib.import_module(_SLOW_IMPORTS[name])
