"""The two ways into a cluster. Ray is imported at the first use, not with the package."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from scheduling.background import in_thread

if TYPE_CHECKING:
    from collections.abc import Sequence

    from scheduling._ray import Reservation
    from scheduling.abc import Placement
    from scheduling.types import Demand


async def ensure_ray(total_cpu: float) -> None:
    """Connect this process to Ray, where it is not yet.

    Join the Ray that RAY_ADDRESS names, else the one that was last started on this machine by `ray start`; nothing is
    changed there. Where there is none, start a one-machine Ray, which ends with this process; it has the CPUs of the
    machine, or `total_cpu` where that is more. SIGTERM then ends the process by SystemExit, unless the program handles
    it or this is not its main thread. Several calls at once, also from several loops, connect once.

    Warns:
        CpusOversubscribed: the Ray that it started has more CPUs than the machine.

    Raises:
        RayUnavailable: Ray could not be joined or started.
    """
    await (await _load("scheduling._ray_start")).ensure_ray(total_cpu)


async def reserve(demands: Sequence[Demand], placement: Placement, *, start_timeout: float, name: str) -> Reservation:
    """Reserve what a gang needs on the Ray that this process is connected to, all of it or nothing.

    Nothing stays reserved after an error or a cancellation. The loop is never blocked.

    :param start_timeout: seconds to wait while others hold the resources.
    :param name: the gang's name, for messages; also of several gangs at once.

    Raises:
        GangInfeasible: the cluster could never hold the gang, however idle; told within 5 seconds. Where an autoscaler
            may add nodes, this waits for them instead.
        GangTimeout: the resources were not free together within `start_timeout`.
        ReservationLost: somebody removed the placement group meanwhile.
        RayUnavailable: this process is not connected to Ray.
        ValueError: the placement does not fit the roles.
    """
    module = await _load("scheduling._ray")
    reservation: Reservation = await module.reserve(demands, placement, start_timeout=start_timeout, name=name)
    return reservation


async def _load(module: str) -> Any:
    # Importing Ray takes half a second, which the loop must not wait for.
    return await in_thread(lambda: importlib.import_module(module))
