"""A policy under training as tenants: each version of a chain is one, `policy-v17`, and `policy` is what was published last.

Nothing of the base changes and no request waits: whoever was let in as `policy` keeps the version that it meant then, until
its last token. The path of such a tenant is a folder of `xorz.Versions`, or FOLDER@NUMBER. Which versions may still be asked
for by name is the setting `max_staleness`: so many before the newest.
"""

import re
from collections.abc import Iterable
from typing import Any

from ..versions import against_base, chain_of


def found(path: Any, number: int | None = None) -> tuple[int, str] | None:
    """The version that a path names, of a folder of versions (the newest without `@NUMBER`), and the path of that very version.

    Args:
        path: of whatever a tenant may lie at; None for all that are no versions.
        number: of the version, where the path does not say it.

    Raises:
        OSError: there is no such version; ValueError: the folder's list is damaged, or the version is no tenant.
    """
    chain = chain_of(path)
    if chain is None:
        return None
    number = against_base(chain[0], chain[1] if number is None else number)[0]
    return number, f"{chain[0]}@{number}"


def named(name: str, number: int) -> str:
    """What version `number` of a policy is called."""
    return f"{name}-v{number}"


def leaving(names: Iterable[str], name: str, number: int, max_staleness: int) -> list[str]:
    """Of `names`, the versions of the policy `name` that are too old when `number` is served, or come after it."""
    mine = re.compile(rf"{re.escape(name)}-v([0-9]{{1,18}})")
    found = ((other, mine.fullmatch(other)) for other in names)
    return [other for other, match in found if match and not 0 <= number - int(match[1]) <= max_staleness]
