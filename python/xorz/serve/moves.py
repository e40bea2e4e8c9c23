"""Where a model moves rows by what is in them: tokens that a mask keeps, rows sorted by their lengths, experts' tokens.

In the batch that a model is tried on, such rows may happen to stay in their places (a mask that keeps everything, lengths that
are sorted already). A layer that is given them then seems to have the rows of the batch; the next batch puts them elsewhere.
So the trial follows what depends on the model's inputs, op by op: where positions are read from such tensors (an index, a mask,
an order), and what is taken by them has its rows in place all the same, no layer's rows are believed that come of it, up to
where it is written to positions again (`index_put`, `index_add`, `scatter`).
"""

import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakTensorKeyDictionary

from .rows import TABLE, Layout

_DATA, _MOVED = 1, 2
_WRITES = (
    "index_put",
    "index_add",
    "index_copy",
    "index_fill",
    "scatter",
    "scatter_add",
    "scatter_reduce",
    "masked_scatter",
)
# Op -> which argument is the dimension, and which the index; 0 where the op finds an order itself.
_ALONG = {"index_select": (1, 2), "gather": (1, 2), "sort": (1, 0), "topk": (2, 0)}
_ALONG |= {"unique_dim": (1, 0), "unique_dim_consecutive": (1, 0), "unique_consecutive": (3, 0)}
_ALL = ("take", "masked_select")


class Moves(TorchDispatchMode):
    """Follows one run. Without `verdicts` it notes each place where rows may move; with them, `moved` tells what comes of it.

    Attributes:
        places: a line of the model's code, an op, and the dimensions that are read by positions which depend on the inputs.
    """

    def __init__(self, recorder: Any, inputs: Sequence[Tensor], verdicts: Mapping[Any, bool] | None) -> None:
        """`inputs`: of the model; `verdicts`: of each place, whether what comes of it is not to be believed."""
        super().__init__()
        self._recorder, self._verdicts = recorder, verdicts
        self._labels = WeakTensorKeyDictionary()
        self._listed = False
        self.places: set[Any] = set()
        self._times: dict[Any, int] = {}
        for tensor in inputs:
            self._labels[tensor] = _DATA

    def moved(self, x: Tensor) -> bool:
        """Whether rows of `x` were moved by what is in them, without having been seen to move."""
        return bool(self._labels.get(x, 0) & _MOVED)

    def listed(self, x: Tensor) -> None:
        """Words of `x` have become Python's, which cannot be followed."""
        self._listed |= (
            bool(self._labels.get(x, 0) & _DATA) and not x.is_floating_point() and x.dtype != torch.bool
        )

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the op, and label what it gives."""
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        name = func._schema.name.partition("::")[2]
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        if name == "_local_scalar_dense":
            self.listed(given[0])
            return out
        label = 0
        for tensor in given:
            label |= self._labels.get(tensor, 0)
        if name.rstrip("_") in _WRITES:
            label = label & _DATA | self._labels.get(given[0], 0)
        if name.endswith("_like") or name.startswith("new_"):
            label = 0
        if name == "lift_fresh" and self._listed:
            label |= _DATA
        leaves = [leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]
        taken = self._place(name, args, kwargs, leaves[0]) if label & _DATA and leaves else 0
        for i, leaf in enumerate(leaves):
            # What comes second is an order, not what is ordered.
            self._labels[leaf] = label | (0 if i else taken)
            if label and leaf._is_view() and name.endswith("_") and leaf._base is not None:
                self._labels[leaf._base] = self._labels.get(leaf._base, 0) | label | taken
        return out

    def _place(self, name: str, args: Any, kwargs: Any, out: Tensor) -> int:
        """The label of what is taken by positions that depend on the inputs."""
        source, dims = self._source(name, args, kwargs, out)
        if source is None or not dims or (not self._labels.get(source, 0) & _DATA and source is not out):
            return 0
        place = (_line(), name, tuple(dims))
        self.places.add(place)
        if self._verdicts is None:
            time = self._times[place] = self._times.get(place, 0) + 1
            self._recorder.note(("moves", place, time), source)
            self._recorder.note(("moved", place, time), out)
            return 0
        return _MOVED if self._verdicts.get(place, True) else 0

    def _source(self, name: str, args: Any, kwargs: Any, out: Tensor) -> tuple[Tensor | None, list[int]]:
        """The tensor that something is taken of, and the dimensions along which the inputs say what."""
        x = args[0] if args else None
        if name in ("cat", "stack") and self._listed:
            # Pieces whose lengths or order Python has read.
            dim = args[1] if len(args) > 1 else kwargs.get("dim", 0)
            return out, [dim % max(out.dim(), 1)]
        if not isinstance(x, Tensor):
            return None, []
        if name == "index":
            return x, self._indexed(args[1])
        if name in _ALONG:
            at, by = _ALONG[name]
            dim = args[at] if len(args) > at else kwargs.get("dim", -1)
            index = args[by] if 0 < by < len(args) else kwargs.get("index")
            followed = not by or (isinstance(index, Tensor) and self._tells(index))
            return (x, [dim % max(x.dim(), 1)]) if followed and isinstance(dim, int) else (None, [])
        if name in _ALL:
            by = args[1] if len(args) > 1 else None
            followed = isinstance(by, Tensor) and self._tells(by)
            return (x, list(range(x.dim()))) if followed else (None, [])
        return None, []

    def _tells(self, index: Tensor) -> bool:
        """Whether positions depend on the inputs: those that no op gave may be made of what Python has read."""
        return bool(self._labels.get(index, _DATA if self._listed else 0))

    def _indexed(self, indices: Any) -> list[int]:
        dims, at = [], 0
        for index in indices:
            spans = (
                index.dim() if isinstance(index, Tensor) and index.dtype in (torch.bool, torch.uint8) else 1
            )
            if isinstance(index, Tensor) and self._tells(index):
                dims += range(at, at + spans)
            at += spans
        return dims


class Listing(TorchFunctionMode):
    """Tells `moves` of tensors whose words become Python's."""

    def __init__(self, moves: Moves) -> None:
        """`moves`: of the same run."""
        super().__init__()
        self._moves = moves

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the op, and tell of what becomes a list."""
        if func in _LISTS and args and isinstance(args[0], Tensor):
            self._moves.listed(args[0])
        return func(*args, **(kwargs or {}))


_LISTS = (Tensor.tolist, Tensor.numpy, Tensor.__array__)


def _line() -> tuple[str, int]:
    """The line of the model's own code that runs, which is the same one in each run, however often."""
    frame = sys._getframe(2)
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_NOT_THE_MODELS):
        frame = frame.f_back
    return frame.f_code.co_filename, frame.f_lineno


_NOT_THE_MODELS = (os.path.dirname(torch.__file__) + os.sep, os.path.dirname(__file__) + os.sep)


def verdicts(places: Iterable[Any], found: Mapping[Any, set[Layout | None]]) -> dict[Any, bool]:
    """Of each place, whether rows may be moved there that were not seen to move; `found`: all that was noted of it."""
    out, taken = dict.fromkeys(places, False), {}
    for (noted, _), layouts in found.items():
        if isinstance(noted, tuple) and noted[0] == "moved":
            taken.setdefault(noted[1:], set()).update(layouts)
    for (noted, _), layouts in found.items():
        if isinstance(noted, tuple) and noted[0] == "moves":
            place, stayed = noted[1], taken.get(noted[1:], set()) - {None, TABLE}
            reached = any(layout not in (None, TABLE) and layout[1] in place[2] for layout in layouts)
            out[place] |= reached and bool(stayed)
    return out
