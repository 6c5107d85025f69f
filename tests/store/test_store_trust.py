"""What a ref gives away: the key of one entry. Its holder is trusted with no more, and nothing of his is unpickled."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import pickle
import time
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from store_harness import run, soon

from actors import Actor, Gang, Role
from collective import GroupSpec, RefLost, TensorRef, TensorStore
from collective._store import wire
from collective._store.holding import holder_of
from collective._store.sources import UNTOLD
from collective.errors import HandshakeError, LinkError, PortRefused
from collective.links import open_endpoint
from scheduling import Resources

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from collective.abc import Channel, Endpoint, Link

NOWHERE = bytes(wire.KEY)


class Forged:
    """Unpickled, it writes a file."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)

    def __reduce__(self) -> tuple[object, ...]:
        return open, (self.path, "w")


@contextlib.asynccontextmanager
async def owner_and_holder(kind: str = "tcp") -> AsyncIterator[tuple[TensorStore, Endpoint]]:
    async with await open_endpoint(kinds=(kind,)) as owner, await open_endpoint(kinds=(kind,)) as holder:
        store = TensorStore(owner, owner="the owner", limit=1 << 20)
        yield store, holder
        store.close()


async def channel_to(ref: TensorRef, holder: Endpoint) -> Channel:
    """Return what a holder of the ref can open, by what is in the ref."""
    where = ref._where
    link = await holder.connect(where.address, where.credential)
    return link.open(where.port, b"mallory")


def held_at(ref: TensorRef, holder: Endpoint, entry: bytes) -> TensorRef:
    """Return a ref of an entry, made by the holder of another one of the same store."""
    return TensorRef(ref._where, entry, ref._summary, hold=holder_of(holder).source(ref._where).hold(entry, UNTOLD))


def fetch(entry: bytes, keys: bytes, *, said: int | None = None) -> bytes:
    """Return a FETCH with these keys, `said` to be so long."""
    wanted = wire.WANTED.pack(1, 1, len(keys) if said is None else said)
    return wire.ENTRY.pack(wire.FETCH, entry) + wanted + keys


def test_the_key_of_an_entry_opens_no_other():
    async def main() -> None:
        async with owner_and_holder() as (store, holder):
            secret, own = await store.put(np.arange(3)), await store.put(np.zeros(3, int))
            mine = held_at(own, holder, own._entry)
            np.testing.assert_array_equal(await mine, [0, 0, 0])
            near = int.from_bytes(own._entry, "little") ^ 1
            for guess in (NOWHERE, (1).to_bytes(wire.KEY, "little"), near.to_bytes(wire.KEY, "little")):
                with pytest.raises(RefLost):
                    await held_at(own, holder, guess)
            entries = {entry.number: entry for entry in store.statistics().entries}
            assert entries[1].holders == (str(store._books.own),)
            assert len(entries[2].holders) == 2
            # A lease that was pickled, with another entry's number for the key.
            rebuild, state = own.lease(60).__reduce__()
            with pytest.raises(RefLost):
                await rebuild(state[0], (1).to_bytes(wire.KEY, "little"), *state[2:])
            np.testing.assert_array_equal(await secret, [0, 1, 2])

    run(main())


def test_keys_are_nowhere_to_be_read():
    async def main() -> None:
        async with owner_and_holder() as (store, _):
            ref = await store.put(np.zeros(3))
            shown = repr((ref, ref._where, store.statistics(), store, RefLost(repr(ref), ref.owner, "gone")))
            for secret in (ref._entry, ref._where.credential.key):
                assert repr(secret)[2:-1] not in shown
                assert secret.hex() not in shown

    run(main())


@pytest.mark.parametrize("number", [0, 1, 2, 17])
def test_a_holder_cannot_end_what_others_have_on_the_way(number):
    """By telling the owner that it has arrived: the number of such a ref is known to its sender and receiver alone."""

    async def main() -> None:
        async with owner_and_holder() as (store, holder):
            ref = await store.put(np.arange(3))
            channel = await channel_to(ref, holder)
            books = store._books
            pin, _ = books.holder.pin(ref._hold, lambda _: None)
            for kind in (wire.HOLD, wire.ARRIVED):
                for entry in (ref._entry, NOWHERE):
                    channel.post(wire.ENTRY.pack(kind, entry) + wire.TOKEN.pack(books.holder.id, number))
            channel.post(fetch(ref._entry, b""))
            await channel.receive()
            assert pin.live

    run(main())


@pytest.mark.parametrize(
    "keys",
    [
        (),
        ((),),
        ((3, -4, ...), (slice(None),), (slice(1, None, -2), slice(None, 5), ...)),
        ((slice(-(1 << 62), 1 << 62, 7),),),
        ((np.int64(2), slice(np.int8(1), None)),),
    ],
)
def test_keys_come_out_as_they_went_in(keys):
    assert wire.unpack_keys(memoryview(wire.pack_keys(keys))) == keys


def test_a_slice_goes_as_far_as_numbers_do():
    packed = wire.pack_keys(((slice(-(1 << 80), 1 << 80),),))
    ((found,),) = wire.unpack_keys(memoryview(packed))
    np.testing.assert_array_equal(np.arange(9)[found], np.arange(9))


def malformed(ref: TensorRef, forged: bytes) -> dict[str, bytes]:
    """Return what no holder says."""
    entry = ref._entry
    three = wire._NUMBER.pack(3)
    lease = wire.ENTRY.pack(wire.LEASE, entry)
    return {
        "a pickle": forged,
        "an unknown kind": wire.ENTRY.pack(99, entry) + forged,
        "half a head": b"\1\2",
        "half a token": wire.ENTRY.pack(wire.HOLD, entry) + b"\0" * 7,
        "half a request": wire.ENTRY.pack(wire.FETCH, entry) + b"\0" * 3,
        "a pickle for keys": fetch(entry, forged),
        "keys that end early": fetch(entry, b"", said=1 << 20),
        "a key without its end": fetch(entry, b"\1" + three),
        "no part of a key": fetch(entry, b"\x23\0"),
        "half a number": fetch(entry, b"\1\0\0"),
        "an index out of range": fetch(entry, b"\1" + three + b"\0"),
        "a step of zero": fetch(entry, b"\x13" + bytes(8) + b"\0"),
        "two ellipses": fetch(entry, b"\2\2\0"),
        "a lease for no time": lease + wire.SECONDS.pack(0),
        "a lease for ever": lease + wire.SECONDS.pack(math.inf),
        "a lease for not a number": lease + wire.SECONDS.pack(math.nan),
    }


@pytest.mark.parametrize("kind", ["memory", "tcp"])
def test_a_holder_that_talks_nonsense_is_given_up_and_nobody_else(kind, tmp_path, caplog):
    async def main() -> None:
        async with owner_and_holder(kind) as (store, holder):
            ref = await store.put(np.arange(3))
            forged = pickle.dumps(Forged(tmp_path / "ran"))
            for what, message in malformed(ref, forged).items():
                channel = await channel_to(ref, holder)
                channel.post(wire.ENTRY.pack(wire.HOLD, ref._entry) + UNTOLD + message)
                with pytest.raises(LinkError):
                    await channel.receive()
                assert len(store.statistics().entries[0].holders) == 1, what
                assert "gives up on mallory" in caplog.text, what
                caplog.clear()
            assert not list(tmp_path.iterdir())
            np.testing.assert_array_equal(await held_at(ref, holder, ref._entry), [0, 1, 2])

    with caplog.at_level(logging.WARNING, "collective"):
        run(main())


class Owner(Actor):
    async def setup(self) -> None:
        self.held = await self.store.put(np.arange(4))

    async def lend(self) -> TensorRef:
        return self.held.lease(60)

    async def served(self) -> list[str]:
        """Return every port that is served here."""
        endpoint: Any = self.store._endpoint
        return list(endpoint._ports._served)


async def opened(link: Link, port: str, forged: bytes) -> bool:
    """Open a port and send pickles, with the opening and after it; return whether it could be opened."""
    channel = link.open(port, forged)
    channel.post(forged)
    channel.post(b"", [forged])
    try:
        await channel.receive()
    except PortRefused:
        return False
    except LinkError:
        return True
    pytest.fail(f"{port} answered")


def test_every_port_refuses_whom_it_does_not_trust(tmp_path):
    """A ref's holder gets to its store alone and a handle's to its calls; elsewhere nothing that they send is read."""

    async def main() -> None:
        forged = pickle.dumps(Forged(tmp_path / "ran"))
        role = Role("owner", Owner, 2, resources=Resources(cpu=0.1))
        groups = [GroupSpec("g", ("owner",), backend="memory")]
        async with (
            Gang(role, groups=groups, runtime="inproc") as gang,
            await open_endpoint(kinds=("memory",)) as stranger,
        ):
            owner = gang["owner"][0]
            where, target = (await owner.lend())._where, owner._target
            ports = await owner.served()
            assert {"store", "calls"} < {port.partition("/")[0] for port in ports}  # and what groups serve
            link = await stranger.connect(where.address, where.credential)
            assert [port for port in [*ports, "gang"] if await opened(link, port, forged)] == [where.port]
            link = await stranger.connect(where.address, target.credential)
            others = [port for port in [*ports, "gang"] if port != target.port]
            assert [port for port in others if await opened(link, port, forged)] == []
            home: Any = gang._crew
            for credential in (where.credential, target.credential):
                for address in (gang["owner"][1]._target.address, home.seats[0].launch.home):
                    with pytest.raises(HandshakeError):
                        await stranger.connect(address, credential)
            assert (await owner.lend()) is not None
        assert not list(tmp_path.iterdir())

    run(main())


def test_leases_leave_no_more_than_their_entry_needs():
    """One that is extended again and again has one timer, and none is left when the entry is gone."""

    def timers() -> int:
        scheduled: list[asyncio.TimerHandle] = asyncio.get_running_loop()._scheduled  # type: ignore[attr-defined]
        return sum(not timer.cancelled() for timer in scheduled)

    async def main() -> None:
        async with owner_and_holder() as (store, _):
            before = timers()
            ref, begun = await store.put(np.arange(3)), time.monotonic()
            leases = [ref.lease(seconds) for seconds in (0.2, 0.01, *[0.1] * 100)]
            assert timers() == before + 1
            del ref, leases

            async def is_gone() -> bool:
                return not store.statistics().entries

            await soon(is_gone)
            assert time.monotonic() - begun >= 0.2
            kept = (await store.put(np.arange(3))).lease(30)
            assert timers() == before + 1
            store.close()
            assert timers() == before
            del kept

    run(main())
