"""Row streams in a gang: what becomes of them when a call that made one fails."""

from __future__ import annotations

import asyncio
from typing import Any

import numpy as np
import pytest

from actors import Actor, Gang, Role
from collective import ConsumerLeft, GroupSpec, RowStream


class Reader(Actor):
    async def feed(self, blocks: int, fail: bool) -> str:
        stream = RowStream(self.groups["feed"], producers="reader", consumers="trainer", batch_size=4, budget=1000)
        try:
            for number in range(blocks):
                await stream.put({"x": np.full(4, number)})
                if fail and self.rank == 1 and number == 3:
                    raise KeyError("bad file")
        except ConsumerLeft as error:
            return str(error)
        await stream.close()
        return "all"


class Trainer(Actor):
    async def fit(self, fail_at: int) -> int:
        stream, batches = RowStream(self.groups["feed"], producers="reader", consumers="trainer", batch_size=4), 0
        async for _ in stream:
            batches += 1
            if self.rank == 0 and batches == fail_at:
                raise ValueError("no more")
        return batches


def in_a_gang(blocks: int, fail: bool, fail_at: int) -> list[Any]:
    """Return what each call came to: two of readers, then two of trainers."""

    async def main() -> list[Any]:
        async with Gang(
            Role("reader", Reader, 2), Role("trainer", Trainer, 2),
            groups=[GroupSpec("feed", roles=("reader", "trainer"))], runtime="inproc",
        ) as gang, asyncio.timeout(20):  # fmt: skip
            calls = [gang["reader"][rank].feed(blocks, fail) for rank in range(2)]
            calls += [gang["trainer"][rank].fit(fail_at) for rank in range(2)]
            results = await asyncio.gather(*calls, return_exceptions=True)
            again = [gang["reader"].feed(4, False), gang["trainer"].fit(0)]
            assert await asyncio.gather(*again) == [["all"] * 2, [4] * 2]  # the group is whole
            return results

    return asyncio.run(main())


def test_a_call_that_fails_ends_the_streams_that_it_made() -> None:
    results = in_a_gang(1000, True, 0)
    for error in results[1:]:
        assert isinstance(error, KeyError)
        assert error.args == ("bad file",)
    with pytest.raises(Exception, match=r"reader\[1\] ended the row stream.*bad file"):
        raise results[0]


def test_a_consumer_whose_call_fails_leaves() -> None:
    first, second, left, other = in_a_gang(1000, False, 5)
    assert isinstance(left, ValueError)
    assert "trainer[0] left the row stream" in first
    assert "trainer[0] left the row stream" in second
    assert 5 <= other < 1000
