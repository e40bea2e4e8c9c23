"""What the modules of a model hold beside its weights, so that a run can be undone, or be seen to leave something."""

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from .weight import Weight


class KeptState:
    """What modules hold beside parameters and saved buffers, so that a run leaves nothing there: attributes, what is in their
    lists and dicts, and tensors that are written to (caches, counts).
    """

    def __init__(self, model: nn.Module) -> None:
        """Remember what there is now."""
        self._attributes: list[tuple[dict[str, Any], dict[str, Any], dict[str, Any]]] = []
        self._tensors: list[tuple[Tensor, int, Tensor]] = []
        for module in model.modules():
            state = module.__dict__
            lists = {n: v for n, v in state.items() if type(v) in (dict, list, set)}
            inside = {n: copy.copy(v) for n, v in lists.items() if n not in ("_parameters", "_modules")}
            self._attributes.append((state, dict(state), inside))
            held = [v for n, v in state.items() if n not in _SAVED] + list(module._buffers.values())
            for leaf in tree_leaves(held):
                if isinstance(leaf, Tensor) and not isinstance(leaf, Weight) and not leaf.is_inference():
                    self._tensors.append((leaf, leaf._version, leaf.detach().clone()))

    def changed(self) -> bool:
        """Whether a run has left anything there."""
        for state, before, inside in self._attributes:
            if state.keys() != before.keys() or any(state[name] is not v for name, v in before.items()):
                return True
            for name, content in inside.items():
                value = before[name]
                if value != content if isinstance(value, set) else not _same(value, content):
                    return True
        return any(tensor._version != version for tensor, version, _ in self._tensors)

    def restore(self) -> None:
        """Set every tensor and flag back to what it was before the run."""
        for state, before, inside in self._attributes:
            for name in [n for n in state if n not in before]:
                del state[name]
            for name, value in before.items():
                if state.get(name, self) is not value:
                    state[name] = value
            for name, content in inside.items():
                value = before[name]
                if value == content if isinstance(value, set) else _same(value, content):
                    continue
                value.clear()
                (value.extend if isinstance(value, list) else value.update)(content)
        with torch.no_grad():
            for tensor, version, words in self._tensors:
                if tensor._version != version:
                    tensor.copy_(words)


_SAVED = ("_parameters", "_buffers", "_modules")


def _same(value: Any, content: Any) -> bool:
    """Whether a list or dict holds the same objects in the same places."""
    if len(value) != len(content):
        return False
    if isinstance(value, list):
        return all(a is b for a, b in zip(value, content, strict=True))
    return all(content.get(key, value) is item for key, item in value.items())
