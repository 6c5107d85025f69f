"""Where the members of a Gloo group read what each of them published. Knows nothing of torch."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

from collective.errors import BackendError

if TYPE_CHECKING:
    from collections.abc import Callable


class Board:
    """Small values by key, the same on all members; one thread waits for them while the loop brings them.

    :param spread: sends a message to every other member's `hear`; called on the thread that publishes.
    """

    def __init__(self, spread: Callable[[bytes], None]) -> None:
        self._spread = spread
        self._values: dict[str, bytes] = {}
        self._changed = threading.Condition()
        self._closed = False

    def publish(self, key: str, value: bytes) -> None:
        """Enter a value here and on every other member's board."""
        self._enter(key, value)
        self._spread(key.encode() + b"\0" + value)

    def hear(self, message: bytes) -> None:
        """Enter what another member published."""
        key, _, value = message.partition(b"\0")
        self._enter(key.decode(), value)

    def wait(self, key: str) -> bytes:
        """Wait for a value, until `close`. Raises: BackendError."""
        with self._changed:
            self._changed.wait_for(lambda: self._closed or key in self._values)
            if self._closed:
                raise BackendError("gloo: the group was given up while its members were meeting")
            return self._values[key]

    def addresses(self) -> list[bytes]:
        """Return every value; each holds the socket address that its member listens on."""
        with self._changed:
            return list(self._values.values())

    def close(self) -> None:
        """End every wait, present and future. Idempotent."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def _enter(self, key: str, value: bytes) -> None:
        with self._changed:
            self._values[key] = value
            self._changed.notify_all()
