"""Collectives whose last step takes long."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

import numpy as np
import pytest

from collective import GroupBroken, tensors
from collective.testing import world
from collective.testing._world import turns


def test_what_is_on_its_way_into_out_succeeds_though_the_group_breaks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Had it failed, the caller could use `out` again, to which a thread still writes."""
    writing, go_on, fill = threading.Semaphore(0), threading.Event(), tensors.fill

    def fill_slowly(out: Any, array: np.ndarray) -> None:
        writing.release()
        assert go_on.wait(60)
        fill(out, array)

    monkeypatch.setattr(tensors, "fill", fill_slowly)

    async def main() -> None:
        async with world("memory", 2) as opened, asyncio.timeout(60):
            outs = [np.zeros((1 << 20, 2))[:, 0] for _ in opened.groups]
            works = [group.allreduce(np.ones(1 << 20), out=out) for group, out in zip(opened.groups, outs, strict=True)]
            for _ in works:
                await asyncio.to_thread(writing.acquire)
            opened.groups[0]._engine.break_everywhere("for the test")
            await turns()
            with pytest.raises(GroupBroken):
                await opened.groups[1].barrier()
            assert not any(work.done() for work in works)
            go_on.set()
            for work, out in zip(works, outs, strict=True):
                assert await work is out
                assert (out == 2).all()
            await opened.reset()
            await asyncio.gather(*(group.barrier() for group in opened.groups))

    asyncio.run(main())
