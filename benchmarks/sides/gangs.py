"""What sides of Gangline have in common that start a gang in a Ray that runs, and ask its actors."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import ray
import uvloop

from benchmarks.cluster import join

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Mapping

    from actors import Gang
    from benchmarks.side import Turns


def serve_gang(turns: Turns, make: Callable[..., Gang], handlers: Mapping[str, Callable[..., Awaitable[Any]]]) -> None:
    """Serve a side of a gang: `make(*arguments)` of the request `setup(address, *arguments)`.

    :param handlers: what answers the other requests, as `handler(gang, *arguments)`.
    """
    uvloop.run(_serve(turns, make, handlers))


async def _serve(
    turns: Turns, make: Callable[..., Gang], handlers: Mapping[str, Callable[..., Awaitable[Any]]]
) -> None:
    gang: Gang | None = None

    async def setup(address: str, *arguments: Any) -> None:
        nonlocal gang
        join(address)
        gang = await make(*arguments).__aenter__()

    async def handle(handler: Callable[..., Awaitable[Any]], *arguments: Any) -> Any:
        return await handler(gang, *arguments)

    served: dict[str, Callable[..., Awaitable[Any]]] = {"setup": setup}
    await turns.serve_async(served | {name: partial(handle, handler) for name, handler in handlers.items()})
    if gang is not None:
        await gang.aclose()
    ray.shutdown()
