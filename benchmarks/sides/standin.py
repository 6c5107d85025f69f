"""A side that measures nothing, to see that taking turns works."""

from __future__ import annotations

from typing import TYPE_CHECKING

from benchmarks.side import time_row

if TYPE_CHECKING:
    from benchmarks.side import Turns


def main(turns: Turns) -> None:
    """Answer."""

    def fail() -> None:
        raise RuntimeError("failed as it was told to")

    turns.serve({"setup": lambda: None, "row": lambda count: time_row(lambda: None, count), "fail": fail})
