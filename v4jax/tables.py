"""Plain text tables and short numbers for the terminal."""

import math
from collections.abc import Sequence


def table(header: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1) -> str:
    """Columns of equal width, indented by two; the first `left` are flush left, the rest right."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    lines = []
    for row in (header, *rows):
        cells = [
            cell.ljust(width) if i < left else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  " + "  ".join(cells).rstrip())
    return "\n".join(lines)


def short(number: int | float, billion: str = "G", trillion: str = "T") -> str:
    """A number with its unit: 13270091351 as "13.27 G"; no `trillion`: 1573.0 G, not 1.57 T."""
    units = [(1e12, trillion), (1e9, billion), (1e6, "M"), (1e3, "k")]
    for factor, letter in units:
        if letter and abs(number) >= factor:
            return f"{number / factor:.{2 if number < 1000 * factor else 1}f} {letter}"
    return f"{number:.0f} "


def parameters(number: int) -> str:
    """284332230231 as "284.33 B"."""
    return short(number, "B", "").strip()


def tenths(number: int | float) -> str:
    """One digit after the point, halves up: 3514.25 as "3514.3"."""
    return f"{math.floor(10 * number + 0.5) / 10:.1f}"


def percent(ratio: int | float) -> str:
    """0.1008 as "10.1 %"; two digits where one after the point would say nothing."""
    return f"{100 * ratio:.1f} %" if ratio >= 0.001 else f"{100 * ratio:.2g} %"
