"""Make the rendered notebooks out of `notebook.py`: ``make notebook``. Cells by jupytext, outputs by running them all."""

from __future__ import annotations

import os
import pathlib
import sys

HERE = pathlib.Path(__file__).parent.resolve()
# Jupyter has a module `notebook` too, which must not be the script of this folder.
sys.path = [path for path in sys.path if path != str(HERE)]

import jupytext  # noqa: E402
import nbformat  # noqa: E402
from nbclient import NotebookClient  # noqa: E402

SIZES = {"notebook.ipynb": "64x128", "notebook_4096.ipynb": "4096x4096"}


def render(name: str, size: str) -> None:
    """Run every cell at this size and write the file; an error in a cell is one here."""
    notebook = jupytext.read(HERE / "notebook.py", fmt="py:percent")
    os.environ["XORZ_NOTEBOOK_SIZE"] = size
    place = {"metadata": {"path": str(HERE)}}
    NotebookClient(notebook, timeout=3600, kernel_name="python3", resources=place).execute()
    # Nothing that differs from run to run but what was measured.
    notebook.metadata = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    for i, cell in enumerate(notebook.cells):
        cell.id, cell.metadata = f"cell-{i}", {}
    nbformat.write(notebook, HERE / name)


if __name__ == "__main__":
    for wanted in sys.argv[1:] or SIZES:
        render(wanted, SIZES[wanted])
