"""Plans as people read them: the matrix of who sends how much to whom, as text and as a picture."""

from __future__ import annotations

import html
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import os
    from collections.abc import Sequence

    from collective.planning import Plan

_SHOWN = 16
"""Rows and columns of a matrix that text shows; a larger one is cut in the middle."""
_CELL = 22
_MARGIN = 64


def text(plan: Plan) -> str:
    """Return the matrix, in bytes, and what it comes to."""
    rows, columns = _senders(plan), list(plan.dst.ranks)
    shown = [_shown(rows), _shown(columns)]
    table = [["from \\ to", *(("..." if rank is None else str(rank)) for rank in shown[1]), "sent"]]
    for row in shown[0]:
        if row is None:
            table.append(["..."] * (len(shown[1]) + 2))
            continue
        edges = plan.outgoing(row)
        cells = ["..." if rank is None else _cell(plan, edges, row, rank) for rank in shown[1]]
        table.append([str(row), *cells, size(plan.traffic(row).sent)])
    totals = ["..." if rank is None else size(plan.traffic(rank).received) for rank in shown[1]]
    table.append(["received", *totals, size(plan.total)])
    widths = [max(len(row[number]) for row in table) for number in range(len(table[0]))]
    lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in table]
    difference, block = plan.fairness
    return "\n".join(
        [
            f"{plan.src!r}",
            f"-> {plan.dst!r}",
            *lines,
            f"{size(plan.total)} in all, and any plan needs {size(plan.lower_bound)}; senders of the same elements "
            f"differ by {size(difference)}, a block has at most {size(block)}; in brackets what stays",
        ]
    )


def write(plan: Plan, file: str | os.PathLike[str]) -> None:
    """Write the matrix as an SVG picture, the darker the more bytes.

    Raises:
        ValueError: the file's name promises another format.
    """
    path = Path(file)
    if path.suffix not in ("", ".svg"):
        raise ValueError(f"{path} would be a {path.suffix[1:]} file, and plans are drawn as SVG; name it .svg")
    rows, columns = _senders(plan), list(plan.dst.ranks)
    edges = {row: plan.outgoing(row) for row in rows}
    most = max((count for row in edges.values() for count in row.values()), default=0) or 1
    width, height = _MARGIN + _CELL * len(columns) + 8, _MARGIN + _CELL * len(rows) + 40
    marks = [_label(_MARGIN + _CELL * (x + 0.5), _MARGIN - 8, str(rank)) for x, rank in enumerate(columns)]
    for y, row in enumerate(rows):
        top = _MARGIN + _CELL * y
        marks.append(_label(_MARGIN - 16, top + _CELL * 0.7, str(row)))
        for x, rank in enumerate(columns):
            count = edges[row].get(rank, 0)
            kept = plan.traffic(row).kept if row == rank else 0
            colour = f"rgb({(shade := 255 - round(200 * count / most))},{shade},255)" if count else "white"
            if kept:
                colour = "#d8ecd8"
            said = f"{row} -> {rank}: {size(count)}" + (f", {size(kept)} stay" if kept else "")
            marks.append(
                f'<rect x="{_MARGIN + _CELL * x}" y="{top}" width="{_CELL}" height="{_CELL}" fill="{colour}" '
                f'stroke="#bbb"><title>{html.escape(said)}</title></rect>'
            )
    note = f"{size(plan.total)} in all; rows send to columns; green: what stays"
    marks.append(f'<text x="8" y="{height - 14}">{html.escape(note)}</text>')
    path.write_text(
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{max(width, 360)}" height="{height}" '
        f'font-family="sans-serif" font-size="11">\n' + "\n".join(marks) + "\n</svg>\n"
    )


def size(count: int) -> str:
    """Return a number of bytes for people."""
    amount, units = float(count), ["B", "KiB", "MiB", "GiB", "TiB"]
    while amount >= 1024 and len(units) > 1:
        amount /= 1024
        del units[0]
    return f"{amount:.4g} {units[0]}"


def _senders(plan: Plan) -> list[int]:
    """Return the source's ranks, and those of the destination that pass something on."""
    sources = set(plan.src.ranks)
    return sorted(sources | {rank for rank in plan.dst.ranks if rank not in sources and plan.outgoing(rank)})


def _shown(ranks: Sequence[int]) -> list[int | None]:
    if len(ranks) <= _SHOWN:
        return list(ranks)
    return [*ranks[: _SHOWN // 2], None, *ranks[-_SHOWN // 2 :]]


def _cell(plan: Plan, edges: dict[int, int], row: int, column: int) -> str:
    kept = plan.traffic(row).kept if row == column else 0
    if kept:
        return f"[{size(kept)}]"
    return size(edges[column]) if edges.get(column) else "."


def _label(x: float, y: float, label: str) -> str:
    return f'<text x="{x}" y="{y}" text-anchor="middle">{html.escape(label)}</text>'
