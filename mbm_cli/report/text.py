"""Text for people: a console that fits 100 columns, and tables that fit narrow terminals. Imports no PyTorch."""

import errno
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich import box
from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, Group, RenderResult
from rich.table import Column, Table

if TYPE_CHECKING:
    from mbm_cli.costs import Cost

WIDTH = 100
NARROW = 40  # below so many columns an epoch has two figures, and a check is written as lines
WORD = 12  # characters of a longer word that are kept together; names of multipliers may be broken
_FRAME, _FRAME_OF_COLUMN = 1, 2  # characters beside what a table holds


def percent(fraction: float | None) -> str:
    return "-" if fraction is None else f"{100 * fraction:.2f} %"


class _Console(Console):
    def on_broken_pipe(self) -> None:
        """Raise BrokenPipeError, where Rich would end the process without clean-up."""
        raise BrokenPipeError(errno.EPIPE, os.strerror(errno.EPIPE))


def console(stderr: bool = False, quiet: bool = False) -> Console:
    """Return a console on standard output (or error) that never exceeds 100 columns."""
    made = _Console(stderr=stderr, quiet=quiet, highlight=False, markup=False, emoji=False, soft_wrap=False)
    if made.width > WIDTH or not made.is_terminal:
        made.width = WIDTH
    return made


class TextTable(Table):
    """A table that prints a line for each cell where a column would be too narrow for its words and numbers."""

    def least_width(self) -> int:
        """Return the width below which words or numbers would be broken, but for long names."""
        return _FRAME + sum(_FRAME_OF_COLUMN + _least(column) for column in self.columns)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        spare = options.max_width - self.least_width()
        if spare >= 0:
            # Rich would shrink the widest columns alone, and break the words in them.
            for i, column in enumerate(sorted(self.columns, key=_wish)):
                more = min(_wish(column), spare // (len(self.columns) - i))
                column.width = _least(column) + more
                spare -= more
            yield from super().__rich_console__(console, options)
            return
        if self.title:
            yield self.title
        for row in zip(*(column.cells for column in self.columns), strict=True):
            for column, cell in zip(self.columns, row, strict=True):
                if cell:
                    yield f"{column.header}: {cell}" if column.header else cell
            yield ""


def _least(column: Column) -> int:
    """Return the width of the longest word, at most WORD; of the widest cell where nothing wraps."""
    if column.no_wrap:
        return _widest(column)
    return max((min(WORD, cell_len(word)) for text in _texts(column) for word in text.split()), default=0)


def _widest(column: Column) -> int:
    return max(map(cell_len, _texts(column)))


def _wish(column: Column) -> int:
    return _widest(column) - _least(column)


def _texts(column: Column) -> list[str]:
    return [str(column.header), *map(str, column.cells)]


def table(title: str | None, columns: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1) -> TextTable:
    """Make a table of text; the first ``left`` columns are words, the others numbers."""
    made = TextTable(title=title, title_justify="left", box=box.SIMPLE_HEAD, title_style="bold", padding=(0, 1, 0, 0))
    for i, column in enumerate(columns):
        made.add_column(column, justify="left" if i < left else "right", overflow="fold")
    for row in rows:
        made.add_row(*row)
    return made


def costs_table(costs: "Sequence[Cost]") -> Group:
    """Make the table of what sources report about multipliers, with the sources below it; nothing without costs."""
    sources = list(dict.fromkeys(f"{cost.source}; {cost.technology}" for cost in costs))
    quantities = list(dict.fromkeys(name for cost in costs for name in cost.figures))
    rows = [
        (
            cost.multiplier,
            f"[{sources.index(f'{cost.source}; {cost.technology}') + 1}] {cost.where}",
            *(f"{cost.figures[name]:.3g}" if name in cost.figures else "-" for name in quantities),
        )
        for cost in costs
    ]
    title = "costs; the exact multiplier of the same operands in the same source is 1"
    notes = [f"[{i}] {source}" for i, source in enumerate(sources, 1)]
    parts: list[Table | str] = [table(title, ("name", "source", *quantities), rows, left=2), *notes]
    return Group(*(parts if costs else []))


def print_table(columns: tuple[str, ...], rows: Sequence[Sequence[str]]) -> None:
    """Print a table of words."""
    console().print(table(None, columns, rows, left=len(columns)))
