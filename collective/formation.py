"""Forming a group: all of its members do it at the same time."""

from __future__ import annotations

from typing import TYPE_CHECKING

from collective._backends import IN_PROCESS, plane_between, planes_of, settle
from collective._core.engine import Engine
from collective.group import Group

if TYPE_CHECKING:
    from collections.abc import Sequence

    from collective.abc import Endpoint
    from collective.types import Credential, GroupSpec, Member


async def form_group(
    endpoint: Endpoint, spec: GroupSpec, members: Sequence[Member], rank: int, *, key: str, credential: Credential
) -> Group:
    """Form a group; every member calls it concurrently, with the same `members` in the same order.

    Waits for the others without a bound of its own: a gang's `start_timeout` cancels it. A call that raises or is
    cancelled leaves nothing behind.

    :param key: names this group and nothing else among all that the members' endpoints ever form.
    :param credential: what the members' endpoints have granted one another.

    Raises:
        ValueError: the backend is unknown, or cannot connect these members. BackendError: it cannot be used here.
        PeerLost: a member cannot be reached, or died. OutOfResources: there are no descriptors for it.
    """
    engine = Engine(
        endpoint,
        members,
        rank,
        name=spec.name,
        key=key,
        credential=credential,
        backend=choose_backend(spec.backend, members),
        timeout=spec.timeout,
        recv_timeout=spec.recv_timeout,
    )
    await engine.open(patient=True)
    return Group(engine)


def choose_backend(backend: str, members: Sequence[Member]) -> str:
    """Return the data plane that "auto" stands for among these members; any other name stands for itself.

    Raises:
        ValueError: it cannot connect these members.
    """
    addresses = [member.address for member in members]
    in_one_process = all((address.shm, address.unix, address.tcp) == (None, None, None) for address in addresses)
    if backend in IN_PROCESS and not in_one_process:
        raise ValueError(
            f'backend "{backend}" connects members inside one process, as under runtime="inproc", and these are in '
            'several; declare GroupSpec(..., backend="auto")'
        )
    if backend != "auto":
        return backend
    if in_one_process:
        return "memory"
    return plane_between([address.host for address in addresses])


def backends_between(backend: str, members: Sequence[Member]) -> tuple[str, ...]:
    """Return the names of what moves the data of a group of these members, as its `Group.backends` on rank 0."""
    hosts = [member.address.host for member in members]
    return planes_of(settle(choose_backend(backend, members), hosts), hosts)
