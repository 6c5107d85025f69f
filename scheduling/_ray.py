"""Ray as a cluster: one placement group a gang."""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING, Any

from ray.exceptions import RayError
from ray.util import placement_group, placement_group_table, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from scheduling import _ray_start, _ray_state
from scheduling._ray_reaper import guard
from scheduling._waiting import claim_all
from scheduling.abc import Claim, Cluster
from scheduling.background import in_thread, post, to_the_end
from scheduling.errors import RayUnavailable, ReservationLost
from scheduling.types import UNITS, count_units, units_lost

if TYPE_CHECKING:
    import concurrent.futures
    from collections.abc import Awaitable, Callable, Sequence

    from ray.util.placement_group import PlacementGroup

    from scheduling.abc import ClaimState, Placement
    from scheduling.types import Bundle, Demand, Holder, Node, Request, Resources

_POLL = 0.01
_LONGEST_POLL = 0.25
"""Seconds between looks at what Ray has no event for; nodes report every 0.1 s."""
_SETTLED = 1.0
"""Seconds that a claim is given to settle before it is removed all the same."""


async def reserve(demands: Sequence[Demand], placement: Placement, *, start_timeout: float, name: str) -> Reservation:
    """Do what `scheduling.reserve` says."""
    request, claim = await claim_all(RayCluster(), demands, placement, start_timeout=start_timeout, name=name)
    assert isinstance(claim, RayClaim)
    try:
        nodes = await claim.bundle_nodes()
    except BaseException:
        await to_the_end(claim.withdraw())
        raise
    return Reservation(claim, request, {demand.role: demand.resources for demand in demands}, nodes)


class Reservation:
    """The resources of a gang, held by one placement group until `release`, or until the process that made it ends."""

    def __init__(self, claim: RayClaim, request: Request, resources: dict[str, Resources], nodes: list[str]) -> None:
        self._claim = claim
        self._request = request
        self._resources = resources
        self._nodes = nodes

    @property
    def placement_group(self) -> PlacementGroup:
        """Ray's handle of the placement group."""
        return self._claim.group

    @property
    def connected(self) -> bool:
        """Whether this process has not left Ray since: then nothing is reserved any more, and its actors are gone."""
        return self._claim.connected

    def bundle_of(self, role: str, rank: int) -> int:
        """Return the index of the bundle that an actor lives in."""
        return self._request.bundle_of(role, rank)

    def node_of(self, role: str, rank: int) -> str:
        """Return the id of the node where an actor's bundle was reserved (after that node's death: another)."""
        return self._nodes[self.bundle_of(role, rank)]

    def actor_options(self, role: str, rank: int) -> dict[str, Any]:
        """Return what to give to `.options()` of the Ray actor, so that it starts inside its bundle."""
        index = self.bundle_of(role, rank)
        bundle = self._request.bundles[index].resources.amounts()
        asked = {name: _inside(amount, bundle[name]) for name, amount in self._resources[role].amounts().items()}
        options: dict[str, Any] = {"num_cpus": asked.pop("CPU", 0)}
        if gpus := asked.pop("GPU", 0):
            options["num_gpus"] = gpus
        if memory := asked.pop("memory", 0):
            options["memory"] = memory
        if asked:
            options["resources"] = asked
        options["scheduling_strategy"] = PlacementGroupSchedulingStrategy(
            self.placement_group, placement_group_bundle_index=index, placement_group_capture_child_tasks=False
        )
        return options

    async def release(self) -> None:
        """Remove the placement group and return when its resources are free for others. Idempotent.

        Ray kills actors that still live in it. A cancellation takes effect after the removal.
        """
        await to_the_end(self._claim.withdraw())


class RayCluster(Cluster):
    """The Ray cluster that this process is connected to."""

    async def nodes(self) -> list[Node]:
        return await in_thread(_ray_state.read_nodes)

    async def may_grow(self) -> bool | None:
        return False if _ray_start.started_here() else await in_thread(_ray_state.read_autoscaler)

    async def holders(self) -> list[Holder]:
        return await in_thread(_ray_state.read_holders)

    async def claim(self, request: Request, name: str) -> RayClaim:
        bundles = [_ray_bundle(bundle) for bundle in request.bundles]
        labels = [dict(bundle.labels) for bundle in request.bundles]

        def create() -> tuple[PlacementGroup, str]:
            unique = guard.hold(name)  # Ray refuses a name that is in use, and gangs may share one
            try:
                group: PlacementGroup = placement_group(
                    bundles,
                    strategy=request.strategy,
                    name=unique,
                    bundle_label_selector=labels if any(labels) else None,
                )
            except BaseException:
                guard.let_go(unique)
                raise
            return group, unique

        creation = in_thread(create)
        try:
            group, unique = await asyncio.shield(creation)
        except asyncio.CancelledError:
            await to_the_end(_undo(creation, name, len(bundles)))
            raise
        except RayError as error:
            raise RayUnavailable(f"gang {name!r}: Ray could not take its placement group: {error}") from error
        return RayClaim(group, unique, name, len(bundles))


async def _undo(creation: asyncio.Future[tuple[PlacementGroup, str]], name: str, size: int) -> None:
    await asyncio.wait([creation])
    if creation.exception() is None:
        await RayClaim(*creation.result(), name, size).withdraw()


class RayClaim(Claim):
    """A placement group."""

    def __init__(self, group: PlacementGroup, unique: str, name: str, size: int) -> None:
        self.group = group
        self._unique = unique
        self.name = name
        self.size = size
        self._connection = _ray_state.connection()
        self._withdrawn = False

    @property
    def connected(self) -> bool:
        """Whether this process still has the connection to Ray by which it was made, without which it is gone."""
        return self._connection is not None and _ray_state.connection() == self._connection

    async def granted(self) -> None:
        loop = asyncio.get_running_loop()
        done: asyncio.Future[None] = loop.create_future()

        def tell(error: BaseException | None) -> None:
            if done.done():
                return
            if error is None:
                done.set_result(None)
            else:
                done.set_exception(error)

        def on_ready(ready: concurrent.futures.Future[Any]) -> None:
            post(loop, tell, ready.exception())

        self.group.ready().future().add_done_callback(on_ready)
        try:
            await done
        except RayError as error:
            raise ReservationLost(self.name) from error

    async def state(self) -> ClaimState:
        table = await in_thread(self._table)
        if not table or table["state"] == "REMOVED":
            return "removed"
        if table["state"] in ("CREATED", "RESCHEDULING"):
            return "granted"
        return "refused" if table["stats"]["scheduling_state"] == "INFEASIBLE" else "waiting"

    async def bundle_nodes(self) -> list[str]:
        """Return the node id of each bundle, once it is granted."""
        nodes = (await in_thread(self._table))["bundles_to_node_id"]
        return [nodes[index] for index in range(self.size)]

    async def withdraw(self) -> None:
        # A process that left Ray has no placement groups any more: they go with the job that made them.
        if self._withdrawn or not self.connected:
            return
        with contextlib.suppress(TimeoutError):  # a node died, or is slow: removing works all the same
            async with asyncio.timeout(_SETTLED):
                await _poll(self._is_settled)
        await in_thread(lambda: remove_placement_group(self.group))
        await _poll(self._is_gone)
        if not self._withdrawn:
            self._withdrawn = True
            await in_thread(lambda: guard.let_go(self._unique))

    async def _is_settled(self) -> bool:
        """Whether it is known to hold nothing, or its nodes have reported what it holds (0.1 s after it came at most).

        What is removed before that takes Ray a second to count as free again (measured with 2.60).
        """
        table = await in_thread(self._table)
        if not table or table["state"] in ("CREATED", "RESCHEDULING"):
            nodes = set(table.get("bundles_to_node_id", {}).values()) - {""}
            return nodes <= await in_thread(self._places)
        return table["stats"]["scheduling_state"] not in ("QUEUED", "SCHEDULING_STARTED", "FINISHED")

    async def _is_gone(self) -> bool:
        return not self.connected or (await self.state() == "removed" and not await in_thread(self._places))

    def _places(self) -> set[str]:
        return _ray_state.read_places(self.group.id.hex())

    def _table(self) -> dict[str, Any]:
        table: dict[str, Any] = placement_group_table(self.group)
        return table


async def _poll(condition: Callable[[], Awaitable[bool]]) -> None:
    """Wait for what Ray has no event for."""
    pause = _POLL
    while not await condition():
        await asyncio.sleep(pause)
        pause = min(1.5 * pause, _LONGEST_POLL)


def _ray_bundle(bundle: Bundle) -> dict[str, float]:
    # Ray refuses a bundle of nothing. A byte of memory is free also where every CPU is taken.
    return bundle.resources.amounts() or {"memory": 1}


def _inside(amount: float, bundle: float) -> float:
    """Return what an actor asks for inside its bundle, so that the last one does not miss the units that Ray loses."""
    units, lost = count_units(amount), units_lost(count_units(bundle))
    return amount if units % UNITS == 0 or not lost else max(units - lost, 0) / UNITS
