"""What it costs to move a tensor that 4 ranks hold by rows to 2 others, between processes of one host.

By `repartition`, into new arrays and into the same ones again (`out`), against what is done without it: one of the 4
gathers, and broadcasts to the 2, who cut out their parts. A sample is one operation on one of the 2, in a row of
several.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from benchmarks.report import Goal
from benchmarks.turns import Entry, Plan, Sides

if TYPE_CHECKING:
    from benchmarks.report import Measure

REPEAT = 7
SOURCES, TARGETS = 4, 2
ROWS = {64 << 10: 50, 1 << 20: 20, 16 << 20: 5, 128 << 20: 2}
"""Bytes of the whole tensor; operations in a row."""
OURS, INTO, BY_HAND = "Gangline", "Gangline into out", "gather, broadcast"


def measure(repeat: int) -> list[Measure]:
    """Measure both ways in turns, to rows, to columns, and to copies of it all."""
    with Sides() as sides:
        sides.add(OURS, "gangline_repartition", ours=True, ranks=SOURCES + TARGETS)
        sides.ask(OURS, "form", sides.ask(OURS, "setup"), TARGETS)
        plans = [
            Plan(
                f"rows of {SOURCES} to {what} of {TARGETS}, {name(nbytes)}",
                {
                    label: Entry(OURS, "move", (way, what, nbytes, row))
                    for label, way in ((OURS, "repartition"), (INTO, "into out"), (BY_HAND, "by hand"))
                },
                [Goal(OURS, BY_HAND, 1.0)] if nbytes >= 1 << 20 and what != "all" else [],
                nbytes,
            )
            for nbytes, row in ROWS.items()
            for what in ("rows", "columns", "all")
        ]
        return [sides.measure(plan, repeat) for plan in plans]


def name(nbytes: int) -> str:
    """Return a size for people."""
    return f"{nbytes >> 20} MiB" if nbytes >= 1 << 20 else f"{nbytes >> 10} KiB"
