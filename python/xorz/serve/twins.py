"""Tied tensors of a model that is spread over devices. Each device may have a copy of its own (an embedding on the first, the
output layer on the last), which nothing in the model tells from two tensors that only began alike.
"""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from .. import _core
from ..digests import digests_of


class Twins:
    """Tensors of the same words on several devices.

    Attributes:
        sure: name -> the others that are one tensor with it, as the model's class declares.
        unsure: name -> others of the same words of which nothing is declared.
    """

    def __init__(self) -> None:
        """Begin with none, as of a model that is on one device."""
        self.sure: dict[str, list[str]] = {}
        self.unsure: dict[str, list[str]] = {}

    def refuse_unsure(self, name: str, given: Iterable[str]) -> None:
        """ValueError if `name` is changed, and one of the same words elsewhere is not among the names `given`: it may be the
        same tensor, to be changed with it, or another one, to be left alone.
        """
        for other in self.unsure.get(name, ()):
            if other not in given:
                raise ValueError(
                    f"tensor `{name}` is changed, and `{other}` has the same words on another device, of which the fine-tune "
                    "says nothing: whether they are tied is not to be known; give both (a delta without changes, if it has "
                    "none), or put both on one device"
                )


def twins(model: nn.Module, own: Mapping[str, Tensor]) -> Twins:
    """Find them among `own`, the model's tensors by name where they are, by digests of their bytes."""
    out = Twins()
    if len({tensor.device for tensor in own.values()}) < 2:
        return out
    declared = getattr(model, "all_tied_weights_keys", None)
    tied = declared if isinstance(declared, Mapping) else {}
    alike: dict[object, list[str]] = {}
    for name, tensor in own.items():
        if tensor.numel():
            alike.setdefault((tensor.dtype, tensor.shape), []).append(name)
    spread = [names for names in alike.values() if len({own[name].device for name in names}) > 1]
    same = digests_of({name: _bytes(own[name]) for names in spread for name in names})
    for names in spread:
        for i, name in enumerate(names):
            for other in names[i + 1 :]:
                if own[name].device == own[other].device or same[name] != same[other]:
                    continue
                is_tied = _root(tied, name) == _root(tied, other)
                if is_tied or _tells(own[name]):
                    found = out.sure if is_tied else out.unsure
                    found.setdefault(name, []).append(other)
                    found.setdefault(other, []).append(name)
    return out


def _root(tied: Mapping[str, str], name: str) -> str:
    """The tensor that it is declared to be."""
    seen = set()
    while name in tied and name not in seen:
        seen.add(name)
        name = tied[name]
    return name


def _tells(words: Tensor) -> bool:
    """Whether two tensors of these words are hardly so by chance: norms and biases begin as ones and zeros."""
    return words.dim() > 1 and bool((words != words.flatten()[0]).any())


def _bytes(tensor: Tensor) -> Tensor:
    """Row by row, which a device hashes side by side."""
    words = _core.dense("tensor", tensor).contiguous()
    return (words if words.dim() else words.view(1)).view(torch.uint8)
