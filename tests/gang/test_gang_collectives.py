"""Collectives over references: called by the driver, and by others who hold the gang."""

from __future__ import annotations

import asyncio
import os
import pickle
import signal
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from gang_harness import run

from actors import Actor, Gang, GroupHandle, NotReady, Role
from collective import GroupBroken, GroupSpec, Layout, PeerLost, ReduceOp, RefLost, Shard, StoreFull
from scheduling import Resources

if TYPE_CHECKING:
    from collective import TensorRef

SMALL = Resources(cpu=0.25)
KIB = 1 << 10
PAGE = 4 * KIB
LONGEST = 60.0
"""Seconds after which a test has hung."""


class Holder(Actor):
    async def give(self, rows: int = 8) -> TensorRef:
        return await self.store.put(np.arange(rows * 2, dtype=np.float32).reshape(rows, 2) + 100 * self.rank)

    async def give_state(self) -> TensorRef:
        import torch  # here, since it takes each actor a second

        part = np.arange(8.0).reshape(2, 4) + 8 * self.rank
        return await self.store.put({"weight": torch.from_numpy(part), "bias": [torch.full((3,), self.rank)]})

    async def held(self) -> tuple[int, int]:
        statistics = self.store.statistics()
        return len(statistics.entries), statistics.used

    async def own(self, count: int) -> list[float]:
        """Run collectives of its own, no member at the same pace."""
        sums = []
        for number in range(count):
            if (number + self.rank) % 3 == 0:
                await asyncio.sleep(0.001)
            sums.append(float((await self.groups["dp"].allreduce(np.array([number + self.rank])))[0]))
        return sums

    async def use(self, group: GroupHandle | None, refs: list[TensorRef], count: int) -> list[float]:
        """Call collectives on a group: that of its own gang, or another's."""
        group = group or self.gang.groups["dp"]
        works = [group.allreduce(refs) for _ in range(count)]
        return [float((await (await work)[0])[0, 0]) for work in works]

    async def leave(self) -> None:
        """Leave a collective unfinished."""
        _ = self.groups["dp"].barrier()
        raise KeyError("for the test")

    async def reset(self) -> None:
        await self.groups["dp"].reset()

    async def pid(self) -> int:
        return os.getpid()


def gang(runtime: str, count: int = 3, **terms: Any) -> Gang:
    spec = GroupSpec("dp", ("holder",), timeout=terms.pop("timeout", 60.0))
    return Gang(Role("holder", Holder, count, resources=SMALL, **terms), groups=[spec], runtime=runtime)


async def nothing_held(gang: Gang) -> None:
    """Wait until the members' stores are empty, without the help of the garbage collector."""
    async with asyncio.timeout(10):
        while any(each != (0, 0) for each in await gang["holder"].held()):  # noqa: ASYNC110 (there is no event)
            await asyncio.sleep(0.01)


async def read(refs: list[TensorRef]) -> list[Any]:
    return [await ref for ref in refs]


def test_every_collective_gives_a_ref_of_each_members_store(runtime):
    async def main() -> None:
        async with gang(runtime) as running:
            group = running.groups["dp"]
            assert (group.name, group.size, group.ranks("holder")) == ("dp", 3, [0, 1, 2])
            assert group.backends == (("memory",) if runtime == "inproc" else ("shm",))
            refs = await running["holder"].give()
            given = [np.array(each) for each in await read(refs)]
            if runtime == "ray":
                refs[1] = await refs[1].object_ref()

            totals = await group.allreduce(refs)
            assert [each.owner.split()[0] for each in totals] == ["holder[0]", "holder[1]", "holder[2]"]
            for each in await read(totals):
                np.testing.assert_array_equal(each, sum(given))
            parts = await read(await group.reduce_scatter(totals, op=ReduceOp.AVG, splits=np.array([1, 0, 7])))
            np.testing.assert_array_equal(np.concatenate(parts), sum(given))
            assert [len(part) for part in parts] == [1, 0, 7]
            whole = (await read(await group.allgather([totals[0][:2], totals[1][::4], totals[2][7:]])))[1]
            np.testing.assert_array_equal(whole, sum(given)[[0, 1, 0, 4, 7]])
            spread = await group.broadcast(totals[2][1:3], 2)
            for each in await read(spread):
                np.testing.assert_array_equal(each, sum(given)[1:3])
            del refs, totals, parts, whole, spread, each
            await nothing_held(running)

    run(asyncio.wait_for(main(), LONGEST))


def test_structures_and_layouts(runtime):
    import torch  # before the loop runs

    async def main() -> None:
        async with gang(runtime) as running:
            group = running.groups["dp"]
            refs = await running["holder"].give_state()
            for state in await read(await group.allreduce(refs)):
                assert state["bias"][0].tolist() == [3, 3, 3]
                assert state["weight"].dtype == torch.float64
            for state in await read(await group.broadcast([None, refs[1], None], 1)):
                assert state["weight"][0].tolist() == [8, 9, 10, 11]
            # Rows on three members become columns on two of them.
            rows = {"weight": Layout((6, 4), 3, [Shard(0)]), "bias": [Layout((9,), 3, [Shard(0)])]}
            columns = {"weight": Layout((6, 4), 2, [Shard(1)], (2, 0)), "bias": [Layout((9,), 2, [Shard(0)], (2, 0))]}
            first, nothing, last = await group.repartition(refs, rows, columns)
            assert nothing is None
            assert (await first)["weight"].tolist() == [[4 * row + 2, 4 * row + 3] for row in range(6)]
            assert (await last)["bias"][0].tolist() == [0, 0, 0, 1, 1]
            del refs, state, first, last
            await nothing_held(running)

    run(asyncio.wait_for(main(), LONGEST))


def test_all_callers_and_the_members_themselves_at_once(runtime):
    """The driver, a member, and an actor of another gang; while the members run collectives of their own."""

    async def main() -> None:
        async with gang(runtime) as running, Gang(Role("other", Holder, resources=SMALL), runtime=runtime) as other:
            group = running.groups["dp"]
            assert pickle.loads(pickle.dumps(group)) == group if runtime == "inproc" else True
            mine, its, others = [await running["holder"].give(2) for _ in range(3)]
            doubled = await group.allreduce(its)
            tripled = await group.allreduce([(await group.allreduce(others))[rank] for rank in range(3)])
            sums = await asyncio.gather(
                running["holder"].own(20),
                running["holder"][1].use(None, doubled, 5),
                other["other"][0].use(group, tripled, 5),
                *(group.allreduce(mine) for _ in range(5)),
            )
            assert sums[0] == [[3.0 * number + 3 for number in range(20)]] * 3
            assert sums[1] == [900.0] * 5
            assert sums[2] == [2700.0] * 5
            for refs in sums[3:]:
                assert [float(each[0, 0]) for each in await read(refs)] == [300.0] * 3

    run(asyncio.wait_for(main(), LONGEST))


class Misfit(Holder):
    async def give_pair(self) -> TensorRef:
        return await self.store.put([np.zeros(2), np.zeros(3)])

    async def give_odd(self) -> list[TensorRef]:
        return [await self.store.put(np.zeros(shape, dtype)) for shape, dtype in ((5, "f4"), ((), "f4"), (8, "i8"))]


def test_what_does_not_fit_is_refused_before_anything_moves():
    async def main() -> None:
        spec = GroupSpec("dp", ("holder",))
        roles = Role("holder", Misfit, 2), Role("other", Holder, 2)
        with pytest.raises(NotReady):
            _ = Gang(*roles, groups=[spec], runtime="inproc").groups
        async with Gang(*roles, groups=[spec], runtime="inproc") as running:
            group = running.groups["dp"]
            refs = await running["holder"].give(4)
            (long, _, whole), (_, _, other_whole) = await running["holder"].give_odd()
            states = [await member.give_pair() for member in running["holder"]]
            stranger = (await running["other"].give(4))[0]
            rows, columns = Layout((8, 2), 2, [Shard(0)]), Layout((8, 2), 2, [Shard(1)])
            cases = [
                (ValueError, r"1 refs for the 2 members of group 'dp'", lambda: group.allreduce(refs[:1])),
                (TypeError, r"refs is <TensorRef float32\[4, 2\]", lambda: group.allreduce(refs[0])),
                (TypeError, r"refs\[1\] is a ndarray; a TensorRef", lambda: group.allreduce([refs[0], np.ones(3)])),
                (ValueError, r"refs\[1\] is None; each", lambda: group.allgather([refs[0], None])),
                (ValueError, r"of other\[0\] .* no member of group 'dp'", lambda: group.allreduce([stranger, refs[1]])),
                (ValueError, r"refs\[0\] .* of the store of rank 1", lambda: group.allreduce(refs[::-1])),
                (
                    ValueError,
                    r"refs\[0\] has float32\[5\] and refs\[1\] float32\[4, 2\]",
                    lambda: group.allreduce([long, refs[1]]),
                ),
                (
                    ValueError,
                    r"refs\[0\] is float32\[5\] and refs\[1\] float32\[4, 2\]; dtypes",
                    lambda: group.allgather([long, refs[1]]),
                ),
                (TypeError, "AVG of int64", lambda: group.allreduce([whole, other_whole], ReduceOp.AVG)),
                (TypeError, "op is 'sum'", lambda: group.allreduce(refs, "sum")),
                (ValueError, r"splits \[4\] do not cut 4 rows", lambda: group.reduce_scatter(refs, splits=[4])),
                (ValueError, "root is 2; the group has ranks 0 to 1", lambda: group.broadcast(refs[0], 2)),
                (ValueError, r"refs\[0\] .* root is 1; only it", lambda: group.broadcast([refs[0], None], 1)),
                (ValueError, r"refs\[0\] has shape \(4, 2\).*\(8, 1\)", lambda: group.repartition(refs, columns, rows)),
                (ValueError, r"refs\[1\] is None, and", lambda: group.repartition([refs[0], None], rows, columns)),
                (ValueError, "src a dict of Layouts", lambda: group.repartition(refs, {"x": rows}, {"x": columns})),
            ]
            for error, said, call in cases:
                with pytest.raises(error, match=said):
                    call()
            with pytest.raises(NotReady, match=r"allreduce of <GroupHandle 'dp' .* needs a running event loop"):
                await asyncio.to_thread(group.allreduce, refs)
            # What is in a structure has to be asked.
            with pytest.raises(ValueError, match=r"refs\[0\] is a structure of 2 tensors and refs\[1\] float32"):
                await group.allreduce([states[0], refs[1]])
            with pytest.raises(TypeError, match=r"allgather: refs\[0\] is of a structure of 2 tensors"):
                await group.allgather(states)
            freed = refs[1][:]
            freed.free()
            with pytest.raises(RefLost, match=r"free\(\) was called"):
                group.allreduce([refs[0], freed])
            assert (await read(await group.allreduce(refs)))[1][0, 0] == 100

    run(asyncio.wait_for(main(), LONGEST))


async def until_waiting(member: Any) -> None:
    """Wait until a put, or a collective, waits for room in a member's store."""
    async with asyncio.timeout(10):
        while not await member.waiting():  # noqa: ASYNC110 (there is no event)
            await asyncio.sleep(0.01)


class Crowded(Holder):
    async def fill(self) -> None:
        self.filled = [await self.store.put(np.zeros(PAGE, np.int8)) for _ in range(3)]

    async def make_room(self) -> None:
        self.filled.clear()

    async def waiting(self) -> int:
        return self.store.statistics().waiting


def test_room_is_waited_for_and_a_cancelled_await_leaves_the_collective_in_its_place():
    async def main() -> None:
        spec = GroupSpec("dp", ("holder",), timeout=60)
        role = Role("holder", Crowded, 2, store_bytes=5 * PAGE)
        async with Gang(role, groups=[spec], runtime="inproc") as running:
            group = running.groups["dp"]
            refs = await running["holder"].give(2)
            await running["holder"][1].fill()
            taken = await group.allreduce(refs)
            work = group.allreduce(refs)
            waiting = asyncio.ensure_future(work)
            await until_waiting(running["holder"][1])
            waiting.cancel()
            behind = group.allreduce(refs)
            await asyncio.wait([waiting])
            assert not work.done()
            await running["holder"][1].make_room()
            assert [float(each[0, 0]) for each in await read(await work)] == [100.0] * 2
            assert (await behind)[0].shape == (2, 2)
            del work, waiting, behind
            # Who calls it and dies holds nobody up, and keeps nothing.
            await running["holder"][1].fill()
            async with Gang(Role("caller", Holder), runtime="inproc") as other:
                call = asyncio.create_task(other["caller"][0].use(group, refs, 1))
                await until_waiting(running["holder"][1])
                assert not call.done()
                await other._crew["caller", 0].process.kill()
                with pytest.raises(PeerLost):
                    await call
                del call
            del taken
            await running["holder"][1].make_room()
            assert (await group.allreduce(refs))[0].shape == (2, 2)
            del refs
            await nothing_held(running)

    run(asyncio.wait_for(main(), LONGEST))


def test_a_full_store_refuses_for_all_and_says_who_holds_what():
    async def main() -> None:
        spec = GroupSpec("dp", ("holder",), timeout=0.5)
        role = Role("holder", Crowded, 2, store_bytes=4 * PAGE)
        async with Gang(role, groups=[spec], runtime="inproc") as running:
            with pytest.raises(ValueError, match="24576 bytes can never be put into 16384"):
                await running.groups["dp"].allgather(await running["holder"].give(3 * PAGE // 8))
            refs = await running["holder"].give(2)
            await running["holder"][1].fill()
            with pytest.raises(StoreFull, match=r"of holder\[1\] .* int8\[4096\] .* by holder\[1\]") as caught:
                await running.groups["dp"].allreduce(refs)
            assert "on rank 1 (holder[1]), for all members of group 'dp'" in caught.value.__notes__[0]
            await running["holder"][1].make_room()
            assert len(await running.groups["dp"].allreduce(refs)) == 2

    run(asyncio.wait_for(main(), LONGEST))


def test_a_broken_group_a_lost_tensor_and_a_dead_member(runtime):
    async def main() -> None:
        async with gang(runtime) as running:
            group = running.groups["dp"]
            refs = await running["holder"].give(2)
            await group.allreduce(refs)
            with pytest.raises(KeyError):
                await running["holder"][1].leave()
            with pytest.raises(GroupBroken, match=r"left barrier\(\) .* unfinished"):
                await group.allreduce(refs)
            await running["holder"].reset()
            assert float((await (await group.allreduce(refs))[0])[0, 0]) == 300.0
            late = pickle.loads(pickle.dumps(refs[1].lease(0.01)))
            refs[1].free()
            async with asyncio.timeout(10):
                while (await running["holder"][1].held())[0]:  # noqa: ASYNC110 (there is no event)
                    await asyncio.sleep(0.01)
            with pytest.raises(RefLost, match="nobody held it any more"):
                await group.allreduce([refs[0], late, refs[2]])
            refs[1] = await running["holder"][1].give(1)
            assert (await group.allgather(refs))[0].shape == (5, 2)
            # And a member that dies.
            if runtime == "ray":
                os.kill(await running["holder"][2].pid(), signal.SIGKILL)
            else:
                await running._crew["holder", 2].process.kill()
            for _ in range(2):
                with pytest.raises(PeerLost, match=r"holder\[2\] was lost during"):
                    await group.allgather(refs)

    run(asyncio.wait_for(main(), LONGEST))
