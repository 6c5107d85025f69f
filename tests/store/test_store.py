"""A store and its own refs: what is kept, what it costs, what is refused."""

from __future__ import annotations

import asyncio
import contextlib
import copy
import gc
import math
import pickle
import threading
import weakref
from collections import OrderedDict, namedtuple
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np
import pytest
import torch
from store_harness import run, soon

from collective import RefLost, StoreFull, TensorRef, TensorStore, freight
from collective._links.arena import arena
from collective._store.holding import holder_of
from collective.links import open_endpoint

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

PAGE = 4096
MIB = 1 << 20


@contextlib.asynccontextmanager
async def a_store(limit: int = 64 * MIB) -> AsyncIterator[TensorStore]:
    async with await open_endpoint(kinds=("memory",)) as endpoint:
        store = TensorStore(endpoint, owner="here", limit=limit)
        yield store
        store.close()


async def empty(store: TensorStore) -> None:
    """Let what was let go of be noticed; then nothing must be left."""
    gc.collect()
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert store.statistics().entries == ()
    assert store.statistics().used == 0


@pytest.mark.parametrize("shape", [(), (0,), (3, 5), (MIB,), (2, 3 * MIB)])
@pytest.mark.parametrize("dtype", ["float32", "bool", "complex64", "bfloat16"])
def test_a_put_is_a_snapshot(shape, dtype):
    kind = np.dtype(ml_dtypes.bfloat16) if dtype == "bfloat16" else np.dtype(dtype)
    array = np.random.default_rng(0).integers(0, 2, shape).astype(kind)
    wanted = np.array(array)

    async def main() -> None:
        async with a_store() as store:
            ref = await store.put(array)
            assert (ref.shape, ref.dtype, ref.nbytes, ref.owner) == (shape, dtype, wanted.nbytes, "here")
            assert repr(ref) == f"<TensorRef {dtype}{list(shape)} of here>"
            array[...] = wanted == 0
            found = await ref
            np.testing.assert_array_equal(found, wanted, strict=True)
            assert not found.flags.writeable
            del ref, found
            await empty(store)

    run(main())


def test_structures_come_back_as_they_were():
    local: Any = namedtuple("Local", "y")
    local.lock = threading.Lock()
    weight = torch.arange(40_000.0).requires_grad_()
    tree = {
        "a": np.arange(6)[::2],
        "b": [weight, (torch.tensor(3, dtype=torch.bfloat16), np.float32(2))],
        "tied": weight,
    }

    async def main() -> None:
        async with a_store() as store:
            ref = await store.put(OrderedDict(tree))
            assert repr(ref) == "<TensorRef 4 tensors of 160030 bytes of here>"
            assert store.statistics().used == 40 * PAGE + PAGE
            found = await ref
            assert list(found) == ["a", "b", "tied"]
            np.testing.assert_array_equal(found["a"], [0, 2, 4])
            assert torch.equal(found["b"][0], weight)
            assert found["tied"] is found["b"][0]
            assert type(found["b"][1]) is tuple
            assert found["b"][1][0].dtype == torch.bfloat16
            # A tensor's changes are its holder's alone, also where that is the owner.
            found["b"][0].zero_()
            assert torch.equal((await ref)["tied"], weight)
            out = {"a": np.empty(3, np.int64), "b": [torch.empty(40_000), (torch.empty((), dtype=torch.bfloat16),) * 2]}
            with pytest.raises(ValueError, match="into: out is no dict with the keys"):
                await ref.into(out)
            with pytest.raises(TypeError, match="structure of tensors, which has no a part"):
                ref[0]
            with pytest.raises(TypeError, match=r"tree\['x'\]\[1\]: builtins.int is no array"):
                await store.put({"x": [np.ones(1), 1]})
            with pytest.raises(TypeError, match=r"tree\['x'\]: the class Local cannot be pickled"):
                await store.put({"x": local(np.ones(1))})
            with pytest.raises(TypeError, match=r"tree\[0\]: the key <unlocked .* cannot be pickled"):
                await store.put([{threading.Lock(): np.ones(1)}])

    run(main())


def test_parts_of_a_tensor():
    array = np.arange(60).reshape(5, 4, 3)

    async def main() -> None:
        async with a_store() as store:
            ref = await store.put(array)
            for key in (slice(1, 3), 2, (slice(None), 1), (..., slice(None, None, 2)), (0, 0, 0)):
                assert ref[key].shape == array[key].shape
                np.testing.assert_array_equal(await ref[key], array[key])
            np.testing.assert_array_equal(await ref[1:4][::2][1], array[1:4][::2][1])
            out = np.empty((2, 4, 3), int)
            assert await ref[3:].into(out) is out
            np.testing.assert_array_equal(out, array[3:])
            with pytest.raises(ValueError, match=r"out is int64\[2, 4, 3\], and the tensor int64\[5, 4, 3\]"):
                await ref.into(out)
            with pytest.raises(IndexError):
                ref[5]
            with pytest.raises(TypeError, match="whole numbers, slices"):
                ref[[1, 2]]
            part = ref[2:]
            assert part == ref[2:] != ref
            del ref
            np.testing.assert_array_equal(await part, array[2:])  # a part keeps the whole

    run(main())


def test_an_array_of_the_store_is_not_copied():
    async def main() -> None:
        async with a_store() as store:
            array = store.empty((4, 1000), np.float32)
            array[:] = 7
            used = store.statistics().used
            ref, rows = await store.put(array), await store.put(array[2:])
            assert store.statistics().used == used == 4 * PAGE  # aliases of one memory, counted once
            assert np.shares_memory(await ref, array)
            assert np.shares_memory(await rows, array[2:])
            with pytest.raises(ValueError, match="read-only"):
                array[0] = 1
            del ref
            gc.collect()
            await asyncio.sleep(0)
            seen = await rows
            del rows
            gc.collect()
            await asyncio.sleep(0)
            assert not array.flags.writeable  # while somebody looks at it
            del seen
            await asyncio.sleep(0.01)
            array[0] = 1
            tensor = store.empty(10, torch.int64)
            tensor[:] = 3
            assert torch.equal(await (await store.put(tensor)), tensor)
            del tensor
            gc.collect()
            gc.disable()  # nothing here may wait for it
            try:
                ref = await store.put(array)
                del array, ref
                await soon(lambda: is_free(store), collect=False)
            finally:
                gc.enable()

    async def is_free(store: TensorStore) -> bool:
        return not store.statistics().used

    run(main())


def test_a_put_waits_for_room_and_a_deadline_says_who_has_it():
    async def main() -> None:
        owned = arena().statistics().owned  # by other tests
        async with a_store(3 * MIB) as store:
            first = await store.put(np.zeros(2 * MIB, np.int8))
            said = r"no room for 2097152 bytes: .* int8\[2097152\] .* by process"
            with pytest.raises(StoreFull, match=said) as caught:
                async with asyncio.timeout(0.01):
                    await store.put(np.zeros(2 * MIB, np.int8))
            assert isinstance(caught.value, TimeoutError)
            assert (caught.value.wanted, caught.value.used, caught.value.limit) == (2 * MIB, 2 * MIB, 3 * MIB)
            assert pickle.loads(pickle.dumps(caught.value)).held == caught.value.held
            with pytest.raises(StoreFull):
                store.empty(2 * MIB, np.int8)
            with pytest.raises(ValueError, match="can never be put"):
                await store.put(np.zeros(4 * MIB, np.int8))

            second = asyncio.create_task(store.put(np.zeros(2 * MIB, np.int8)))
            third = asyncio.create_task(store.put(np.zeros(1, np.int8)))
            await asyncio.sleep(0)
            assert store.statistics().waiting == 2  # in line, although there is room for the small one
            seen = await first
            del first
            gc.collect()
            await asyncio.sleep(0.01)
            assert not second.done()  # somebody looks at that memory yet
            del seen
            gc.collect()
            assert [(await each).shape for each in (second, third)] == [(2 * MIB,), (1,)]
            cancelled = asyncio.create_task(store.put(np.zeros(2 * MIB, np.int8)))
            await asyncio.sleep(0)
            cancelled.cancel()
            with pytest.raises(asyncio.CancelledError):
                await cancelled
            del second, third
            await empty(store)
        assert arena().statistics().owned <= owned

    run(main())


async def lease_is_over(store: TensorStore) -> bool:
    return not store.statistics().entries[-1].leased


async def are_entries(store: TensorStore, count: int) -> bool:
    return len(store.statistics().entries) == count


def test_refs_are_pickled_by_calls_and_leases_alone():
    async def main() -> None:
        async with a_store() as store:
            ref = await store.put(np.arange(3))
            for dump in (pickle.dumps, lambda x: pickle.dumps({"x": [x]})):
                with pytest.raises(pickle.PicklingError, match=r"int64\[3\] of here.*pickle ref.lease\(seconds\)"):
                    dump(ref)
            assert copy.copy(ref) == copy.deepcopy([ref])[0] == ref
            data = pickle.dumps(ref[1:].lease(60))
            short = pickle.dumps(ref.lease(0.01))
            del ref
            gc.collect()
            lent: Any = pickle.loads(data)
            assert isinstance(lent, TensorRef)
            np.testing.assert_array_equal(await lent, [1, 2])
            (entry,) = store.statistics().entries
            assert (len(entry.holders), 50 < entry.leased < 60) == (1, True)

            brief = await store.put(np.arange(4))
            held, late = pickle.loads(pickle.dumps([brief.lease(0.01), brief.lease(0.01)]))
            await held
            del brief
            gc.collect()
            await soon(lambda: lease_is_over(store))
            np.testing.assert_array_equal(await held, [0, 1, 2, 3])  # it holds, now that it was used
            del held
            gc.collect()
            await soon(lambda: are_entries(store, 1))
            with pytest.raises(RefLost, match="freed"):
                await late
            np.testing.assert_array_equal(await pickle.loads(short), [0, 1, 2])  # as long as the longest lease

    run(main())


def test_what_is_freed_or_closed_is_lost():
    async def main() -> None:
        async with a_store(MIB) as store:
            freed, closed = await store.put(np.arange(3)), await store.put(np.arange(3))
            kept = await closed
            freed.free()
            with pytest.raises(RefLost, match=r"int64\[3\] of here.* of here is lost: free\(\) was called"):
                await freed
            waiting = asyncio.create_task(store.put(np.zeros(MIB, np.int8)))
            await asyncio.sleep(0)
            store.close()
            for doomed in (waiting, closed, store.put(np.ones(1))):
                with pytest.raises(RefLost, match="its store was closed"):
                    await doomed
            np.testing.assert_array_equal(kept, [0, 1, 2])

    run(main())


def test_a_sender_that_dies_before_the_receiver_holds_it_loses_it():
    async def main() -> None:
        async with a_store() as store, await open_endpoint(kinds=()) as one, await open_endpoint(kinds=()) as other:
            ref = await store.put(np.arange(3))
            (sent,) = freight.unload(freight.Freight().ship([ref]).table, one)
            del ref
            await soon(lambda: holders_are(store, 1))
            table = freight.Freight().ship([sent]).table
            assert (await sent)[2] == 2
            one.abort()
            await soon(lambda: holders_are(store, 0))
            (lost,) = freight.unload(table, other)
            with pytest.raises(RefLost, match="nobody held it any more"):
                await lost
            with pytest.raises(RefLost, match="its owner cannot be reached any more"):
                await sent
            freight.Freight().ship([sent])
            assert not holder_of(one).pins

    async def holders_are(store: TensorStore, count: int) -> bool:
        return len([name for entry in store.statistics().entries for name in entry.holders]) == count

    run(main())


def test_what_is_sent_by_a_link_that_has_ended_is_given_up():
    async def main() -> None:
        async with a_store() as store:
            ended = freight.Freight()
            ended.lose()
            ended.ship([await store.put(np.arange(3))])
            await soon(lambda: are_entries(store, 0))

    run(main())


def test_an_owner_whose_link_ends_as_it_is_made_is_lost(monkeypatch):
    async def main() -> None:
        async with a_store() as store, await open_endpoint(kinds=()) as other:
            connect = other.connect

            async def connect_in_vain(*where: Any) -> Any:
                link = await connect(*where)
                await link.aclose()
                return link

            monkeypatch.setattr(other, "connect", connect_in_vain)
            (ref,) = freight.unload(freight.Freight().ship([await store.put(np.arange(3))]).table, other)
            with pytest.raises(RefLost, match="its owner cannot be reached any more"):
                await ref

    run(main())


def test_what_keeps_a_ref_that_came_otherwise_stays_until_the_next_has_it():
    async def main() -> None:
        async with a_store() as store, await open_endpoint(kinds=()) as other:
            put = await store.put(np.arange(3))
            where, number, *_ = put._record()
            keeper = Keeper()
            keeper.ref = put
            kept = weakref.ref(keeper)
            passed = TensorRef(where, number, put._summary, expires=math.inf, keeper=keeper)
            del put, keeper
            shipment = freight.Freight().ship([passed])
            del passed
            assert kept() is not None
            (ref,) = freight.unload(shipment.table, other)
            assert (await ref)[2] == 2
            await soon(lambda: is_gone(kept))
            assert (await ref)[2] == 2

    async def is_gone(kept: weakref.ref[Keeper]) -> bool:
        return kept() is None

    run(main())


class Keeper:
    """Stands in for an ObjectRef of Ray."""

    ref: TensorRef


async def is_writable(array: np.ndarray) -> bool:
    return array.flags.writeable


def test_endpoints_of_one_process_read_in_place():
    async def main() -> None:
        async with a_store(MIB) as store, await open_endpoint(kinds=()) as other:
            array = store.empty(1000, np.float32)
            array[:] = 5
            tensor = torch.arange(100_000)
            sent = [await store.put(array), await store.put(tensor)]
            refs = freight.unload(freight.Freight().ship(sent).table, other)
            del sent
            seen, part, own = await refs[0], await refs[0][10:20], await refs[1]
            assert np.shares_memory(seen, array)
            assert np.shares_memory(part, array[10:20])
            np.testing.assert_array_equal(await refs[0][::10], array[::10])
            own.zero_()
            assert torch.equal(await refs[1], tensor)
            del refs, seen, own
            await soon(lambda: are_entries(store, 0))
            assert not array.flags.writeable
            del part
            await soon(lambda: is_writable(array))

    run(main())


@pytest.mark.parametrize("elsewhere", [False, True])
def test_ray_reads_in_the_owners_process_while_the_loop_is_blocked(elsewhere):
    from collective._store import _ray_refs

    async def main() -> None:
        async with a_store() as store:
            array = store.empty((4, 1000), np.float32)
            array[:] = np.arange(4000).reshape(4, 1000)
            ref = await store.put(array)
            tree = await store.put({"a": np.arange(3), "b": torch.arange(4)})
            with ThreadPoolExecutor(1) as thread:

                def read(ref: TensorRef) -> Any:
                    unbox = partial(_ray_refs._unbox, b"", "", ref._record())
                    return thread.submit(unbox).result(10) if elsewhere else unbox()

                whole, row, column = read(ref), read(ref[1]), read(ref[:, 1])
                np.testing.assert_array_equal(whole, array, strict=True)
                np.testing.assert_array_equal(row, array[1], strict=True)
                np.testing.assert_array_equal(column, array[:, 1], strict=True)
                assert [type(part) for part in read(tree).values()] == [np.ndarray, torch.Tensor]
                record = ref._record()
                del ref, row, column
                await soon(lambda: are_entries(store, 1))
                assert not array.flags.writeable  # it is still read
                lost = _ray_refs._unbox(b"", "", record)
                assert isinstance(lost, RefLost)
                del whole
                await soon(lambda: is_writable(array))

    run(main())


def test_ray_lets_go_of_a_ref_though_it_keeps_what_it_was_given():
    from collective._store import _ray_refs

    async def main() -> None:
        async with a_store() as store:
            handed = _ray_refs.Handed(await store.put(np.arange(3)))
            _ray_refs._kept["id"] = handed
            _ray_refs.Transport().garbage_collect("id", None, [handed])
            await soon(lambda: are_entries(store, 0))

    run(main())


def test_a_closed_store_is_gone():
    """Its endpoint, which lives on, knows nothing of it: neither the books, nor the credential."""

    async def main() -> None:
        async with await open_endpoint(kinds=("memory",)) as endpoint:
            table = endpoint.__dict__["_ports"]._grants
            for _ in range(3):
                store = TensorStore(endpoint, owner="here", limit=MIB)
                ref = await store.put(np.zeros(10))
                books = weakref.ref(store._books)
                store.close()
                with pytest.raises(RefLost, match="its store was closed"):
                    await ref
                del store, ref
                await soon(partial(is_gone, books))
                assert not table
                assert not holder_of(endpoint)._sources

    async def is_gone(books: Any) -> bool:
        return books() is None

    run(main())


def test_an_into_that_is_cancelled_leaves_out_alone():
    async def main() -> None:
        async with a_store() as store:
            ref = await store.put(np.ones(1 << 22))
            outs = [np.zeros((1 << 22, 2))[:, 0] for _ in range(4)]
            for out in outs:
                filling = asyncio.create_task(ref.into(out))
                while not out[:: 1 << 12].any() and not filling.done():  # noqa: ASYNC110 (a thread writes)
                    await asyncio.sleep(0)
                filling.cancel()
                await asyncio.wait([filling])
                out[:: 1 << 12] = -1
            out = np.zeros(1 << 22)
            assert (await ref.into(out) == 1).all()
            for out in outs:  # at last, since a thread may not have come to it before
                assert (out[:: 1 << 12] == -1).all()

    run(main())
