"""Refs as Ray's ObjectRefs."""

from __future__ import annotations

import asyncio
import gc
import sys
import threading
import time
import traceback
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import ray
from gang_harness import run
from ray.experimental.rdt import util as transports

from actors import Actor, Gang, NotPicklable, Role
from collective import RefLost, TensorRef
from collective._store import _ray_refs
from scheduling import Resources

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Coroutine
    from pathlib import Path

COUNT = 1 << 20
LAST = float(COUNT - 1)


class Owner(Actor):
    async def make(self) -> TensorRef:
        return await self.store.put(np.arange(COUNT, dtype=np.float32))

    async def make_object(self, plain: Any) -> None:
        """Put one into Ray from here, read it here, and have a Ray actor keep it."""
        array = self.store.empty(COUNT, np.float32)
        array[:] = np.arange(COUNT)
        found = await (await self.store.put(array)).object_ref()
        assert float(ray.get(found)[-1]) == float((await found)[-1]) == LAST
        await plain.keep.remote([found])

    async def read(self, plain: Any) -> tuple[float, float, float]:
        """Read what a Ray actor keeps, with this actor's loop blocked and not."""
        found = await plain.kept.remote()
        blocking = ray.get(found[0])
        ref = await self.store.from_object_ref(found[0])
        return float(blocking[-1]), float((await found[0])[-1]), float((await ref)[-1])

    async def echo(self, value: Any) -> Any:
        return value

    async def kept(self, plain: Any) -> Any:
        return await plain.kept.remote()

    async def pass_on_first(self) -> tuple[dict[str, float], bool, bool]:
        """Do all that has to do with Ray for the first time here.

        Returns how long that kept this loop from going on, whether it took torch, and whether Ray lacks its transports.
        """
        gaps = {}
        async with asyncio.TaskGroup() as tasks:
            watch = Watch()
            watching = tasks.create_task(watch.run())
            await asyncio.sleep(0.05)
            ref = await self.store.put(np.arange(3.0))
            gaps["put"] = await watch.worst()
            last.remote(None), get_last.remote([ref])
            gaps["a ref for a task"] = await watch.worst()
            found = await ref.object_ref()
            gaps["object_ref"] = await watch.worst()
            again = await self.store.from_object_ref(found)
            gaps["from_object_ref"] = await watch.worst()
            assert again == ref
            watching.cancel()
        imported = "torch" in sys.modules
        return gaps, imported, transports.get_transport_data_type("NIXL") is not sys.modules["torch"].Tensor

    async def block(self, until: Path) -> None:
        while not until.exists():  # noqa: ASYNC240  # nobody is answered meanwhile
            time.sleep(0.01)  # noqa: ASYNC251

    async def counts(self) -> AsyncIterator[int]:
        while True:
            yield len(self.store.statistics().entries)
            await asyncio.sleep(0.01)


class Watch:
    """Sees how long its loop does not go on."""

    def __init__(self) -> None:
        self._worst = 0.0

    async def run(self) -> None:
        before = time.perf_counter()
        while True:
            await asyncio.sleep(0)
            now = time.perf_counter()
            self._worst, before = max(self._worst, now - before), now

    async def worst(self) -> float:
        """Return the longest time, in seconds, since this was asked last."""
        await asyncio.sleep(0.01)
        found, self._worst = self._worst, 0.0
        return found


@ray.remote(num_cpus=0.1)
class Plain:
    def last(self, array: np.ndarray) -> float:
        assert not array.flags.writeable
        return float(array[-1])

    def get_last(self, found: list[Any]) -> float:
        return float(ray.get(found[0])[-1])

    def keep(self, found: list[Any]) -> None:
        self.found = found

    def kept(self) -> list[Any]:
        return self.found

    def use(self, refs: list[TensorRef]) -> tuple[str, float]:
        async def main() -> float:
            return float((await refs[0])[-1])

        return type(refs[0]).__name__, asyncio.run(main())

    def forward(self, other: Any, refs: list[TensorRef]) -> tuple[str, float]:
        return ray.get(other.use.remote([refs[0], refs[0]]))


@ray.remote(num_cpus=0.1)
class Asynchronous:
    async def last(self, array: np.ndarray) -> float:
        return float(array[-1])

    async def await_last(self, found: list[Any]) -> float:
        return float((await found[0])[-1])

    async def wait_for_ever(self) -> None:
        await asyncio.Event().wait()

    async def block(self, seconds: float) -> None:
        time.sleep(seconds)  # noqa: ASYNC251  # what comes meanwhile is begun together


@ray.remote(num_cpus=0.1)
def last(array: np.ndarray) -> float:
    return float(array[-1])


@ray.remote(num_cpus=0.1)
def get_last(found: list[Any]) -> float:
    return float(ray.get(found[0])[-1])


@pytest.fixture(autouse=True)
def actors(ray_session: None) -> tuple[Any, Any]:
    return Plain.remote(), Asynchronous.remote()


def gang_of(owners: int) -> Gang:
    return Gang(Role("owner", Owner, owners, resources=Resources(cpu=0.25)))


def run_leaving_nothing(main: Coroutine[Any, Any, None]) -> None:
    """Run a test that, should it fail, has nobody keep its ObjectRefs: they keep memory, which other tests look at."""
    try:
        run(main, debug=False)  # Ray's own calls block the loop
    except BaseException as error:
        traceback.clear_frames(error.__traceback__)
        raise


async def entries_become(owner: Any, count: int) -> None:
    async with asyncio.timeout(30), owner.counts() as counts:
        async for now in counts:
            gc.collect()
            if now == count:
                return


async def read_for_ever(found: Any) -> None:
    while True:
        await found


async def from_object_ref(found: Any) -> TensorRef:
    return await _ray_refs.from_object_ref(found)


def test_an_object_ref_is_the_tensor_wherever_ray_takes_one(actors):
    plain, asynchronous = actors
    older = Plain.options(enable_tensor_transport=True).remote()  # imports torch

    async def main() -> None:
        async with gang_of(2) as gang:
            owner, other = gang["owner"]
            ref = await owner.make()
            found = await ref.object_ref()
            assert isinstance(found, ray.ObjectRef)
            assert await from_object_ref(found) == ref
            ref.free()
            assert await asyncio.to_thread(ray.wait, [found]) == ([found], [])
            assert (await asyncio.to_thread(ray.get, found))[-1] == (await found)[-1] == LAST
            # What comes while it is blocked is begun together: the arguments of one before the other has run.
            blocked = asynchronous.block.remote(0.2)
            uses = [
                *(asynchronous.last.remote(found) for _ in range(3)),
                asynchronous.await_last.remote([found]),
                *(actor.last.remote(found) for actor in (plain, older)),
                *(actor.get_last.remote([found]) for actor in (plain, older)),
                last.remote(found),
                get_last.remote([found]),
            ]
            assert await asyncio.gather(*uses) == [LAST] * len(uses)
            await blocked
            await plain.keep.remote([found])
            del found, uses
            await entries_become(owner, 1)
            assert await owner.read(plain) == await other.read(plain) == (LAST, LAST, LAST)
            await plain.keep.remote([])
            await entries_become(owner, 0)

    run_leaving_nothing(main())


def test_an_actor_of_a_gang_makes_object_refs(actors):
    async def main() -> None:
        plain, asynchronous = actors
        async with gang_of(1) as gang:
            (owner,) = gang["owner"]
            await owner.make_object(plain)
            (found,) = await plain.kept.remote()
            assert (await asyncio.to_thread(ray.get, found))[-1] == (await found)[-1] == LAST
            assert await asynchronous.last.remote(found) == await last.remote(found) == LAST
            # Its owner would not come along in a call, and whoever got it would wait for ever.
            with pytest.raises(NotPicklable, match="goes by Ray alone: pass its value"):
                await owner.echo(found)
            with pytest.raises(NotPicklable, match="goes by Ray alone: pass its value"):
                await owner.kept(plain)
            del found
            await entries_become(owner, 1)
            await plain.keep.remote([])
            await entries_become(owner, 0)

    run_leaving_nothing(main())


def test_a_ref_travels_in_rays_serializer_as_its_object_ref(actors):
    async def main() -> None:
        plain, _ = actors
        other = Plain.remote()
        async with gang_of(1) as gang:
            (owner,) = gang["owner"]
            ref = await owner.make()
            assert await plain.use.remote([ref]) == ("TensorRef", LAST)
            forwarded = plain.forward.remote(other, [ref, ref])
            del ref
            assert await forwarded == ("TensorRef", LAST)
            await entries_become(owner, 0)

    run_leaving_nothing(main())


def test_what_cannot_be_read_is_an_error_wherever_it_is_used(actors, monkeypatch, tmp_path):
    async def main() -> None:
        plain, asynchronous = actors
        async with gang_of(1) as gang:
            (owner,) = gang["owner"]
            lost = await (await owner.make()).object_ref()
            await owner.make_object(plain)
            (made,) = await plain.kept.remote()
            monkeypatch.setattr(_ray_refs, "LONGEST", 0.2)
            blocked = asyncio.create_task(owner.block(tmp_path / "enough"))
            try:
                with pytest.raises(TimeoutError, match=r"float32\[1048576\] of owner\[0\].* in 0.2 s.*from_object_ref"):
                    await read_for_ever(made)
            finally:
                (tmp_path / "enough").touch()
                await blocked
        for use in (
            asynchronous.last.remote(lost),
            asynchronous.await_last.remote([lost]),
            plain.get_last.remote([lost]),
            last.remote(lost),
        ):
            with pytest.raises(RefLost, match=r"float32\[1048576\] of owner\[0\]"):
                await use
        with pytest.raises(RefLost):
            await (await from_object_ref(lost))
        with pytest.raises(TypeError, match="is no TensorRef's"):
            await from_object_ref(ray.put(1))

    run_leaving_nothing(main())


def test_waiting_for_an_object_ref_ends_with_its_deadline(actors):
    """Ray's waits cannot be interrupted: they belong on threads that nobody else needs and that end by themselves."""

    async def main() -> None:
        _, asynchronous = actors
        never = asynchronous.await_last.remote([asynchronous.wait_for_ever.remote()])
        begun = time.monotonic()
        for _ in range(40):  # more than the default executor has threads
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.01):
                    await from_object_ref(never)
        assert time.monotonic() - begun < 5
        async with asyncio.timeout(5):
            await asyncio.to_thread(int)
        for thread in threading.enumerate():
            if thread.name == _ray_refs._THREAD:
                await asyncio.to_thread(thread.join, 5)
                assert not thread.is_alive()
        ray.cancel(never)

    run_leaving_nothing(main())


def test_the_first_ref_that_goes_to_ray_does_not_stop_the_loop(actors):
    """What is done for the first time imports torch nowhere, for that holds the loop from whichever thread."""

    async def main() -> None:
        async with gang_of(1) as gang:
            (owner,) = gang["owner"]
            gaps, imported, forgotten = await owner.pass_on_first()
            assert not imported
            assert not forgotten
            assert max(gaps.values()) < 1, gaps  # 1.7 s with torch; ours is some ms, but others may have the CPU

    run_leaving_nothing(main())
