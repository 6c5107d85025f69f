"""Reservations on a real Ray of three nodes: 2 CPUs in zone a; 2 CPUs and 2 disks, and 1 CPU, in zone b."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import ray
from ray.util import placement_group, placement_group_table, remove_placement_group

import scheduling
from scheduling import (
    Demand,
    GangInfeasible,
    GangTimeout,
    ReservationLost,
    Resources,
    Template,
    colocate,
    on_labels,
    pack,
    reserve,
    spread,
    strict_pack,
    strict_spread,
)
from scheduling import _ray_state as ray_state
from scheduling._ray import RayCluster

if TYPE_CHECKING:
    from collections.abc import Iterator

    from scheduling._ray import Reservation

pytestmark = pytest.mark.usefixtures("three_nodes")

ROOT = Path(scheduling.__file__).parents[1]
ALL = [Demand("all", 5)]
"""Every CPU that there is."""


def free_cpus() -> float:
    return sum(node.available["CPU"] for node in ray_state.read_nodes())


def living_groups() -> list[str]:
    return [group["name"] for group in placement_group_table().values() if group["state"] != "REMOVED"]


@pytest.fixture(autouse=True)
def _nothing_stays_reserved() -> Iterator[None]:
    yield
    assert living_groups() == []
    assert free_cpus() == 5


@ray.remote(num_cpus=0)
class Probe:
    def node(self) -> str:
        return ray.get_runtime_context().get_node_id()


def start_probes(reservation: Reservation, demands: list[Demand]) -> dict[tuple[str, int], str]:
    """Start an actor for each place and return the node that it runs on."""
    places = [(demand.role, rank) for demand in demands for rank in range(demand.count)]
    actors = [Probe.options(**reservation.actor_options(*place)).remote() for place in places]  # type: ignore[attr-defined]
    return dict(zip(places, ray.get([actor.node.remote() for actor in actors], timeout=30), strict=True))


def test_actors_run_in_the_bundles_of_their_places() -> None:
    demands = [Demand("reader", 4, Resources(cpu=0.25)), Demand("trainer", 2, Resources(custom={"disk": 0.5}))]

    async def main() -> None:
        reservation = await reserve(demands, pack(), start_timeout=20, name="g")
        nodes = await asyncio.to_thread(start_probes, reservation, demands)
        assert nodes == {place: reservation.node_of(*place) for place in nodes}
        table = placement_group_table(reservation.placement_group)
        bundle = reservation.bundle_of("trainer", 1)
        assert table["bundles"][bundle] == {"CPU": 1.0, "disk": 0.5}
        assert table["bundles_to_node_id"][bundle] == reservation.node_of("trainer", 1)
        assert table["name"].startswith("g-")
        await reservation.release()
        assert table["placement_group_id"] not in str(ray_state.read_nodes())
        await reservation.release()

    asyncio.run(main())


def test_colocated_roles_share_nodes() -> None:
    demands = [Demand("reader", 4, Resources(cpu=0.25)), Demand("trainer", 2, Resources(cpu=0.5)), Demand("other", 2)]

    async def main() -> None:
        template = colocate("reader", "trainer") & spread()
        reservation = await reserve(demands, template, start_timeout=20, name="g")
        nodes = await asyncio.to_thread(start_probes, reservation, demands)
        await reservation.release()
        for share in range(2):
            assert {nodes["reader", 2 * share], nodes["reader", 2 * share + 1]} == {nodes["trainer", share]}

    asyncio.run(main())


@pytest.mark.parametrize(
    ("template", "zones"),
    [(on_labels({"zone": "a"}), {"a"}), (on_labels({"zone": "!a"}) & strict_spread(), {"b"})],
)
def test_labels_choose_nodes(template: Template, zones: set[str]) -> None:
    async def main() -> None:
        reservation = await reserve([Demand("a", 2)], template, start_timeout=20, name="g")
        labels = {node.id: node.labels["zone"] for node in ray_state.read_nodes()}
        assert {labels[reservation.node_of("a", rank)] for rank in range(2)} == zones
        await reservation.release()

    asyncio.run(main())


def test_strict_templates() -> None:
    async def main() -> None:
        apart = await reserve([Demand("a", 3, Resources(cpu=0.5))], strict_spread(), start_timeout=20, name="g")
        assert len({apart.node_of("a", rank) for rank in range(3)}) == 3
        await apart.release()
        together = await reserve([Demand("a", 2)], strict_pack(), start_timeout=20, name="g")
        assert together.node_of("a", 0) == together.node_of("a", 1)
        await together.release()

    asyncio.run(main())


@pytest.mark.parametrize(
    ("template", "demands", "roles"),
    [
        (pack(), [Demand("a", 6), Demand("z", 1, Resources(cpu=0))], ["a"]),
        (spread(), [Demand("a", 1, Resources(cpu=3)), Demand("b", 1)], ["a"]),
        (pack(), [Demand("a", 1, Resources(gpu=1)), Demand("b", 1, Resources(custom={"tape": 1}))], ["a", "b"]),
        (strict_pack(), [Demand("a", 2), Demand("b", 1)], ["a", "b"]),
        (strict_spread(), [Demand("a", 4, Resources(cpu=0.5))], ["a"]),
        (colocate("a", "b"), [Demand("a", 2), Demand("b", 3), Demand("c", 1)], ["a", "b"]),
        (on_labels({"zone": "c"}, ["b"]), [Demand("a", 1), Demand("b", 1)], ["b"]),
        (on_labels({"zone": "a"}), [Demand("a", 3)], ["a"]),
    ],
)
def test_what_can_never_fit_is_told_at_once(template: Template, demands: list[Demand], roles: list[str]) -> None:
    async def main() -> None:
        with pytest.raises(GangInfeasible) as caught:
            await reserve(demands, template, start_timeout=100, name="g")
        assert [short.role for short in caught.value.shortages] == roles
        assert len(caught.value.nodes) == 3

    started = time.monotonic()
    asyncio.run(main())
    assert time.monotonic() - started < 5  # the contract


def test_the_verdict_is_rays_too() -> None:
    """Where our own logic would wait for ever, Ray's word is taken."""

    async def main() -> None:
        cluster = RayCluster()
        claim = await cluster.claim(strict_pack().request([Demand("a", 3)]), "g")
        assert await claim.state() in ("waiting", "refused")
        while await claim.state() != "refused":  # noqa: ASYNC110  # Ray has no event for it
            await asyncio.sleep(0.01)
        await claim.withdraw()
        assert await claim.state() == "removed"

    asyncio.run(main())


def test_timeout_names_the_holders() -> None:
    @ray.remote(num_cpus=1)
    class Squatter:
        def ready(self) -> None:
            pass

    async def main() -> None:
        held = await reserve([Demand("h", 2)], on_labels({"zone": "a"}), start_timeout=20, name="holder")
        squatter = Squatter.options(resources={"disk": 1}).remote()
        await squatter.ready.remote()
        with pytest.raises(GangTimeout) as caught:
            await reserve([Demand("a", 4), Demand("z", 1, Resources(cpu=0))], spread(), start_timeout=0.3, name="g")
        message = str(caught.value)
        assert "placement group 'holder-" in message
        assert ": 2 CPU on node" in message
        assert "Squatter (pid " in message
        assert "0 CPU of 2 CPU" in message
        assert living_groups() == [table_name(held)]
        ray.kill(squatter)
        await held.release()
        # All that the two held is free again.
        await (await reserve(ALL, spread(), start_timeout=20, name="g")).release()

    asyncio.run(main())


def table_name(reservation: Reservation) -> str:
    name: str = placement_group_table(reservation.placement_group)["name"]
    return name


def test_waits_until_the_resources_are_free() -> None:
    async def main() -> None:
        first = await reserve(ALL, pack(), start_timeout=20, name="same name")
        second = asyncio.ensure_future(reserve(ALL, pack(), start_timeout=60, name="same name"))
        while len(await asyncio.to_thread(living_groups)) < 2:  # noqa: ASYNC110  # Ray has no event for it
            await asyncio.sleep(0.01)
        assert not second.done()
        await first.release()
        await (await second).release()

    asyncio.run(main())


@pytest.mark.parametrize("steps", [0, 1, 2, 3, 5, 8, 13, 21])
def test_cancelling_at_any_step_leaves_nothing(steps: int) -> None:
    async def main() -> None:
        task = asyncio.ensure_future(reserve(ALL, pack(), start_timeout=20, name="g"))
        for _ in range(steps):
            await asyncio.sleep(0.001)
        task.cancel()
        try:
            reservation = await task
        except asyncio.CancelledError:
            return
        await reservation.release()

    asyncio.run(main())


def test_cancelling_the_wait_leaves_nothing() -> None:
    async def main() -> None:
        holder = await reserve(ALL, pack(), start_timeout=20, name="holder")
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.2):
                await reserve(ALL, pack(), start_timeout=60, name="g")
        assert living_groups() == [table_name(holder)]
        await holder.release()

    asyncio.run(main())


def test_somebody_removes_the_group_of_a_waiting_gang() -> None:
    async def main() -> None:
        holder = await reserve(ALL, pack(), start_timeout=20, name="holder")
        task = asyncio.ensure_future(reserve(ALL, pack(), start_timeout=60, name="g"))
        while not (ours := [name for name in await asyncio.to_thread(living_groups) if name.startswith("g-")]):  # noqa: ASYNC110
            await asyncio.sleep(0.01)
        remove_placement_group(ray.util.get_placement_group(ours[0]))
        with pytest.raises(ReservationLost):
            await task
        await holder.release()

    asyncio.run(main())


def test_actors_that_ask_for_nothing_start_where_all_cpus_are_taken() -> None:
    nothing = [Demand("a", 1, Resources(cpu=0)), Demand("b", 1, Resources(cpu=0))]

    async def main() -> None:
        holder = await reserve(ALL, pack(), start_timeout=20, name="holder")
        for template in (strict_spread(), colocate("a", "b")):
            reservation = await reserve(nothing, template, start_timeout=20, name="g")
            assert reservation.actor_options("a", 0)["num_cpus"] == 0
            nodes = await asyncio.to_thread(start_probes, reservation, nothing)
            assert nodes == {place: reservation.node_of(*place) for place in nodes}
            await reservation.release()
        await holder.release()

    asyncio.run(main())


def test_amounts_that_ray_cuts_do_not_keep_an_actor_from_its_bundle() -> None:
    # Ray makes 0.5699 of 0.57, in which three actors of 0.19 would not fit; see `units_lost`.
    demands = [Demand("a", 3, Resources(cpu=0.19)), Demand("b", 1, Resources(cpu=0))]

    async def main() -> None:
        reservation = await reserve(demands, colocate("a", "b"), start_timeout=20, name="g")
        assert len(set((await asyncio.to_thread(start_probes, reservation, demands)).values())) == 1
        await reservation.release()

    asyncio.run(main())


def test_released_resources_are_free_at_once() -> None:
    async def main() -> None:
        for _ in range(3):
            reservation = await reserve(ALL, pack(), start_timeout=20, name="g")
            await reservation.release()
            assert free_cpus() == 5

    asyncio.run(main())


def test_two_loops_reserve_at_once() -> None:
    async def main() -> None:
        reservation = await reserve([Demand("a", 2)], pack(), start_timeout=20, name="g")
        await reservation.release()

    async def both() -> None:
        await asyncio.gather(*(asyncio.to_thread(asyncio.run, main()) for _ in range(2)))

    asyncio.run(both())


JOIN = """
import asyncio, warnings
from scheduling import ensure_ray
warnings.simplefilter("error", RuntimeWarning)
asyncio.run(ensure_ray(50))
import ray
print(ray.cluster_resources()["CPU"])
"""


def test_another_process_joins_and_stretches_nothing() -> None:
    done = subprocess.run(
        [sys.executable, "-c", JOIN], cwd=ROOT, capture_output=True, text=True, timeout=100, check=False
    )
    assert done.stdout.split() == ["5.0"], done.stderr


def test_holders_are_read_without_a_dashboard() -> None:
    group = placement_group([{"CPU": 1}], name="plain")
    assert group.wait(20)
    (holder,) = ray_state.read_holders()
    assert (holder.what, holder.amounts) == ("placement group 'plain'", {"CPU": 1.0})
    remove_placement_group(group)

    async def freed() -> None:
        await (await reserve(ALL, pack(), start_timeout=20, name="g")).release()

    asyncio.run(freed())
