"""Attaching one module: its class becomes a subclass made here (as FSDP2 and `torch.nn.utils.parametrize` do), its tensors
become `Weight`s in place, and `restore` undoes both.
"""

import functools
import sys
import types
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from . import compiled, forwards, split
from .rows import Unknown
from .site import Owner, Site
from .weight import Weight

_is_compiling = torch.compiler.is_compiling


def _tensor(name: str) -> property:
    """A class attribute that gives the module's own tensor, or what a reader is to meet in its place; see `Site.read`."""

    def get(self: nn.Module) -> Any:
        if torch.compiler.is_compiling():
            return _read_apart(self, name)
        site = self.__dict__.get("_xorz")
        rows = None if site is None or name not in site.weights else site.owner.now()
        if rows is None:
            # No tenant is active; or the module has no such tensor; or it was registered after attaching.
            own = self._parameters if name in self._parameters else self._buffers
            try:
                return own[name]
            except KeyError:
                raise AttributeError(f"'{type(self).__name__}' object has no attribute '{name}'") from None
        reader = sys._getframe(1).f_locals.get("self")
        if reader is not self and isinstance(reader, nn.Module) and reader.__dict__.get("_xorz") is not site:
            site.owner.suspect(reader)
        return site.read(name, rows)

    return property(get)


@torch.compiler.disable
def _read_apart(module: nn.Module, name: str) -> Any:
    """Of what a compiler makes, nobody knows whose words it will see: it is to run this as it stands."""
    site = module.__dict__["_xorz"]
    rows = site.owner.now()
    if rows is None or name not in site.weights:
        return module._parameters.get(name, module._buffers.get(name))
    return site.read(name, rows)


def _forward(self: nn.Module, input: Tensor) -> Any:
    # One input, and one output whose width is known: compilers get one opaque op.
    if torch.compiler.is_compiling():
        return compiled.call(self, input, self._xorz_width)
    try:
        site = self._xorz
    except AttributeError:
        return _detached(self, input)
    return forwards.call(site, self, input)


def _forward_linear(self: nn.Module, input: Tensor) -> Any:
    if _is_compiling():
        return compiled.call(self, input, self._xorz_width)
    try:
        site = self._xorz
    except AttributeError:
        return _detached(self, input)
    return forwards.linear(site, self, input)


def _detached(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """Whoever wrapped the forward while the model was attached (accelerate's hooks) still calls this one."""
    return plain_class(module).forward(module, *args, **kwargs)


def _disabled() -> Any:
    @torch.compiler.disable
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        site = self.__dict__.get("_xorz")
        if site is None:
            return _detached(self, *args, **kwargs)
        return forwards.call(site, self, *args, **kwargs)

    return forward


def _compute_bias(self: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
    """T5's relative positions: [1, heads, q, k] for all; one for each batch row where tenants differ."""
    plain, site = plain_class(self).compute_bias, self.__dict__.get("_xorz")
    owner: Owner | None = self.__dict__.get("_xorz_owner") if site is None else site.owner
    rows = None if owner is None else owner.now()
    if rows is None or rows.only is not None:
        return plain(self, *args, **kwargs)
    if rows.fixed is not None:
        raise Unknown(type(self).__name__)
    each = {}
    for slot in rows.used:
        with owner.active.set(rows.uniform(slot)):
            each[slot] = plain(self, *args, **kwargs)
    return torch.cat([each[slot] for slot in rows.slots])


def _apply(self: nn.Module, fn: Any, recurse: bool = True) -> nn.Module:
    for tensor in (*self._parameters.values(), *self._buffers.values()):
        if tensor is not None:
            probe = fn(torch.empty(0, dtype=tensor.dtype, device=tensor.device))
            if probe.dtype != tensor.dtype or probe.device != tensor.device:
                raise RuntimeError(
                    f"xorz: the model is attached to tenants, whose deltas are of {tensor.dtype} on {tensor.device}; call "
                    f"tenants.detach() before moving it to {probe.dtype} on {probe.device}"
                )
            break
    # The tensors stay as they are, since `fn` changes neither their dtype nor their device.
    for child in self.children() if recurse else ():
        child._apply(fn)
    return self


def plain_class(module: nn.Module) -> type:
    """The class that the module had."""
    return next(cls for cls in type(module).__mro__ if cls not in _made)


def _load(self: nn.Module, state_dict: dict, prefix: str, *args: Any) -> None:
    if any(prefix + name in state_dict for name in (*self._parameters, *self._buffers)):
        raise RuntimeError(
            f"xorz: {self._xorz.name} is attached to tenants of its weights; call tenants.detach() before loading others"
        )
    super(type(self), self)._load_from_state_dict(state_dict, prefix, *args)


class _Classes(dict[Any, type]):
    """Classes made here, by what they were made of."""

    def __setitem__(self, key: Any, cls: type) -> None:
        super().__setitem__(key, cls)
        _made.add(cls)


def _made_of(cls: type, body: dict[str, Any]) -> type:
    """A class that does what `body` says, and cannot be pickled: its name finds the plain one."""
    return type(cls.__name__, (cls,), {"__reduce_ex__": _refuse_copy, **body})


def _refuse_copy(self: nn.Module, protocol: Any) -> Any:
    raise TypeError(
        f"xorz: this {type(self).__name__} is attached to tenants; call tenants.detach() before copying or saving the model "
        "itself (its state_dict can be saved)"
    )


_made: set[type] = set()
_classes = _Classes()


def become(module: nn.Module, what: str, body: Callable[[type], dict[str, Any]]) -> None:
    """Make `module`'s class one that does what `body(class)` says; one is made for each class and `what`."""
    key = (type(module), what)
    if key not in _classes:
        cls = type(module)
        _classes[key] = _made_of(cls, {"__module__": cls.__module__, **body(cls)})
    module.__class__ = _classes[key]


def swap(module: nn.Module, site: Site) -> None:
    """Attach `site` to `module`; its tensors are swapped apart (`shroud`)."""
    names = (*module._parameters, *_persistent(module))
    width = _width(module, site)
    key = (type(module), site.kind, names, width is not None)
    if key not in _classes:
        forward = functools.wraps(type(module).forward)(_disabled()) if width is None else _forward
        if type(module) is nn.Linear and site.kind == "linear":
            forward = _forward_linear
        body: dict[str, Any] = {"forward": forward, "_apply": _apply, "_load_from_state_dict": _load}
        body |= {name: _tensor(name) for name in names}
        if hasattr(type(module), "compute_bias"):
            body["compute_bias"] = _compute_bias
        body["__module__"] = type(module).__module__
        _classes[key] = _made_of(type(module), body)
    split.pristine(site, module)
    module.__dict__["_xorz"] = site
    module.__dict__["_xorz_number"] = compiled.register(module)
    module.__dict__["_xorz_width"] = width
    module.__class__ = _classes[key]
    rebind(module, type(module))
    if "forward" in module.__dict__:
        guard(module, site)


def rebind(module: nn.Module, cls: type) -> None:
    """Forwards of the module that accelerate has put aside, to call them and to put them back, are those of this class."""
    for name in ("_old_forward", "forward"):
        aside = module.__dict__.get(name)
        if (
            isinstance(aside, types.MethodType)
            and aside.__self__ is module
            and aside.__func__ in (c.__dict__.get("forward") for c in (*type(module).__mro__, *_made))
        ):
            module.__dict__[name] = types.MethodType(cls.forward, module)


def _persistent(module: nn.Module) -> list[str]:
    """Buffers that a checkpoint holds, so that a fine-tune may change them."""
    return [name for name in module._buffers if name not in module._non_persistent_buffers_set]


def shroud(sites: list[tuple[Site, nn.Module]]) -> list[Tensor]:
    """Swap the content of every tensor of these modules for a `Weight`, once for tied ones; gives the objects."""
    users: dict[int, tuple[Tensor, list[tuple[Site, str]]]] = {}
    for site, module in sites:
        for name in (*module._parameters, *_persistent(module)):
            tensor = module._parameters.get(name, module._buffers.get(name))
            if tensor is not None:
                users.setdefault(id(tensor), (tensor, []))[1].append((site, name))
    for tensor, places in users.values():
        # The base's own words come under a new object; the old one, which others hold, becomes the weight.
        raw = Weight.of(tensor, tuple(places))
        _exchange(tensor, raw)
        tensor.base = raw
        detached = raw.detach()
        for site, name in places:
            site.raws[name], site.base[name] = raw, detached
            site.weights[name] = Weight.of(raw, ((site, name),))
    return [tensor for tensor, _ in users.values()]


def unshroud(tensors: list[Tensor]) -> None:
    """Undo `shroud`: each object is the base's own tensor again."""
    for tensor in tensors:
        _exchange(tensor, tensor.base)


def _exchange(one: Tensor, other: Tensor) -> None:
    """Each object becomes the other tensor, for whoever refers to it. As `torch.utils.swap_tensors`, which refuses tensors that
    are weakly referred to (recurrent layers do) or in a graph: here that is harmless, since the base's tensor stays alive.
    """
    one.__class__, other.__class__ = other.__class__, one.__class__
    one.__dict__, other.__dict__ = dict(other.__dict__), dict(one.__dict__)
    torch._C._swap_tensor_impl(one, other)


def swap_method(module: nn.Module, owner: Owner) -> None:
    """For a module without parameters of its own whose method must run once per tenant."""
    module.__dict__["_xorz_owner"] = owner
    become(module, "compute_bias", lambda _: {"compute_bias": _compute_bias})


def guard(module: nn.Module, site: Site) -> None:
    """For a module whose forward was replaced on the instance, so that it is not the class's: it asks for a tenant, too."""
    inner = module.__dict__["forward"]

    @functools.wraps(inner)
    def forward(*args: Any, **kwargs: Any) -> Any:
        if "_xorz" not in module.__dict__:
            return inner(*args, **kwargs)
        rows = site.owner.rows(site)
        with nullcontext() if site.owner.active.get() is not None else site.owner.active.set(rows):
            return inner(*args, **kwargs)

    forward._xorz_inner = inner
    module.__dict__["forward"] = forward


def _width(module: nn.Module, site: Site) -> int | None:
    """Last dimension of what the module gives, if a compiler can be told: one input, a known output."""
    if type(module) is nn.Linear:
        return module.out_features
    if type(module) is nn.Embedding:
        return module.embedding_dim
    if site.kind == "conv1d":
        return module.nf
    if site.kind == "rows" or type(module) in (nn.LayerNorm, nn.RMSNorm):
        return next(p.size(-1) for p in module._parameters.values() if p is not None)
    return None


def restore_class(module: nn.Module) -> None:
    """Undo `swap` and `swap_method`: the module has its own class and forward again."""
    module.__class__ = plain_class(module)
    rebind(module, type(module))
    own = module.__dict__.get("forward")
    if hasattr(own, "_xorz_inner"):
        module.__dict__["forward"] = own._xorz_inner
    for name in ("", "_number", "_width", "_owner", "_block", "_whole", "_root"):
        module.__dict__.pop(f"_xorz{name}", None)
