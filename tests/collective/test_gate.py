"""Gates: once one is shut, nothing behind it is read or written; and those who go through one besides operations."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

import numpy as np
import pytest
import torch

from collective import BackendError, RowStream, tensors
from collective._gate import PIECE, Gate, Stopped
from collective.testing import world
from collective.testing._world import outcome, until

LONG = 3 * PIECE // 8 + 5
"""Elements of 8 bytes: three pieces, and a bit."""


@pytest.mark.parametrize(
    ("shape", "cut"),
    [
        ((), ...),
        ((LONG,), ...),
        ((2 * LONG,), slice(None, None, 2)),
        ((2 * LONG,), slice(None, None, -2)),
        ((3, LONG), (slice(None), slice(1, LONG, 2))),
        ((1, 1, 2, LONG), ...),
        ((LONG, 3), (slice(None), 1)),
        ((0, 4), ...),
    ],
)
@pytest.mark.parametrize("kind", ["numpy", "torch"])
def test_a_gate_fills_arrays_of_any_form(shape: tuple[int, ...], cut: Any, kind: str) -> None:
    room = np.zeros(shape)
    source = np.random.default_rng(1).random(room[cut].shape)
    out = room[cut]
    if kind == "torch":
        if any(stride < 0 for stride in out.strides):
            pytest.skip("torch has no negative strides")
        out = torch.from_numpy(out)
    gate = Gate()
    gate.fill(out, source.reshape(-1))
    gate.check()
    np.testing.assert_array_equal(np.asarray(out), source)
    gate.shut()
    gate.fill(out, np.zeros_like(source))
    np.testing.assert_array_equal(np.asarray(out), source)
    with pytest.raises(Stopped):
        gate.check()


def test_shutting_a_gate_waits_for_the_piece_that_is_written_and_for_no_other() -> None:
    gate, target = Gate(), np.zeros(4 * PIECE, np.uint8)
    writing, go_on = threading.Event(), threading.Event()

    def write_piece(piece: slice) -> None:
        writing.set()
        assert go_on.wait(10)
        target[piece] = 1

    writer = threading.Thread(target=lambda: gate.write(target, write_piece))
    writer.start()
    assert writing.wait(10)
    shutting = threading.Thread(target=gate.shut)
    shutting.start()
    shutting.join(0.05)
    assert shutting.is_alive()
    go_on.set()
    shutting.join(10)
    writer.join(10)
    assert target.sum() == PIECE


def test_a_put_that_is_cancelled_reads_its_rows_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    copying, go_on, copied = threading.Event(), threading.Event(), threading.Event()
    copy, taken = Gate.copy, []

    def copy_late(self: Gate, target: np.ndarray, source: np.ndarray) -> None:
        copying.set()
        assert go_on.wait(10)
        before = target.copy()
        copy(self, target, source)
        taken.append(not np.array_equal(target, before))
        copied.set()

    async def main() -> None:
        async with world("memory", 2, roles={"reader": 1, "trainer": 1}) as opened, asyncio.timeout(20):
            streams = [
                RowStream(group, producers="reader", consumers="trainer", batch_size=1 << 20) for group in opened.groups
            ]
            monkeypatch.setattr(Gate, "copy", copy_late)
            putting = asyncio.create_task(streams[0].put({"x": np.full(1 << 20, 2.0)}))
            await until(copying.is_set)
            putting.cancel()
            await asyncio.wait([putting])
            go_on.set()
            await until(copied.is_set)
            assert taken == [False]
            await asyncio.gather(*(stream.close() for stream in streams))

    asyncio.run(main())


@pytest.mark.parametrize("link", ["memory", "unix", "shm"])
def test_a_send_that_fails_while_its_tensor_is_read_gives_nobody_a_part_of_it(
    link: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The sender's part of the epoch has ended, and the receiver has not heard of that yet."""
    reading, go_on = threading.Event(), threading.Event()
    fill = tensors.fill

    def fill_slowly(out: Any, array: np.ndarray) -> None:
        fill(out, array)
        reading.set()
        assert go_on.wait(10)

    async def main() -> None:
        async with world("gloo", 2, link=link) as opened, asyncio.timeout(30):
            sender, receiver = opened.groups
            tensor = np.ones((1 << 21, 2))[:, 0]
            received = receiver.recv(0)
            with monkeypatch.context() as patch:
                patch.setattr(tensors, "fill", fill_slowly)
                sent = sender.send(tensor, 1)
                await until(reading.is_set)
                mailbox = sender._engine.current.mailbox
                threading.Timer(0.1, go_on.set).start()  # shutting the gate waits for the piece
                mailbox.end(lambda: BackendError("for the test"))
                assert isinstance(await outcome(sent), BackendError)
                tensor[...] = 2
            error = await outcome(received)
            assert isinstance(error, BackendError), f"got {error!r}"
            assert "failed: BackendError: for the test" in str(error)

    asyncio.run(main())


def test_what_goes_out_of_a_callers_memory_is_cut_off_with_its_send() -> None:
    """Links that do not share memory send from the tensor itself."""

    async def main() -> None:
        async with world("gloo", 2, link="unix") as opened, asyncio.timeout(30):
            sender, receiver = opened.groups
            tensor = np.ones(256 << 20, np.uint8)
            sent, received = sender.send(tensor, 1), receiver.recv(0)
            coming = opened.groups[1]._engine.current.mailbox._matched
            await until(lambda: any(arrival.coming[::4096].any() for arrival in coming.values()))
            sender._engine.current.mailbox.end(lambda: BackendError("for the test"))
            tensor[...] = 2  # in this very turn
            assert isinstance(await outcome(sent), BackendError)
            assert isinstance(await outcome(received), BackendError)

    asyncio.run(main())
