"""Data planes, one a file; this is the only place that chooses one by name."""

from __future__ import annotations

import contextlib
import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

    from collective.abc import DataPlane, PlaneContext

NAMES = ("gloo", "memory")
IN_PROCESS = ("memory",)
"""Those that connect members inside one process only."""
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
    raise ValueError(f"group {context.group!r}: unknown backend {name!r}; known are {', '.join(NAMES)}")


def preload(names: Iterable[str]) -> None:
    """Import what these data planes will import when they open; blocks for seconds, so run it in a thread.

    What fails here fails again, and is reported, when the data plane opens.
    """
    for name in names:
        if name in _SLOW_IMPORTS:
            with contextlib.suppress(ImportError):
                importlib.import_module(_SLOW_IMPORTS[name])
