"""The endpoint that each event loop has for dialing, made when it is first asked for and closed with the loop."""

from __future__ import annotations

import asyncio
import contextlib
import os
from functools import partial
from typing import TYPE_CHECKING, Final

from collective._links.endpoint import LinkEndpoint
from collective._links.hosts import default_host
from collective._links.timers import call_later_or_at_close

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator

_endpoints: dict[asyncio.AbstractEventLoop, tuple[LinkEndpoint, AsyncGenerator[None, None]]] = {}
_left_behind: list[object] = []
_NEVER: Final = 1e9
"""Seconds."""


def loop_endpoint() -> LinkEndpoint:
    """Return the running loop's endpoint for dialing; see `collective.links.loop_endpoint`."""
    loop = asyncio.get_running_loop()
    entry = _endpoints.get(loop)
    if entry is None or entry[0].closed:
        endpoint = LinkEndpoint(kinds=(), host=default_host(), directory=None, interface="")
        call_later_or_at_close(loop, _NEVER, partial(_abort, loop, endpoint))
        keeper = _keep(loop, endpoint)
        # The first step of an asynchronous generator makes the loop close it in `shutdown_asyncgens`, which
        # `asyncio.run` awaits as the last thing before it closes the loop: then it can still wait, and close in order.
        with contextlib.suppress(StopIteration):  # How a first step that does not wait ends.
            keeper.__anext__().send(None)
        entry = _endpoints[loop] = (endpoint, keeper)
    return entry[0]


def _abort(loop: asyncio.AbstractEventLoop, endpoint: LinkEndpoint) -> None:
    """The loop is being closed: close its endpoint at once, if that is still open."""
    if not endpoint.closed:
        _endpoints.pop(loop, None)
        endpoint.abort()


async def _keep(loop: asyncio.AbstractEventLoop, endpoint: LinkEndpoint) -> AsyncGenerator[None, None]:
    try:
        yield
    finally:
        _endpoints.pop(loop, None)
        await endpoint.aclose()


def _in_child() -> None:
    # Kept, not dropped: finalizing a generator would call into the parent's loop, through descriptors that both share.
    _left_behind.extend(_endpoints.items())
    _endpoints.clear()


os.register_at_fork(after_in_child=_in_child)
