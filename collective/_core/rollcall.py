"""Who is missing, when a collective has waited for longer than its group's timeout: all are asked, along the tree."""

from __future__ import annotations

import asyncio
import itertools
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Sequence

AGAIN = 1.0
"""Seconds after which a collective that is overdue, and that all have called by now, is asked about again."""
NAMED = 8
"""Operations of a member that are named to others."""
_SHORTEST, _LONGEST = 5.0, 30.0
"""Between these, who asks waits for answers as long as the group's timeout. Who lives answers in a fraction of that, on
a loaded machine too."""


class RollCall:
    """One member's part in asking all members a question. It goes on from neighbour to neighbour in the tree.

    :param neighbours: who is next to this member in the tree.
    :param answer: returns this member's answer to a question.
    :param post: post a message to another rank.
    :param spawn: run a coroutine that ends with the group.
    :param timeout: the group's.
    """

    def __init__(
        self,
        rank: int,
        neighbours: Sequence[int],
        *,
        answer: Callable[[Any], Any],
        post: Callable[[int, tuple[Any, ...]], None],
        spawn: Callable[[Coroutine[Any, Any, None]], object],
        timeout: float,
    ) -> None:
        self._rank = rank
        self._neighbours = neighbours
        self._answer = answer
        self._post = post
        self._spawn = spawn
        self._patience = min(max(timeout, _SHORTEST), _LONGEST)
        self._numbers = itertools.count()
        self._waiting: dict[tuple[Any, int], asyncio.Future[dict[int, Any]]] = {}

    async def ask(self, question: Any) -> dict[int, Any]:
        """Return each member's answer, by rank, without those that do not answer."""
        return await self._ask((self._rank, next(self._numbers)), question, None, 0)

    def hear(self, src: int, message: tuple[Any, ...]) -> None:
        """Take a ("roll?", number, question, hops) or ("roll.", number, answers) message."""
        if message[0] == "roll?":
            self._spawn(self._pass_on(src, *message[1:]))
            return
        waiting = self._waiting.get((message[1], src))
        if waiting is not None and not waiting.done():
            waiting.set_result(message[2])

    async def _pass_on(self, src: int, number: Any, question: Any, hops: int) -> None:
        self._post(src, ("roll.", number, await self._ask(number, question, src, hops)))

    async def _ask(self, number: Any, question: Any, src: int | None, hops: int) -> dict[int, Any]:
        """Ask this member and all those on the other sides of it than where the question came from."""
        answers = {self._rank: self._answer(question)}
        loop = asyncio.get_running_loop()
        waiting: dict[int, asyncio.Future[dict[int, Any]]] = {}
        for rank in self._neighbours:
            if rank != src:
                waiting[rank] = self._waiting[number, rank] = loop.create_future()
                self._post(rank, ("roll?", number, question, hops + 1))
        try:
            if waiting:
                # Who is further away gives up sooner: what it has then reaches the others while they wait.
                await asyncio.wait(waiting.values(), timeout=self._patience / (1 + hops))
        finally:
            for rank in waiting:
                del self._waiting[number, rank]
        for answer in waiting.values():
            if answer.done():
                answers |= answer.result()
        return answers
