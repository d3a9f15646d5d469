"""Tables as plain text: a benchmark runs where no package but torch and numpy is."""

from collections.abc import Sequence

Row = Sequence[str]


def table(title: str, names: Row, rows: Sequence[Row], left: Sequence[str] = ()) -> str:
    """Return the table: a line for each row, every column as wide as its widest cell.

    Args:
        title: The line above it.
        names: Of the columns.
        rows: Cells; what is missing at the end of a row is empty.
        left: Columns that begin at the left; the others end at the right.
    """
    whole = [[*row, *[""] * (len(names) - len(row))] for row in (names, *rows)]
    widths = [max(map(len, column)) for column in zip(*whole, strict=True)]
    lines = [title]
    for row in whole:
        cells = [
            cell.ljust(width) if name in left else cell.rjust(width)
            for name, cell, width in zip(names, row, widths, strict=True)
        ]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)
