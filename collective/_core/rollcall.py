"""Who is missing, when a collective has waited for longer than its group's timeout."""

from __future__ import annotations

import asyncio
import itertools
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

WAIT = 1.0
"""Seconds that members have to say how far they have come."""


class RollCall:
    """Asks other members how many places of the current epoch they have taken.

    :param post: post a message to another rank.
    """

    def __init__(self, post: Callable[[int, tuple[Any, ...]], None]) -> None:
        self._post = post
        self._questions = itertools.count()
        self._waiting: dict[tuple[int, int], asyncio.Future[int]] = {}

    async def behind(self, ranks: Sequence[int], epoch: int, place: int) -> list[int]:
        """Return which ranks have not called the collective at a place, or do not answer."""
        question = next(self._questions)
        loop = asyncio.get_running_loop()
        answers: dict[int, asyncio.Future[int]] = {rank: loop.create_future() for rank in ranks}
        for rank, answer in answers.items():
            self._waiting[question, rank] = answer
            self._post(rank, ("roll?", question, epoch))
        try:
            await asyncio.wait(answers.values(), timeout=WAIT)
        finally:
            for rank in answers:
                del self._waiting[question, rank]
        return [rank for rank, answer in answers.items() if not answer.done() or answer.result() <= place]

    def answer(self, src: int, message: tuple[Any, ...], epoch: int, taken: int) -> None:
        """Answer another member's question."""
        _, question, number = message
        self._post(src, ("roll.", question, taken if number == epoch else 0))

    def hear(self, src: int, message: tuple[Any, ...]) -> None:
        """Take another member's answer."""
        waiting = self._waiting.get((message[1], src))
        if waiting is not None and not waiting.done():
            waiting.set_result(message[2])
