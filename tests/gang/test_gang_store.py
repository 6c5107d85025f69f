"""The stores of a gang's actors."""

from __future__ import annotations

import asyncio
import gc
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from gang_harness import run

from actors import Actor, Gang, NotPicklable, Role
from collective import RefLost, StoreFull
from scheduling import Resources

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from collective import StoreStatistics, TensorRef

SMALL = Resources(cpu=0.25)
MIB = 1 << 20


class Owner(Actor):
    def __init__(self) -> None:
        self.first = self.store  # there from the start
        self.sent = asyncio.Event()

    async def setup(self) -> None:
        self.held = [await self.store.put(np.full(MIB, self.rank))]

    async def give(self) -> TensorRef:
        return self.held[0]

    async def statistics(self) -> StoreStatistics:
        assert self.store is self.first
        return self.store.statistics()

    async def counts(self) -> AsyncIterator[int]:
        while True:
            yield len(self.store.statistics().entries)
            await asyncio.sleep(0.01)

    async def ends_with_a_ref(self) -> AsyncIterator[TensorRef]:
        try:
            await asyncio.get_running_loop().create_future()
        except asyncio.CancelledError:
            await asyncio.sleep(0.05)
        try:
            yield await self.store.put(np.ones(3))
        finally:
            self.sent.set()

    async def left_behind(self) -> int:
        """Return how many entries there are once that was sent, and somebody had time to let it go."""
        async with asyncio.timeout(5):
            await self.sent.wait()
        for _ in range(500):
            if (count := len(self.store.statistics().entries)) == 1:
                break
            await asyncio.sleep(0.01)
        return count

    def put_from_a_thread(self) -> Any:
        from actors import from_thread

        return from_thread.run(self.store.put, {"x": np.arange(3)})

    async def fill(self) -> None:
        async with asyncio.timeout(0.05):
            await self.store.put(np.zeros(10 * MIB, np.int8))


class Reader(Actor):
    def __init__(self, given: Any = None) -> None:
        self.given = given

    async def total_given(self) -> float:
        return float((await self.given).sum())

    async def total(self, refs: list[TensorRef]) -> float:
        return float(sum([(await ref).sum() for ref in refs]))

    async def swap(self, ref: TensorRef) -> TensorRef:
        return await self.store.put((await ref)[:5] * 2)


def test_actors_read_each_others_tensors_and_nothing_is_left(runtime):
    async def main() -> None:
        roles = Role("owner", Owner, 2, resources=SMALL, store_bytes=16 * MIB), Role("reader", Reader, resources=SMALL)
        async with Gang(*roles, runtime=runtime) as gang:
            refs = await gang["owner"].give()
            assert repr(refs[1]) == f"<TensorRef int64[1048576] of owner[1] of gang {gang._id!r}>"
            assert await gang["reader"].total(refs) == [MIB]
            (swapped,) = await gang["reader"].swap(refs[1])
            np.testing.assert_array_equal(await swapped, [2] * 5)
            assert (await (await gang["owner"][0].put_from_a_thread()))["x"].tolist() == [0, 1, 2]
            with pytest.raises(StoreFull, match=r"store of owner\[0\] of gang .* int64\[1048576\] .* by owner\[0\]"):
                await gang["owner"][0].fill()
            with pytest.raises(NotPicklable, match=r"pickle ref.lease\(seconds\)"):
                await Gang(Role("late", Reader, args=(refs[1],), resources=SMALL), runtime=runtime).__aenter__()
            lent = refs[1].lease(60)
            async with Gang(Role("late", Reader, args=(lent,), resources=SMALL), runtime=runtime) as late:
                assert await late["late"].total_given() == [MIB]
            kept = await refs[0]
            old = refs[1]
            del refs
            gc.collect()
            async with asyncio.timeout(5), gang["owner"][0].counts() as counts:
                async for count in counts:
                    if count == 1:
                        break
        assert kept[-1] == 0
        with pytest.raises(RefLost, match=r"of owner\[1\] of gang .* cannot be reached any more"):
            await old
        # Another gang knows nothing of it either.
        async with Gang(Role("reader", Reader, resources=SMALL), runtime=runtime) as gang:
            with pytest.raises(ExceptionGroup) as caught:
                await gang["reader"].total([old])
            assert isinstance(caught.value.exceptions[0], RefLost)

    run(main())


def test_what_a_stream_still_sends_after_its_reader_was_cancelled_is_given_up():
    async def main() -> None:
        async with Gang(Role("owner", Owner, resources=SMALL), runtime="inproc") as gang:
            (owner,) = gang["owner"]
            stream = await owner.ends_with_a_ref().__aenter__()
            await owner.statistics()  # it waits
            leaving = asyncio.create_task(stream.aclose())
            await asyncio.sleep(0.01)
            leaving.cancel()
            with pytest.raises(asyncio.CancelledError):
                await leaving
            assert await owner.left_behind() == 1

    run(main())


def test_store_bytes_is_checked():
    for wrong, error in ((0, ValueError), (1.5, TypeError)):
        with pytest.raises(error, match="store_bytes is"):
            Role("owner", Owner, store_bytes=wrong).check()
