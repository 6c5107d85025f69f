"""The endpoint that each event loop has for dialing, made when it is first asked for and closed when the loop ends."""

from __future__ import annotations

import asyncio
import contextlib
import os
import threading
from typing import TYPE_CHECKING

from collective._links.endpoint import LinkEndpoint
from collective._links.hosts import default_host

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator

_endpoints: dict[asyncio.AbstractEventLoop, tuple[LinkEndpoint, AsyncGenerator[None, None]]] = {}
_lock = threading.Lock()
_left_behind: list[object] = []


def loop_endpoint() -> LinkEndpoint:
    """Return the running loop's endpoint for dialing; see `collective.links.loop_endpoint`."""
    loop = asyncio.get_running_loop()
    entry = _endpoints.get(loop)
    if entry is None or entry[0].closed:
        _abort_ended()
        endpoint = LinkEndpoint(kinds=(), host=default_host(), directory=None, interface="")
        keeper = _keep(loop, endpoint)
        # The first step of an asynchronous generator makes the loop close it in `shutdown_asyncgens`, which
        # `asyncio.run` awaits as the last thing before it closes the loop. No other hook does the same on every loop.
        with contextlib.suppress(StopIteration):  # How a first step that does not wait ends.
            keeper.__anext__().send(None)
        with _lock:
            entry = _endpoints[loop] = (endpoint, keeper)
    return entry[0]


def _abort_ended() -> None:
    """Close the endpoints of loops that were closed without `shutdown_asyncgens`."""
    with _lock:
        ended = [_endpoints.pop(loop) for loop in list(_endpoints) if loop.is_closed()]
    for endpoint, _ in ended:
        endpoint.abort()


async def _keep(loop: asyncio.AbstractEventLoop, endpoint: LinkEndpoint) -> AsyncGenerator[None, None]:
    try:
        yield
    finally:
        with _lock:
            _endpoints.pop(loop, None)
        await endpoint.aclose()


def _in_child() -> None:
    # Kept, not dropped: finalizing a generator would call into the parent's loop, through descriptors that both share.
    global _lock
    _lock = threading.Lock()  # Another thread of the parent may have held it.
    _left_behind.extend(_endpoints.items())
    _endpoints.clear()


os.register_at_fork(after_in_child=_in_child)
