"""What sides of Gangline have in common that are the members of one group, a process each."""

from __future__ import annotations

from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

from collective import GroupSpec
from collective.formation import form_group
from collective.links import open_endpoint
from collective.types import Credential, Member

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence

    from collective import Group
    from collective.abc import Endpoint
    from collective.types import Address

_CREDENTIAL = Credential("benchmark", b"benchmark benchmark benchmark benchmark")


class Membership:
    """One process's part in a group on "shm".

    :ivar group: the group, once it was formed.
    """

    group: Group

    def __init__(self, endpoint: Endpoint, rank: int) -> None:
        self.endpoint = endpoint
        self._rank = rank

    async def address(self) -> Address:
        """Return where the others reach this member."""
        return self.endpoint.address

    async def form(self, addresses: Sequence[Address]) -> None:
        """Form the group: all members do, with the addresses of all in the order of ranks."""
        members = [Member("member", rank, address) for rank, address in enumerate(addresses)]
        spec = GroupSpec("group", ("member",), backend="shm")
        self.group = await form_group(
            self.endpoint, spec, members, self._rank, key="benchmark", credential=_CREDENTIAL
        )


@asynccontextmanager
async def membership(rank: int) -> AsyncIterator[Membership]:
    """Open an endpoint; close it in the end, and the group before."""
    async with await open_endpoint(kinds=("shm",)) as endpoint:
        endpoint.grant(_CREDENTIAL)
        member = Membership(endpoint, rank)
        try:
            yield member
        finally:
            if hasattr(member, "group"):
                await member.group.aclose()
