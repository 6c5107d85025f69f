"""Runtimes, one a file; this is the only place that chooses one by name."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Any

    from actors.abc import Runtime
    from actors.role import Role
    from scheduling.abc import Placement

NAMES = ("inproc", "ray")
IN_PROCESS = ("inproc",)
"""Those whose actors share one process."""


async def make_runtime(name: str, *, roles: Sequence[Role[Any]], placement: Placement, gang: str) -> Runtime:
    """Return a runtime for one gang, which has not reserved or started anything.

    Raises:
        ValueError: no runtime has that name. NotPicklable: a class or a constructor argument cannot travel.
    """
    if name == "inproc":
        from actors._runtimes.inproc import InprocRuntime

        return InprocRuntime(roles=roles)
    if name == "ray":
        from scheduling.background import in_thread

        # Importing Ray takes half a second, which the loop must not wait for.
        module = await in_thread(lambda: importlib.import_module("actors._runtimes._ray"))
        runtime: Runtime = module.RayRuntime(roles=roles, placement=placement, gang=gang)
        return runtime
    raise ValueError(f"gang {gang!r}: unknown runtime {name!r}; known are {', '.join(NAMES)}")
