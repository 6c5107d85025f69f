"""What the other members of a group say, and to whom it goes: by kind, and by epoch."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

from collective.abc import Message
from collective.scopes import Ending

if TYPE_CHECKING:
    from collections.abc import Callable

    from collective._core.engine import Engine
    from collective.abc import Channel


class Hearing:
    """Takes one member's messages and channels. What belongs to an epoch that has not begun here waits for it."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._early: list[Callable[[], None]] = []

    def epoch_started(self) -> None:
        """Deliver what came for the epoch that is the current one now."""
        early, self._early = self._early, []
        for deliver in early:
            deliver()

    def hear(self, src: int, message: tuple[Any, ...], buffers: list[memoryview]) -> None:
        """Take a message."""
        engine = self._engine
        kind = message[0]
        if kind == "lost":
            engine.faults.lose(message[1], message[2])
        elif kind == "leave":
            engine.faults.hear_goodbyes(src, message[1])
        elif kind == "left":
            engine.faults.hear_farewell(src)
        elif kind in ("round", "reset!"):
            engine.resets.hear(src, message)
        elif kind in ("roll?", "roll."):
            engine.faults.hear_roll(src, message)
        else:
            self._hear_in_epoch(src, message, buffers)

    def _hear_in_epoch(self, src: int, message: tuple[Any, ...], buffers: list[memoryview]) -> None:
        kind, number, *rest = message
        epoch = self._engine.current
        if number > epoch.number:
            self._early.append(partial(self._hear_in_epoch, src, message, buffers))
        elif number < epoch.number:
            return
        elif kind == "agree":
            epoch.agreement.hear(rest[0])  # which has ended where nothing can be agreed any more
        elif epoch.broken:
            return
        elif kind == "mail":
            if epoch.fault is None and epoch.doom is None:
                epoch.mailbox.hear(src, rest[0], buffers)
        elif kind == "flow":
            epoch.flows.hear(src, rest[0], Message(rest[1], buffers))
        elif kind == "plane":
            epoch.plane.hear(src, rest[0])
        elif kind == "stream":
            epoch.streams.hear(src, rest[0], rest[1])
        elif kind == "lane":
            epoch.lane.hear(rest[0])
        elif kind == "over":
            self._engine.end_scope(rest[0], Ending(*rest[1]))
        elif kind == "threads":
            self._engine.watchdog.hear(*rest)
        elif kind == "doom":
            self._engine.faults.doom(epoch, *rest)
        elif kind == "cut":
            self._engine.faults.take_reset(epoch, *rest)
        elif kind == "break":
            self._engine.faults.take_break(epoch, rest[0])
        elif kind == "timeout":
            self._engine.faults.time_out(epoch, *rest)

    def take_data(self, src: int, ticket: tuple[int, str, Any], channel: Channel) -> None:
        """Take a channel that another member opened for what is too large to buffer."""
        number, kind, what = ticket
        epoch = self._engine.current
        if number > epoch.number:
            self._early.append(partial(self.take_data, src, ticket, channel))
        elif number < epoch.number or epoch.broken:
            self._engine.fabric.forget(channel)  # it was opened in an epoch that has ended
        elif kind == "flow":
            epoch.flows.take(src, what, channel)
        elif epoch.fault is not None or epoch.doom is not None:
            self._engine.fabric.forget(channel)  # only collectives before the cut still complete
        elif kind == "mail":
            epoch.mailbox.take_data(src, what, channel)
        elif kind == "stream":
            epoch.streams.take_channel(src, what, channel)
