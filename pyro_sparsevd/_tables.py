"""Tables of text, as characters and as HTML."""

__all__ = ["as_html", "as_text"]

import html
from collections.abc import Sequence


def as_text(rows: Sequence[Sequence[str]]) -> str:
    """Returns a table with the first column aligned on the left and the others on the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ((row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])) for row in rows)
    return "\n".join("  ".join(line).rstrip() for line in lines)


def as_html(rows: Sequence[Sequence[str]]) -> str:
    """Returns a table whose first row is its head, with all text escaped."""
    head, *body = ([html.escape(cell) for cell in row] for row in rows)
    lines = ["".join(f"<th>{cell}</th>" for cell in head), *("".join(f"<td>{c}</td>" for c in row) for row in body)]
    return f"<table>{''.join(f'<tr>{line}</tr>' for line in lines)}</table>"
