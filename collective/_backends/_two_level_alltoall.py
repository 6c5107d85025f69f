"""Moves from every member to every other one where hosts have one line between them: the leaders' plane.

Members of one host exchange directly. What goes to another host is brought to the leader, sent with that of the others
to the other leader, and handed out there. Nobody knows all sizes, and what is staged has to stay small: members show
theirs on their host, and the leaders send each other the longest move of their hosts along with the first window.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import numpy as np

from collective._backends._two_level_line import overlap

if TYPE_CHECKING:
    from asyncio import Future
    from collections.abc import Awaitable, Callable, Iterable, Sequence

    from collective._backends._two_level_line import Stages
    from collective._backends._two_level_places import Places
    from collective.abc import DataPlane

_LEAST: Final = 1 << 10
"""Bytes of a window, between two members, however many they are."""
_HEAD: Final = 8
"""Bytes that tell of the longest move."""
_OUT, _IN = 0, 1
_NOTHING: Final = np.empty(0, np.uint8)


class Exchange:
    """One member's part in an alltoall. See `Levels` for the planes.

    :param issue: takes every stage that is issued.
    :param most: bytes that are staged at a time, about.
    """

    def __init__(
        self,
        places: Places,
        inner: DataPlane,
        outer: DataPlane | None,
        *,
        issue: Callable[[Awaitable[None]], Future[None]],
        most: int,
    ) -> None:
        self._places = places
        self._inner = inner
        self._outer = outer
        self._issue = issue
        self._window = max(_LEAST, most // (places.size * max(map(len, places.hosts))))
        self._away = [rank for rank in places.order if rank not in places.here]
        """The ranks on other hosts, host by host: the order in which pieces lie in what is sent."""
        self._sizes: np.ndarray
        """By member of this host and direction: the bytes to or from each rank on another host."""
        self._longest = 0

    def run(self, sources: Sequence[np.ndarray], targets: Sequence[np.ndarray]) -> Stages:
        """Move it all."""
        here = self._places.here
        self._issue(self._inner.alltoall([sources[rank] for rank in here], [targets[rank] for rank in here]))
        if not self._away:
            return
        yield self._show_sizes(sources, targets)
        yield from self._part(sources, targets, 0)
        starts = range(self._window, self._longest, self._window)
        yield from overlap(self._part(sources, targets, start) for start in starts)

    def _show_sizes(self, sources: Sequence[np.ndarray], targets: Sequence[np.ndarray]) -> Future[None]:
        own = np.array([[array.size for array in arrays] for arrays in (sources, targets)], np.int64)
        own[:, list(self._places.here)] = 0
        self._sizes = np.empty((len(self._places.here), *own.shape), np.int64)
        counts = [own.nbytes] * len(self._sizes)
        return self._issue(self._inner.allgather(_bytes(own), _bytes(self._sizes), counts))

    def _part(self, sources: Sequence[np.ndarray], targets: Sequence[np.ndarray], start: int) -> Stages:
        """Move a window of each pair's bytes; the first one tells every member of the longest."""
        places, end, head = self._places, start + self._window, _HEAD if start == 0 else 0
        sizes = np.clip(self._sizes - start, 0, self._window)
        given = np.concatenate([sources[rank][start:end] for rank in self._away])
        brought = [np.empty(size, np.uint8) for size in sizes[:, _OUT].sum(1)] if places.leads else []
        yield self._inside([given], brought)
        handed: list[np.ndarray] = []
        if self._outer is not None:
            received = self._receiving(sizes, head)
            yield self._issue(self._outer.alltoall(self._sending(sizes, brought, head), received))
            handed = self._sort(sizes, received, head)
        taken = np.empty(head + sizes[places.index, _IN].sum(), np.uint8)
        yield self._inside(handed, [taken])
        if head:
            self._longest = int(taken[:head].view(np.int64)[0])
        lengths = [sizes[places.index, _IN, rank] for rank in self._away]
        for rank, piece in zip(self._away, _split(taken[head:], lengths), strict=True):
            targets[rank][start:end] = piece

    def _inside(self, sent: Sequence[np.ndarray], received: Sequence[np.ndarray]) -> Future[None]:
        """Issue a move on this host, between its leader, who comes first, and the others."""
        size = len(self._places.here)
        sources, targets = ([*arrays, *[_NOTHING] * (size - len(arrays))] for arrays in (sent, received))
        return self._issue(self._inner.alltoall(sources, targets))

    def _sending(self, sizes: np.ndarray, brought: Sequence[np.ndarray], head: int) -> list[np.ndarray]:
        """Return what goes to each host: what each member here has for each one there."""
        longest = np.array([self._sizes.max()], np.int64).view(np.uint8)[:head]
        hosts: list[list[np.ndarray]] = [[longest] for _ in self._places.hosts]
        for index, blob in enumerate(brought):
            away = [host for host in range(len(hosts)) if host != self._places.host]
            lengths = [sizes[index, _OUT, list(self._places.hosts[host])].sum() for host in away]
            for host, piece in zip(away, _split(blob, lengths), strict=True):
                hosts[host].append(piece)
        hosts[self._places.host] = [_NOTHING]
        return [np.concatenate(pieces) for pieces in hosts]

    def _receiving(self, sizes: np.ndarray, head: int) -> list[np.ndarray]:
        """Return where what comes from each host goes."""
        return [
            _NOTHING if host == self._places.host else np.empty(head + sizes[:, _IN, list(ranks)].sum(), np.uint8)
            for host, ranks in enumerate(self._places.hosts)
        ]

    def _sort(self, sizes: np.ndarray, received: Sequence[np.ndarray], head: int) -> list[np.ndarray]:
        """Return what each member here gets from all the other hosts."""
        longest = np.array([self._sizes.max()], np.int64)
        members: list[list[np.ndarray]] = [[] for _ in self._places.here]
        for host, ranks in enumerate(self._places.hosts):
            if host == self._places.host:
                continue
            if head:
                longest = np.maximum(longest, received[host][:head].view(np.int64))
            pieces = _split(received[host][head:], sizes[:, _IN, list(ranks)].T.reshape(-1))
            for number, piece in enumerate(pieces):
                members[number % len(members)].append(piece)
        return [np.concatenate([longest.view(np.uint8)[:head], *pieces]) for pieces in members]


def _split(array: np.ndarray, lengths: Iterable[int]) -> list[np.ndarray]:
    """Return consecutive parts of so many bytes each."""
    ends = np.cumsum(np.fromiter(lengths, np.int64)).tolist()
    return [array[begin:end] for begin, end in zip([0, *ends], ends, strict=False)]


def _bytes(array: np.ndarray) -> np.ndarray:
    return array.reshape(-1).view(np.uint8)
