"""Modules that are run once per tenant on the whole batch, because inside of them rows go where no layer can follow: experts
that are given the tokens which a router chose, rows that are sorted, packed or padded.

Where a layer's rows could not be proven (`proof`), the smallest module around it is looked for of which they can: it is given
and gives tensors alone, the rows of all that it gives are known, and a run of it leaves nothing behind. Such a module runs once
with each tenant on all rows, and each row is taken from its tenant's run. Its weights are held as deltas as before.
"""

import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from .rows import TABLE, Layout, RowMap, lead_of
from .site import Site
from .state import KeptState
from .weight import Weight, with_dense

_PLAIN = (type(None), bool, int, float, str, torch.dtype, torch.device)
_TAKEN = ("_xorz", "_xorz_owner", "forward")


def around(model: nn.Module, layouts: dict[Any, Layout | None]) -> dict[str, nn.Module]:
    """Name -> module: what lies around layers whose rows are not known, and may be run once per tenant."""
    out: dict[str, nn.Module] = {}
    modules = dict(model.named_modules())
    for name in _unknown(layouts):
        while "." in name:
            name = name.rpartition(".")[0]
            module = modules.get(name)
            state = {} if module is None else module.__dict__
            if "_xorz_whole" in state or (state and not any(taken in state for taken in _TAKEN)):
                out[name] = module
    return out


def _unknown(layouts: dict[Any, Layout | None]) -> list[str]:
    """Names of the layers whose rows are not known, or that an op met beside such rows."""
    found = [place for (place, _), layout in layouts.items() if layout is None]
    sites = [place[0] if isinstance(place, tuple) else place for place in found]
    return list(dict.fromkeys(site.name for site in sites if isinstance(site, Site)))


class Watch:
    """Notes what these modules are given and give in the runs that find out where rows are."""

    def __init__(self, modules: dict[str, nn.Module]) -> None:
        """Watch these modules, which are given by name."""
        self._names = {module: name for name, module in modules.items()}
        self._unfit: set[str] = set()

    @contextmanager
    def noting(self, recorder: Any) -> Iterator[None]:
        """Inside of it, calls of the modules on this thread are noted by `recorder`."""
        thread = threading.get_ident()
        begun: list[tuple[nn.Module, list[Any], KeptState]] = []

        def before(module: nn.Module, args: Any, kwargs: Any) -> None:
            if threading.get_ident() == thread:
                begun.append((module, _copies((args, kwargs)), KeptState(module)))

        def after(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            if threading.get_ident() != thread:
                return
            # What raised on the way has no end.
            while begun and begun[-1][0] is not module:
                begun.pop()
            if begun:
                _, given, state = begun.pop()
                self._note(recorder, self._names[module], (args, kwargs), output, given, state)

        with ExitStack() as stack:
            for module in self._names:
                stack.callback(module.register_forward_pre_hook(before, with_kwargs=True).remove)
                stack.callback(module.register_forward_hook(after, with_kwargs=True).remove)
            yield

    def _note(
        self, recorder: Any, name: str, given: Any, output: Any, copies: list[Any], state: KeptState
    ) -> None:
        leaves = [*tree_leaves(given), *tree_leaves(output)]
        strange = any(not isinstance(leaf, (Tensor, *_PLAIN)) for leaf in leaves)
        nowhere = any(isinstance(leaf, Weight) for leaf in tree_leaves(output))
        if strange or nowhere or state.changed() or not _same(copies, tree_leaves(given)):
            self._unfit.add(name)
        for i, leaf in enumerate(tree_leaves(output)):
            recorder.note((name, "out", i), leaf)

    def smallest(self, proof: Any) -> set[str]:
        """Names of modules: of each unknown layer the smallest one around it that can be run once per tenant."""
        seen: dict[str, list[Layout | None]] = {}
        for (place, _), layout in proof.layouts.items():
            if isinstance(place, tuple) and len(place) == 3 and place[0] in self._names.values():
                seen.setdefault(place[0], []).append(layout)
        fit = {
            name
            for name, found in seen.items()
            if name not in self._unfit and None not in found and set(found) != {TABLE}
        }
        out = set()
        for name in _unknown(proof.layouts):
            while "." in name:
                name = name.rpartition(".")[0]
                if name in fit:
                    out.add(name)
                    break
        return out


def _copies(args: Any) -> list[Any]:
    return [
        leaf.clone() if isinstance(leaf, Tensor) and not isinstance(leaf, Weight) else leaf
        for leaf in tree_leaves(args)
    ]


def _same(copies: list[Any], leaves: list[Any]) -> bool:
    """Whether a run has left what it was given as it was."""
    return len(copies) == len(leaves) and all(
        torch.equal(a.nan_to_num(), b.nan_to_num())
        for a, b in zip(copies, leaves, strict=True)
        if isinstance(a, Tensor) and not isinstance(a, Weight)
    )


def run(name: str, rows: RowMap, plain: Any, owner: Any, args: Any, kwargs: Any) -> Any:
    """`plain(*args, **kwargs)` once with each tenant on all rows; of each row its tenant's.

    Raises:
        RuntimeError: it is given or gives something of which rows are not proven.
    """
    for leaf in tree_leaves((args, kwargs)):
        if not isinstance(leaf, (Tensor, *_PLAIN)):
            raise _refused(name, rows, f"was given a {type(leaf).__name__}")
    each, spec = [], None
    for slot in rows.used:
        mine, more = with_dense(args, kwargs, slot)
        with owner.active.set(rows.uniform(slot)):
            leaves, spec = tree_flatten(plain(*mine, **more))
        each.append(leaves)
    if any(len(leaves) != len(each[0]) for leaves in each):
        raise _refused(name, rows, "gave another number of outputs for each")
    merged = [_merged(name, rows, i, values) for i, values in enumerate(zip(*each, strict=True))]
    return tree_unflatten(merged, spec)


def _merged(name: str, rows: RowMap, i: int, values: tuple[Any, ...]) -> Any:
    first = values[0]
    if not isinstance(first, Tensor):
        if not isinstance(first, _PLAIN) or any(value != first for value in values):
            raise _refused(name, rows, f"gave a {type(first).__name__}")
        return first
    if any(value.shape != first.shape for value in values):
        raise _refused(name, rows, "gave another shape for each")
    layout = rows.where((name, "out", i), first)
    if layout is None or layout == TABLE:
        if all(torch.equal(value, first) for value in values[1:]):
            return first
        raise rows.unproven(lead_of(first), f"whoever takes what {name} gives")
    return rows.picked(layout, lead_of(first), values)


def _refused(name: str, rows: RowMap, what: str) -> RuntimeError:
    return RuntimeError(
        f"xorz: {name} has layers whose rows cannot be told while {rows.describe()} are active, and {what}, so that it cannot "
        "be run once for each; use one tenant at a time"
    )
