"""Many calls at once, whose collectives and sends must not be mixed: what tests of scopes run on every backend."""

from __future__ import annotations

import asyncio
import random
from typing import TYPE_CHECKING, Any

import numpy as np

from actors import Actor, from_thread
from collective.errors import ScopeEnded

if TYPE_CHECKING:
    from collections.abc import Sequence

    from actors import Gang
    from actors.handles import Handles


class Refused(Exception):
    """What a call raises that was told to."""


class Server(Actor):
    """Answers calls that each take three collectives and a ring of sends, and sleep before and between them."""

    async def answer(self, value: int, seed: int, *, fails: bool = False) -> list[float]:
        rng = random.Random(f"{seed} {self.rank}")
        group = self.groups["dp"]
        results = []
        for step in range(3):
            await asyncio.sleep(rng.random() * 0.01)
            if fails and step == self.rank % 3:
                raise Refused(f"rank {self.rank} at step {step}")
            results.append(float((await group.allreduce(np.array([value + step + self.rank])))[0]))
        following, before = (self.rank + 1) % group.size, (self.rank - 1) % group.size
        await group.send(np.array([value]), following)
        await asyncio.sleep(rng.random() * 0.005)
        results.append(float((await group.recv(before))[0]))
        return results

    def answer_in_thread(self, value: int, seed: int, *, fails: bool = False) -> list[float]:
        return from_thread.run(self.answer, value, seed, fails=fails)

    async def epoch(self) -> int:
        return self.groups["dp"].epoch

    async def ask(self, numbers: Sequence[int], method: str, seed: int) -> dict[str, int]:
        """Be one of several callers."""
        return await call_many(self.gang["server"], numbers, method, seed)


class Front(Server):
    """An actor that calls the servers, as others do at the same time."""


async def call_many(servers: Handles[Any], numbers: Sequence[int], method: str, seed: int) -> dict[str, int]:
    """Make all calls at once, some of which fail or are cancelled; count how they ended."""
    rng = random.Random(seed)
    size = len(servers)
    ended: dict[str, int] = {}

    async def one(number: int) -> None:
        value, fate = 1000 * number, rng.random()
        call = asyncio.ensure_future(getattr(servers, method)(value, rng.random(), fails=fate < 0.1))
        if fate > 0.85:
            asyncio.get_running_loop().call_later(rng.random() * 0.2, call.cancel)
        try:
            answers = await call
        except asyncio.CancelledError:
            how = "cancelled"
        except ExceptionGroup as failures:
            kinds = {type(error).__name__ for error in failures.exceptions}
            waits = all(isinstance(e, ScopeEnded) and "Role(threads=" in str(e) for e in failures.exceptions)
            how = "waited for threads" if waits else "/".join(sorted(kinds))
        else:
            expected = [size * (value + step) + sum(range(size)) for step in range(3)] + [value]
            how = "right" if all(answer == expected for answer in answers) else f"WRONG {answers}"
        ended[how] = ended.get(how, 0) + 1

    async with asyncio.TaskGroup() as tasks:
        for number in numbers:
            tasks.create_task(one(number))
    return ended


async def traffic(gang: Gang, calls: int, method: str, callers: int) -> dict[str, int]:
    """Have one caller or several make calls at once; return how these ended."""
    numbers = [range(start, calls, callers) for start in range(callers)]
    if callers == 1:
        told = [await call_many(gang["server"], numbers[0], method, 1)]
    else:
        fronts = gang["front"]
        told = await asyncio.gather(*(fronts[n].ask(numbers[n], method, n) for n in range(callers)))
    ended: dict[str, int] = {}
    for each in told:
        for how, count in each.items():
            ended[how] = ended.get(how, 0) + count
    assert set(await gang["server"].epoch()) == {0}, "a group had to be reset"
    return ended
