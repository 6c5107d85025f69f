"""What arguments and results are when they arrive, and how large ones travel."""

from __future__ import annotations

import asyncio
import gc
import subprocess
import sys
import textwrap
import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from actor_harness import run, team

from actors import Actor, NotPicklable
from actors._pickling import Beside, dumps, loads
from collective._links import arena
from collective._links.ring import usable
from collective.links import allocate, arena_statistics


@dataclass
class Pair:
    left: Any
    right: Any


class Keeper(Actor):
    async def echo(self, value: Any) -> Any:
        return value

    async def keep(self, value: Any) -> None:
        self.value = value

    async def change(self) -> None:
        self.value.append("changed there")

    async def kept(self) -> Any:
        return self.value

    async def writeable(self, array: Any) -> bool:
        return bool(array.flags.writeable)

    async def fill(self, tensor: Any, value: float) -> Any:
        tensor.fill_(value)
        return tensor

    async def apply(self, function: Any, *args: Any) -> Any:
        return function(*args)

    async def large(self, size: int) -> bytes:
        return bytes(size)


def test_nothing_is_shared_between_caller_and_actor(kind: str) -> None:
    async def main() -> None:
        async with team(kind, Keeper) as keepers:
            mine: list[Any] = ["mine"]
            array = np.arange(100_000)
            await keepers[0].keep(mine)
            await keepers[0].change()
            mine.append("changed here")
            assert await keepers[0].kept() == ["mine", "changed there"]
            await keepers[0].keep(array)
            array[:] = 0
            kept = await keepers[0].kept()
            assert kept[-1] == 99_999
            assert not np.shares_memory(kept, keepers.instances[0].value)
            again = await keepers[0].kept()
            assert not np.shares_memory(kept, again)

    run(kind, main())


@pytest.mark.parametrize("size", [0, 1, 1000, 100_000, 5_000_000])
def test_arrays_arrive_equal_and_read_only(kind: str, size: int) -> None:
    async def main() -> None:
        async with team(kind, Keeper) as keepers:
            array = np.arange(size, dtype=np.float32)
            for sent in (array, array[::2], array.reshape(-1, 1).T, np.asfortranarray(np.stack([array, array]))):
                there = await keepers[0].echo(sent)
                assert there.dtype == sent.dtype
                np.testing.assert_array_equal(there, sent)
                assert not there.flags.writeable
                assert not await keepers[0].writeable(sent)
            pair = await keepers[0].echo(Pair(array, {"nested": [array]}))
            np.testing.assert_array_equal(pair.left, pair.right["nested"][0])

    run(kind, main())


def test_tensors_arrive_in_memory_of_their_own(kind: str) -> None:
    torch = pytest.importorskip("torch")

    async def main() -> None:
        async with team(kind, Keeper) as keepers:
            for dtype in (torch.float32, torch.bfloat16, torch.int64, torch.bool):
                tensor = torch.ones(50_000, dtype=dtype)
                there = await keepers[0].fill(tensor, 0)
                assert there.dtype == dtype
                assert not there.any()
                assert tensor.all()
            parameter = torch.nn.Parameter(torch.ones(3))
            there = await keepers[0].echo({"weight": parameter, "array": np.ones(3)})
            assert isinstance(there["weight"], torch.nn.Parameter)
            assert not there["array"].flags.writeable

    run(kind, main())


@pytest.mark.skipif(not usable(), reason="rings need the store order of x86")
def test_over_shared_memory_large_arrays_and_tensors_are_read_in_place(monkeypatch: pytest.MonkeyPatch) -> None:
    torch = pytest.importorskip("torch")
    size = 1 << 20
    monkeypatch.setattr(arena, "_arena", None)  # One of its own: some of another test's may be on its way back.

    async def used(expected: int) -> None:
        deadline = time.monotonic() + 20
        while arena_statistics().used != expected:
            assert time.monotonic() < deadline, f"not {expected} bytes are used: {arena_statistics()}"
            gc.collect()
            await asyncio.sleep(0.001)

    async def main() -> None:
        async with team("shm", Keeper) as keepers:
            await keepers[0].keep(np.ones(size, np.uint8))
            await used(size)
            assert keepers.instances[0].value.sum() == size
            await keepers[0].keep(torch.ones(size, dtype=torch.uint8))
            await used(size)
            assert keepers.instances[0].value.sum() == size
            block = allocate(size)
            tensor = torch.frombuffer(block.memory, dtype=torch.float32).fill_(1)
            await keepers[0].keep(tensor)
            await used(size)
            kept = keepers.instances[0].value
            filled = await keepers[0].fill(tensor[1000:], 5)
            assert (filled == 5).all()
            assert kept.all()
            assert (tensor == 1).all()
            tensor[3] = 7
            assert kept[3] == 7
            assert kept.fill_(9).data_ptr() % 4096 == 0
            assert tensor[3] == 7
            del filled, kept, tensor, block
            await keepers[0].keep(None)
            await used(0)

    run("shm", main())


def test_a_tensor_takes_the_memory_that_arrived() -> None:
    torch = pytest.importorskip("torch")
    data, buffers = dumps([torch.ones(1000), np.ones(1000)], "it")
    arrived = [memoryview(bytearray(buffer)) for buffer in buffers]
    tensor, array = loads(data, arrived, "it")
    assert tensor.data_ptr() == np.frombuffer(arrived[0], np.uint8).ctypes.data
    assert array.ctypes.data == np.frombuffer(arrived[1], np.uint8).ctypes.data
    assert not array.flags.writeable


def test_functions_and_local_classes_travel_by_value(kind: str) -> None:
    class Local:
        value = 3

    async def main() -> None:
        async with team(kind, Keeper) as keepers:
            offset = 10
            assert await keepers[0].apply(lambda x: x + offset, 5) == 15
            there = await keepers[0].echo(Local())
            assert there.value == 3
            array = np.arange(100_000)
            assert await keepers[0].apply(lambda x: int(x.sum()) + offset, array) == int(array.sum()) + 10

    run(kind, main())


def test_what_is_missing_beside_refs_is_told_once() -> None:
    with pytest.raises(NotPicklable) as caught:
        loads(b"cnowhere\nNothing\n.", Beside([memoryview(b"")], []), "an argument")
    assert str(caught.value).count("an argument") == 1


def test_what_main_defines_travels_by_value() -> None:
    """A class of the caller's `__main__` would be looked up in that of the actor, which is another one."""
    script = """
        import pickle, sys
        from actors._pickling import dumps

        class Config:
            def __init__(self, rate):
                self.rate = rate
            def twice(self):
                return 2 * self.rate

        sys.stdout.buffer.write(pickle.dumps(dumps({"config": Config(4)}, "it")))
    """
    written = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], stdout=subprocess.PIPE, check=True).stdout
    import pickle

    data, buffers = pickle.loads(written)
    config = loads(data, buffers, "it")["config"]
    assert config.twice() == 8
    # And back: this process has no such class in its own __main__ either.
    data, buffers = dumps(config, "it")
    assert type(loads(data, buffers, "it")) is type(config)


def test_large_replies_delay_no_small_ones(kind: str) -> None:
    async def main() -> None:
        async with team(kind, Keeper) as keepers:
            await keepers[0].echo(0)
            large = asyncio.create_task(keepers[0].large(256 << 20))
            served = 0
            await keepers[0].echo(0)
            while not large.done():
                assert await keepers[0].echo(served) == served
                served += 1
            assert len(await large) == 256 << 20
            assert served > 10

    run(kind, main())


def test_a_large_argument_delays_no_reply_and_no_other_actor(kind: str) -> None:
    async def main() -> None:
        async with team(kind, Keeper, 2) as keepers:
            await keepers.handles.echo(0)
            small = asyncio.create_task(keepers[0].echo("small"))
            large = asyncio.create_task(keepers[0].echo(np.zeros(128 << 20, np.uint8)))
            await asyncio.sleep(0)
            assert await small == "small"
            assert not large.done()
            for number in range(5):
                assert await keepers[1].echo(number) == number
            assert not large.done()
            assert len(await large) == 128 << 20

    run(kind, main())


def test_all_sizes_pass(kind: str) -> None:
    async def main() -> None:
        async with team(kind, Keeper) as keepers:
            sizes = [0, 1, 32 << 10, (32 << 10) + 1, 64 << 10, (64 << 10) + 1, 1 << 20, (3 << 20) + 7]
            sent = [bytes([n % 251]) * size for n, size in enumerate(sizes)]
            assert await asyncio.gather(*(keepers[0].echo(value) for value in sent)) == sent
            arrays = await asyncio.gather(*(keepers[0].echo(np.frombuffer(value, np.uint8)) for value in sent))
            assert [array.tobytes() for array in arrays] == sent

    run(kind, main())
