"""Looks after the base: deltas are of its words as they were, so whoever changes them or replaces a module must be noticed."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from .site import Site


class Watch:
    """What an attached model was made of, compared at each `use`."""

    def __init__(self, model: nn.Module) -> None:
        """Watch `model`; there is nothing to compare with before `begin`."""
        self._model = model
        self._tensors: list[tuple[Tensor, int, int, str]] = []
        self._objects: list[tuple[dict[str, Any], str, Any, str]] = []
        self._modules: dict[int, str] = {}
        self._readers: dict[int, tuple[nn.Module, dict[str, Any]]] = {}

    def begin(self, sites: Mapping[str, Site], modules: Mapping[str, nn.Module]) -> None:
        """Remember versions and addresses of all tensors, and which objects are where."""
        seen = set()
        for name, site in sites.items():
            module = modules[name]
            self._modules[id(module)] = name
            for own, raw in site.raws.items():
                held = module._parameters if own in module._parameters else module._buffers
                self._objects.append((held, own, held[own], site.full(own)))
                if id(raw) not in seen and not raw.is_inference():
                    seen.add(id(raw))
                    self._tensors.append((raw, raw._version, raw.data_ptr(), site.full(own)))
        for name, module in self._model.named_modules():
            for child, found in module._modules.items():
                if found is not None:
                    self._objects.append(
                        (module._modules, child, found, f"{name}.{child}" if name else child)
                    )

    def check(self) -> None:
        """RuntimeError, by name, if the base is not what it was."""
        for raw, version, address, name in self._tensors:
            if raw._version != version or raw.data_ptr() != address:
                raise RuntimeError(
                    f"xorz: `{name}` of the base was changed since it was attached, and no tenant's delta fits any more; "
                    "detach, put it right, and attach again"
                )
        for i, (held, key, found, name) in enumerate(self._objects):
            if held.get(key) is not found:
                self._replaced(i, held, key, found, name)
        for reader, kept in self._readers.values():
            self._keeps(reader, kept)

    def _replaced(self, i: int, held: dict[str, Any], key: str, found: Any, name: str) -> None:
        if isinstance(found, nn.Module):
            # A module that was wrapped (PEFT does so) was not replaced: everything attached is still there.
            here = {id(m) for m in self._model.modules()}
            if all(id(m) in here for m in found.modules() if id(m) in self._modules):
                self._objects[i] = (held, key, held.get(key), name)
                return
        raise RuntimeError(
            f"xorz: `{name}` of the attached model was replaced or removed, so that tenants' deltas of it would do nothing; "
            "detach, put it right, and attach again"
        )

    def suspect(self, reader: nn.Module) -> None:
        """A module that reads another one's weights: it must not keep tensors that it makes of them."""
        if id(reader) not in self._readers:
            self._readers[id(reader)] = (reader, _tensors_of(reader))

    def _keeps(self, reader: nn.Module, before: dict[str, Any]) -> None:
        for name, tensor in _tensors_of(reader).items():
            if before.get(name) != tensor:
                raise RuntimeError(
                    f"xorz: {type(reader).__name__} reads weights of another module and kept a tensor in `{name}` since: made "
                    "of one tenant's weights, it would be used for all; such a module cannot be served"
                )


def _tensors_of(module: nn.Module) -> dict[str, Any]:
    """Attributes that hold tensors, and which."""
    out: dict[str, Any] = {}
    for name, value in module.__dict__.items():
        if name in ("_parameters", "_modules"):
            continue
        held = (
            list(value.values())
            if isinstance(value, dict)
            else value
            if isinstance(value, (list, tuple))
            else [value]
        )
        tensors = [id(t) for t in held if isinstance(t, Tensor)]
        if tensors:
            out[name] = tensors
    return out
