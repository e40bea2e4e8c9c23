"""Attached modules under `torch.compile`: ops that the compiler cannot see into, so that the map of rows is read when they run.

Nothing of any tenant is traced: neither names nor counts nor addresses, so nothing is ever recompiled for them.
"""

import itertools
import weakref

import torch
from torch import Tensor, nn

from . import forwards
from .site import Site

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
    if out.shape[:-1] != (input.shape[:-1] if site.kind != "embedding" else input.shape):
        raise RuntimeError(
            f"xorz: {site.name} gives rows of shape {list(out.shape[:-1])} when compiled; run it without torch.compile"
        )
    return out.contiguous()


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


def call(module: nn.Module, input: Tensor, width: int) -> Tensor:
    """What an attached module of one input does where it is being compiled."""
    return torch.ops.xorz_attached.call(input, module._xorz_number, width)
