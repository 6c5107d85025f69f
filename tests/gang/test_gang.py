"""What a gang is while it runs, on every runtime."""

from __future__ import annotations

import asyncio
import gc
import os
import weakref
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
from gang_harness import run

from actors import Actor, Gang, GangStartError, Handle, Handles, NotPicklable, NotReady, Role
from collective import GroupSpec, ReduceOp
from scheduling import Resources, pack

SMALL = Resources(cpu=0.5)


class Reader(Actor):
    def __init__(self, path: str) -> None:
        self.path = path

    async def feed(self, steps: int) -> None:
        feed = self.groups["feed"]
        for step in range(steps):
            shares = [np.full(3, 10.0 * self.rank + step) for _ in feed.ranks("trainer")]
            await asyncio.gather(*(feed.send(s, dst) for s, dst in zip(shares, feed.ranks("trainer"), strict=True)))

    async def pid(self) -> int:
        return os.getpid()


class Trainer(Actor):
    async def setup(self) -> None:
        self.weights = np.zeros(4)

    async def fit(self, steps: int) -> float:
        feed, dp = self.groups["feed"], self.groups["dp"]
        for _ in range(steps):
            parts = [await w for w in [feed.recv(src) for src in feed.ranks("reader")]]
            shard = await dp.reduce_scatter(np.full(4, np.concatenate(parts).sum()), ReduceOp.AVG)
            self.weights = await dp.allgather(self.weights[: len(shard)] + shard)
        return float(self.weights.sum())

    async def readers(self) -> list[int]:
        return await self.gang["reader"].pid()


def test_the_design_s_example(runtime):
    async def main():
        reader = Role("reader", Reader, 2, args=("data",), resources=SMALL)
        trainer = Role("trainer", Trainer, 2, resources=SMALL)
        async with Gang(
            reader,
            trainer,
            groups=[GroupSpec("feed", roles=("reader", "trainer")), GroupSpec("dp", roles=("trainer",))],
            placement=pack(),
            runtime=runtime,
        ) as gang:
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(gang["reader"].feed(3))
                fit = tasks.create_task(gang["trainer"].fit(3))
            # A step brings 3 x (0 + step) + 3 x (10 + step) to each of 4 weights.
            assert fit.result() == [4 * sum(30 + 6 * step for step in range(3))] * 2
            assert isinstance(gang["trainer"], Handles)
            assert isinstance(gang["trainer"][0], Handle)
            assert gang[trainer] == gang["trainer"]
            assert await gang[reader][1].call(Reader.pid) == (await gang["reader"].pid())[1]
            assert await gang["trainer"].readers() == [await gang["reader"].pid()] * 2

    run(main())


VISITS: ContextVar[tuple[str, ...]] = ContextVar("visits", default=())


class Member(Actor):
    """Tells what it saw, where."""

    def __init__(self, *args: object, **kwargs: object) -> None:
        self.given = args, kwargs
        self.seen = {"__init__": (self.role, self.rank)}
        for name in ("groups", "gang"):
            with pytest.raises(NotReady):
                getattr(self, name)
        VISITS.set((*VISITS.get(), "__init__"))

    async def setup(self) -> None:
        self.seen["groups"] = tuple((g.name, g.rank, g.size) for g in self.groups.values())
        self.seen["backends"] = {group.backend for group in self.groups.values()}
        self.seen["gang"] = tuple((role, len(handles)) for role, handles in self.gang.items())
        if self.groups:
            self.seen["sum"] = (await next(iter(self.groups.values())).allreduce(np.ones(1)))[0]
        VISITS.set((*VISITS.get(), "setup"))

    async def tell(self) -> dict[str, object]:
        return self.seen

    async def arguments(self) -> object:
        return self.given

    async def visits(self) -> tuple[str, ...]:
        return VISITS.get()

    async def meet(self, other: str) -> list[dict[str, object]]:
        return await self.gang[other].tell()

    async def introduce(self) -> Handle[Member]:
        return self.gang[self.role][self.rank]


def test_an_actor_knows_its_place_its_groups_and_its_gang(runtime):
    members = {"all": ("b", "a"), "a": ("a",), "b": ("b",), "again": ("b", "a")}
    groups = [GroupSpec(name, roles) for name, roles in members.items()]

    async def main():
        async with Gang(
            Role("a", Member, 2, resources=SMALL), Role("b", Member, 1, resources=SMALL), groups=groups, runtime=runtime
        ) as gang:
            for rank, seen in enumerate(await gang["a"].tell()):
                assert seen == {
                    "__init__": ("a", rank),
                    "groups": (("all", 1 + rank, 3), ("a", rank, 2), ("again", 1 + rank, 3)),
                    "backends": {{"inproc": "memory", "ray": "shm"}[runtime]},  # what "auto" stands for
                    "gang": (("a", 2), ("b", 1)),
                    "sum": 3,
                }
            (seen,) = await gang["b"].tell()
            assert seen["groups"] == (("all", 0, 3), ("b", 0, 1), ("again", 0, 3))
            assert await gang["b"][0].meet("a") == await gang["a"].tell()
            assert await gang["a"].introduce() == list(gang["a"])

    run(main())


def test_what_init_and_setup_set_in_the_context_is_there_in_calls(runtime):
    async def main():
        VISITS.set(("outside",))
        async with Gang(Role("a", Member, 1, resources=SMALL), runtime=runtime) as gang:
            assert (await gang["a"].visits())[0][-2:] == ("__init__", "setup")
        assert VISITS.get() == ("outside",)

    run(main())


def test_constructor_arguments_are_copies_that_only_one_actor_has(runtime):
    array, nested = np.arange(4), {"a": [1, 2]}

    async def main():
        role = Role("a", Member, 2, args=(array, nested), kwargs={"big": np.ones(50_000)}, resources=SMALL)
        async with Gang(role, runtime=runtime) as gang:
            array[:] = 0
            nested["a"].clear()
            for args, kwargs in await gang["a"].arguments():
                assert args[0].tolist() == [0, 1, 2, 3]
                assert args[1] == {"a": [1, 2]}
                assert kwargs["big"].sum() == 50_000

    run(main())


class Dropping(Actor):
    """Keeps nothing of its argument."""

    def __init__(self, array: Any) -> None:
        self.array = weakref.ref(array)

    def memory(self) -> tuple[bool, int]:
        """Return whether the argument lives, and what memory the process has, files left out."""
        gc.collect()
        status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
        kilobytes = sum(int(status[name].split()[0]) for name in ("RssAnon", "RssShmem"))
        return self.array() is not None, kilobytes << 10


def test_constructor_arguments_live_no_longer_than_the_constructor(runtime):
    """Kind: what is needed once is kept by something that lasts: a frame, a closure, an argument of a task."""
    size = 96 << 20  # more than an actor's process has otherwise; Ray's store takes as much

    async def main():
        role = Role("a", Dropping, 2, args=(np.ones(size if runtime == "ray" else 1, np.uint8),), resources=SMALL)
        async with Gang(role, runtime=runtime) as gang:
            for lives, memory in await gang["a"].memory():
                assert not lives
                assert runtime == "inproc" or memory < size
            if runtime == "inproc":
                assert not gang._runtime._pickles
                return
            total = ray.cluster_resources()["object_store_memory"]
            async with asyncio.timeout(10):
                while ray.available_resources()["object_store_memory"] < total:  # noqa: ASYNC110
                    await asyncio.sleep(0.05)  # nodes report it at times; there is no event

    run(main())


def test_an_argument_that_cannot_travel_is_an_error_before_anything_moves(runtime):
    async def main():
        with pytest.raises(NotPicklable, match=r"Member.*cannot travel.*generator"):
            async with Gang(Role("a", Member, args=((x for x in ()),)), runtime=runtime):
                pass

    run(main())


class Counter(Actor):
    def __init__(self) -> None:
        self.calls: list[int] = []

    def plain(self, number: int) -> list[int]:
        self.calls.append(number)
        return self.calls

    async def stream(self, count: int):
        for number in range(count):
            yield number


def test_plain_methods_streams_and_classes_of_this_function(runtime):
    class Local(Counter):
        async def name(self) -> str:
            return type(self).__qualname__

    async def main():
        async with Gang(Role("local", Local, 2, resources=SMALL), runtime=runtime) as gang:
            one, two = gang["local"]
            assert [await one.plain(number) for number in range(3)][-1] == [0, 1, 2]
            async with two.stream(40) as numbers:
                assert [number async for number in numbers] == list(range(40))
            assert "Local" in await one.name()

    run(main())


def test_gangs_call_one_another(runtime):
    class Caller(Actor):
        async def ask(self, handles: Handles[Member]) -> list[object]:
            return await handles.tell()

    async def main():
        async with (
            Gang(Role("member", Member, 2, resources=SMALL), runtime=runtime, name="one") as one,
            Gang(Role("member", Caller, 2, resources=SMALL), runtime=runtime, name="two") as two,
        ):
            assert await two["member"].ask(one["member"]) == [await one["member"].tell()] * 2
            assert one["member"] != two["member"]
            assert one["member"][0] != one["member"][1]

    run(main())


def test_a_gang_starts_once_and_ends_once(runtime):
    async def main():
        gang = Gang(Role("a", Member, 1, resources=SMALL), runtime=runtime)
        async with gang:
            handle = gang["a"][0]
            with pytest.raises(RuntimeError, match="was started before; make a new Gang"):
                await gang.__aenter__()
            assert (await handle.tell())["gang"] == (("a", 1),)
            await asyncio.gather(gang.aclose(), gang.aclose())
            await gang.aclose()
        with pytest.raises(RuntimeError, match="was started before"):
            await gang.__aenter__()

        never = Gang(Role("a", Member, 1, resources=SMALL), runtime=runtime)
        await never.aclose()
        with pytest.raises(RuntimeError, match="was started before"):
            await never.__aenter__()

    run(main())


def test_keys_show_nowhere(runtime):
    async def main():
        async with Gang(Role("a", Member, 1, resources=SMALL), runtime=runtime) as gang:
            handle = gang["a"][0]
            target = handle._target
            launch = gang._crew.seats[0].launch
            shown = f"{gang!r} {handle!r} {gang['a']!r} {target!r} {launch!r} {launch}"
            for credential in (launch.member, launch.calls):
                assert len(credential.key) == 32
                assert repr(credential.key) not in shown
                assert credential.key.hex() not in shown
            # Handles open an actor's calls and nothing else.
            assert target.credential == launch.calls

    run(main())


def test_errors_of_a_gang_travel():
    import pickle

    error = GangStartError("team", "reader", 3, "setup", "ValueError: no")
    again = pickle.loads(pickle.dumps(error))
    assert str(again) == str(error) == "gang 'team' did not start: reader[3] failed in its setup: ValueError: no"
    assert (again.gang, again.role, again.rank, again.phase, again.problem) == (
        "team",
        "reader",
        3,
        "setup",
        "ValueError: no",
    )
