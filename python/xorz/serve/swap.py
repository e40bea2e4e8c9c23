"""Attaching one module: its class becomes a subclass made here (as FSDP2 and `torch.nn.utils.parametrize` do), its tensors
become `Weight`s in place, and `restore` undoes both.
"""

import functools
import inspect
import sys
import types
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from . import compiled, enclosing, forwards, split
from .rows import RowMap
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
    return _plain(module).forward(module, *args, **kwargs)


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
    plain, site = _plain(self).compute_bias, self.__dict__.get("_xorz")
    owner: Owner | None = self.__dict__.get("_xorz_owner") if site is None else site.owner
    rows = None if owner is None else owner.now()
    if rows is None or rows.only is not None:
        return plain(self, *args, **kwargs)
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


def _plain(module: nn.Module) -> type:
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


# Nothing was said, which is not None: that is the base.
_UNSAID: Any = object()
_made: set[type] = set()
_classes = _Classes()


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
    _rebind(module, type(module))
    if "forward" in module.__dict__:
        guard(module, site)


def _rebind(module: nn.Module, cls: type) -> None:
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
    key = (type(module), "compute_bias")
    if key not in _classes:
        body = {"compute_bias": _compute_bias, "__module__": type(module).__module__}
        _classes[key] = _made_of(type(module), body)
    module.__dict__["_xorz_owner"] = owner
    module.__class__ = _classes[key]


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


def swap_encoder(module: nn.Module, owner: Owner) -> None:
    """For torch's encoder and its layers, whose fused paths call none of their children."""
    key = (type(module), "encoder")
    if key not in _classes:
        forward = _encoder if isinstance(module, nn.TransformerEncoder) else _encoder_layer
        _classes[key] = _made_of(type(module), {"forward": forward, "__module__": "torch.nn"})
    module.__dict__["_xorz_owner"] = owner
    module.__class__ = _classes[key]


def swap_block(module: nn.Module, owner: Owner, name: str) -> None:
    """For a module whose inside takes rows apart and puts them together again, but whose own rows stay rows."""
    key = (type(module), "block")
    if key not in _classes:
        plain = type(module).forward

        @functools.wraps(plain)
        def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
            return _block(self, plain, args, kwargs)

        body = {"forward": forward, "__module__": type(module).__module__}
        _classes[key] = _made_of(type(module), body)
    module.__dict__["_xorz_block"] = name
    module.__dict__["_xorz_owner"] = owner
    module.__class__ = _classes[key]


@torch.compiler.disable
def _block(module: nn.Module, plain: Any, args: Any, kwargs: Any) -> Any:
    owner = module.__dict__.get("_xorz_owner")
    rows = None if owner is None else owner.now()
    if rows is not None and rows.probe is not None:
        rows.probe.note(("block", module._xorz_block), args[0] if args else kwargs.get("hidden_states"))
        return plain(module, *args, **kwargs)
    if rows is None or (rows.only is not None and owner.mode != "deterministic"):
        return plain(module, *args, **kwargs)
    if rows.only is None and not any(site.serves(rows) for site in _inside(module)):
        return plain(module, *args, **kwargs)
    return split.block(owner, module._xorz_block, rows, functools.partial(plain, module), args, kwargs)


def swap_whole(module: nn.Module, owner: Owner, name: str) -> None:
    """For a module that is run once per tenant in some batches; see `enclosing`."""
    key = (type(module), "whole")
    if key not in _classes:
        plain = type(module).forward

        @functools.wraps(plain)
        def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
            owner = self.__dict__.get("_xorz_owner")
            rows = None if owner is None or _is_compiling() else owner.now()
            return _whole(self, plain, rows, args, kwargs)

        body = {"forward": forward, "__module__": type(module).__module__}
        _classes[key] = _made_of(type(module), body)
    module.__dict__["_xorz_whole"] = name
    module.__dict__["_xorz_owner"] = owner
    module.__class__ = _classes[key]


def _whole(module: nn.Module, plain: Any, rows: RowMap | None, args: Any, kwargs: Any) -> Any:
    name = module.__dict__.get("_xorz_whole")
    mixed = rows is not None and rows.only is None and rows.proof is not None and not rows.tokens
    if mixed and name in rows.proof.whole and any(site.serves(rows) for site in _inside(module)):
        run = functools.partial(plain, module)
        return enclosing.run(name, rows, run, module._xorz_owner, args, kwargs)
    return plain(module, *args, **kwargs)


def swap_root(module: nn.Module, owner: Owner) -> None:
    """For the model itself: what cannot be served row by row inside of it may be served by running it once per tenant."""
    key = (type(module), "root")
    if key not in _classes:
        plain = type(module).forward

        @functools.wraps(plain)
        def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
            if torch.compiler.is_compiling():
                return compiled.root(self, plain, args, kwargs)
            return _root(self, plain, args, kwargs)

        body = {"forward": forward, "__module__": type(module).__module__, "_xorz_plain": plain}
        if hasattr(type(module), "_expand_inputs_for_generation"):
            body |= {
                "generate": _generate(type(module)),
                "_expand_inputs_for_generation": _expand(type(module)),
            }
        _classes[key] = _made_of(type(module), body)
    module.__dict__["_xorz_owner"] = owner
    module.__dict__["_xorz_root"] = compiled.register(module)
    module.__class__ = _classes[key]
    _rebind(module, type(module))
    if "forward" in module.__dict__ and not isinstance(module.__dict__["forward"], types.MethodType):
        _guard_root(module)


def swap_encoder_root(module: nn.Module, owner: Owner, name: str) -> None:
    """For an encoder, which `generate` calls on its own: where its rows are is found as for a whole model."""
    key = (type(module), "encoder root")
    if key not in _classes:
        plain = type(module).forward

        @functools.wraps(plain)
        def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
            owner = self.__dict__.get("_xorz_owner")
            rows = None if owner is None or _is_compiling() else owner.now()
            if rows is not None and rows.only is None and rows.proof is None and not rows.tokens:
                return _root(self, plain, args, kwargs)
            return _whole(self, plain, rows, args, kwargs)

        body = {"forward": forward, "__module__": type(module).__module__}
        _classes[key] = _made_of(type(module), body)
    module.__dict__["_xorz_whole"] = name
    module.__dict__["_xorz_owner"] = owner
    module.__class__ = _classes[key]


def _guard_root(module: nn.Module) -> None:
    """For a model whose forward was replaced on the instance before it was attached (accelerate's hooks, wrappers of one's
    own): where its rows are is found there, too.
    """
    inner = module.__dict__["forward"]

    @functools.wraps(inner)
    def forward(*args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            return inner(*args, **kwargs)
        return _root(module, lambda _, *given, **named: inner(*given, **named), args, kwargs)

    forward._xorz_inner = getattr(inner, "_xorz_inner", inner)
    module.__dict__["forward"] = forward


def _root(module: nn.Module, plain: Any, args: Any, kwargs: Any) -> Any:
    owner = module.__dict__.get("_xorz_owner")
    rows = None if owner is None else owner.now()
    if rows is None and owner is not None and owner.serves_by_default:
        with owner.use(owner.default):
            return plain(module, *args, **kwargs)
    if rows is None or rows.only is not None:
        return plain(module, *args, **kwargs)
    run = functools.partial(plain, module)
    why = owner.apart
    # torch's own layers say themselves where their batch is.
    if not rows.tokens and not isinstance(module, (nn.RNNBase, nn.MultiheadAttention)):
        main = getattr(module, "main_input_name", "")
        rows = rows.known(owner.proofs.of(owner, module, run, rows, args, kwargs, main))
    if why is None:
        try:
            with owner.active.set(rows):
                return split.settled(run(*args, **kwargs), rows)
        except RuntimeError as error:
            why = error
    out = split.apart(owner, rows, run, args, kwargs, why)
    owner.apart = why
    return out


def _generate(cls: type) -> Any:
    """`generate`, after which the names are again those of the prompts, and which takes them as `tenants`, too."""
    plain = cls.generate

    @functools.wraps(plain)
    def generate(self: nn.Module, *args: Any, tenants: Any = _UNSAID, **kwargs: Any) -> Any:
        owner = self.__dict__.get("_xorz_owner")
        if owner is None:
            return plain(self, *args, **kwargs)
        if tenants is not _UNSAID:
            asked = owner.use(tenants)
        elif owner.serves_by_default and owner.active.get() is None:
            asked = owner.use(owner.default)
        else:
            asked = owner.active.set(owner.active.get())
        with asked:
            return plain(self, *args, **kwargs)

    return generate


def _expand(cls: type) -> Any:
    """Where transformers makes several sequences of each prompt, its tenant is each one's."""
    # A plain method or a static one, depending on the version of transformers.
    plain = inspect.getattr_static(cls, "_expand_inputs_for_generation")

    @functools.wraps(cls._expand_inputs_for_generation)
    def expand(self: nn.Module, expand_size: int = 1, *args: Any, **kwargs: Any) -> Any:
        owner = self.__dict__.get("_xorz_owner")
        rows, given = None if owner is None else owner.active.get(), kwargs.get("input_ids")
        out = plain.__get__(self, cls)(expand_size, *args, **kwargs)
        if rows is not None and rows.only is None and expand_size > 1 and given is not None:
            if given.size(0) == len(rows.slots):
                owner.active.put(rows.expanded(expand_size))
        return out

    return expand


def _inside(module: nn.Module) -> list[Site]:
    return [m.__dict__["_xorz"] for m in module.modules() if "_xorz" in m.__dict__]


def _encoder_layer(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
    if not torch.compiler.is_compiling() and "_xorz_owner" in self.__dict__:
        for site in _inside(self)[:1]:
            self._xorz_owner.rows(site)
    return _plain(self).forward(self, *args, **kwargs)


def _encoder(
    self: Any,
    src: Tensor,
    mask: Tensor | None = None,
    src_key_padding_mask: Tensor | None = None,
    is_causal: bool | None = None,
) -> Tensor:
    """torch drops padded places where it can, and gives zeros there; so must whoever computes them."""
    plain = _plain(self).forward
    if torch.compiler.is_compiling():
        return plain(self, src, mask, src_key_padding_mask, is_causal)
    sites = _inside(self) if "_xorz_owner" in self.__dict__ else []
    rows = [self._xorz_owner.rows(site) for site in sites[:1]]
    serves = rows and rows[0] is not None and any(site.serves(rows[0]) for site in sites)
    if not serves or is_causal or not _drops_padding(self, sites, src, mask, src_key_padding_mask):
        return plain(self, src, mask, src_key_padding_mask, is_causal)
    output = src
    for layer in self.layers:
        output = layer(output, src_mask=None, is_causal=False, src_key_padding_mask=src_key_padding_mask)
    padded = src_key_padding_mask if src_key_padding_mask.dtype == torch.bool else src_key_padding_mask != 0
    output = output.masked_fill(padded[..., None], 0.0)
    return output if self.norm is None else self.norm(output)


def _drops_padding(
    encoder: Any, sites: list[Site], src: Tensor, mask: Tensor | None, padding: Tensor | None
) -> bool:
    """Whether torch's own encoder would compute on nested tensors: its conditions, in its order."""
    if not torch.backends.mha.get_fastpath_enabled() or not getattr(encoder, "use_nested_tensor", False):
        return False
    if encoder.layers[0].training or src.dim() != 3 or padding is None or mask is not None or src.is_nested:
        return False
    kept = padding.logical_not() if padding.dtype == torch.bool else padding == 0
    if getattr(encoder, "mask_check", True) and not bool(
        (kept[:, :1] & (kept[:, :-1] >= kept[:, 1:]).all(1, True)).all()
    ):
        return False
    trains = any(t.requires_grad for site in sites for t in site.raws.values())
    return not torch.is_autocast_enabled() and not (torch.is_grad_enabled() and (src.requires_grad or trains))


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
    module.__class__ = _plain(module)
    _rebind(module, type(module))
    own = module.__dict__.get("forward")
    if hasattr(own, "_xorz_inner"):
        module.__dict__["forward"] = own._xorz_inner
    for name in ("", "_number", "_width", "_owner", "_block", "_whole", "_root"):
        module.__dict__.pop(f"_xorz{name}", None)
