"""Data planes, one a file; this is the only place that chooses one by name."""

from __future__ import annotations

import contextlib
import importlib
import platform
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

    from collective.abc import DataPlane, PlaneContext

NAMES = ("gloo", "memory", "shm")
IN_PROCESS = ("memory",)
"""Those that connect members inside one process only."""
MEMBERS = 128
"""The most members of a group on "shm"."""
_SLOW_IMPORTS = {"gloo": "collective._backends._gloo_mesh"}


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
    raise ValueError(f"group {context.group!r}: unknown backend {name!r}; known are {', '.join(NAMES)}")


def plane_within_a_host(size: int) -> str:
    """Return the name of the data plane for so many members in processes of one host; the same on all of them."""
    suits = sys.platform == "linux" and platform.machine() == "x86_64" and size <= MEMBERS
    return "shm" if suits else "gloo"


def preload(names: Iterable[str]) -> None:
    """Import what these data planes will import when they open; blocks for seconds, so run it in a thread.

    What fails here fails again, and is reported, when the data plane opens.
    """
    for name in names:
        if name in _SLOW_IMPORTS:
            with contextlib.suppress(ImportError):
                importlib.import_module(_SLOW_IMPORTS[name])
