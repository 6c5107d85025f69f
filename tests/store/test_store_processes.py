"""Refs between processes: how they are read, who holds them, and what deaths do."""

from __future__ import annotations

import asyncio
import os
import pickle
import signal
import subprocess
import sys
from collections import namedtuple
from functools import partial
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from store_harness import HERE, held_by, holders, is_empty, peers, run, soon

from actors import Handles
from collective import PeerLost, RefLost, TensorStore
from collective._links.borrowing import Borrowed
from collective._store.holding import holder_of
from collective._store.sources import tables
from collective.links import loop_endpoint, open_endpoint

COUNT = 1 << 20
ME = f"process {os.getpid()}"


def base_of(array: np.ndarray) -> Any:
    """Return what an array's memory belongs to."""
    while isinstance(array, np.ndarray) and array.base is not None and not isinstance(array, Borrowed):
        array = array.base.obj if isinstance(array.base, memoryview) else array.base
    return array


def test_a_ref_is_read_in_place_and_lives_while_somebody_holds_it():
    async def main() -> None:
        a, b = pair[0].handle, pair[1].handle
        ref = await a.make_in_place(COUNT)
        array = await ref
        assert not array.flags.writeable
        assert isinstance(base_of(array), Borrowed)
        np.testing.assert_array_equal(array, np.arange(COUNT, dtype=np.float32))
        again, part = await asyncio.gather(ref, ref[5:-5])
        assert all(isinstance(base_of(each), Borrowed) for each in (again, part))
        np.testing.assert_array_equal(part, array[5:-5])
        assert await b.total(ref[:10]) == 45
        assert (await a.statistics()).used == 4 * COUNT  # one copy, whoever reads it

        await held_by(a, ME)
        await b.keep({"here": [ref]})
        await held_by(a, "b", ME)
        del ref
        await held_by(a, "b")
        assert (await b.give())["here"][0].shape == (COUNT,)  # its ref is gone when this line is
        await held_by(a, "b")
        await b.forget()
        await held_by(a)
        assert array[7] == 7  # what was read stays good
        assert (await a.statistics()).used == 4 * COUNT
        del array, again, part
        await is_empty(a)

    with peers("a", "b") as pair:
        run(main())


def test_a_tensor_is_its_readers_own():
    async def main() -> None:
        a, b = pair[0].handle, pair[1].handle
        tree = {"weight": torch.arange(float(COUNT)), "steps": torch.tensor(3)}
        ref = await a.put(tree)
        found = await ref
        assert torch.equal(found["weight"], tree["weight"])
        found["weight"].zero_()
        assert torch.equal((await ref)["weight"], tree["weight"])
        out = {"weight": torch.empty(COUNT), "steps": torch.empty((), dtype=torch.int64)}
        assert (await ref.into(out)) is out
        assert torch.equal(out["weight"], tree["weight"])
        assert await b.total((await a.put(tree["weight"]))[-1:]) == COUNT - 1

    with peers("a", "b") as pair:
        run(main())


def test_another_host_gets_a_copy_of_no_more_than_it_asks_for():
    async def main() -> None:
        a = only[0].handle
        ref = await a.make(COUNT)
        np.testing.assert_array_equal(await ref, np.arange(COUNT, dtype=np.float32))
        tie = ref._hold.source
        before = tie._channel.link.statistics().bytes_received
        assert (await ref[100:200]).sum() == sum(range(100, 200))
        assert tie._channel.link.kind == "tcp"
        assert tie._channel.link.statistics().bytes_received - before < 2000
        out = np.empty(COUNT, np.float32)
        await ref.into(out)
        assert out[-1] == COUNT - 1
        with pytest.raises(ValueError, match="into: out is float32"):
            await ref.into(out[1:])
        del ref
        await is_empty(a)

    with peers("a", hosts=("elsewhere",)) as only:
        run(main())


def test_a_ref_is_held_on_its_way():
    async def main() -> None:
        a, b, c = (peer.handle for peer in three)
        # From hand to hand, each letting go as soon as it has passed it on.
        await b.keep([await a.make(10), (await a.make(20))[5:]])
        await b.pass_on(c)
        await b.forget()
        await held_by(a, "c", "c")
        assert [await c.total(ref) for ref in await c.give()] == [45, sum(range(5, 20))]
        streamed = []
        async with c.stream() as refs:
            async for ref in refs:
                streamed.append(ref)
                await c.forget()
        del ref, refs
        await held_by(a, ME, ME)
        assert (await streamed[1])[0] == 5
        # To the whole of a role at once, and home.
        everybody = Handles("x", three[0].target.interface, [b, c, a])
        await everybody.keep(streamed)
        streamed.clear()
        await held_by(a, "a", "b", "c", "a", "b", "c")
        await everybody.forget()
        await is_empty(a)
        assert not holder_of(loop_endpoint()).pins
        assert await c.total(await a.plain(4)) == 6
        await is_empty(a)

    with peers("a", "b", "c") as three:
        run(main())


def test_who_never_gets_a_ref_does_not_keep_it():
    async def main() -> None:
        a, b = pair[0].handle, pair[1].handle
        ref = await a.make(COUNT)
        with pytest.raises(TypeError):
            b.keep(ref, ref)
        method = pair[1].target.interface.methods["keep"]
        method.wire = b"\x07\x00nothing"
        with pytest.raises(AttributeError, match="no method 'nothing'"):
            await pair[1].handle.keep(ref)
        method.wire = b"\x04\x00keep"
        task = asyncio.create_task(b.takes_long(ref))
        await held_by(a, "b", ME)
        task.cancel()
        await held_by(a, ME)
        # A stopped process takes nothing; what waits for it is withdrawn, or lost with it.
        pair[1].process.send_signal(signal.SIGSTOP)
        big = np.ones(4 << 20)
        tasks = [asyncio.create_task(b.keep(each)) for each in ([ref], [ref, big], [ref, big])]
        await asyncio.sleep(0)
        assert len(holder_of(loop_endpoint()).pins) == 3
        tasks[2].cancel()
        with pytest.raises(asyncio.CancelledError):
            await tasks[2]
        assert len(holder_of(loop_endpoint()).pins) == 2
        del ref
        pair[1].process.kill()
        for task in tasks[:2]:
            with pytest.raises(PeerLost):
                await task
        del tasks, task
        await is_empty(a)

    with peers("a", "b") as pair:
        run(main())


def test_what_an_owner_sends_is_there_with_the_ref():
    async def main() -> None:
        a, b = pair[0].handle, pair[1].handle
        await a.statistics()  # the link is there
        for count in (1000, COUNT):
            ref, tree = await a.make(count), await a.put({"x": [torch.ones(count), np.zeros(3)]})
            await b.keep(ref[5:])
            await held_by(a, "b", ME, ME)
            pair[0].process.send_signal(signal.SIGSTOP)
            array, found = await ref, await tree  # nobody is asked
            np.testing.assert_array_equal(await ref[5:10], range(5, 10))
            assert isinstance(base_of(array), Borrowed) == (count == COUNT)
            pair[0].process.send_signal(signal.SIGCONT)
            found["x"][0].zero_()
            assert torch.equal((await tree)["x"][0], torch.ones(count))
            with pytest.raises(ValueError, match="read-only"):
                array[0] = 1
            assert (await ref.into(np.empty(count, np.float32)))[-1] == count - 1
            await b.forget()
            del ref, tree
            await held_by(a)
            np.testing.assert_array_equal(array, np.arange(count, dtype=np.float32))
            del array, found
            await is_empty(a)

    with peers("a", "b") as pair:
        run(main())


def test_a_structure_of_a_class_that_is_missing_fails_where_it_is_read(monkeypatch):
    module = ModuleType("only_here")
    module.Pair = namedtuple("Pair", "x y", module="only_here")
    monkeypatch.setitem(sys.modules, "only_here", module)

    async def main() -> None:
        b = only[0].handle
        async with await open_endpoint(kinds=("shm",)) as endpoint:
            store = TensorStore(endpoint, owner="here", limit=COUNT)
            await b.forget()  # the link is there
            await b.keep(await store.put(module.Pair(np.ones(3), np.ones(3))))
            with pytest.raises(ModuleNotFoundError, match="only_here"):
                await b.fetch()
            store.close()

    with peers("b") as only:
        run(main())


def test_what_was_lent_for_a_frame_that_never_left_is_taken_back():
    async def main() -> None:
        b = only[0].handle
        async with await open_endpoint(kinds=("shm",)) as endpoint:
            store = TensorStore(endpoint, owner="here", limit=8 * COUNT)
            ref = await store.put(np.ones(COUNT, np.float32))
            assert await b.total(ref) == await b.total(ref) == COUNT
            await soon(lambda: is_quiet(endpoint))
            only[0].process.send_signal(signal.SIGSTOP)
            first = asyncio.create_task(b.keep(np.ones(4 << 20)))  # waits to be asked for, and the next one behind it
            second = asyncio.create_task(b.keep([ref, np.ones(4 << 20)]))
            await asyncio.sleep(0.01)
            second.cancel()
            with pytest.raises(asyncio.CancelledError):
                await second
            del ref, second
            await soon(lambda: is_free(store))
            only[0].process.kill()
            with pytest.raises(PeerLost):
                await first
            store.close()

    async def is_quiet(endpoint: Any) -> bool:
        lent = [link.statistics().bytes_lent for link in loop_endpoint()._links.values()]
        return not any(lent) and not holder_of(endpoint).pins

    async def is_free(store: TensorStore) -> bool:
        return not store.statistics().used

    with peers("b") as only:
        run(main())


def test_a_holder_that_dies_gives_up_its_refs():
    async def main() -> None:
        a, b = pair[0].handle, pair[1].handle
        await b.keep(await a.make(COUNT))
        await b.fetch()
        await held_by(a, "b")
        pair[1].process.kill()
        await is_empty(a)  # with the memory that it looked at

    with peers("a", "b") as pair:
        run(main())


def test_an_owner_that_dies_loses_its_refs_at_once():
    async def main() -> None:
        a, b = pair[0].handle, pair[1].handle
        ref = await a.make(COUNT)
        await b.keep(ref)
        await b.fetch()
        given = await b.give()  # not by its owner: it has to be asked
        data = pickle.dumps(ref.lease(60))
        pair[0].process.send_signal(signal.SIGSTOP)
        array = await ref  # came with the ref from its owner
        waiting = [asyncio.create_task(each()) for each in (lambda: given.into(np.empty(COUNT, np.float32)), b.total)]
        await soon(lambda: is_waiting(ref))
        pair[0].process.kill()
        for task in waiting:
            with pytest.raises(RefLost, match=r"float32\[1048576\] of a> of a is lost: its owner cannot be reached"):
                await task
        with pytest.raises(RefLost):
            await ref
        with pytest.raises(RefLost, match="cannot be reached"):
            await pickle.loads(data)
        assert array[-1] == COUNT - 1
        assert float((await b.what_was_read())[-1]) == COUNT - 1

    async def is_waiting(ref: Any) -> bool:
        return bool(ref._hold.source._waiting)

    with peers("a", "b") as pair:
        run(main())


def test_a_full_store_lets_a_put_wait_for_other_processes():
    async def main() -> None:
        a, b = pair[0].handle, pair[1].handle
        await b.keep(await a.make(COUNT // 2))
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.1):
                await a.make(COUNT)
        putting = asyncio.create_task(a.make(COUNT))
        assert await holders(a) == ["b"]
        pair[1].process.kill()
        assert (await (await putting)).shape == (COUNT,)

    with peers("a", "b", limit=5 * COUNT) as pair:
        run(main())


@pytest.mark.parametrize("hosts", [(), ("one", "two", "three")])
def test_classes_of_a_script_come_back_as_what_they_are(hosts):
    """Of `__main__`, which is another in each process, and local ones: in structures, wherever a ref of them goes."""
    path = os.pathsep.join((str(HERE), str(HERE.parent.parent)))
    command = [sys.executable, str(HERE / "classes_of_main.py"), *hosts]
    done = subprocess.run(
        command, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("host", [None, "elsewhere"])
def test_a_holder_that_dies_amid_cancelled_fetches_leaves_nothing(host):
    """Neither at its owner, whatever it was about to send, nor at whoever had sent it a ref."""

    async def main() -> None:
        async with await open_endpoint(kinds=("shm", "tcp")) as endpoint:
            store = TensorStore(endpoint, owner="here", limit=64 << 20)
            books, holder = store._books, holder_of(endpoint)
            await asyncio.sleep(0)
            tasks = asyncio.all_tasks()
            for number in range(3):
                with peers("b", hosts=(host,) if host else ()) as only:
                    b = only[0].handle
                    ref = await store.put(np.arange(8 << 20, dtype=np.float32))
                    part = ref[::2]  # copied for each who asks
                    await b.keep([ref, part])
                    await b.keep((await b.give())[number % 2])  # not by its owner: it has to be asked
                    for _ in range(20):
                        fetching = asyncio.create_task(b.fetch())
                        await asyncio.sleep(0.002 * number)
                        fetching.cancel()
                        await asyncio.wait([fetching])
                    only[0].process.send_signal(signal.SIGSTOP)
                    stuck = [asyncio.create_task(b.fetch()) for _ in range(3)]
                    passing = asyncio.create_task(b.keep(ref))
                    await asyncio.sleep(0.02)
                    only[0].process.kill()
                    for task in (*stuck, passing):
                        with pytest.raises(PeerLost):
                            await task
                    del ref, part, task, passing, stuck, fetching
                await soon(partial(is_empty_here, store))
                await soon(partial(is_quiet, [holder, holder_of(loop_endpoint())]))
                # This process holds entries of its own store by a link too, when others hand it refs of them.
                assert len(books._sessions) <= 1
                assert len(tables._tables) <= 1
                assert not books._untold
                assert asyncio.all_tasks() <= tasks
            store.close()

    async def is_empty_here(store: TensorStore) -> bool:
        return not store.statistics().used and not store._books.entries

    async def is_quiet(holders: list[Any]) -> bool:
        return not any(holder.pins for holder in holders)

    run(main())
