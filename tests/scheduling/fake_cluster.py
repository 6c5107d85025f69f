"""A cluster without Ray, whose every answer the test decides."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from scheduling import Claim, Cluster, Holder, Node, Request, ReservationLost

if TYPE_CHECKING:
    from scheduling.abc import ClaimState


class FakeClaim(Claim):
    def __init__(self, cluster: FakeCluster) -> None:
        self.cluster = cluster

    async def granted(self) -> None:
        while self.cluster.verdict not in ("granted", "removed"):
            self.cluster.changed.clear()
            await self.cluster.changed.wait()
        if self.cluster.verdict == "removed":
            raise ReservationLost("fake")

    async def state(self) -> ClaimState:
        return self.cluster.verdict

    async def withdraw(self) -> None:
        await asyncio.sleep(0)  # as where another process is asked
        self.cluster.claims.remove(self)


class FakeCluster(Cluster):
    """:ivar claims: those that are neither withdrawn nor failed."""

    def __init__(self, nodes: list[Node], *, verdict: ClaimState = "waiting", grows: bool | None = False) -> None:
        self.present = nodes
        self.verdict = verdict
        self.grows = grows
        self.holding: list[Holder] = []
        self.claims: list[FakeClaim] = []
        self.claimed = 0
        self.asked = asyncio.Event()
        self.changed = asyncio.Event()

    def say(self, verdict: ClaimState) -> None:
        self.verdict = verdict
        self.changed.set()

    async def nodes(self) -> list[Node]:
        return self.present

    async def may_grow(self) -> bool | None:
        return self.grows

    async def claim(self, request: Request, name: str) -> FakeClaim:
        claim = FakeClaim(self)
        self.claims.append(claim)
        self.claimed += 1
        self.asked.set()
        return claim

    async def holders(self) -> list[Holder]:
        return self.holding
