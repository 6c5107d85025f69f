"""An actor with a store in a process of its own, without a gang. Tells its target on standard output."""

from __future__ import annotations

import asyncio
import os
import pickle
import sys
from typing import TYPE_CHECKING, Any
from uuid import uuid4

import numpy as np

from actors import Actor
from actors._dispatch import Dispatcher
from actors._interface import Interface
from actors._protocol import port
from actors._target import Target
from actors.actor import create
from collective.freight import name_endpoint
from collective.links import open_endpoint
from collective.store import TensorStore
from collective.types import Credential

if TYPE_CHECKING:
    from collections.abc import AsyncIterator


class Keeper(Actor):
    """Puts, reads, keeps and passes on."""

    def __init__(self) -> None:
        self.kept: Any = None
        self.read: Any = None

    async def make(self, count: int) -> Any:
        return await self.store.put(np.arange(count, dtype=np.float32))

    async def make_in_place(self, count: int) -> Any:
        array = self.store.empty(count, np.float32)
        array[:] = np.arange(count)
        return await self.store.put(array)

    async def put(self, tree: Any) -> Any:
        return await self.store.put(tree)

    async def statistics(self) -> Any:
        return self.store.statistics()

    async def keep(self, ref: Any) -> None:
        self.kept = ref

    async def fetch(self, part: slice | None = None) -> None:
        self.read = await (self.kept if part is None else self.kept[part])

    async def what_was_read(self) -> Any:
        return self.read

    async def forget_read(self) -> None:
        self.read = None

    async def total(self, ref: Any = None) -> float:
        array = await (self.kept if ref is None else ref)
        return float(array.sum())

    async def apply(self, function: Any) -> Any:
        return function(await self.kept)

    async def give(self) -> Any:
        return self.kept

    async def stream(self) -> AsyncIterator[Any]:
        for each in self.kept:
            yield each

    async def pass_on(self, other: Any) -> None:
        await other.keep(self.kept)

    async def forget(self) -> None:
        self.kept = None

    async def takes_long(self, ref: Any) -> None:
        await asyncio.get_running_loop().create_future()

    def plain(self, count: int) -> Any:
        from actors import from_thread

        return from_thread.run(self.store.put, np.arange(count, dtype=np.float32))


async def serve(name: str, host: str, limit: int) -> tuple[Target, Any]:
    """Start serving a Keeper; return its target, and what stops it."""
    endpoint = await open_endpoint(kinds=("shm", "tcp"), host=host)
    name_endpoint(endpoint, name)
    uid = uuid4().hex
    credential = Credential(f"call/{uid}", os.urandom(32))
    endpoint.grant(credential, (port(uid),))
    store = TensorStore(endpoint, owner=name, limit=limit)
    instance = create(Keeper, (), {}, role=name, rank=0, make_store=lambda: store)
    dispatcher = Dispatcher(instance, endpoint, role=name, rank=0, gang="team", uid=uid)
    dispatcher.start()
    target = Target(endpoint.address, "team", name, 0, uid, credential, Interface.of(Keeper))
    return target, (endpoint, dispatcher, store)


async def main(name: str, host: str, limit: str) -> None:
    target, (endpoint, dispatcher, store) = await serve(name, host, int(limit))
    sys.stdout.write(pickle.dumps(target).hex() + "\n")
    sys.stdout.flush()
    await asyncio.to_thread(sys.stdin.read)
    await dispatcher.aclose()
    await endpoint.aclose()
    store.close()


if __name__ == "__main__":
    import store_peer  # by this name, the class is the parent's

    asyncio.run(store_peer.main(*sys.argv[1:]))
