"""Plain tables of frozen dataclasses, for people.

@dataclass(frozen=True)
class Row:
    name: str = column("kernel")
    ms: float = column("ms", ".3f")

print(table([Row("gemm", 1.25)]))
"""

import dataclasses
from collections.abc import Sequence
from typing import Any


def column(title: str, form: str = "", default: Any = dataclasses.MISSING) -> Any:
    """A dataclass field that a table shows under `title`, numbers in the format `form`."""
    return dataclasses.field(default=default, metadata={"title": title, "form": form})


def table(rows: Sequence[Any]) -> str:
    """The rows under their titles; None is a dash, and a column of nothing else is left out."""
    if not rows:
        return ""
    shown = [
        field
        for field in dataclasses.fields(rows[0])
        if any(getattr(row, field.name) is not None for row in rows)
    ]
    cells = [[field.metadata["title"] for field in shown]]
    cells += [[_cell(getattr(row, field.name), field.metadata["form"]) for field in shown] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    is_text = [not field.metadata["form"] for field in shown]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if text else cell.rjust(width)
            for cell, width, text in zip(line, widths, is_text, strict=True)
        ).rstrip()
        for line in cells
    )


def markdown(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Cells as a Markdown table."""
    lines = [titles, ["---"] * len(titles), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _cell(value: Any, form: str) -> str:
    return "-" if value is None else format(value, form)
