"""What changed between two state_dicts, and changing the one into the other in place: the path of RL weight sync.

Built on the ops `delta_encode`, `delta_restore` and `delta_apply_`; no kernel and no format of its own.
"""

import warnings
from collections.abc import Iterable, Iterator, Mapping, MutableMapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from . import _core, _ops, digests, extra

StateDict = Mapping[str, Tensor]
_WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class StateDelta:
    """What turns one state_dict into another, bit for bit; made by `diff`, used up by `apply_`.

    It pickles, and `torch.save` and `torch.load` take it as it is. All tensors are on the CPU.

    Attributes:
        deltas: name -> resident delta (1-D uint8), for every tensor with changed words.
        alone: name -> the new tensor itself: new, or of another dtype or shape than before.
        removed: names that the new state_dict lacks.
        ties: name -> the name of an earlier tensor that is the same tensor (they share memory); diffed once.
        unchanged: names of tensors that did not change. Their words are neither kept nor compared by `apply_`.
        changed: number of words that differ, in all deltas, ties counted once.
        words: number of words that were compared.
        tensor_bytes: bytes of all tensors of the new state_dict, ties counted once.
    """

    def __init__(self) -> None:
        """An empty delta, which changes nothing."""
        self.deltas: dict[str, Tensor] = {}
        self.alone: dict[str, Tensor] = {}
        self.removed: tuple[str, ...] = ()
        self.ties: dict[str, str] = {}
        self.unchanged: tuple[str, ...] = ()
        self.changed = 0
        self.words = 0
        self.tensor_bytes = 0

    @property
    def nbytes(self) -> int:
        """Bytes of all deltas and of the tensors kept alone: what there is to send."""
        return sum(t.nbytes for t in (*self.deltas.values(), *self.alone.values()))

    def __repr__(self) -> str:
        """How many tensors changed, and how many bytes the delta takes."""
        counts = f"{len(self.deltas)} changed, {len(self.unchanged)} unchanged"
        for what in ("ties", "alone", "removed"):
            count = len(getattr(self, what))
            counts += f", {count} {what}" if count else ""
        share = f" ({100 * self.changed / self.words:.3g} %)" if self.words else ""
        return (
            f"StateDelta({counts}; {self.changed:,} of {self.words:,} words differ{share}; "
            f"{self.nbytes:,} bytes for {self.tensor_bytes:,})"
        )


# It holds tensors, names and numbers and runs no code when it is unpickled, so torch.load(weights_only=True) may take it.
torch.serialization.add_safe_globals([StateDelta])


def tensors_of(what: str, value: Any) -> dict[str, Tensor]:
    """Name -> tensor of a state_dict or a module, everything checked that can be without looking at words."""
    if isinstance(value, nn.Module):
        value = value.state_dict(keep_vars=True)
    if not isinstance(value, Mapping):
        raise TypeError(f"{what} must be a state_dict or a module, but is {type(value).__name__}")
    value = extra.plain(what, value)
    for name, tensor in value.items():
        if not isinstance(name, str):
            raise TypeError(f"{what}: a tensor's name must be a str, but is {type(name).__name__}")
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{what}: `{name}` must be a tensor, but is {type(tensor).__name__}")
        if is_traceable_wrapper_subclass(tensor):
            raise TypeError(
                f"{what}: `{name}` is a {type(tensor).__name__}, which wraps other tensors; give those (such as "
                "DTensor.full_tensor() or .to_local())"
            )
        if tensor.layout != torch.strided or tensor.is_meta or tensor.is_quantized:
            raise TypeError(f"{what}: `{name}` must be a dense tensor with data")
        if tensor.is_conj() or tensor.is_neg():
            raise TypeError(
                f"{what}: `{name}` is a conjugate or negative view; give .resolve_conj().resolve_neg()"
            )
    return dict(value)


def place(tensor: Tensor) -> tuple[Any, ...]:
    """Equal for tensors that are the same words in the same memory, and for no others."""
    if tensor.numel() == 0:
        return (id(tensor),)
    return tensor.device, tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride()


def _same_kind(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape


def text_of(tensor: Tensor) -> str:
    """Dtype and shape, for messages."""
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"


def _real(tensor: Tensor) -> Tensor:
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor


def _bits(tensor: Tensor) -> Tensor:
    """The tensor's words as integers: a copy of floats might quiet a NaN on some machine, a copy of integers cannot."""
    tensor = _real(tensor)
    return tensor.view(_WORDS[tensor.element_size()])


def _known(tensor: Tensor) -> Tensor:
    """The tensor as one of a dtype that deltas know; its bits, where they do not know its own."""
    tensor = _real(tensor)
    return tensor if tensor.dtype in _core.DTYPES else _bits(tensor)


def _equal(a: Tensor, b: Tensor) -> bool:
    """Whether two contiguous tensors on the CPU hold the same bits."""
    a, b = a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8)
    wide = a.numel() // 8 * 8
    if wide and not (a.data_ptr() | b.data_ptr() | a.storage_offset() | b.storage_offset()) & 7:
        # Compare eight bytes at once.
        whole = torch.equal(a[:wide].view(torch.int64), b[:wide].view(torch.int64))
        return whole and torch.equal(a[wide:], b[wide:])
    return torch.equal(a, b)


def diff(old: StateDict | nn.Module, new: StateDict | nn.Module, *, prefer: str = "memory") -> StateDelta:
    """What turns `old` into `new`, bit for bit.

    Both are kept as they are, and tensors that are not on the CPU or not contiguous are copied one at a time. A
    `state_dict()` shares the model's memory: clone it before training goes on, or old and new will be the same.

    Args:
        old: state_dict (or module) before.
        new: state_dict (or module) after.
        prefer: what the deltas are encoded for: "memory" (small, to be sent), "speed", or "auto" for this machine.

    Returns:
        The delta; tensors that did not change are only named in it.

    Raises:
        TypeError: neither state_dict nor module, or a value that is no dense tensor; ValueError: an unknown `prefer`.
    """
    if prefer not in ("auto", "memory", "speed"):
        raise ValueError(f'prefer must be "auto", "memory" or "speed", but is {prefer!r}')
    before, after = tensors_of("old", old), tensors_of("new", new)
    places = [(place(before[n]), place(t)) for n, t in after.items() if n in before and t.numel()]
    if places and all(a == b for a, b in places):
        warnings.warn(
            "old and new are the same memory, so nothing differs; clone the old state_dict before training",
            stacklevel=2,
        )
    out, firsts, unchanged = StateDelta(), {}, []
    for name, tensor in after.items():
        first = firsts.setdefault(place(tensor), name)
        if first != name and _tied_before(before, first, name, out):
            out.ties[name] = first
            continue
        out.tensor_bytes += tensor.nbytes
        base = before.get(name)
        if base is None or not _same_kind(base, tensor):
            out.alone[name] = _copy(tensor)
            continue
        out.words += tensor.numel() * (1 + tensor.is_complex())
        made = _encode(name, base, tensor, prefer)
        if made is None:
            unchanged.append(name)
        else:
            out.deltas[name] = made
            out.changed += _core.delta_info(made).changed
    out.removed = tuple(n for n in before if n not in after)
    out.unchanged = tuple(unchanged)
    return out


def _copy(tensor: Tensor) -> Tensor:
    host = _core.on_host("tensor", tensor)
    return host.clone() if host.data_ptr() == tensor.data_ptr() else host


def _tied_before(before: dict[str, Tensor], first: str, name: str, out: StateDelta) -> bool:
    """Whether `name`, the same tensor as `first` now, was equal to it before, so that one delta does for both."""
    if first in out.alone:
        # The tensor is stored whole and gets a new place, wherever it was before.
        return name not in before or not _same_kind(before[name], out.alone[first])
    if name not in before or not _same_kind(before[first], before[name]):
        return False
    a, b = before[first], before[name]
    return place(a) == place(b) or _equal(_core.on_host(first, a), _core.on_host(name, b))


def _encode(name: str, base: Tensor, tensor: Tensor, prefer: str) -> Tensor | None:
    """The delta; None if nothing changed."""
    if place(base) == place(tensor):
        return None
    a, b = _core.on_host(name, base), _core.on_host(name, tensor)
    if _equal(a, b):
        return None
    return _ops.delta_encode(_known(a), _known(b), prefer=prefer)


def apply_(target: nn.Module | MutableMapping[str, Tensor], delta: StateDelta) -> Any:
    """Turn `target`, which must hold what `diff` was given as `old`, into `new`, in place, and give it back.

    Everything is checked before the first word changes: names, dtypes, shapes, the deltas' own bytes and the digests of
    the words that they change. What can still fail is the machine (no memory, an interrupt). Parameters that require grad
    are changed like any others, under `no_grad`; their version counters are bumped, so that a backward pass through values
    of before raises instead of being wrong. Tensors that share memory are changed once. On a GPU that has kernels digests and
    words are its own matter, and the host waits for it before and after; only deltas of encoding `exponent` go
    through the CPU, one tensor at a time, as on other devices: whether its streams are whole is told from the words. Names
    in `target` that the delta does not know are left alone.

    Args:
        target: a module, whose parameters and buffers are changed, or a state_dict, whose tensors are. A state_dict is also
            given the new tensors and loses the removed ones; a module cannot, so those are refused, unless it has a tensor
            of the new kind already.
        delta: from `diff`.

    Raises:
        KeyError: a tensor is missing; ValueError: a tensor is another than the one that was diffed (both values are named),
        has two new values, or has no place, or the module is attached to tenants; TypeError: arguments of other types;
        RuntimeError: what ops before have reported of a GPU that the target is on.
        `target` is untouched then.
    """
    if not isinstance(delta, StateDelta):
        raise TypeError(f"delta must be a StateDelta, but is {type(delta).__name__}")
    is_module = isinstance(target, nn.Module)
    if is_module and any("_xorz" in module.__dict__ for module in target.modules()):
        raise ValueError("target is attached to tenants, of whom it is the base; call tenants.detach() first")
    tensors = tensors_of("target", target)
    if not is_module and not isinstance(target, MutableMapping):
        raise TypeError(f"target must be a module or a dict, but is {type(target).__name__}")
    # What is bytes cannot be changed in place: copies are, and given to the target at the end.
    states = extra.states(target.state_dict(keep_vars=True) if is_module else target)
    jobs = _jobs(tensors, delta)
    placed, fresh = _new_tensors(tensors, delta, is_module, states)
    _check_memory(tensors, jobs, placed, delta)
    for name, blob in jobs.items():
        _check(name, tensors[name], blob)
    there = digests.elsewhere(
        {n: _known(tensors[n].detach()) for n in jobs if _in_place(tensors[n], jobs[n])}
    )
    # What ops before have reported is said before the first word changes, not in the midst of it.
    for device in dict.fromkeys(tensors[name].device for name in there):
        torch.cuda.synchronize(device)
        _ops.cuda_status(device)
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        # Hashing runs without the interpreter's lock. Of several errors the one of the first tensor is raised.
        list(pool.map(lambda job: _match(job[0], tensors[job[0]], job[1], there.get(job[0])), jobs.items()))
    with torch.no_grad():
        for name, blob in jobs.items():
            _change(tensors[name], blob, name in there)
        for name, value in placed.items():
            _bits(tensors[name]).copy_(_bits(value))
        changed = {n: fresh.pop(n, tensors[n]) for n in states if n in (*jobs, *placed, *fresh)}
        if not is_module:
            _replace(target, fresh, delta)
        for name, value in changed.items():
            extra.give(target, name, states[name], value)
    for device in dict.fromkeys(tensors[name].device for name in there):
        torch.cuda.synchronize(device)
        _ops.cuda_status(device)
    return target


def _jobs(tensors: dict[str, Tensor], delta: StateDelta) -> dict[str, Tensor]:
    """Target name -> delta, ties that share memory in the target once."""
    for name, blob in delta.deltas.items():
        if not isinstance(blob, Tensor):
            raise TypeError(f"delta.deltas[{name!r}] must be a tensor, but is {type(blob).__name__}")
    wanted = (*delta.deltas, *delta.ties, *delta.unchanged)
    missing = [n for n in wanted if n not in tensors and delta.ties.get(n) not in delta.alone]
    if missing:
        more = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
        raise KeyError(f"the target has no tensor `{missing[0]}`{more}, which the delta was made for")
    jobs = dict(delta.deltas)
    for name, first in delta.ties.items():
        if first in delta.deltas and place(tensors[name]) != place(tensors[first]):
            jobs[name] = delta.deltas[first]
    return jobs


def _new_tensors(
    tensors: dict[str, Tensor], delta: StateDelta, is_module: bool, states: Mapping[str, Any]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """New tensors by name: those that the target has room for, and those that a dict must take up."""
    placed: dict[str, Tensor] = {}
    fresh: dict[str, Tensor] = {}
    alone = {**delta.alone, **{n: delta.alone[f] for n, f in delta.ties.items() if f in delta.alone}}
    for name, value in alone.items():
        if not isinstance(value, Tensor):
            raise TypeError(f"delta.alone[{name!r}] must be a tensor, but is {type(value).__name__}")
        there = tensors.get(name)
        if there is not None and _same_kind(there, value):
            placed[name] = value
        elif not is_module or name in states:
            fresh[name] = value
        else:
            has = "no such tensor" if there is None else text_of(there)
            raise ValueError(
                f"tensor `{name}`: the delta brings {text_of(value)}, but the module has {has}; "
                "apply it to a state_dict, and load that into a module that fits"
            )
    if is_module and delta.removed:
        here = [n for n in delta.removed if n in tensors]
        if here:
            raise ValueError(
                f"tensor `{here[0]}`: the delta removes it, but a module cannot lose its {text_of(tensors[here[0]])}; "
                "apply it to a state_dict, and load that into a module that fits"
            )
    return placed, fresh


def _check(name: str, tensor: Tensor, blob: Tensor) -> None:
    if tensor.is_inference() and not torch.is_inference_mode_enabled():
        raise ValueError(
            f"tensor `{name}` was made in inference mode; call apply_ within torch.inference_mode()"
        )
    try:
        info = _core.delta_info(blob)
    except ValueError as error:
        raise ValueError(f"tensor `{name}`: {error}") from error
    if _known(tensor.detach()).dtype != info.dtype:
        raise ValueError(f"tensor `{name}` is {text_of(tensor)}, but its delta is of {info.dtype}")


def _in_place(tensor: Tensor, blob: Tensor) -> bool:
    """Whether a device that has kernels may change the words where they lie: then no tile can fail any more."""
    plain = tensor.is_contiguous() and not (tensor.is_conj() or tensor.is_neg())
    return tensor.device.type == "cuda" and plain and _core.delta_info(blob).encoding != "exponent"


def _match(name: str, tensor: Tensor, blob: Tensor, known: bytes | None) -> None:
    """`known`: the digest of the words, where these stay on their device."""
    try:
        if known is None:
            _core.delta_matches(blob, _known(_core.on_host(name, tensor)))
        else:
            _core.delta_matches_known(blob, _known(tensor.detach()), known)
    except ValueError as error:
        raise ValueError(f"tensor `{name}`: {error}") from error


def _change(tensor: Tensor, blob: Tensor, on_device: bool) -> None:
    words = _known(tensor.detach())
    if on_device or (words.device.type == "cpu" and words.is_contiguous()):
        _ops.delta_apply_(words, blob.to(words.device))
    else:
        new = _ops.delta_restore(_core.on_host("tensor", words), blob)
        _bits(words).copy_(_bits(new))


def _replace(target: MutableMapping[str, Tensor], fresh: dict[str, Tensor], delta: StateDelta) -> None:
    """New tensors into a dict, one for all names that are tied; removed ones out of it."""
    devices = {t.device for t in target.values() if isinstance(t, Tensor)}
    device = devices.pop() if len(devices) == 1 else torch.device("cpu")
    made = {
        n: value.to(target[n].device if isinstance(target.get(n), Tensor) else device, copy=True)
        for n, value in fresh.items()
        if n not in delta.ties
    }
    for name in fresh:
        first = delta.ties.get(name, name)
        target[name] = made[first] if first in made else target[first]
    for name in delta.removed:
        target.pop(name, None)


def _span(tensor: Tensor) -> tuple[int, int]:
    """First byte of the tensor's memory, and the one after the last."""
    last = sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.data_ptr(), tensor.data_ptr() + (last + 1) * tensor.element_size()


def _folds(tensor: Tensor) -> bool:
    """Whether words of the tensor may share memory with each other, as those of an expanded one do."""
    reach = 0
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1 and stride <= reach:
            return True
        reach += (size - 1) * stride
    return False


def _marks(tensors: Iterable[Tensor]) -> Iterator[bool]:
    """For each tensor, whether it shares a word with an earlier one or with itself. All lie in one span."""
    tensors = list(tensors)
    start = min(_span(t)[0] for t in tensors)
    marks = torch.zeros(max(_span(t)[1] for t in tensors) - start, dtype=torch.uint8)
    for t in tensors:
        size = t.element_size()
        view = marks.as_strided(t.shape, [s * size for s in t.stride()], t.data_ptr() - start)
        shared = _folds(t) or bool(view.any())
        if not shared:
            view.fill_(1)
        yield shared


def _check_memory(
    tensors: dict[str, Tensor], jobs: dict[str, Tensor], placed: dict[str, Tensor], delta: StateDelta
) -> None:
    """No word of the target is to have two values: neither two new ones nor a new and an unchanged one."""
    same = (*delta.unchanged, *(n for n, first in delta.ties.items() if first in delta.unchanged))
    new: dict[str, Tensor | None] = {**dict.fromkeys(same), **jobs, **placed}
    owners: dict[tuple[Any, ...], str] = {}
    for name in new:
        first = owners.setdefault(place(tensors[name]), name)
        if first == name:
            continue
        if not _agree(new[first], new[name]):
            raise ValueError(
                f"tensors `{first}` and `{name}` are one tensor in the target, but two in the delta: "
                f"{_fate(new[first])} and {_fate(new[name])}"
            )
        jobs.pop(name, None)
        placed.pop(name, None)
    spans = sorted(
        (str(tensors[n].device), *_span(tensors[n]), n) for n in owners.values() if tensors[n].numel()
    )
    group: list[str] = []
    device, end = "", 0
    for where, first_byte, last_byte, name in spans:
        if group and (where != device or first_byte >= end):
            _refuse_overlap(tensors, group, new)
            group, end = [], 0
        group.append(name)
        device, end = where, max(end, last_byte)
    _refuse_overlap(tensors, group, new)


def _agree(a: Tensor | None, b: Tensor | None) -> bool:
    return a is b or (a is not None and b is not None and _same_kind(a, b) and _equal(a, b))


def _fate(new: Tensor | None) -> str:
    return "unchanged" if new is None else f"changed by {new.nbytes} bytes"


def _refuse_overlap(tensors: dict[str, Tensor], group: list[str], new: dict[str, Tensor | None]) -> None:
    changing = any(new[n] is not None for n in group)
    if not changing or (len(group) == 1 and not _folds(tensors[group[0]])):
        return
    for name, shared in zip(group, _marks(tensors[n] for n in group), strict=True):
        if shared:
            others = ", ".join(f"`{n}`" for n in group if n != name) or "itself"
            raise ValueError(
                f"tensor `{name}` {text_of(tensors[name])} shares words with {others} in the target; "
                "such tensors cannot be changed one by one: clone them first"
            )
