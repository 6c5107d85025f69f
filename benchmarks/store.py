"""One tensor from actor to actor by reference, against Ray's object store and Ray Direct Transport over gloo.

Each hop is ordered by the driver: one actor stores a tensor, another looks at its last byte. The sides take turns.
"""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING, Any

import ray
from ray.experimental.collective import create_collective_group

from actors import Gang, Role
from benchmarks.plain import DirectGiver, PlainGiver, PlainTaker
from benchmarks.report import Comparison
from benchmarks.tensors import Giver, Taker
from scheduling import Resources

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

SIZES = {"4 KiB": 4 << 10, "64 MiB": 64 << 20}
FIRST = {"4 KiB": 1 / 20, "64 MiB": 1 / 5}
FURTHER = 1 / 10
COPY = 1.3
REPEAT = 30
SMALL = Resources(cpu=0.5)


async def measure(repeat: int) -> list[Comparison]:
    """Measure all sizes."""
    ray.init(address="local", num_cpus=8, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    try:
        return [comparison for size in SIZES for comparison in await measure_size(size, repeat)]
    finally:
        ray.shutdown()


async def measure_size(size: str, repeat: int) -> list[Comparison]:
    """Measure all sides in turns."""
    nbytes = SIZES[size]
    giver, takers = plain(PlainGiver, nbytes)
    direct, direct_takers = plain(DirectGiver, nbytes, direct=True)
    create_collective_group([direct, *direct_takers], backend="gloo")
    async with Gang(
        Role("giver", Giver, args=(nbytes,), resources=SMALL), Role("taker", Taker, 2, resources=SMALL)
    ) as gang:
        (own,), own_takers = gang["giver"], gang["taker"]

        async def ours() -> tuple[float, float]:
            return await hops(own.give, own_takers[0].take, own_takers[1].take)

        async def objects() -> tuple[float, float]:
            return await hops(given(giver), *(taken(taker) for taker in takers))

        async def rdt() -> tuple[float, float]:
            return await hops(given(direct), *(taken(taker) for taker in direct_takers))

        sides = {"ours": ours, "objects": objects, "rdt": rdt}
        samples: dict[str, list[tuple[float, float]]] = {name: [] for name in sides}
        for round_ in range(repeat + 2):
            for name in list(sides) if round_ % 2 else list(reversed(sides)):
                sample = await sides[name]()
                if round_ >= 2:  # warm
                    samples[name].append(sample)
        puts, copies = await own.puts(repeat)
    for actor in (giver, *takers, direct, *direct_takers):
        ray.kill(actor)
    found = []
    for name, peer in (("objects", "Ray's object store"), ("rdt", "Ray Direct Transport, gloo")):
        for place, what, goal in ((0, "to the first reader", FIRST[size]), (1, "to one more", FURTHER)):
            if place and size == "4 KiB":
                continue
            mine, theirs = ([sample[place] for sample in samples[side]] for side in ("ours", name))
            found.append(Comparison(f"{size} {what}", mine, peer, theirs, goal))
    if size == "64 MiB":
        found.append(Comparison(f"put of {size}", puts, "a warm memcpy", copies, COPY))
    return found


def plain(cls: type, nbytes: int, *, direct: bool = False) -> tuple[Any, list[Any]]:
    """Start Ray's actors of one side."""
    options: dict[str, Any] = {"num_cpus": 0.5, "enable_tensor_transport": direct}
    if direct:
        cls.give = ray.method(tensor_transport="gloo")(cls.give)  # type: ignore[attr-defined]
    giver = ray.remote(**options)(cls).remote(nbytes)
    return giver, [ray.remote(**options)(PlainTaker).remote() for _ in range(2)]


def given(actor: Any) -> Callable[[], Awaitable[Any]]:
    """Return what has a Ray actor give, without waiting."""

    async def give() -> Any:
        return [actor.give.remote()]

    return give


def taken(actor: Any) -> Callable[[Any], Awaitable[int]]:
    """Return what has a Ray actor take."""

    async def take(boxed: list[Any]) -> int:
        result: int = await actor.take.remote(boxed[0])
        return result

    return take


async def hops(
    give: Callable[[], Awaitable[Any]], first: Callable[[Any], Awaitable[int]], second: Callable[[Any], Awaitable[int]]
) -> tuple[float, float]:
    """Return the seconds from one actor to the first reader, and to one more."""
    start = time.perf_counter()
    ref = await give()
    assert await first(ref) == 1
    middle = time.perf_counter()
    assert await second(ref) == 1
    end = time.perf_counter()
    del ref
    await asyncio.sleep(0.01)  # what was let go of is freed
    return middle - start, end - middle
