"""Attached modules under `torch.compile`: ops that the compiler cannot see into, so that the map of rows is read when they run.

Nothing of any tenant is traced: neither names nor counts nor addresses, so nothing is ever recompiled for them.
"""

import ast
import functools
import itertools
import weakref
from typing import Any

import torch
from torch import Tensor, nn

from . import forwards
from .site import Site
from .weight import Weight

_modules: "weakref.WeakValueDictionary[int, nn.Module]" = weakref.WeakValueDictionary()
_next = itertools.count()


def register(module: nn.Module) -> int:
    """A number that finds the module again."""
    number = next(_next)
    _modules[number] = module
    return number


def _site(number: int) -> tuple[nn.Module, Site]:
    module = _modules.get(number)
    site = None if module is None else module.__dict__.get("_xorz")
    if site is None:
        raise RuntimeError(
            "xorz: this graph was compiled from an attached model that has been detached; compile it again"
        )
    return module, site


# The tag keeps compilers from running two calls as one, or at compile time.
_TAGS = (torch.Tag.nondeterministic_seeded,)


@torch.library.custom_op("xorz_attached::call", mutates_args=(), tags=_TAGS)
def _attached(input: Tensor, module: int, width: int) -> Tensor:
    found, site = _site(module)
    out = forwards.call(site, found, input)
    if isinstance(out, Weight) or out.shape[:-1] != (
        input.shape[:-1] if site.kind != "embedding" else input.shape
    ):
        raise RuntimeError(
            f"xorz: {site.name} gives rows of shape {list(out.shape[:-1])} when compiled; run it without torch.compile"
        )
    return out.contiguous()


@torch.library.custom_op("xorz_attached::enter", mutates_args=(), tags=_TAGS)
def _enter(given: list[Tensor], module: int, how: str) -> Tensor:
    _prove(given, module, how)
    return given[0].clone()


@_enter.register_fake
def _(given: list[Tensor], module: int, how: str) -> Tensor:
    return torch.empty_like(given[0])


@torch.compiler.disable
def _prove(given: list[Tensor], number: int, how: str) -> None:
    """Where the rows are in what layers are given, before the first batch of its kind; see `proof`."""
    module = _modules.get(number)
    owner = None if module is None else module.__dict__.get("_xorz_owner")
    rows = None if owner is None else owner.now()
    if rows is None or rows.only is not None or rows.tokens:
        return
    tensors, args, kwargs = iter(given), [], {}
    for name, value in ast.literal_eval(how):
        value = next(tensors) if value == _TENSOR else value
        if name:
            kwargs[name] = value
        else:
            args.append(value)
    run = functools.partial(type(module)._xorz_plain, module)
    main = getattr(module, "main_input_name", "")
    owner.proofs.of(owner, module, run, rows, tuple(args), kwargs, main)


_TENSOR = "a tensor"


def root(module: nn.Module, plain: Any, args: Any, kwargs: Any) -> Any:
    """The whole model where it is being compiled: an op before all others asks where its rows are, when the graph runs."""
    values = [("", value) for value in args] + list(kwargs.items())
    tensors = [value for _, value in values if isinstance(value, Tensor)]
    simple = all(value is None or isinstance(value, (Tensor, bool, int, float, str)) for _, value in values)
    if not tensors or not simple:
        return plain(module, *args, **kwargs)
    told = [(name, _TENSOR if isinstance(value, Tensor) else value) for name, value in values]
    first, is_new = torch.ops.xorz_attached.enter(tensors, module._xorz_root, str(told)), True
    mine, named = [], {}
    for name, value in values:
        if is_new and isinstance(value, Tensor):
            value, is_new = first, False
        if name:
            named[name] = value
        else:
            mine.append(value)
    return plain(module, *mine, **named)


@_attached.register_fake
def _(input: Tensor, module: int, width: int) -> Tensor:
    found, site = _site(module)
    if site.kind == "embedding":
        return input.new_empty((*input.shape, width), dtype=found._parameters["weight"].dtype)
    out = input.new_empty((*input.shape[:-1], width))
    if (
        input.is_floating_point()
        and torch.is_autocast_enabled(input.device.type)
        and site.kind in ("linear", "conv1d")
    ):
        return out.to(torch.get_autocast_dtype(input.device.type))
    return out


def _refuse(ctx: object, grad: Tensor) -> None:
    raise RuntimeError(
        "xorz: gradients do not flow through a compiled attached model; call it under torch.no_grad(), "
        "or train it without torch.compile"
    )


_attached.register_autograd(_refuse)
_enter.register_autograd(_refuse)


def call(module: nn.Module, input: Tensor, width: int) -> Tensor:
    """What an attached module of one input does where it is being compiled."""
    return torch.ops.xorz_attached.call(input, module._xorz_number, width)
