"""A gang that does nothing, in a group."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from actors import Gang, Role
from benchmarks.sides.gangs import serve_gang
from benchmarks.sides.idle_actor import Idle
from collective import GroupSpec
from scheduling import Resources

if TYPE_CHECKING:
    from benchmarks.side import Turns


def main(turns: Turns) -> None:
    """Start the gang in a Ray that runs."""
    serve_gang(turns, make, {"processes": processes})


def make(actors: int) -> Gang:
    role = Role("idle", Idle, actors, resources=Resources(cpu=0.1))
    return Gang(role, groups=[GroupSpec("all", roles=("idle",))])


async def processes(gang: Gang) -> list[int]:
    return [os.getpid(), *await gang["idle"].meet()]
