"""Which process goes where: resources, placement templates, feasibility, reservations.

    demands = [Demand("reader", 4, Resources(cpu=0.25)), Demand("trainer", 2)]
    reservation = await reserve(demands, colocate("reader", "trainer"), start_timeout=60, name="feed")
    ...
    await reservation.release()

A gang's demands and its placement become one placement group, reserved as a whole or not at all. Ray is imported at the
first `reserve` or `ensure_ray`, not with the package.
"""

from __future__ import annotations

from scheduling.abc import Claim, Cluster, Placement
from scheduling.errors import (
    CpusOversubscribed,
    GangInfeasible,
    GangTimeout,
    RayUnavailable,
    ReservationLost,
    SchedulingError,
)
from scheduling.feasibility import find_shortages
from scheduling.reserving import ensure_ray, reserve
from scheduling.templates import (
    Template,
    colocate,
    on_labels,
    pack,
    spread,
    strict_pack,
    strict_spread,
)
from scheduling.types import Bundle, Demand, Holder, Node, Request, Resources, Shortage

__all__ = [
    "Bundle",
    "Claim",
    "Cluster",
    "CpusOversubscribed",
    "Demand",
    "GangInfeasible",
    "GangTimeout",
    "Holder",
    "Node",
    "Placement",
    "RayUnavailable",
    "Request",
    "ReservationLost",
    "Resources",
    "SchedulingError",
    "Shortage",
    "Template",
    "colocate",
    "ensure_ray",
    "find_shortages",
    "on_labels",
    "pack",
    "reserve",
    "spread",
    "strict_pack",
    "strict_spread",
]
