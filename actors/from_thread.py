"""The way from a plain method, which runs in a worker thread, back to its actor's event loop."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

from actors._threads import current_job
from actors.errors import NotReady

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

P = ParamSpec("P")
R = TypeVar("R")


def run(function: Callable[P, Awaitable[R]], /, *args: P.args, **kwargs: P.kwargs) -> R:
    """Run an async function on the actor's loop, wait for it, and return its result or raise its error.

    Works inside a plain method of an actor. Where the call of that method is cancelled, the function is cancelled too,
    and this raises asyncio.CancelledError; so does every later use in that call.

    Raises:
        NotReady: used outside a plain method, or on the loop itself.
    """
    job = current_job.get()
    try:
        on_loop: Any = asyncio.get_running_loop()
    except RuntimeError:
        on_loop = None
    name = getattr(function, "__qualname__", repr(function))
    if job is None:
        raise NotReady(
            f"from_thread.run({name}): this code does not run in a plain method of an actor; "
            "in an async one await it, in a thread of your own take the context along (contextvars.copy_context().run)"
        )
    if on_loop is job.loop:
        raise NotReady(f"from_thread.run({name}): this code runs on the actor's loop already; await it")
    result: R = job.run_on_loop(function, args, kwargs)
    return result
