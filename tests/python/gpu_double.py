"""A double of a GPU for whole models: tensors that say they lie on cuda:0, whose words lie apart, and a ledger of what a
driver would have to do. No expectation but in tests.

torch decides what runs (shapes, autograd, dispatch); each op that arrives computes on the words by torch's and xorz's CPU
kernels. It is stricter than a GPU where a GPU would be slow or wrong: an op that meets tensors of both devices is refused as
torch does it, an op of xorz without a CUDA kernel is refused, and whatever waits for the device (a number that is read, a
mask turned to places, a copy to the host or from memory that is not pinned) is written into `waits`.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

CUDA = torch.device("cuda:0")
# Of csrc/ops.cpp: what has a CUDA kernel, and what goes by the host.
KERNELS = {
    "delta_linear", "delta_linear_grad_input", "delta_linear_grouped", "delta_linear_grouped_grad_input", "delta_embedding",
    "delta_restore", "delta_apply_",
}  # fmt: skip
BY_THE_HOST = {"delta_encode", "delta_slice", "delta_concat", "delta_check"}
# What must know a number on the device before it can go on.
ASKING = {
    "_local_scalar_dense", "is_nonzero", "equal", "nonzero", "masked_select", "_unique2", "unique_dim", "unique_consecutive",
    "repeat_interleave", "nonzero_numpy", "allclose", "bincount",
}  # fmt: skip


class Ledger:
    """What was asked of the device, in order."""

    def __init__(self) -> None:
        self.waits: list[str] = []
        self.ops: list[str] = []
        self.synchronized = 0


ledger = Ledger()


class OnGpu(torch.Tensor):
    """A tensor of cuda:0. To C++ it is on the meta device, where torch asks no driver for anything."""

    words: Tensor
    device = property(lambda self: CUDA)
    is_cuda = property(lambda self: True)
    is_meta = property(lambda self: False)

    @staticmethod
    def __new__(cls, words: Tensor) -> "OnGpu":
        out = torch.Tensor._make_wrapper_subclass(
            cls,
            words.size(),
            strides=words.stride(),
            storage_offset=words.storage_offset(),
            dtype=words.dtype,
            device="meta",
        )
        out.words = words
        return out

    __torch_function__ = torch._C._disabled_torch_function_impl

    def data_ptr(self) -> int:
        return self.words.data_ptr()

    def untyped_storage(self) -> torch.UntypedStorage:
        return self.words.untyped_storage()

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return _run(func, args, kwargs or {})


class _Machine(TorchDispatchMode):
    """Makes what is made on cuda:0 without any tensor to tell it."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return _run(func, args, kwargs or {})


def _name(func) -> str:
    return func._schema.name.split("::")[-1]


def _is_gpu(leaf) -> bool:
    return isinstance(leaf, OnGpu)


def _run(func, args, kwargs):
    name, leaves = _name(func), tree_leaves((args, kwargs))
    here = [leaf for leaf in leaves if _is_gpu(leaf)]
    to = kwargs.get("device")
    to = None if to is None else torch.device(to)
    # What C++ makes like one of these tensors, it makes on the meta device.
    if to is not None and to.type == "meta":
        to = CUDA
    if not here and (to is None or to.type != "cuda"):
        return func(*args, **kwargs)
    ledger.ops.append(name)
    if func.namespace == "xorz":
        _check_op(name, leaves)
    if name in ASKING:
        ledger.waits.append(name)
    if name in ("_to_copy", "copy_"):
        return _copied(func, name, args, kwargs, to)
    strays = [leaf for leaf in leaves if isinstance(leaf, Tensor) and not _is_gpu(leaf) and leaf.dim() > 0]
    if here and strays:
        if name not in ("index", "index_put_", "index_put", "_index_put_impl_"):
            raise RuntimeError(
                f"{name}: expected all tensors to be on the same device, but found cuda:0 and cpu"
            )
        ledger.waits.append(f"{name} by numbers of the host")
    return _apply(func, args, kwargs, True)


def _check_op(name: str, leaves) -> None:
    given = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
    if any(not _is_gpu(t) for t in given):
        raise RuntimeError(f"xorz::{name}: an argument is on cpu, but another argument is on cuda:0")
    if name in BY_THE_HOST:
        ledger.waits.append(name)
    elif name not in KERNELS:
        raise RuntimeError(f"xorz::{name}: this op has no CUDA kernel; move its tensors to the CPU")
    if name == "delta_linear_grouped" and "exact" in leaves:
        ledger.waits.append(f"{name} in mode exact")


def _apply(func, args, kwargs, to_gpu: bool):
    """The op on the words; what it gives is new, or the argument that it has written to."""
    args_, kwargs_ = tree_map(lambda leaf: leaf.words if _is_gpu(leaf) else leaf, (args, kwargs))
    if "device" in kwargs_:
        kwargs_ = {**kwargs_, "device": torch.device("cpu")}
    if kwargs_.get("pin_memory"):
        kwargs_ = {**kwargs_, "pin_memory": False}
    out = func(*args_, **kwargs_)
    owners = {id(leaf.words): leaf for leaf in tree_leaves((args, kwargs)) if _is_gpu(leaf)}

    def given(leaf):
        if not isinstance(leaf, Tensor) or not to_gpu:
            return leaf
        return owners.get(id(leaf)) or OnGpu(leaf)

    return tree_map(given, out)


def _copied(func, name, args, kwargs, to):
    """Between the devices, or on one."""
    if name == "copy_":
        target, source = args[:2]
        if _is_gpu(target) != _is_gpu(source) and source.dim() > 0:
            ledger.waits.append("copy_ to the device" if _is_gpu(target) else "copy_ to the host")
        plain = source.words if _is_gpu(source) else source
        (target.words if _is_gpu(target) else target).copy_(plain)
        return target
    source = args[0]
    goes = to.type if to is not None else ("cuda" if _is_gpu(source) else "cpu")
    if _is_gpu(source) != (goes == "cuda"):
        ledger.waits.append(f"a copy to the {'device' if goes == 'cuda' else 'host'}")
    elif kwargs.get("dtype") in (None, source.dtype) and kwargs.get("memory_format") is None:
        return source  # which `.to` of the same device would have given
    return _apply(func, args, kwargs, goes == "cuda")


def to_gpu(model: nn.Module) -> nn.Module:
    """Put every parameter and buffer there, ties kept."""
    made: dict[int, Tensor] = {}
    for module in model.modules():
        for name, tensor in module._parameters.items():
            if tensor is not None:
                if id(tensor) not in made:
                    made[id(tensor)] = nn.Parameter(
                        OnGpu(tensor.detach()), requires_grad=tensor.requires_grad
                    )
                module._parameters[name] = made[id(tensor)]
        for name, tensor in module._buffers.items():
            if tensor is not None:
                module._buffers[name] = made.setdefault(id(tensor), OnGpu(tensor))
    return model


@contextmanager
def machine(monkeypatch) -> Iterator[Ledger]:
    """Inside, `cuda:0` is this double."""
    global ledger
    ledger = Ledger()

    def synchronize(device=None) -> None:
        ledger.synchronized += 1

    # There is no runtime to begin.
    monkeypatch.setattr(torch.cuda, "_lazy_init", lambda: None)
    monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda device: ledger.waits.append("rng"))
    monkeypatch.setattr(torch.cuda, "set_rng_state", lambda state, device: ledger.waits.append("rng"))
    with _Machine():
        yield ledger
