"""Out of threads, memory or descriptors, or merely slow: what a group does then.

The kind: a shortage costs time where the loop can do it instead, else it is an error that names it; never a hang.
"""

from __future__ import annotations

import asyncio
import os
import threading
from typing import TYPE_CHECKING

import numpy as np
import pytest

from collective import BackendError, GroupSpec, Member
from collective._backends import _gloo_session, _shm_driver
from collective._core import offload as offloading
from collective._core.offload import in_thread, offload
from collective._links import rights
from collective.errors import OutOfResources
from collective.formation import form_group
from collective.links import open_endpoint
from collective.testing import world
from collective.types import Credential

if TYPE_CHECKING:
    import socket
    from collections.abc import Iterator

    from collective import Group
    from collective.abc import Endpoint


@pytest.fixture
def no_threads() -> Iterator[pytest.MonkeyPatch]:
    """Let no thread start, until `undo`."""

    def refuse(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(offloading, "_pool", offloading._Pool())
        patch.setattr(threading.Thread, "start", refuse)
        yield patch


def test_what_belongs_on_a_thread_is_done_by_the_loop_where_there_is_none(no_threads: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        assert await offload(threading.get_ident) == threading.get_ident()
        with pytest.raises(ZeroDivisionError):
            await offload(lambda: 1 // 0)
        with pytest.raises(OutOfResources, match=r"no threads left to run this.*ulimit -u"):
            await in_thread(threading.get_ident, name="this")
        no_threads.undo()
        assert await offload(threading.get_ident) != threading.get_ident()

    asyncio.run(main())


def test_a_cancelled_offload_is_not_begun() -> None:
    async def main() -> None:
        gate, begun = threading.Event(), []
        busy = [offload(gate.wait) for _ in range(offloading._THREADS)]
        late = offload(lambda: begun.append(1))
        late.cancel()
        gate.set()
        await asyncio.gather(*busy)
        await offload(lambda: None)
        assert not begun

    asyncio.run(main())


def test_large_collectives_go_on_without_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_: str) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(_shm_driver, "Worker", refuse)

    async def main() -> None:
        async with asyncio.timeout(30), world("shm", 2) as members:
            for nbytes in (8, 9 << 20, 8):
                tensors = [np.full(nbytes // 8, float(rank)) for rank in range(2)]
                pairs = zip(members.groups, tensors, strict=True)
                sums = await asyncio.gather(*(group.allreduce(tensor) for group, tensor in pairs))
                assert all((each == 1.0).all() for each in sums)

    asyncio.run(main())


def test_a_gloo_group_without_threads_is_an_error_that_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_: str) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(_gloo_session, "Worker", refuse)

    async def main() -> None:
        with pytest.raises(ExceptionGroup) as failed:
            async with asyncio.timeout(30), world("gloo", 2):
                raise AssertionError("it was formed")
        assert failed.group_contains(BackendError, match="no threads left")

    asyncio.run(main())


def test_a_member_that_cannot_take_the_groups_descriptors_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where SCM_RIGHTS are truncated, since the process is at its limit."""
    genuine = rights.receive

    def truncated(sock: socket.socket, count: int, most: int) -> tuple[bytes, list[int]]:
        data, descriptors = genuine(sock, count, most)
        for descriptor in descriptors:
            os.close(descriptor)
        return data, []

    monkeypatch.setattr(rights, "receive", truncated)

    async def main() -> None:
        with pytest.raises(ExceptionGroup) as failed:
            async with asyncio.timeout(30), world("shm", 2, link="unix"):
                raise AssertionError("it was formed")
        assert failed.group_contains(BackendError, match=r"rank 1 .* no file descriptors left")

    asyncio.run(main())


def test_a_groups_timeout_does_not_bound_how_long_it_takes_to_form() -> None:
    """The kind: a start that is merely slow is no failure; only the gang's start_timeout ends it."""
    credential = Credential("gang", bytes(32))
    spec = GroupSpec("slow", roles=("member",), timeout=0.05)

    async def main() -> None:
        async with asyncio.timeout(30), await open_endpoint(kinds=("memory",)) as one, await open_endpoint(
            kinds=("memory",)
        ) as other:
            members = [Member("member", rank, each.address) for rank, each in enumerate((one, other))]

            one.grant(credential)
            other.grant(credential)

            def form(endpoint: Endpoint, rank: int) -> asyncio.Task[Group]:
                return asyncio.create_task(
                    form_group(endpoint, spec, members, rank, key="slow", credential=credential)
                )

            first = form(one, 0)
            late, _ = await asyncio.wait([first], timeout=4 * spec.timeout)
            assert not late
            for group in await asyncio.gather(first, form(other, 1)):
                await group.aclose()

    asyncio.run(main())
