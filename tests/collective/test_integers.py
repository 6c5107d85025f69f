"""Whole numbers in arguments: one rule everywhere, at the call. numpy's are fine; bools, floats and text are none."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch

from actors import Actor, Gang, Role
from collective import Layout, Shard, plan
from collective.layouts import StridedShard
from collective.rows import RowStream
from collective.testing import world
from collective.testing._world import attempt
from collective.types import GroupSpec

if TYPE_CHECKING:
    from collections.abc import Callable

    from collective import Group

NONE = (True, np.True_, np.array(True), torch.tensor(True), 0.0, np.float64(1), "0", b"\0", None, [0])
ONE = np.ones(1)

IN_GROUPS: dict[str, Callable[[Group, Any], object]] = {
    "dst": lambda group, n: group.send(ONE, n),
    "src": lambda group, n: group.recv(n),
    "tag of send": lambda group, n: group.send(ONE, 0, tag=n),
    "tag of recv": lambda group, n: group.recv(0, tag=n),
    "root of broadcast": lambda group, n: group.broadcast(ONE, n),
    "root of reduce": lambda group, n: group.reduce(ONE, n),
    "root of gather": lambda group, n: group.gather(ONE, n),
    "root of scatter": lambda group, n: group.scatter([ONE], n),
    "key": lambda group, n: group.split(0, n),
    "splits": lambda group, n: group.reduce_scatter(np.ones(0), splits=[n]),
    "shape": lambda group, n: group.empty((2, n), "float32"),
}
ELSEWHERE: dict[str, Callable[[Any], object]] = {
    "Shard's dim": Shard,
    "Shard's splits": lambda n: Shard(0, splits=(n,)),
    "StridedShard's factor": lambda n: StridedShard(0, n),
    "a Layout's shape": lambda n: Layout((n,), 1, [Shard(0)]),
    "a Layout's ranks": lambda n: Layout((4,), 1, [Shard(0)], ranks=[n]),
    "a Layout's local_shape": Layout((4,), 1, [Shard(0)]).local_shape,
    "a plan's itemsize": lambda n: plan(Layout((4,), 1, [Shard(0)]), Layout((4,), 1, [Shard(0)]), itemsize=n),
}


def test_arguments_of_operations() -> None:
    async def main() -> None:
        async with world("memory", 1) as opened:
            group = opened.groups[0]
            for where, call in IN_GROUPS.items():
                for value in NONE:
                    error = attempt(call, group, value)
                    assert isinstance(error, TypeError), f"{where} {value!r} gave {error!r}"
                    assert repr(value) in str(error), f"{where} {value!r} gave {error}"
                for value in (0, np.int64(0), np.uint8(0), np.array(0), torch.tensor(0)):
                    assert not isinstance(attempt(call, group, value), Exception), f"{where} {value!r} was refused"
                await opened.reset()
            for value in (*NONE[:-2], [0]):
                assert isinstance(attempt(group.split, value), TypeError), f"color {value!r} was taken"
            for value in ("11", b"\1", 1, True):
                assert isinstance(attempt(group.reduce_scatter, ONE, splits=value), TypeError), f"{value!r} was taken"
            assert group.empty(np.int32(3), "float32").shape == (3,)
            with pytest.raises(ValueError, match="shape is \\[-1\\]; a length is negative"):
                group.empty(-1, "float32")
            await group.send(ONE, 0, tag=np.int64(3))
            assert await group.recv(0, tag=3) == ONE, "equal tags of different types are one tag"

    asyncio.run(main())


@pytest.mark.parametrize("where", ELSEWHERE)
def test_arguments_of_layouts_and_plans(where: str) -> None:
    for value in NONE[:-1]:  # ranks may be nested
        error = attempt(ELSEWHERE[where], value)
        assert isinstance(error, TypeError), f"{where} {value!r} gave {error!r}"
    ELSEWHERE[where](np.int64(0))


def test_arguments_of_row_streams() -> None:
    async def main() -> None:
        async with world("memory", 2, roles={"reader": 1, "trainer": 1}) as opened:
            for name in ("batch_size", "budget"):
                for value in (True, 1.0, "1"):
                    options: dict[str, Any] = {"batch_size": 1, name: value}
                    with pytest.raises(TypeError, match=name):
                        RowStream(opened.groups[0], producers="reader", consumers="trainer", **options)

    asyncio.run(main())


class Owner(Actor):
    async def put(self) -> Any:
        return await self.store.put(np.arange(24.0).reshape(4, 6))

    async def empty(self, shape: Any) -> tuple[int, ...]:
        return self.store.empty(shape, "float32").shape  # type: ignore[no-any-return]


def test_indices_of_handles_and_refs_and_roots_of_references() -> None:
    async def main() -> None:
        groups = [GroupSpec("g", ("owner",))]
        async with Gang(Role("owner", Owner, np.int64(2)), groups=groups, runtime="inproc") as gang:  # type: ignore[arg-type]
            owners = gang["owner"]
            refs = await owners.put()
            for value in NONE:
                for call in (owners.__getitem__, refs[0].__getitem__, lambda n: gang.groups["g"].broadcast(refs[0], n)):
                    error = attempt(call, value)
                    assert isinstance(error, TypeError), f"{call} {value!r} gave {error!r}"
            for cut in (slice(1.0, 2), slice(True), slice("a", None)):
                assert isinstance(attempt(refs[0].__getitem__, cut), TypeError), f"{cut} was taken"
            assert owners[np.int64(1)] == owners[1]
            assert (await refs[0][np.int64(1) : np.int8(3), np.uint8(2)]).tolist() == [8.0, 14.0]
            assert await owners[0].empty(np.int64(3)) == (3,)
            with pytest.raises(TypeError, match=r"shape is 1\.5; an int or a sequence of ints"):
                await owners[0].empty(1.5)

    asyncio.run(main())
