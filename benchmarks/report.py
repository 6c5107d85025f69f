"""What a benchmark reports: how long each side took, and what was to be reached."""

from __future__ import annotations

import math
import statistics
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

INSTALL = "pip install 'gangline[bench]'"


@dataclass(frozen=True)
class Summary:
    """What is kept of a side's samples.

    :param low: a tenth of the samples are below it; `high`: a tenth are above it.
    :param rounds: the median of each round.
    """

    median: float
    low: float
    high: float
    least: float
    most: float
    samples: int
    rounds: list[float]

    @staticmethod
    def of(rounds: Sequence[Sequence[float]]) -> Summary:
        """Sum up samples, given by round."""
        pooled = sorted(sample for row in rounds for sample in row)
        last = len(pooled) - 1
        return Summary(
            statistics.median(pooled),
            pooled[round(last * 0.1)],
            pooled[round(last * 0.9)],
            pooled[0],
            pooled[-1],
            len(pooled),
            [statistics.median(row) for row in rounds],
        )


@dataclass(frozen=True)
class Goal:
    """What one side is to reach.

    :param peer: the side that it is compared with; without one, `at_most` is for the median itself.
    :param difference: whether `at_most` is for the difference of the medians instead of for their ratio.
    :param interval: whether it is for the lower end of the ratio's 95 % interval, over rounds: then it is missed only
        where noise does not explain it.
    """

    side: str
    peer: str | None
    at_most: float
    difference: bool = False
    interval: bool = False


class Verdict(NamedTuple):
    """A goal, and what was reached."""

    goal: Goal
    value: float

    @property
    def met(self) -> bool:
        return self.value <= self.goal.at_most


@dataclass(frozen=True)
class Measure:
    """One thing that was measured on several sides in turns.

    :param unit: of the samples: "s", "MiB" or "%".
    :param sides: by name; those that begin with "Gangline" are ours.
    :param absent: why there are no samples of a side.
    :param nbytes: how much one operation moves, where that is the point.
    """

    what: str
    unit: str
    sides: Mapping[str, Summary]
    goals: Sequence[Goal] = ()
    absent: Mapping[str, str] = field(default_factory=dict)
    nbytes: int = 0

    def verdicts(self) -> list[Verdict]:
        """Return the goals for which both sides were measured."""
        return [
            Verdict(goal, self.value(goal))
            for goal in self.goals
            if goal.side in self.sides and (goal.peer is None or goal.peer in self.sides)
        ]

    def value(self, goal: Goal) -> float:
        """Return what a goal is about."""
        ours = self.sides[goal.side].median
        if goal.peer is None:
            return ours
        if goal.interval:
            return ratio_interval(self.sides[goal.side].rounds, self.sides[goal.peer].rounds)[0]
        theirs = self.sides[goal.peer].median
        return ours - theirs if goal.difference else ours / theirs

    def unasked(self, peer: str) -> float | None:
        """Return the ratio of Gangline to a peer for which there is no goal."""
        ours = self.sides.get("Gangline")
        if ours is None or is_ours(peer) or any(goal.peer == peer for goal in self.goals):
            return None
        return ours.median / self.sides[peer].median

    def as_json(self) -> dict[str, Any]:
        return asdict(self)

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> Measure:
        sides = {name: Summary(**summary) for name, summary in data["sides"].items()}
        return Measure(**{**data, "sides": sides, "goals": [Goal(**goal) for goal in data["goals"]]})


def ratio_interval(ours: Sequence[float], theirs: Sequence[float]) -> tuple[float, float]:
    """Return the 95 % interval of the median ratio of rounds in turns, by the sign test's order statistics."""
    ratios = sorted(mine / other for mine, other in zip(ours, theirs, strict=True))
    tail, outside = 0.0, 0
    while outside < len(ratios) // 2:
        tail += math.comb(len(ratios), outside) / 2 ** len(ratios)
        if tail > 0.025:
            break
        outside += 1
    return ratios[max(0, outside - 1)], ratios[len(ratios) - max(1, outside)]


def is_ours(side: str) -> bool:
    """Return whether a side is Gangline's."""
    return side.startswith("Gangline")


def render(measures: Sequence[Measure]) -> str:
    """Return a table for people: medians, with the 10th and the 90th percentile in brackets."""
    rows = [["", "median [10 % - 90 %]", "Gangline's share of it, and the goal"]]
    for measure in measures:
        rows.append([measure.what, "", ""])
        for name, summary in measure.sides.items():
            rows.append([f"  {name}", _spread(measure, summary), "; ".join(_remarks(measure, name))])
        rows += [[f"  {name}", f"missing: {why}", ""] for name, why in measure.absent.items()]
    widths = [max(len(row[column]) for row in rows) for column in range(2)]
    lines = ["  ".join([*(cell.ljust(w) for cell, w in zip(row, widths, strict=False)), row[2]]) for row in rows]
    missed = [each for measure in measures for each in measure.verdicts() if not each.met]
    goals = sum(len(measure.verdicts()) for measure in measures)
    lines += ["", f"{goals - len(missed)} of {goals} goals met"]
    return "\n".join(line.rstrip() for line in lines)


def number(value: float) -> str:
    """Return three significant digits, without an exponent."""
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"


def quantity(value: float, unit: str) -> str:
    """Return a value with the unit that suits it."""
    scale, name = scaled(value, unit)
    return f"{number(value * scale)} {name}"


def scaled(value: float, unit: str) -> tuple[float, str]:
    """Return the factor and the name of the unit that suits a value."""
    if unit != "s" or value >= 0.1:
        return 1, unit
    return (1e3, "ms") if value >= 1e-3 else (1e6, "us")


def _spread(measure: Measure, summary: Summary) -> str:
    scale, unit = scaled(summary.median, measure.unit)
    middle, low, high = (number(value * scale) for value in (summary.median, summary.low, summary.high))
    rate = f", {measure.nbytes / summary.median / 1e9:.2f} GB/s" if measure.nbytes else ""
    return f"{middle} {unit} [{low} - {high}]{rate}"


def _remarks(measure: Measure, name: str) -> list[str]:
    remarks = []
    for goal, value in (verdict for verdict in measure.verdicts() if name == (verdict.goal.peer or verdict.goal.side)):
        which = "" if goal.side == "Gangline" else f"{goal.side.removeprefix('Gangline, ')}: "
        verdict = "met" if value <= goal.at_most else "MISSED"
        if goal.difference or goal.peer is None:
            more = " more" if goal.peer else ""
            reached, wanted = quantity(value, measure.unit), quantity(goal.at_most, measure.unit)
            remarks.append(f"{which}{reached}{more}, goal {wanted} {verdict}")
        else:
            remarks.append(f"{which}{ratio(value)}, goal {ratio(goal.at_most)} {verdict}")
    share = measure.unasked(name)
    if share is not None:
        remarks.append(ratio(share))
    return remarks


def ratio(value: float) -> str:
    """Return a ratio with two digits or more."""
    return f"{value:.2g}" if value < 0.1 else f"{value:.2f}" if value < 10 else number(value)
