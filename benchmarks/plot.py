"""The results as dots on a logarithmic scale of time."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from benchmarks.report import is_ours

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from benchmarks.report import Measure

# The colours that Okabe and Ito chose to be told apart by everybody; each family has a marker of its own, too.
STYLES = {
    "Gangline": ("#D55E00", "o", True),
    "Gangline, group.empty": ("#D55E00", "o", False),
    "Ray": ("#0072B2", "s", True),
    "Ray Compiled Graphs": ("#56B4E9", "D", True),
    "Ray Direct Transport": ("#F0E442", "p", True),
    "xoscar": ("#009E73", "^", True),
    "Monarch": ("#CC79A7", "v", True),
    "torch Gloo": ("#E69F00", "P", True),
    "MPICH": ("#000000", "x", True),
}
"""Colour, marker, and whether it is filled, of the sides that are drawn."""
SAME = {"Ray objects": "Ray", "Ray, ProcessGroupGloo by hand": "Ray"}
LEFT_OUT = "4 ranks"
TICKS = {
    **{1e-6: "1 µs", 1e-5: "10 µs", 1e-4: "100 µs", 1e-3: "1 ms", 1e-2: "10 ms"},
    **{1e-1: "0.1 s", 1.0: "1 s", 10.0: "10 s"},
}


def draw(measures: Mapping[str, Sequence[Measure]], path: Path) -> None:
    """Draw every measure of a time against peers into an SVG file; of the collectives, those of 2 ranks."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    rows = [each for group in measures.values() for each in group if _drawn(each)]
    settings: dict[Any, Any] = {
        "svg.fonttype": "none",
        "svg.hashsalt": "gangline",
        "font.size": 9,
        "font.family": "sans-serif",
    }
    with pyplot.rc_context(settings):
        figure, axes = pyplot.subplots(figsize=(9, 1.2 + 0.27 * len(rows)), layout="constrained")
        labelled: set[str] = set()
        for place, measure in enumerate(rows):
            for side, summary in measure.sides.items():
                name = SAME.get(side, side)
                if name in STYLES:
                    colour, marker, filled = STYLES[name]
                    axes.plot(
                        summary.median,
                        place,
                        marker,
                        color=colour,
                        markerfacecolor=colour if filled else "white",
                        markersize=6,
                        markeredgewidth=1.5 if marker == "x" else 1,
                        label=None if name in labelled else name,
                        zorder=3 if is_ours(side) else 2,
                    )
                    labelled.add(name)
        axes.set_yticks(range(len(rows)), [measure.what for measure in rows])
        axes.invert_yaxis()
        axes.set_xscale("log")
        least, most = axes.get_xlim()
        ticks = {tick: text for tick, text in TICKS.items() if least <= tick <= most}
        axes.set_xticks(list(ticks), list(ticks.values()))
        axes.minorticks_off()
        axes.grid(axis="x", color="#CCCCCC", linewidth=0.6)
        axes.grid(axis="y", color="#EEEEEE", linewidth=0.6)
        axes.set_axisbelow(True)
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.tick_params(length=0)
        figure.legend(loc="outside upper center", ncols=4, frameon=False)
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, format="svg", facecolor="white", metadata={"Date": None, "Creator": None})
        pyplot.close(figure)


def _drawn(measure: Measure) -> bool:
    peers = [side for side in measure.sides if SAME.get(side, side) in STYLES and not is_ours(side)]
    return measure.unit == "s" and bool(peers) and LEFT_OUT not in measure.what
