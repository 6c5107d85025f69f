"""Put the latest results into README.md, and draw them: `python -m benchmarks readme [FOLDER]`."""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.machine import PACKAGES
from benchmarks.plot import draw
from benchmarks.report import Measure, is_ours, quantity, ratio

if TYPE_CHECKING:
    from collections.abc import Sequence

ROOT = Path(__file__).parent.parent
RESULTS = Path(__file__).parent / "results"
PLOT = RESULTS / "times.svg"
ORDER = {
    "calls": "Calls",
    "collectives": "Collectives on one host",
    "scopes": "Scopes",
    "n_to_m": "Many to many",
    "store": "Tensors by reference",
    "start": "Starting and stopping",
    "idle": "Idling",
}
BEGIN, END = "<!-- benchmarks: begin -->", "<!-- benchmarks: end -->"


def main(arguments: Sequence[str]) -> int:
    """Write the part of README.md between the markers, and the plot that it shows."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks readme", description=__doc__)
    parser.add_argument("folder", nargs="?", type=Path, default=RESULTS, help="where the files of --json are")
    folder = parser.parse_args(arguments).folder
    files = [folder / f"{name}.json" for name in ORDER]
    reports = [json.loads(file.read_text()) for file in files if file.exists()]
    if not reports:
        parser.error(f"{folder} holds none of {', '.join(f'{name}.json' for name in ORDER)}; run `make bench` first")
    measures = {report["benchmark"]: [Measure.from_json(data) for data in report["measures"]] for report in reports}
    draw(measures, PLOT)
    readme = ROOT / "README.md"
    readme.write_text(replace(readme.read_text(), section(reports, measures)))
    return 0


def replace(text: str, section: str) -> str:
    """Return a text with another section between its markers. Raises: ValueError: it has none."""
    found, count = re.subn(f"{BEGIN}.*{END}", lambda _: f"{BEGIN}\n{section}\n{END}", text, flags=re.DOTALL)
    if count != 1:
        raise ValueError(f"there must be one {BEGIN} ... {END} in the text, and there are {count}")
    return found


def section(reports: Sequence[dict[str, Any]], measures: dict[str, list[Measure]]) -> str:
    """Return what the README says of the results."""
    verdicts = [verdict for each in measures.values() for measure in each for verdict in measure.verdicts()]
    met = sum(verdict.met for verdict in verdicts)
    paragraphs = [
        machine(reports),
        f"Beside a peer's time is Gangline's as a part of it, with the goal for that part: {met} of {len(verdicts)} "
        "goals are met.",
        f"![Times of Gangline and its peers, on a logarithmic scale]({PLOT.relative_to(ROOT)})",
    ]
    for report in reports:
        name = report["benchmark"]
        paragraphs += [f"**{ORDER[name]}**, rounds: {report['rounds']}", table(measures[name])]
    return "\n\n".join(paragraphs)


def machine(reports: Sequence[dict[str, Any]]) -> str:
    """Return what the numbers depend on; of the first report, where they differ."""
    facts = reports[0]["machine"]
    versions = ", ".join(f"{name} {facts[name]}" for name in PACKAGES if facts[name] != "missing")
    return (
        f"Medians, all sides in turns in one run, on {facts['cpus']} cores of {facts['cpu']}, {facts['memory']}, "
        f"{facts['system']}, Python {facts['python']}; {versions}."
    )


def table(measures: Sequence[Measure]) -> str:
    """Return a table with a column for each side."""
    sides = list(dict.fromkeys(side for measure in measures for side in (*measure.sides, *measure.absent)))
    sides.sort(key=lambda side: not is_ours(side))
    rows = [["", *sides], ["---", *("---:" for _ in sides)]]
    rows += [[measure.what, *(cell(measure, side) for side in sides)] for measure in measures]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def cell(measure: Measure, side: str) -> str:
    """Return a side's median, and what Gangline makes of it."""
    if side in measure.absent:
        return "missing"
    if side not in measure.sides:
        return ""
    parts = [quantity(measure.sides[side].median, measure.unit)]
    for goal, value in measure.verdicts():
        if side != (goal.peer or goal.side):
            continue
        of = "" if goal.side == "Gangline" else goal.side.removeprefix("Gangline, ") + " "
        if goal.difference:
            reached, wanted = f"{value:+.2g}", f"{goal.at_most:+.2g} {measure.unit}"
        elif goal.peer is None:
            reached, wanted = "", quantity(goal.at_most, measure.unit)
        else:
            reached, wanted = ratio(value), ratio(goal.at_most)
        part = f"{of}{reached}, goal {wanted}" if reached else f"goal {wanted}"
        parts.append(part if value <= goal.at_most else f"**{part}: missed**")
    share = measure.unasked(side)
    if share is not None:
        parts.append(ratio(share))
    return "<br>".join(parts)
