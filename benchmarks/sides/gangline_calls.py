"""Calls between the actors of a gang on Ray, and from the process that started it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from actors import Actor, Gang, Role
from benchmarks.side import time_async_row
from benchmarks.sides.gangs import serve_gang
from scheduling import Resources

if TYPE_CHECKING:
    from actors import Handle
    from benchmarks.side import Turns

FAR = 3


class Callee(Actor):
    """Is called."""

    async def echo(self, data: bytes) -> bytes:
        return data

    async def size(self, array: np.ndarray) -> int:
        return array.nbytes


class Caller(Actor):
    """Calls another actor."""

    async def echoes(self, callee: Handle[Callee], count: int) -> list[float]:
        return await time_async_row(lambda: callee.echo(b"x"), count)

    async def sizes(self, callee: Handle[Callee], nbytes: int, count: int) -> list[float]:
        array = np.ones(nbytes, np.uint8)
        return await time_async_row(lambda: callee.size(array), count)


def main(turns: Turns) -> None:
    """Start the gang in a Ray that runs."""
    serve_gang(turns, make, {"actor": actor, "driver": driver, "gather": gather, "array": array})


def make() -> Gang:
    resources = Resources(cpu=0.1)
    return Gang(Role("caller", Caller, 1, resources=resources), Role("callee", Callee, FAR, resources=resources))


async def actor(gang: Gang, count: int) -> list[float]:
    samples: list[float] = await gang["caller"][0].echoes(gang["callee"][0], count)
    return samples


async def driver(gang: Gang, count: int) -> list[float]:
    callee = gang["callee"][0]
    return await time_async_row(lambda: callee.echo(b"x"), count)


async def gather(gang: Gang, count: int) -> list[float]:
    callees = gang["callee"]
    return await time_async_row(lambda: callees.echo(b"x"), count)


async def array(gang: Gang, nbytes: int, count: int) -> list[float]:
    samples: list[float] = await gang["caller"][0].sizes(gang["callee"][0], nbytes, count)
    return samples
