"""Tables for papers, in LaTeX with booktabs."""

from mbm_cli.report.text import TextTable

_ESCAPES = {c: f"\\{c}" for c in "&%$#_{}"} | {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
}


def latex(table: TextTable) -> str:
    """Write a table as ``tabular``; the title becomes a comment."""
    alignment = "".join("r" if column.justify == "right" else "l" for column in table.columns)
    rows = zip(*(column.cells for column in table.columns), strict=True)
    lines = [
        f"% {table.title}" if table.title else "%",
        f"\\begin{{tabular}}{{{alignment}}}",
        r"\toprule",
        _line([str(column.header) for column in table.columns]),
        r"\midrule",
        *(_line([str(cell) for cell in row]) for row in rows),
        r"\bottomrule",
        r"\end{tabular}",
    ]
    return "\n".join(lines) + "\n"


def _line(cells: list[str]) -> str:
    escaped = ("".join(_ESCAPES.get(c, c) for c in " ".join(cell.split())) for cell in cells)
    return " & ".join(escaped) + r" \\"
