"""The contracts of this room: placements, and clusters that grant what a placement asks for."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Literal, TypeAlias

if TYPE_CHECKING:
    from collections.abc import Sequence

    from scheduling.types import Demand, Holder, Node, Request

ClaimState: TypeAlias = Literal["waiting", "refused", "granted", "removed"]


class Placement(ABC):
    """A rule that turns the actors of a gang into one request for resources."""

    @abstractmethod
    def request(self, demands: Sequence[Demand]) -> Request:
        """Return bundles that hold every actor of every role exactly once, and how they are spread.

        Pure and deterministic. Roles are in the order in which the gang has them, ranks from 0.

        Raises:
            ValueError: the placement does not fit the roles, for example names one that the gang does not have.
        """


class Claim(ABC):
    """A request that was handed to a cluster: granted as a whole, or not yet.

    It stays in the cluster, waiting or granted, until `withdraw`.
    """

    @abstractmethod
    async def granted(self) -> None:
        """Return once all of its bundles are reserved. May be cancelled and awaited again.

        Raises:
            ReservationLost: somebody removed it.
        """

    @abstractmethod
    async def state(self) -> ClaimState:
        """Return what the cluster says of it; "refused" where no set of its present nodes could ever hold it."""

    @abstractmethod
    async def withdraw(self) -> None:
        """Give everything back, or stop waiting for it; return when what it held is free. Idempotent."""


class Cluster(ABC):
    """Nodes whose resources can be claimed."""

    @abstractmethod
    async def nodes(self) -> list[Node]:
        """Return the living nodes."""

    @abstractmethod
    async def may_grow(self) -> bool | None:
        """Return whether an autoscaler may add nodes; None while a young cluster has not said."""

    @abstractmethod
    async def claim(self, request: Request, name: str) -> Claim:
        """Ask for resources, without waiting for them. Cancelled or failed, it leaves nothing in the cluster."""

    @abstractmethod
    async def holders(self) -> list[Holder]:
        """Return who holds resources now, as far as the cluster knows: placement groups and actors."""
