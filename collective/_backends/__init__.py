"""Data planes, one a file; this is the only place that chooses one by name."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collective.abc import DataPlane, PlaneContext

NAMES = ("gloo", "memory")


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
