"""Attaching what is called with the whole batch: the model, its encoder, blocks, and modules that are run once per tenant.
Their classes become others, too (`swap`), whose forward asks where the rows are, or serves tenants one after the other.
"""

import functools
import inspect
import types
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from . import compiled, enclosing, split
from .rows import RowMap, Unknown
from .site import Owner, Site
from .swap import become, plain_class, rebind

# Nothing was said, which is not None: that is the base.
_UNSAID: Any = object()


def _forward_by(call: Callable[..., Any]) -> Callable[[type], dict[str, Any]]:
    """The body of a class whose forward is `call(module, the class's own forward, args, kwargs)`."""

    def body(cls: type) -> dict[str, Any]:
        plain = cls.forward

        @functools.wraps(plain)
        def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
            return call(self, plain, args, kwargs)

        return {"forward": forward}

    return body


def swap_encoder(module: nn.Module, owner: Owner) -> None:
    """For torch's encoder and its layers, whose fused paths call none of their children."""
    forward = _torch_encoder if isinstance(module, nn.TransformerEncoder) else _encoder_layer
    module.__dict__["_xorz_owner"] = owner
    become(module, "encoder", lambda _: {"forward": forward})


def swap_block(module: nn.Module, owner: Owner, name: str) -> None:
    """For a module whose inside takes rows apart and puts them together again, but whose own rows stay rows."""
    module.__dict__["_xorz_block"] = name
    module.__dict__["_xorz_owner"] = owner
    become(module, "block", _forward_by(_block))


def swap_whole(module: nn.Module, owner: Owner, name: str, *, alone: bool = False) -> None:
    """For a module that is run once per tenant in some batches; see `enclosing`. `alone`: it is called on its own, too (the
    encoder by `generate`), where its rows are found as a whole model's.
    """
    module.__dict__["_xorz_whole"] = name
    module.__dict__["_xorz_owner"] = owner
    become(module, "alone" if alone else "whole", _forward_by(_alone if alone else _whole))


def swap_root(module: nn.Module, owner: Owner) -> None:
    """For the model itself: what cannot be served row by row inside of it may be served by running it once per tenant."""
    module.__dict__["_xorz_owner"] = owner
    module.__dict__["_xorz_root"] = compiled.register(module)
    become(module, "root", _root_body)
    rebind(module, type(module))
    if "forward" in module.__dict__ and not isinstance(module.__dict__["forward"], types.MethodType):
        _guard_root(module)


def _root_body(cls: type) -> dict[str, Any]:
    body = {**_forward_by(_compiled_or_root)(cls), "_xorz_plain": cls.forward}
    if hasattr(cls, "_expand_inputs_for_generation"):
        body |= {"generate": _generate(cls), "_expand_inputs_for_generation": _expand(cls)}
    return body


def _compiled_or_root(module: nn.Module, plain: Any, args: Any, kwargs: Any) -> Any:
    if torch.compiler.is_compiling():
        return compiled.root(module, plain, args, kwargs)
    return _root(module, plain, args, kwargs)


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
    if rows.fixed is not None:
        raise Unknown(module._xorz_block)
    return split.block(owner, module._xorz_block, rows, functools.partial(plain, module), args, kwargs)


def _whole(module: nn.Module, plain: Any, args: Any, kwargs: Any) -> Any:
    if torch.compiler.is_compiling():
        return plain(module, *args, **kwargs)
    owner, name = module.__dict__.get("_xorz_owner"), module.__dict__.get("_xorz_whole")
    rows: RowMap | None = None if owner is None else owner.now()
    mixed = rows is not None and rows.only is None and rows.proof is not None and not rows.tokens
    if mixed and name in rows.proof.whole and any(site.serves(rows) for site in _inside(module)):
        if rows.fixed is not None:
            raise Unknown(name)
        return enclosing.run(name, rows, functools.partial(plain, module), owner, args, kwargs)
    return plain(module, *args, **kwargs)


def _alone(module: nn.Module, plain: Any, args: Any, kwargs: Any) -> Any:
    owner = None if torch.compiler.is_compiling() else module.__dict__.get("_xorz_owner")
    rows = None if owner is None else owner.now()
    if rows is not None and rows.only is None and rows.proof is None and not rows.tokens:
        return _root(module, plain, args, kwargs)
    return _whole(module, plain, args, kwargs)


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
    rows.arrived()
    run = functools.partial(plain, module)
    why = owner.apart
    # torch's own layers say themselves where their batch is.
    told = rows.tokens or (rows.fixed is not None and len(rows.slots) == 1)
    if not told and not isinstance(module, (nn.RNNBase, nn.MultiheadAttention)):
        main = getattr(module, "main_input_name", "")
        rows = rows.known(owner.proofs.of(owner, module, run, rows, args, kwargs, main))
    if rows.fixed is not None:
        return _with_fixed_rows(module, run, owner, rows, args, kwargs)
    if why is None:
        try:
            with owner.active.set(rows):
                return split.settled(run(*args, **kwargs), rows)
        except RuntimeError as error:
            why = error
    out = split.apart(owner, rows, run, args, kwargs, why)
    owner.apart = why
    return out


def _with_fixed_rows(module: nn.Module, run: Any, owner: Owner, rows: RowMap, args: Any, kwargs: Any) -> Any:
    """With the rows of a graph, which cannot be taken apart: what is not served as it stands is an error."""
    try:
        with owner.active.set(rows):
            return split.settled(run(*args, **kwargs), rows)
    except Unknown as error:
        raise error.of(type(module).__name__) from None


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
    return plain_class(self).forward(self, *args, **kwargs)


def _torch_encoder(
    self: Any,
    src: Tensor,
    mask: Tensor | None = None,
    src_key_padding_mask: Tensor | None = None,
    is_causal: bool | None = None,
) -> Tensor:
    """torch drops padded places where it can, and gives zeros there; so must whoever computes them."""
    plain = plain_class(self).forward
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
