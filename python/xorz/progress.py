"""Bars for what takes long, as transformers shows them: tqdm's, where it is installed, and none where nobody looks."""

import os
import sys
from typing import Any


class _Silent:
    """A bar that shows nothing."""

    def __enter__(self) -> "_Silent":
        """Begin a bar that nobody sees."""
        return self

    def __exit__(self, *_: object) -> None:
        """End a bar that nobody saw."""

    def update(self, amount: float = 1) -> None:
        """Whatever was done is not shown."""

    def reset(self, total: float | None = None) -> None:
        """Whatever begins is not shown."""


def bar(**options: Any) -> Any:
    """tqdm's bar with these options (`total`, `desc`, `unit`, ...), or one that shows nothing: without tqdm, where stderr is no
    terminal and no notebook, or where Hugging Face's libraries were told to show none (`HF_HUB_DISABLE_PROGRESS_BARS`).
    """
    try:
        from tqdm.auto import tqdm
    except ModuleNotFoundError:
        return _Silent()
    if _disabled():
        return _Silent()
    if options.get("unit") == "B":
        options |= {"unit_scale": True, "unit_divisor": 1000}
    return tqdm(leave=False, **options)


def seen(shown: Any) -> bool:
    """Whether anybody sees what a bar shows."""
    return not isinstance(shown, _Silent)


def _disabled() -> bool:
    if os.environ.get("HF_HUB_DISABLE_PROGRESS_BARS", "0").upper() in ("1", "ON", "YES", "TRUE"):
        return True
    notebook = "ipykernel" in sys.modules
    return not notebook and not (sys.stderr is not None and sys.stderr.isatty())
