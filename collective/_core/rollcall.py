"""Who is missing, when a collective has waited for longer than its group's timeout."""

from __future__ import annotations

import asyncio
import itertools
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

WAIT = 1.0
"""Seconds that members have to say how far they have come."""
NAMED = 4
"""Collectives of a member that are named to others."""


class RollCall:
    """Asks other members what they have called in a scope of the current epoch that is not agreed.

    :param post: post a message to another rank.
    """

    def __init__(self, post: Callable[[int, tuple[Any, ...]], None]) -> None:
        self._post = post
        self._questions = itertools.count()
        self._waiting: dict[tuple[int, int], asyncio.Future[tuple[int, list[str]]]] = {}

    async def behind(
        self, ranks: Sequence[int], epoch: int, scope: bytes, ahead: int
    ) -> dict[int, tuple[int, list[str]]]:
        """Return the ranks that have no more than `ahead` collectives waiting in a scope, or do not answer.

        With how many they have in it, and what they wait for in any.
        """
        question = next(self._questions)
        loop = asyncio.get_running_loop()
        answers: dict[int, asyncio.Future[tuple[int, list[str]]]] = {rank: loop.create_future() for rank in ranks}
        for rank, answer in answers.items():
            self._waiting[question, rank] = answer
            self._post(rank, ("roll?", question, epoch, scope))
        try:
            await asyncio.wait(answers.values(), timeout=WAIT)
        finally:
            for rank in answers:
                del self._waiting[question, rank]
        silent = 0, ["something that it does not tell"]
        said = {rank: answer.result() if answer.done() else silent for rank, answer in answers.items()}
        return {rank: each for rank, each in said.items() if each[0] <= ahead}

    def answer(self, src: int, question: int, waiting: int, pending: list[str]) -> None:
        """Answer another member's question."""
        self._post(src, ("roll.", question, waiting, pending))

    def hear(self, src: int, message: tuple[Any, ...]) -> None:
        """Take another member's answer."""
        waiting = self._waiting.get((message[1], src))
        if waiting is not None and not waiting.done():
            waiting.set_result((message[2], message[3]))
