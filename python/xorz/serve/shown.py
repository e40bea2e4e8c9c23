"""What notebooks show of tenants: tables of HTML, of objects that are plain text and plain numbers to everyone else."""

import html
from collections.abc import Iterable, Sequence


class Summary(str):
    """A text, with the table that it is for notebooks."""

    table: str

    def __new__(cls, text: str, heads: Sequence[str], rows: Iterable[Sequence[str]]) -> "Summary":
        """The text, and the table's heads and rows."""
        self = super().__new__(cls, text)
        self.table = table(heads, rows)
        return self

    def _repr_html_(self) -> str:
        return self.table


class Memory(dict[str, int]):
    """Bytes by name, as a table for notebooks."""

    def _repr_html_(self) -> str:
        return table(("", "bytes"), [(name, f"{size:,}") for name, size in self.items()])


def table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table of HTML; cells may hold anything, as names of tensors and tenants do."""
    top = "".join(f"<th>{html.escape(head)}</th>" for head in heads)
    body = "".join(
        "<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in rows
    )
    return f"<table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table>"
