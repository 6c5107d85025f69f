"""What a benchmark reports: samples of both sides, and their ratio."""

from __future__ import annotations

import os
import platform
import statistics
from dataclasses import dataclass
from importlib.metadata import version
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence


@dataclass(frozen=True)
class Comparison:
    """Seconds that the same thing took with Gangline and with a peer, measured in turns.

    :param goal: what the ratio of the medians may be at most.
    """

    what: str
    ours: list[float]
    peer: str
    theirs: list[float]
    goal: float

    @property
    def ratio(self) -> float:
        """The ratio of the medians, ours to theirs."""
        return statistics.median(self.ours) / statistics.median(self.theirs)


def render(comparisons: Sequence[Comparison]) -> str:
    """Return a table for people: medians, with the least and the most in brackets."""
    columns: list[tuple[str, Callable[[Comparison], str]]] = [
        ("", lambda each: each.what),
        ("gangline", lambda each: _times(each.ours)),
        ("peer", lambda each: _times(each.theirs)),
        ("", lambda each: each.peer),
        ("ratio", lambda each: f"{each.ratio:.2f}"),
        ("goal", lambda each: f"{each.goal:.2f} {'met' if each.ratio <= each.goal else 'MISSED'}"),
    ]
    rows = [[title for title, _ in columns], *([cell(each) for _, cell in columns] for each in comparisons)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(columns))]
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows)


def describe_machine() -> dict[str, str]:
    """Return what the numbers depend on."""
    return {
        "cpus": str(len(os.sched_getaffinity(0))),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "python": platform.python_version(),
        **{name: version(name) for name in ("ray", "torch", "numpy")},
    }


def _times(samples: Sequence[float]) -> str:
    middle = statistics.median(samples)
    unit, scale = ("s", 1) if middle >= 0.1 else ("ms", 1e3) if middle >= 1e-3 else ("us", 1e6)
    return f"{middle * scale:.3g} {unit} [{min(samples) * scale:.3g}-{max(samples) * scale:.3g}]"
