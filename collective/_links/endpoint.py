"""An endpoint: its listeners, its links, and the dials and handshakes that lead to them.

Between two endpoints there is one link for each credential. Where both dial at the same time, the dial of the endpoint
with the smaller id stands: its acceptor answers at once, while the other acceptor holds its answer back until its own
dial is decided, and then points to the link that came of it. So whoever is told that a link exists has it already.
"""

from __future__ import annotations

import asyncio
import logging
import os
import random
import resource
from typing import TYPE_CHECKING, Any, TypeAlias
from uuid import uuid4

from collective._links import handshake
from collective._links.handshake import ACCEPTED, EXISTS, NO_LINK, Hello, Verdict
from collective._links.kinds import KINDS, make_kind
from collective._links.mux import Mux
from collective._links.ports import Ports
from collective.abc import Channel, Endpoint, Link
from collective.errors import LinkBroken, LinkClosed, LinkError, OutOfResources, WrongLoop
from collective.types import Address, Credential

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from collective._links.carrier import Carrier, Kind

_MOST_HANDSHAKES = 2048
"""Dialers that may be busy proving themselves: a gang of a thousand may dial one of its own at once. Beyond that, or a
fourth of the descriptors that this process may have, the oldest goes; an honest one comes again."""
_LAST_SECONDS = 1.0
"""What a dialer gets that is only to be told that there are no descriptors left."""
_ATTEMPTS = 6
_PAUSE = 0.05
"""Seconds before the second attempt, at most; twice that before the third, and so on."""
_NOTICE = 5.0
"""Seconds after which it is said in the log who does not answer a dial. That alone is no reason to give it up."""

_logger = logging.getLogger("collective")

_Key: TypeAlias = tuple[str, Credential]
"""Endpoint and credential: what there is one link for."""


class LinkEndpoint(Endpoint):
    """An endpoint over any kinds."""

    def __init__(self, *, kinds: Sequence[str], host: str, directory: str | None, interface: str) -> None:
        self._loop = asyncio.get_running_loop()
        self._address = Address(uuid4().hex)
        self._ports = Ports()
        self._links: dict[_Key, Mux] = {}
        self._all: set[Mux] = set()
        self._dials: dict[_Key, _Dial] = {}
        self._handshakes: dict[asyncio.Task[bool], Carrier] = {}
        self._closed = False
        unknown = set(kinds).difference(KINDS)
        if unknown:
            raise ValueError(f"{sorted(unknown)} are no kinds of link; there are {KINDS}")
        # Everybody can dial sockets; memory links are for who listens for them too, or does not listen at all.
        dials = [name for name in KINDS if name in kinds or name != "memory" or not kinds]
        self._kinds: dict[str, Kind] = {
            name: make_kind(name, host=host, directory=directory, interface=interface) for name in dials
        }
        try:
            for name in KINDS:
                if name in kinds:
                    self._address = self._kinds[name].listen(self._accept, self._address)
        except BaseException as error:
            self.abort()
            exhausted = OutOfResources.of(error, f"this process ({os.getpid()})", "listen for links")
            if exhausted is not None:
                raise exhausted from error
            raise

    # Endpoint.

    @property
    def address(self) -> Address:
        return self._address

    def grant(self, credential: Credential, ports: Sequence[str] = ("",)) -> None:
        if isinstance(ports, str):
            raise TypeError(f"ports is a sequence of prefixes, not one string {ports!r}")
        self._ports.grant(credential, tuple(ports))

    def revoke(self, credential: Credential) -> None:
        self._ports.revoke(credential)

    def serve(self, port: str, on_channel: Callable[[Channel], None]) -> None:
        self._ports.serve(port, on_channel)

    def unserve(self, port: str) -> None:
        self._ports.unserve(port)

    async def connect(self, address: Address, credential: Credential) -> Link:
        if self._closed:
            raise LinkClosed(f"endpoint {self._address.endpoint} is closed")
        key = (address.endpoint, credential)
        link = self._links.get(key)
        if link is not None:
            return link
        dial = self._dials.get(key)
        if dial is None:
            dial = self._dials[key] = _Dial(self._loop.create_task(self._dial(address, credential)))
            dial.task.add_done_callback(lambda _: self._forget_dial(key, dial))
        try:
            return await dial.wait()
        finally:
            if dial.abandoned:
                self._forget_dial(key, dial)

    async def aclose(self) -> None:
        tasks = self._stop()
        try:
            await asyncio.gather(*(link.aclose() for link in list(self._all)))
            if tasks:
                await asyncio.wait(tasks)
        finally:
            self.abort()

    def abort(self) -> None:
        self._stop()
        for link in list(self._all):
            link.end(LinkClosed(f"endpoint {self._address.endpoint} was closed"))

    @property
    def closed(self) -> bool:
        """Whether it was closed."""
        return self._closed

    def __repr__(self) -> str:
        return f"<endpoint {self._address.endpoint}, {'closed' if self._closed else f'{len(self._all)} links'}>"

    def _stop(self) -> list[asyncio.Task[Any]]:
        """Take and make no more connections; return the tasks that were about to."""
        self._closed = True
        for kind in self._kinds.values():
            kind.close()
        tasks = [*self._handshakes, *(dial.task for dial in self._dials.values())]
        for carrier in self._handshakes.values():
            carrier.close()
        if not self._loop.is_closed():
            for task in tasks:
                task.cancel()
        return tasks

    def _forget_dial(self, key: _Key, dial: _Dial) -> None:
        if self._dials.get(key) is dial:
            del self._dials[key]

    # Dialing.

    async def _dial(self, address: Address, credential: Credential) -> Mux:
        """Dial until there is a link, or cannot be one; who is not answered for minutes gives up.

        The other end's process may be busy, and while it lives that is no loss: shorter deadlines are the caller's.
        """
        notice = self._loop.call_later(_NOTICE, _say_who_is_awaited, address)
        try:
            return await self._dial_on(address, credential)
        finally:
            notice.cancel()

    async def _dial_on(self, address: Address, credential: Credential) -> Mux:
        key = (address.endpoint, credential)
        replaces = NO_LINK
        failure: LinkBroken | None = None
        for attempt in range(_ATTEMPTS):
            if failure is not None:
                await asyncio.sleep(random.uniform(0, _PAUSE * 2 ** (attempt - 1)))
            failure = None
            carrier = await self._carrier_to(address)
            try:
                async with asyncio.timeout(handshake.SECONDS):
                    verdict = await handshake.dial(
                        carrier,
                        own=self._address.endpoint,
                        wanted=address.endpoint,
                        credential=credential,
                        replaces=replaces,
                    )
                if verdict.status == ACCEPTED and not self._closed:
                    mux = self._add(carrier, key, verdict.number, dialed=True)
                    mux.start()
                    return mux
            except TimeoutError:
                carrier.close()
                failure = LinkBroken(f"{carrier.where} did not answer within {handshake.SECONDS:g} s")
                continue
            except LinkBroken as error:
                # It had too many dialers at once, or this one was too slow. If it has died, nothing listens any more.
                carrier.close()
                failure = error
                continue
            except BaseException:
                carrier.close()
                raise
            carrier.close()
            existing = self._links.get(key)
            if existing is not None:
                return existing
            # It holds on to a link that has ended here, and has not heard of that yet.
            replaces = verdict.number
        if failure is not None:
            raise LinkBroken(f"cannot connect to endpoint {address.endpoint}: {failure}") from failure
        raise LinkBroken(f"endpoint {address.endpoint} keeps pointing to a link that has ended")

    async def _carrier_to(self, address: Address) -> Carrier:
        failures = []
        for kind in self._kinds.values():
            if not kind.reaches(address):
                continue
            try:
                return await kind.dial(address)
            except WrongLoop:
                raise
            except LinkBroken as error:
                failures.append(str(error))
        why = "; ".join(failures) or "it listens on nothing that can be reached from here"
        raise LinkBroken(f"cannot connect to endpoint {address.endpoint}: {why}")

    # Accepting.

    def _accept(self, carrier: Carrier) -> None:
        if self._closed:
            carrier.close()
            return
        if len(self._handshakes) >= _most_handshakes():
            oldest = next(iter(self._handshakes))
            oldest.cancel()
            self._handshakes.pop(oldest).close()
        task = self._loop.create_task(self._shake_hands(carrier))
        self._handshakes[task] = carrier
        task.add_done_callback(self._shaken)

    def _shaken(self, task: asyncio.Task[bool]) -> None:
        carrier = self._handshakes.pop(task, None)
        if carrier is not None and (task.cancelled() or not task.result()):
            carrier.close()

    async def _shake_hands(self, carrier: Carrier) -> bool:
        """Return whether the carrier has become a link."""
        mux: Mux | None = None

        async def decide(hello: Hello) -> Verdict:
            nonlocal mux
            decision = await self._decide(carrier, hello)
            if isinstance(decision, Verdict):
                return decision
            mux = decision
            return Verdict(ACCEPTED, mux.number)

        try:
            async with asyncio.timeout(_LAST_SECONDS if carrier.last else handshake.SECONDS):
                await handshake.accept(carrier, own=self._address.endpoint, find=self._ports.granted, decide=decide)
        except (LinkError, TimeoutError) as error:
            # Whoever that was has been told what it may know, and its socket is all that it cost.
            if mux is not None:
                mux.end(LinkBroken(f"the handshake of endpoint {mux.remote} failed: {error}"))
            return False
        if mux is None:
            return False
        mux.start()
        return True

    async def _decide(self, carrier: Carrier, hello: Hello) -> Mux | Verdict:
        """Say what becomes of a dial whose dialer has proved itself."""
        key = (hello.endpoint, hello.credential)
        own = self._address.endpoint
        if hello.endpoint == own:
            # A link to oneself has both of its ends here; the table has the one that dialed.
            return self._add(carrier, key, hello.number, dialed=False, listed=False)
        while own < hello.endpoint and (dial := self._dials.get(key)) is not None:
            await dial.settled()
        if self._closed:
            raise LinkClosed(f"endpoint {own} is closed")
        existing = self._links.get(key)
        if existing is not None:
            if existing.number != hello.replaces:
                return Verdict(EXISTS, existing.number)
            existing.end(LinkBroken(f"endpoint {hello.endpoint} had lost the link, and has made a new one"))
        return self._add(carrier, key, hello.number, dialed=False)

    def _add(self, carrier: Carrier, key: _Key, number: bytes, *, dialed: bool, listed: bool = True) -> Mux:
        """Make the link; `listed` for `connect` to find."""

        def changed(mux: Mux) -> None:
            if self._links.get(key) is mux:
                del self._links[key]
            if mux.stopped:
                self._all.discard(mux)
                self._ports.link_ended(mux)

        endpoint, credential = key
        mux = Mux(
            carrier,
            remote=endpoint,
            credential=credential,
            dialed=dialed,
            number=number,
            on_open=self._ports.opened,
            on_change=changed,
        )
        self._all.add(mux)
        if listed:
            older = self._links.get(key)
            self._links[key] = mux
            if older is not None:
                older.end(LinkBroken(f"a newer link to endpoint {endpoint} has replaced this one"))
        return mux


def _most_handshakes() -> int:
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return _MOST_HANDSHAKES if limit < 0 else min(_MOST_HANDSHAKES, max(1, limit // 4))  # Below 0: there is none.


def _say_who_is_awaited(address: Address) -> None:
    _logger.warning(
        "still waiting for endpoint %s (%s) to answer a dial: its process may be busy, or its machine",
        address.endpoint,
        address.shm or address.unix or address.tcp or "in this process",
    )


class _Dial:
    """A dial that several callers wait for; the last one to give up cancels it."""

    def __init__(self, task: asyncio.Task[Mux]) -> None:
        self.task = task
        self.abandoned = False
        self._waiting = 0
        task.add_done_callback(self._look_at)

    @staticmethod
    def _look_at(task: asyncio.Task[Mux]) -> None:
        if not task.cancelled():
            task.exception()  # Each waiter raises it; one that has left must not make the loop complain.

    async def wait(self) -> Mux:
        """Wait for the link."""
        self._waiting += 1
        try:
            return await asyncio.shield(self.task)
        except asyncio.CancelledError:
            waiter = asyncio.current_task()
            if self.task.cancelled() and not (waiter and waiter.cancelling()):
                raise LinkClosed("the endpoint was closed while it was connecting") from None
            raise
        finally:
            self._waiting -= 1
            if not self._waiting and not self.task.done():
                self.abandoned = True
                self.task.cancel()

    async def settled(self) -> None:
        """Wait until it is decided, one way or the other."""
        await asyncio.wait([self.task])
