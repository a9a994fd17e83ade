"""A small table as data, and the four ways it is shown: plain lines, rich, HTML, Markdown.

grid = Grid("parameters", ("group", "entries"), (("frozen", "3,145,728"), ("total", "3,145,728")), totals=1)
print("\\n".join(plain(grid)))
"""

from __future__ import annotations

import dataclasses as dc
from collections.abc import Sequence
from html import escape

from rich.table import Table
from rich.text import Text

from ftjax.report.units import visible


@dc.dataclass(frozen=True)
class Grid:
    """Text in rows and columns.

    Attributes:
      title: what it shows.
      header: one text per column.
      rows: as many texts each.
      totals: how many of the last rows sum up the others.
      words: columns of words, aligned left; the others hold numbers and are aligned right.
      note: a sentence below.
    """

    title: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    totals: int = 0
    words: frozenset[int] = frozenset({0})
    note: str = ""


def plain(grid: Grid) -> list[str]:
    """Lines with aligned columns."""
    everything = [grid.header, *grid.rows]
    widths = [max(len(row[i]) for row in everything) for i in range(len(grid.header))]

    def line(row: Sequence[str]) -> str:
        cells = [
            c.ljust(w) if i in grid.words else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True))
        ]
        return "  " + "  ".join(cells).rstrip()

    return [grid.title, *map(line, everything), *([f"  {grid.note}"] if grid.note else [])]


def rich_table(grid: Grid) -> Table:
    """For a terminal; cells are taken literally, never as markup."""
    table = Table(
        title=Text(grid.title, "bold"), title_justify="left", box=None, padding=(0, 2, 0, 0), header_style="dim"
    )
    for i, name in enumerate(grid.header):
        words = i in grid.words
        # Numbers keep their line; words give way on a narrow terminal.
        table.add_column(Text(name), justify="left" if words else "right", no_wrap=not words, overflow="fold")
    for i, row in enumerate(grid.rows):
        table.add_row(*map(Text, row), style="bold" if i >= len(grid.rows) - grid.totals else "")
    return table


def html(grid: Grid) -> str:
    """A ``<table>``, everything escaped."""

    def cells(row: Sequence[str], tag: str) -> str:
        return "".join(
            f"<{tag}{'' if i in grid.words else ' class=n'}>{escape(visible(c))}</{tag}>" for i, c in enumerate(row)
        )

    first_total = len(grid.rows) - grid.totals
    body = "\n".join(
        f"<tr{' class=total' if i >= first_total else ''}>{cells(row, 'td')}</tr>" for i, row in enumerate(grid.rows)
    )
    note = f"<p class=note>{escape(visible(grid.note))}</p>" if grid.note else ""
    head = f"<thead><tr>{cells(grid.header, 'th')}</tr></thead>"
    return f"<div class=wide><table>{head}\n<tbody>{body}</tbody></table></div>{note}"


def markdown(grid: Grid) -> str:
    """A pipe table."""

    def line(row: Sequence[str]) -> str:
        return "| " + " | ".join(visible(c).replace("|", "\\|").replace("\n", " ") for c in row) + " |"

    rule = "|" + "|".join("---" if i in grid.words else "---:" for i in range(len(grid.header))) + "|"
    return "\n".join([line(grid.header), rule, *map(line, grid.rows)])
