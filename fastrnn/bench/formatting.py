"""Times and tables as text."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def format_seconds(seconds: float) -> str:
    """``0.01234`` -> ``12.3 ms``: three significant digits."""
    scale, unit = time_unit(seconds)
    value = seconds * scale
    return f"{value:.{max(0, 2 - int(np.floor(np.log10(max(value, 1e-9)))))}f} {unit}"


def time_unit(seconds: float) -> tuple[float, str]:
    """The unit to print a time in, and how many of it make a second."""
    for scale, unit in ((1.0, "s"), (1e3, "ms")):
        if seconds * scale >= 1.0:
            return scale, unit
    return 1e6, "µs"


def markdown_table(cells: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a Markdown table; the first row is the header, the first column text."""
    widths = [max(len(row[i]) for row in cells) for i in range(len(cells[0]))]

    def line(row: Sequence[str]) -> str:
        first, *rest = (
            cell.ljust(w) if i == 0 else cell.rjust(w)
            for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        )
        return f"| {' | '.join([first, *rest])} |"

    rule = "|" + "|".join(
        "-" * (w + 2) if i == 0 else "-" * (w + 1) + ":" for i, w in enumerate(widths)
    )
    return [line(cells[0]), rule + "|", *(line(row) for row in cells[1:])]
