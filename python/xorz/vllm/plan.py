"""Which rows and columns of which checkpoint tensor a model's parameters are made of: renamed, fused, cut for
tensor parallel.

vLLM's models know it, each in its own `load_weights`. That is run once on tensors without data (torch's meta
device): every copy that it makes is a view of a checkpoint tensor into a view of a parameter, and the two
views say what went where. So no list of names is repeated here, no memory is taken, and a loader that
computes with weights is found out.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

Range = tuple[int, int]

UNUSED = "the model's loader makes no parameter of it"
"""Why a change of a tensor cannot be followed into a model that does not hold it."""


@dataclass(frozen=True)
class Piece:
    """A rectangle of checkpoint tensor `name` and where it lies in the parameter; a vector is one column."""

    name: str
    rows: Range
    cols: Range
    to_rows: Range
    to_cols: Range

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns of the rectangle, which are the same on both sides."""
        return self.rows[1] - self.rows[0], self.cols[1] - self.cols[0]


@dataclass(frozen=True)
class Plan:
    """What a model's loader does.

    Attributes:
        pieces: parameter -> what it is made of, by row; parameters are called as in `parameters`.
        refused: checkpoint tensor -> why a change of it cannot be followed into the model.
        users: checkpoint tensor -> the parameters made of it.
    """

    pieces: dict[str, list[Piece]]
    refused: dict[str, str]
    users: dict[str, list[str]]


def matrices_of(name: str, param: Tensor) -> list[str]:
    """What the matrices of a parameter are called: those of a stack [E, n, k] one by one."""
    return [f"{name}[{i}]" for i in range(param.size(0))] if param.dim() == 3 else [name]


def parameters(model: nn.Module) -> dict[str, Tensor]:
    """A model's parameters by their first names; of stacks [E, n, k], such as experts', the E matrices one by one."""
    out = {}
    for name, param in model.named_parameters():
        stacked = param.data.unbind() if param.dim() == 3 else [param.data]
        out |= dict(zip(matrices_of(name, param), stacked, strict=True))
    return out


# Functions that only make another view of the same memory.
_VIEWS = (
    "view",
    "slice",
    "select",
    "narrow",
    "t",
    "transpose",
    "permute",
    "unsqueeze",
    "squeeze",
    "expand",
    "alias",
)
_VIEWS += (
    "detach",
    "_unsafe_view",
    "split",
    "split_with_sizes",
    "chunk",
    "unbind",
    "as_strided",
    "reshape",
    "unflatten",
)


class _Watch(TorchDispatchMode):
    """Notes copies between known memories, and whatever else is done with a checkpoint tensor."""

    def __init__(
        self, params: Mapping[int, tuple[str, Tensor]], sources: Mapping[int, tuple[str, Tensor]]
    ) -> None:
        super().__init__()
        self._params, self._sources = params, dict(sources)
        self.pieces: dict[str, list[Piece]] = {}
        self.refused: dict[str, str] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        known = [
            self._sources[_memory(a)] for a in args if isinstance(a, Tensor) and _memory(a) in self._sources
        ]
        if name == "copy_" and _memory(args[0]) in self._params:
            self._copied(args[0], args[1])
        elif known and name not in _VIEWS:
            for source, whole in known:
                # Another device or memory, but the same words in the same places.
                moved = name in ("_to_copy", "clone") and isinstance(out, Tensor) and out.dtype == whole.dtype
                if moved and _layout(args[0]) == _layout(whole):
                    self._sources[_memory(out)] = (source, out)
                else:
                    self.refused[source] = f"the model's loader computes with it ({name})"
        return out

    def _copied(self, to: Tensor, of: Tensor) -> None:
        source = self._sources.get(_memory(of))
        if source is None:
            return
        param, whole = self._params[_memory(to)]
        name, tensor = source
        a, b = _rectangle(of, tensor), _rectangle(to, whole)
        if tensor.dim() > 2:
            self.refused[name] = (
                f"it has {tensor.dim()} dimensions, and only vectors and matrices are followed"
            )
        elif of.dtype != to.dtype:
            self.refused[name] = f"the checkpoint holds {of.dtype}, but the model computes in {to.dtype}"
        elif a is None or b is None or of.shape != to.shape:
            self.refused[name] = "the model's loader reorders its elements"
        else:
            self.pieces.setdefault(param, []).append(Piece(name, *a, *b))


def _memory(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _layout(tensor: Tensor) -> tuple[Any, ...]:
    return tensor.storage_offset(), tensor.shape, tensor.stride()


def _rectangle(view: Tensor, whole: Tensor) -> tuple[Range, Range] | None:
    """Rows and columns of `whole`, contiguous and of one to three dimensions, that `view` shows as they lie there.

    The matrices of a stack are counted as if one lay below the other; a view shows one of them, or a part of it.
    """
    dims = min(whole.dim(), 2)
    if not 1 <= whole.dim() <= 3 or view.dim() != dims or not view.numel():
        return None
    k = whole.size(-1) if dims == 2 else 1
    at = view.storage_offset()
    shape = (*view.shape, 1)[:2]
    fits = [
        size == 1 or stride == wanted
        for size, stride, wanted in zip(view.shape, view.stride(), (k, 1)[-dims:], strict=True)
    ]
    row, col = divmod(at, k)
    # The matrix's own rows, and where it begins.
    n = whole.size(-2) if whole.dim() == 3 else whole.size(0)
    if not all(fits) or col + shape[1] > k or row % n + shape[0] > n or row >= whole.numel() // k:
        return None
    return (row, row + shape[0]), (col, col + shape[1])


@contextmanager
def _without_data(model: nn.Module) -> Iterator[dict[str, nn.Parameter]]:
    """In the place of each parameter one without data, with all that loaders look for on it; by first name."""
    owners = [
        (module, name, param) for module in model.modules() for name, param in module._parameters.items()
    ]
    twins = {id(param): _twin(param) for _, _, param in owners if param is not None}
    try:
        for module, name, param in owners:
            if param is not None:
                module._parameters[name] = twins[id(param)]
        yield dict(model.named_parameters())
    finally:
        for module, name, param in owners:
            module._parameters[name] = param


def _twin(param: nn.Parameter) -> nn.Parameter:
    data = torch.empty(param.shape, dtype=param.dtype, device="meta")
    out = torch.Tensor._make_subclass(type(param), data, False)
    out.__dict__.update(param.__dict__)
    return out


def plan(model: nn.Module, checkpoint: Mapping[str, tuple[torch.dtype, tuple[int, ...]]]) -> Plan:
    """How `model.load_weights` fills its parameters from tensors of these dtypes and shapes. The model is left as it was."""
    with _without_data(model) as params, torch.no_grad():
        tensors = {
            name: torch.empty(shape, dtype=dtype, device="meta")
            for name, (dtype, shape) in checkpoint.items()
        }
        watch = _Watch(
            {_memory(param): (name, param.data) for name, param in params.items()},
            {_memory(tensor): (name, tensor) for name, tensor in tensors.items()},
        )
        with watch:
            model.load_weights(iter(tensors.items()))
    pieces, refused = {}, watch.refused
    for param, found, shape in _by_matrix(params, watch.pieces):
        why = _incomplete(found, shape)
        if why:
            refused.update(dict.fromkeys((piece.name for piece in found), f"{why} of `{param}`"))
        pieces[param] = sorted(found, key=lambda piece: piece.to_rows)
    users: dict[str, list[str]] = {}
    for param, found in pieces.items():
        for piece in found:
            users.setdefault(piece.name, []).append(param)
    for name in checkpoint:
        if name not in users and name not in refused:
            refused[name] = UNUSED
    return Plan(pieces, refused, users)


def _by_matrix(
    params: Mapping[str, Tensor], pieces: Mapping[str, list[Piece]]
) -> Iterator[tuple[str, list[Piece], tuple[int, int]]]:
    """Each matrix's name, pieces and shape; a vector is one column."""
    for param, found in pieces.items():
        whole = params[param]
        n, k = (*whole.shape, 1)[:2] if whole.dim() < 3 else whole.shape[1:]
        apart: dict[int, list[Piece]] = {}
        for piece in found:
            first, end = piece.to_rows
            own = replace(piece, to_rows=(first % n, first % n + end - first))
            apart.setdefault(first // n, []).append(own)
        names = matrices_of(param, whole)
        yield from ((names[i], mine, (n, k)) for i, mine in sorted(apart.items()))


def _incomplete(pieces: list[Piece], shape: tuple[int, int]) -> str | None:
    """What is wrong with pieces that are not whole rows one below the other (more rows, of zeros, may follow)."""
    at = 0
    for piece in sorted(pieces, key=lambda piece: piece.to_rows):
        if piece.to_cols != (0, shape[1]):
            return "the model's loader puts it beside other tensors, in columns"
        if piece.to_rows[0] != at:
            return "the model's loader leaves gaps or overlaps in the rows"
        at = piece.to_rows[1]
    return None
