"""Data planes on their own: every member in one process, against numpy."""

from __future__ import annotations

import asyncio
import functools
import gc
import itertools
import os
import threading
import time
from typing import TYPE_CHECKING

import numpy as np
import pytest
from plane_harness import HOSTS, all_of, make_planes, opened

from collective._backends import make_plane
from collective.abc import PlaneContext
from collective.errors import BackendError
from collective.reductions import COMPLEX, FLOATS, HALVES, REDUCIBLE, check
from collective.tensors import numpy_dtype
from collective.types import ReduceOp

if TYPE_CHECKING:
    from collections.abc import Awaitable, Iterator, Sequence

    from collective.abc import DataPlane

BACKENDS = ("memory", "shm", "gloo", "two-level")
SIZES = (1, 2, 3, 4)
LENGTHS = (1, 5, 1000)
LARGE = 300_000
"""Elements of a float64 array that takes the way of large ones with any number of members."""

every_plane = pytest.mark.parametrize("backend", BACKENDS)
every_size = pytest.mark.parametrize("size", SIZES)


def make(dtype: str, length: int, rank: int, op: ReduceOp = ReduceOp.SUM) -> np.ndarray:
    """Return an array of any values of a dtype; small ones where rounding would hide errors."""
    random = np.random.default_rng((rank, length, REDUCIBLE.index(dtype)))
    if dtype == "bool":
        return random.random(length) < 0.5
    if dtype in COMPLEX:
        return (random.normal(size=length) + 1j * random.normal(size=length)).astype(dtype)
    if dtype in FLOATS:
        array = random.normal(size=length)
        if op in (ReduceOp.MIN, ReduceOp.MAX):
            array[random.random(length) < 0.1] = np.nan
        return array.astype(numpy_dtype(dtype))
    limits = np.iinfo(dtype)
    return random.integers(limits.min, limits.max, length, dtype, endpoint=True)


def expect(arrays: Sequence[np.ndarray], op: ReduceOp, backend: str = "") -> np.ndarray:
    """Reduce by numpy alone, halves in float32 and rounded once: by rank; on two levels, host by host."""
    dtype = arrays[0].dtype
    wide = [array.astype(np.float32) for array in arrays] if dtype in map(numpy_dtype, HALVES) else list(arrays)
    combine = {
        ReduceOp.SUM: np.add,
        ReduceOp.AVG: np.add,
        ReduceOp.PROD: np.multiply,
        ReduceOp.MIN: np.minimum,
        ReduceOp.MAX: np.maximum,
    }[op]
    with np.errstate(all="ignore"):
        if backend == "two-level":
            parts: dict[str, list[np.ndarray]] = {}
            for host, array in zip(HOSTS, wide, strict=False):
                parts.setdefault(host, []).append(array)
            wide = [functools.reduce(combine, part) for part in parts.values()]
        result = functools.reduce(combine, wide)
        if op is ReduceOp.AVG:
            result = result / len(arrays)
        return result.astype(dtype)


def reducible() -> Iterator[tuple[ReduceOp, str]]:
    for op, dtype in itertools.product(ReduceOp, REDUCIBLE):
        try:
            check(op, dtype)
        except TypeError:
            continue
        yield op, dtype


def assert_same_bits(actual: np.ndarray, expected: np.ndarray) -> None:
    assert actual.dtype == expected.dtype
    assert actual.tobytes() == expected.tobytes()


def assert_reduced(actual: np.ndarray, expected: np.ndarray, op: ReduceOp) -> None:
    """Compare bits, but for complex products: numpy's own depend on where the result lies (fused multiply-add)."""
    if op is ReduceOp.PROD and expected.dtype.kind == "c":
        assert actual.dtype == expected.dtype
        np.testing.assert_allclose(actual, expected, rtol=1e-5 if expected.dtype == np.complex64 else 1e-13, atol=1e-6)
    else:
        assert_same_bits(actual, expected)


def cut(length: int, size: int) -> list[int]:
    """Return an uneven way to split a length, with an empty part where there are three or more."""
    if size == 1:
        return [length]
    counts = [0] * size
    counts[0] = length // 3
    counts[-1] = length - counts[0]
    return counts


@every_plane
@every_size
def test_every_reduction_of_every_dtype(backend: str, size: int) -> None:
    async def main() -> None:
        async with opened(backend, size) as planes:
            for (op, dtype), length in itertools.product(reducible(), LENGTHS):
                arrays = [make(dtype, length, rank, op) for rank in range(size)]
                before = [array.copy() for array in arrays]
                for array in arrays:
                    array.setflags(write=False)
                outs = [np.empty_like(array) for array in arrays]
                await all_of([p.allreduce(a, o, op) for p, a, o in zip(planes, arrays, outs, strict=True)])
                expected = expect(arrays, op)
                for out in outs:
                    assert_reduced(out, expected, op)
                    assert_same_bits(out, outs[0])
                for array, original in zip(arrays, before, strict=True):
                    assert_same_bits(array, original)

    asyncio.run(main())


@every_plane
@every_size
@pytest.mark.parametrize("dtype", ["float64", "bfloat16", "complex64", "int8"])
def test_large_reductions(backend: str, size: int, dtype: str) -> None:
    length = LARGE * 8 // numpy_dtype(dtype).itemsize + 3
    op = ReduceOp.PROD if dtype == "complex64" else ReduceOp.SUM

    async def main() -> None:
        arrays = [make(dtype, length, rank) for rank in range(size)]
        expected = expect(arrays, op, backend)
        counts = cut(length, size)
        async with opened(backend, size) as planes:
            outs = [np.empty_like(array) for array in arrays]
            await all_of([p.allreduce(a, o, op) for p, a, o in zip(planes, arrays, outs, strict=True)])
            for out in outs:
                assert_reduced(out, expected, op)
                assert_same_bits(out, outs[0])

            root = size - 1
            top = np.empty_like(expected)
            await all_of(
                [
                    p.reduce(a, top if r == root else None, op, root)
                    for r, (p, a) in enumerate(zip(planes, arrays, strict=True))
                ]
            )
            assert_reduced(top, expected, op)

            parts = [np.empty(count, expected.dtype) for count in counts]
            await all_of([p.reduce_scatter(a, o, op, counts) for p, a, o in zip(planes, arrays, parts, strict=True)])
            assert_reduced(np.concatenate(parts), expected, op)

            await all_of([p.allreduce(a, a, op) for p, a in zip(planes, arrays, strict=True)])  # in place
            for array in arrays:
                assert_reduced(array, expected, op)

    asyncio.run(main())


@every_plane
@every_size
@pytest.mark.parametrize("length", [0, 1, 7, LARGE * 8])
def test_moving(backend: str, size: int, length: int) -> None:
    async def main() -> None:
        async with opened(backend, size) as planes:
            for root in range(size):
                arrays = [np.full(length, rank + 1, np.uint8) for rank in range(size)]
                await all_of([p.broadcast(a, root) for p, a in zip(planes, arrays, strict=True)])
                assert all((array == root + 1).all() for array in arrays)

            counts = cut(length, size)
            sources = [np.full(count, rank + 1, np.uint8) for rank, count in enumerate(counts)]
            outs = [np.empty(length, np.uint8) for _ in range(size)]
            await all_of([p.allgather(s, o, counts) for p, s, o in zip(planes, sources, outs, strict=True)])
            for out in outs:
                assert_same_bits(out, np.concatenate(sources))

            def size_between(src: int, dst: int) -> int:
                return 0 if (src + dst) % 3 == 2 else length // (1 + src + 2 * dst)

            sent = [
                [np.full(size_between(src, dst), 10 * src + dst, np.uint8) for dst in range(size)]
                for src in range(size)
            ]
            got = [[np.empty(size_between(src, dst), np.uint8) for src in range(size)] for dst in range(size)]
            await all_of([p.alltoall(s, t) for p, s, t in zip(planes, sent, got, strict=True)])
            for src, dst in itertools.product(range(size), repeat=2):
                assert_same_bits(got[dst][src], sent[src][dst])

    asyncio.run(main())


@every_plane
@every_size
def test_short_rooted_and_scattered_reductions(backend: str, size: int) -> None:
    async def main() -> None:
        async with opened(backend, size) as planes:
            for length, op in itertools.product((0, 1, 10), (ReduceOp.SUM, ReduceOp.PROD)):
                arrays = [make("complex128", length, rank) for rank in range(size)]
                expected = expect(arrays, op)
                for root in range(size):
                    top = np.empty_like(expected)
                    await all_of(
                        [
                            p.reduce(a, top if r == root else None, op, root)
                            for r, (p, a) in enumerate(zip(planes, arrays, strict=True))
                        ]
                    )
                    assert_reduced(top, expected, op)
                counts = cut(length, size)
                parts = [np.empty(count, np.complex128) for count in counts]
                await all_of(
                    [p.reduce_scatter(a, o, op, counts) for p, a, o in zip(planes, arrays, parts, strict=True)]
                )
                assert_reduced(np.concatenate(parts), expected, op)

    asyncio.run(main())


@every_plane
@pytest.mark.parametrize("size", [2, 3])
def test_large_and_small_operations_pair_in_call_order(backend: str, size: int) -> None:
    """All are pending at once, and members issue at different paces."""

    async def main() -> None:
        async with opened(backend, size) as planes:
            lengths = [1, LARGE, 1, 2, LARGE, LARGE // 2, 3, 1, 1]
            outs: list[list[np.ndarray]] = []
            completions: list[Awaitable[None]] = []
            for rank, plane in enumerate(planes):
                outs.append([np.empty(length) for length in lengths])
                for place, (length, out) in enumerate(zip(lengths, outs[rank], strict=True)):
                    source = np.full(length, float(10**place) * (rank + 1))
                    if place % 4 == 2:
                        counts = [length] * size
                        gathered = np.empty(length * size)
                        outs[rank][place] = gathered
                        completions.append(
                            plane.allgather(
                                source.view(np.uint8), gathered.view(np.uint8), [8 * count for count in counts]
                            )
                        )
                    else:
                        completions.append(plane.allreduce(source, out, ReduceOp.SUM))
                await asyncio.sleep(0)
            await all_of(completions)
            total = sum(range(1, size + 1))
            for place, length in enumerate(lengths):
                for rank in range(size):
                    out = outs[rank][place]
                    if place % 4 == 2:
                        expected = np.repeat([float(10**place) * (r + 1) for r in range(size)], length)
                        assert (out == expected).all()
                    else:
                        assert (out == float(10**place) * total).all()

    asyncio.run(main())


@every_plane
def test_the_loop_goes_on_beside_large_operations(backend: str) -> None:
    """While 64 MiB are reduced, the loop keeps turning: the work is on other threads."""

    async def main() -> None:
        async with opened(backend, 2) as planes:
            arrays = [np.ones(8 << 20) for _ in planes]
            pending = asyncio.gather(*(p.allreduce(a, a, ReduceOp.SUM) for p, a in zip(planes, arrays, strict=True)))
            turns = 0
            while not pending.done():
                await asyncio.sleep(0)
                turns += 1
            await pending
            assert turns > 20
            assert (arrays[1] == 2).all()

    asyncio.run(main())


@every_plane
def test_abandoned_work_leaves_the_callers_memory_alone(backend: str) -> None:
    """The other member comes to the operations only afterwards, so that data may still arrive."""

    async def main() -> None:
        planes = make_planes(backend, 2)
        await asyncio.gather(*(plane.open() for plane in planes))
        kept = [np.zeros(length) for length in (10, LARGE)]
        for target in kept:
            planes[0].allreduce(np.ones(target.size), target, ReduceOp.SUM)
        planes[0].abandon()
        planes[0].abandon()
        late = planes[1].allreduce(np.ones(10), np.zeros(10), ReduceOp.SUM)
        await asyncio.wait([asyncio.ensure_future(late)], timeout=0.5)
        planes[1].abandon()
        await asyncio.gather(*(plane.aclose() for plane in planes))
        assert not any(target.any() for target in kept)
        with pytest.raises(BackendError, match="not open"):
            planes[0].broadcast(np.ones(1, np.uint8), 0)

    asyncio.run(main())


@every_plane
def test_opening_alone_ends_when_abandoned(backend: str) -> None:
    async def main() -> None:
        plane = make_planes(backend, 2)[0]
        opening = asyncio.create_task(plane.open())
        await asyncio.sleep(0)
        plane.abandon()
        with pytest.raises(BackendError):
            await asyncio.wait_for(opening, 30)

    asyncio.run(main())


@every_plane
def test_operations_before_opening_are_refused(backend: str) -> None:
    async def main() -> None:
        plane = make_planes(backend, 1)[0]
        with pytest.raises(BackendError, match="not open"):
            plane.broadcast(np.ones(1, np.uint8), 0)
        await plane.aclose()

    asyncio.run(main())


def test_memory_members_on_two_loops_are_refused() -> None:
    async def first() -> None:
        planes = make_planes("memory", 2)
        opening = asyncio.create_task(planes[0].open())
        await asyncio.sleep(0)
        refused: list[BaseException] = []

        def other_loop() -> None:
            with pytest.raises(BackendError, match="another event loop") as caught:
                asyncio.run(planes[1].open())
            refused.append(caught.value)

        thread = threading.Thread(target=other_loop)
        thread.start()
        await asyncio.to_thread(thread.join)
        assert len(refused) == 1
        planes[0].abandon()
        with pytest.raises(BackendError):
            await opening

    asyncio.run(first())


def test_unknown_backend_lists_the_known() -> None:
    context = PlaneContext("g", "k", 0, 1, lambda rank, message: None, 1.0)
    with pytest.raises(ValueError, match="'nccl'; known are gloo, memory, shm, two-level"):
        make_plane("nccl", context)


def test_memory_meetings_are_freed() -> None:
    from collective._backends import memory

    async def main() -> None:
        async with opened("memory", 3) as planes:
            assert memory._meetings
            await all_of([p.allreduce(np.ones(2), np.ones(2), ReduceOp.SUM) for p in planes])
        abandoned = make_planes("memory", 2)
        await asyncio.gather(*(plane.open() for plane in abandoned))
        abandoned[0].allreduce(np.ones(2), np.ones(2), ReduceOp.SUM)
        for plane in abandoned:
            plane.abandon()

    memory._meetings.clear()
    asyncio.run(main())
    gc.collect()
    assert not memory._meetings


def test_gloo_ends_its_threads_and_descriptors() -> None:
    """Also those of abandoned groups with work pending."""
    sessions = []

    def held() -> tuple[int, int]:
        """Return the numbers of threads and of descriptors, once every session of this test has ended."""
        for session in sessions:
            assert session.join(75)
        sessions.clear()
        return len(os.listdir("/proc/self/task")), len(os.listdir("/proc/self/fd"))

    async def use(abandon: bool) -> None:
        planes = make_planes("gloo", 3)
        sessions.extend(plane._session for plane in planes)  # type: ignore[attr-defined]
        await asyncio.gather(*(plane.open() for plane in planes))
        await all_of([p.allreduce(np.ones(LARGE), np.ones(LARGE), ReduceOp.SUM) for p in planes])
        if abandon:
            planes[0].allreduce(np.ones(LARGE), np.ones(LARGE), ReduceOp.SUM)
            planes[0].allreduce(np.ones(1), np.ones(1), ReduceOp.SUM)
            for plane in planes:
                plane.abandon()
        else:
            await asyncio.gather(*(plane.aclose() for plane in planes))

    asyncio.run(use(False))
    before = held()
    for abandon in (False, True) * 5:
        asyncio.run(use(abandon))
    deadline = time.monotonic() + 20  # the kernel may show a thread for a moment after it has been joined
    while not all(now <= then for now, then in zip(held(), before, strict=True)) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert all(now <= then for now, then in zip(held(), before, strict=True)), (held(), before)


def test_gloo_ends_soon_where_it_is_abandoned_while_it_waits_for_a_member_to_connect() -> None:
    """Gloo waits minutes for that, and one of two members does: which one is a matter of their ports."""

    async def begin() -> list[DataPlane]:
        planes = make_planes("gloo", 2)
        planes[1].hear = lambda rank, message: None  # type: ignore[method-assign]  # It never learns where to connect.
        opening = [asyncio.create_task(plane.open()) for plane in planes]
        board = planes[0]._session._board  # type: ignore[attr-defined]
        async with asyncio.timeout(60):
            while len(board.addresses()) < 2:  # noqa: ASYNC110
                await asyncio.sleep(0.01)
        for plane in planes:
            plane.abandon()
        done, late = await asyncio.wait(opening, timeout=20)
        assert not late
        assert all(isinstance(task.exception(), BackendError) for task in done)
        return planes

    async def main() -> None:
        for planes in await asyncio.gather(*(begin() for _ in range(8))):
            for plane in planes:
                assert plane._session.join(20)  # type: ignore[attr-defined]

    asyncio.run(main())
