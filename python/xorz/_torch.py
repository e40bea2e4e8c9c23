"""Says in a sentence that torch is missing or too old, before anything here imports it."""

import re
import sys

OLDEST = (2, 10)


def require() -> None:
    """Import torch; ImportError where this Python has none, or one older than the library can be loaded into."""
    wanted = f"xorz needs torch {OLDEST[0]}.{OLDEST[1]} or newer"
    try:
        import torch
    except ModuleNotFoundError as error:
        if error.name != "torch":
            raise
        raise ImportError(
            f"{wanted}, but {sys.executable} has no torch; install it there, for example with `pip install torch`",
            name="torch",
        ) from None
    # A folder named torch beside the script can be imported, too, but has no version.
    version = str(getattr(torch, "__version__", "of no version"))
    release = re.match(r"(\d+)\.(\d+)", version)
    if release is None or tuple(map(int, release.groups())) < OLDEST:
        where = next(iter(getattr(torch, "__path__", ["?"])))
        raise ImportError(
            f"{wanted}, but the torch in {where} is {version}; install one that is, for example with "
            f"`{sys.executable} -m pip install 'torch>={OLDEST[0]}.{OLDEST[1]}'`",
            name="torch",
        )


require()
