"""A gang that does nothing, in a group."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import ray
import uvloop

from actors import Gang, Role
from benchmarks.cluster import join
from benchmarks.sides.idle_actor import Idle
from collective import GroupSpec
from scheduling import Resources

if TYPE_CHECKING:
    from benchmarks.side import Turns


def main(turns: Turns) -> None:
    """Start the gang in a Ray that runs."""
    uvloop.run(serve(turns))


async def serve(turns: Turns) -> None:
    gang: Any = None

    async def setup(address: str, actors: int) -> None:
        nonlocal gang
        join(address)
        role = Role("idle", Idle, actors, resources=Resources(cpu=0.1))
        gang = await Gang(role, groups=[GroupSpec("all", roles=("idle",))]).__aenter__()

    async def processes() -> list[int]:
        return [os.getpid(), *await gang["idle"].meet()]

    await turns.serve_async({"setup": setup, "processes": processes})
    if gang is not None:
        await gang.aclose()
    ray.shutdown()
