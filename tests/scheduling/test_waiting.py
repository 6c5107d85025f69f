"""The wait for resources, on a cluster without Ray: when it ends, how, and what it leaves behind."""

from __future__ import annotations

import asyncio
import pickle
from typing import TYPE_CHECKING, Any

import pytest
from fake_cluster import FakeCluster

from scheduling import (
    Bundle,
    Demand,
    GangInfeasible,
    GangTimeout,
    Holder,
    Node,
    Placement,
    Request,
    ReservationLost,
    Resources,
    pack,
)
from scheduling import _waiting as waiting
from scheduling.background import to_the_end
from scheduling.types import FrozenMap

if TYPE_CHECKING:
    from collections.abc import Sequence

    from scheduling.abc import ClaimState

NODES = [Node("n" * 56, "10.0.0.1", FrozenMap({"CPU": 2.0}), FrozenMap({"CPU": 0.5}))]
FITS = [Demand("a", 2)]
NEVER = [Demand("a", 2), Demand("b", 1, Resources(gpu=1))]


async def start(cluster: FakeCluster, demands: list[Demand], start_timeout: float = 60.0) -> None:
    await waiting.claim_all(cluster, demands, pack(), start_timeout=start_timeout, name="g")


def test_returns_once_granted() -> None:
    async def main() -> None:
        cluster = FakeCluster(NODES)
        task = asyncio.ensure_future(start(cluster, FITS))
        await asyncio.sleep(0)
        assert not task.done()
        cluster.say("granted")
        await task
        assert len(cluster.claims) == 1

    asyncio.run(main())


def test_infeasible_claims_nothing() -> None:
    async def main() -> None:
        cluster = FakeCluster(NODES)
        with pytest.raises(GangInfeasible) as caught:
            await start(cluster, NEVER)
        assert cluster.claimed == 0
        error = caught.value
        assert [(short.role, short.resources) for short in error.shortages] == [("b", Resources(gpu=1))]
        assert str(error) == (
            "gang 'g' can never fit on this cluster:\n"
            "  b: 1 x (1 CPU, 1 GPU): no node has 1 GPU\n"
            "the 1 node has, when idle:\n"
            "  node 10.0.0.1 (nnnnnnnn): 2 CPU, 0 GPU\n"
            "ask for less, choose another placement, or add nodes"
        )
        copy = pickle.loads(pickle.dumps(error))
        assert (str(copy), copy.shortages, copy.nodes) == (str(error), error.shortages, error.nodes)

    asyncio.run(main())


def test_waits_where_an_autoscaler_may_add_nodes() -> None:
    async def main() -> None:
        cluster = FakeCluster(NODES, grows=True)
        task = asyncio.ensure_future(start(cluster, NEVER))
        await cluster.asked.wait()
        cluster.present = [*NODES, Node("m", "m", FrozenMap({"CPU": 4.0, "GPU": 1.0}))]
        cluster.say("granted")
        await task

    asyncio.run(main())


def test_timeout_says_that_the_autoscaler_added_nothing() -> None:
    async def main() -> None:
        cluster = FakeCluster(NODES, grows=True, verdict="refused")
        with pytest.raises(GangTimeout, match="autoscaler added no node that holds these:\n  b: 1 x") as caught:
            await start(cluster, NEVER, 0.1)
        assert not cluster.claims
        assert [short.role for short in caught.value.shortages] == ["b"]

    asyncio.run(main())


def test_a_young_cluster_is_asked_again_whether_it_grows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(waiting, "GRACE", 0.1)

    async def main() -> None:
        cluster = FakeCluster(NODES, grows=None)
        with pytest.raises(GangInfeasible):
            await start(cluster, NEVER)
        assert cluster.claimed == 1
        assert not cluster.claims
        with pytest.raises(GangInfeasible):  # told rather than a timeout, also where that comes first
            await start(cluster, NEVER, 0.01)
        assert not cluster.claims

    asyncio.run(main())


def test_the_clusters_own_verdict_counts() -> None:
    async def main() -> None:
        cluster = FakeCluster(NODES, verdict="refused")
        with pytest.raises(GangInfeasible, match="the cluster finds no set of nodes"):
            await start(cluster, FITS)
        assert not cluster.claims

    asyncio.run(main())


def test_a_cluster_that_shrinks_while_waiting() -> None:
    async def main() -> None:
        cluster = FakeCluster(NODES)
        task = asyncio.ensure_future(start(cluster, FITS))
        await cluster.asked.wait()
        cluster.present = []
        with pytest.raises(GangInfeasible, match="the cluster has no node"):
            await task
        assert not cluster.claims

    asyncio.run(main())


def test_timeout_names_who_holds_what() -> None:
    async def main() -> None:
        cluster = FakeCluster(NODES)
        cluster.holding = [
            Holder("placement group 'x'", NODES[0].id, FrozenMap({"CPU": 1.5})),
            Holder("actor Foo (pid 7)", NODES[0].id, FrozenMap({"disk": 1.0})),  # is in nobody's way
        ]
        with pytest.raises(GangTimeout) as caught:
            await start(cluster, FITS, 0.01)
        assert not cluster.claims
        error = caught.value
        assert isinstance(error, TimeoutError)
        assert str(error) == (
            "gang 'g' waited 0.01 s for its resources:\n"
            "  a: 2 x (1 CPU)\n"
            "free:\n"
            "  node 10.0.0.1 (nnnnnnnn): 0.5 CPU of 2 CPU\n"
            "held by:\n"
            "  placement group 'x': 1.5 CPU on node 10.0.0.1 (nnnnnnnn)\n"
            "end what holds them, ask for less, or raise the gang's start_timeout"
        )
        copy = pickle.loads(pickle.dumps(error))
        assert (str(copy), copy.holders, copy.timeout) == (str(error), error.holders, 0.01)

    asyncio.run(main())


@pytest.mark.parametrize("verdict", ["waiting", "granted"])
def test_cancelling_leaves_nothing(verdict: ClaimState) -> None:
    async def main() -> None:
        cluster = FakeCluster(NODES)
        task = asyncio.ensure_future(start(cluster, FITS))
        await cluster.asked.wait()
        cluster.say(verdict)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert not cluster.claims

    asyncio.run(main())


def test_a_removed_claim_is_an_error() -> None:
    async def main() -> None:
        cluster = FakeCluster(NODES)
        task = asyncio.ensure_future(start(cluster, FITS))
        await cluster.asked.wait()
        cluster.say("removed")
        with pytest.raises(ReservationLost):
            await task

    asyncio.run(main())


@pytest.mark.parametrize("start_timeout", [0, -1, float("nan")])
def test_refuses_bad_timeouts(start_timeout: float) -> None:
    async def main() -> None:
        await start(FakeCluster(NODES), FITS, start_timeout)

    with pytest.raises(ValueError, match="start_timeout"):
        asyncio.run(main())


@pytest.mark.parametrize(
    "bundles",
    [[["a", 0]], [["a", 0, "a", 1], ["a", 1]], [["a", 0, "a", 1, "b", 0]]],
    ids=["lacks", "repeats", "invents"],
)
def test_a_placement_of_the_users_own_is_checked(bundles: list[list[Any]]) -> None:
    class Wrong(Placement):
        def request(self, demands: Sequence[Demand]) -> Request:
            return Request(tuple(Bundle(Resources(), tuple(zip(b[::2], b[1::2], strict=True))) for b in bundles))

    async def main() -> None:
        await waiting.claim_all(FakeCluster(NODES), FITS, Wrong(), start_timeout=1, name="g")

    with pytest.raises(ValueError, match="must place each actor once"):
        asyncio.run(main())


def test_to_the_end_outlives_cancellations() -> None:
    async def main() -> None:
        go = asyncio.Event()

        async def work() -> int:
            await go.wait()
            return 7

        task = asyncio.ensure_future(to_the_end(work()))
        for _ in range(3):
            await asyncio.sleep(0)
            task.cancel()
        await asyncio.sleep(0)
        assert not task.done()
        go.set()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert await to_the_end(work()) == 7

    asyncio.run(main())
