"""How a gang gets its resources, on any cluster: claim, wait, and give up for a reason."""

from __future__ import annotations

import asyncio
from collections import Counter
from typing import TYPE_CHECKING

from scheduling.background import to_the_end
from scheduling.errors import GangInfeasible, GangTimeout, ReservationLost
from scheduling.feasibility import find_shortages
from scheduling.types import FrozenMap, Shortage

if TYPE_CHECKING:
    from collections.abc import Sequence

    from scheduling.abc import Claim, Cluster, Placement
    from scheduling.types import Demand, Holder, Request

GRACE = 3.0
"""Seconds that a young cluster is given to say whether it has an autoscaler; infeasible is told within 5."""
_FIRST_LOOK = 0.05
_LONGEST_LOOK = 2.0
"""Seconds between looks at a claim that is not granted; granting itself is an event."""


async def claim_all(
    cluster: Cluster, demands: Sequence[Demand], placement: Placement, *, start_timeout: float, name: str
) -> tuple[Request, Claim]:
    """Claim resources for every actor of a gang and wait until they are granted.

    The contract is that of `scheduling.reserve`.
    """
    if not start_timeout > 0:
        raise ValueError(f"gang {name!r}: start_timeout is {start_timeout!r}; it must be positive, in seconds")
    request = placement.request(demands)
    _check_complete(demands, request)
    waiting = _Waiting(cluster, demands, request, start_timeout, name)
    await waiting.look_ahead()
    claim = await cluster.claim(request, name)
    try:
        await waiting.wait(claim)
    except BaseException:
        await to_the_end(claim.withdraw())
        raise
    return request, claim


class _Waiting:
    """One gang's wait for its resources."""

    def __init__(
        self, cluster: Cluster, demands: Sequence[Demand], request: Request, start_timeout: float, name: str
    ) -> None:
        self.cluster = cluster
        self.demands = demands
        self.request = request
        self.timeout = start_timeout
        self.name = name
        self.started = asyncio.get_running_loop().time()
        self.shortages: tuple[Shortage, ...] = ()
        self.may_grow: bool | None = None
        self.refused_before = False

    async def look_ahead(self) -> None:
        """Raise where the answer is known before anything is claimed: the usual infeasible gang leaves no trace."""
        self.shortages = find_shortages(self.demands, self.request, await self.cluster.nodes())
        await self._give_up_if_hopeless()

    async def wait(self, claim: Claim) -> None:
        """Return once the claim is granted."""
        granted = asyncio.ensure_future(claim.granted())
        try:
            async with asyncio.timeout_at(self.started + self.timeout) as scope:
                await self._watch(claim, granted)
        except TimeoutError:
            if not scope.expired():
                raise
            if self.shortages and not self.may_grow:
                raise await self._infeasible() from None
            raise await self._timed_out() from None
        finally:
            granted.cancel()
            await asyncio.gather(granted, return_exceptions=True)

    async def _watch(self, claim: Claim, granted: asyncio.Future[None]) -> None:
        pause = _FIRST_LOOK
        while not (await asyncio.wait([granted], timeout=pause))[0]:
            pause = min(2 * pause, _LONGEST_LOOK)
            state = await claim.state()
            if state == "removed":
                raise ReservationLost(self.name)
            self.shortages = await self._look(refused=state == "refused")
            await self._give_up_if_hopeless()
        granted.result()

    async def _look(self, *, refused: bool) -> tuple[Shortage, ...]:
        shortages = find_shortages(self.demands, self.request, await self.cluster.nodes())
        # The cluster's own verdict counts when it is still the same at the next look: nodes come and go.
        if refused and self.refused_before and not shortages:
            reason = "the cluster finds no set of nodes that could hold the gang"
            shortages = tuple(Shortage(d.role, d.count, d.resources, FrozenMap(), reason) for d in self.demands)
        self.refused_before = refused
        return shortages

    async def _give_up_if_hopeless(self) -> None:
        if not self.shortages:
            return
        self.may_grow = await self.cluster.may_grow()
        young = asyncio.get_running_loop().time() - self.started < GRACE
        if self.may_grow is False or (self.may_grow is None and not young):
            raise await self._infeasible()

    async def _infeasible(self) -> GangInfeasible:
        return GangInfeasible(self.name, self.shortages, await self.cluster.nodes())

    async def _timed_out(self) -> GangTimeout:
        nodes, holders = await self.cluster.nodes(), await self.cluster.holders()
        return GangTimeout(
            self.name, self.timeout, self.demands, _relevant(holders, self.request), nodes, self.shortages
        )


def _relevant(holders: Sequence[Holder], request: Request) -> list[Holder]:
    asked = {name for bundle in request.bundles for name in bundle.resources.amounts()}
    return [holder for holder in holders if not asked.isdisjoint(holder.amounts)]


def _check_complete(demands: Sequence[Demand], request: Request) -> None:
    """Placements may be the user's own."""
    placed = Counter(member for bundle in request.bundles for member in bundle.members)
    wanted = {(demand.role, rank) for demand in demands for rank in range(demand.count)}
    wrong = sorted((wanted ^ placed.keys()) | {member for member, times in placed.items() if times > 1})
    if wrong:
        role, rank = wrong[0]
        raise ValueError(f"the placement must place each actor once; it does not for {role}[{rank}]")

