"""From a package (or deltas in memory) to what each attached module needs of it; every refusal comes from here, before a
tenant exists. No dense fine-tuned matrix is made, but one expert of a stack at a time and tensors that are small.
"""

import os
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from .. import _core, _ops, checkpoint, digests
from ..diff import StateDelta
from . import names
from .residency import padded
from .site import COMPUTING, FLOATS, Site, restored_as
from .stored import Experts, stored
from .twins import Twins, twins
from .weight import plain

LARGEST_COPY = 0.01
"""Share of the base's bytes that a tenant's dense copies may take, if nobody says otherwise; the rest stays deltas."""

SMALL = 64 << 10
"""Bytes of copies that are nothing to speak of, however small the base."""


class Prepared:
    """What one tenant changes: deltas and dense values by site and parameter."""

    def __init__(self) -> None:
        """Begin with no change at all; `prepare` adds what it finds."""
        self.deltas: list[tuple[Site, str, Tensor]] = []
        self.values: list[tuple[Site, str, Tensor]] = []
        self.alone = False

    def move(self) -> None:
        """Put the dense values where their modules are, tied ones once; the deltas go into arenas later."""
        there: dict[Any, Tensor] = {}
        for site, _, value in self.values:
            if site.device.type != "cpu":
                key = (id(value), site.device)
                there[key] = there[key] if key in there else value.to(site.device)
        self.values = [(s, param, there.get((id(v), s.device), v)) for s, param, v in self.values]

    def copies(self, device: torch.device) -> int:
        """Bytes of the dense values there; tied ones once."""
        return sum({t.data_ptr(): t.nbytes for s, _, t in self.values if s.device == device}.values())

    def bytes(self, device: torch.device) -> int:
        """Bytes that it will take there."""
        deltas = {id(d): padded(d.numel()) for s, _, d in self.deltas if s.device == device}
        return sum(deltas.values()) + self.copies(device)


def prepare(
    model: nn.Module,
    source: Any,
    prefer: str | None,
    max_copies: int | None = None,
    kept: Mapping[str, str] = MappingProxyType({}),
    trust: str = "digest",
) -> Prepared:
    """Read, check against the model's own tensors, and say who serves what; errors as `Tenants.load`. `kept`: what modules made
    of the base's weights before it was attached; see `kept.kept`. `trust` as `attach`.
    """
    base = {
        name: plain(tensor).detach()
        for name, tensor in model.state_dict(keep_vars=True).items()
        if torch.is_tensor(tensor)
    }
    entries = _entries(model, base, source, prefer, trust, twins(model, base))
    where = _places(model)
    out = Prepared()
    base_bytes = sum({t.untyped_storage().data_ptr(): t.nbytes for t in base.values()}.values())
    small: dict[str, list[tuple[Site, str, Tensor]]] = {}
    for name, (kind, tensor) in entries.items():
        if name in kept:
            raise ValueError(
                f"tensor `{name}` is changed, and {kept[name]} was made of the base's words of it before the model was "
                "attached, so that it would be used for all tenants; clear it before attach"
            )
        for site, param in where.get(name, ()):
            _one(out, site, param, name, kind, tensor, base[name], small)
        if not where.get(name):
            raise ValueError(
                f"tensor `{name}` is changed, but its module is not attached (filter_fn), so nothing serves it"
            )
    _copy(out, small, base, base_bytes if max_copies is None else max_copies, max_copies is None)
    return out


def _key(tensor: Tensor) -> Any:
    """What tied tensors have in common; those without words are not tied."""
    return (tensor.device, tensor.data_ptr(), tensor.shape, tensor.stride()) if tensor.numel() else id(tensor)


def _copy(
    out: Prepared,
    small: dict[str, list[tuple[Site, str, Tensor]]],
    base: dict[str, Tensor],
    limit: int,
    is_base: bool,
) -> None:
    """Dense copies of what only such serve, the smallest first, as far as they are allowed; the others stay deltas, and are
    made dense for each call.
    """
    limit = max(SMALL, int(LARGEST_COPY * limit)) if is_base else limit
    used = 0
    for name, places in sorted(small.items(), key=lambda item: base[item[0]].nbytes):
        used += base[name].nbytes
        # Vectors and buffers belong to norms and biases, which serve the rows of a batch from a table.
        if used <= limit or base[name].dim() < 2:
            value = restored_as(base[name].cpu(), places[0][2])
            out.values += [(site, param, value) for site, param, _ in places]
        else:
            out.deltas += places


def _entries(
    model: nn.Module, base: dict[str, Tensor], source: Any, prefer: str | None, trust: str, copied: Twins
) -> dict[str, tuple[str, Any]]:
    """Name in the model -> ("delta", resident delta), ("experts", one of them or None for each) or ("alone", tensor).

    Changed ones only, ties made whole, those between devices (`copied`), too.
    """
    deltas, alone, removed = _read(model, base, source, prefer, trust)
    tied = _ties(base)
    for name, others in copied.sure.items():
        tied[name] = list(dict.fromkeys((*tied[name], *others)))
    for name in removed:
        if name in base and not any(alias in deltas or alias in alone for alias in tied[name]):
            raise ValueError(f"tensor `{name}` is not in the fine-tune, and the model needs it")
    out: dict[str, tuple[str, Any]] = {}
    for kind, tensors in (("delta", deltas), ("alone", alone)):
        for name, tensor in tensors.items():
            if name not in base:
                raise KeyError(f"the model has no tensor `{name}`, which the fine-tune has")
            if isinstance(tensor, list):
                experts = [None if d is None or _core.delta_info(d).changed == 0 else d for d in tensor]
                if any(d is not None for d in experts):
                    out[name] = ("experts", experts)
                continue
            if kind == "alone" and tensor.shape == base[name].shape and tensor.dtype == base[name].dtype:
                # A head that the packed base lacked, and the model has: the difference to the model's own.
                tensor = _ops.delta_encode(_core.on_host(name, base[name]), tensor.contiguous())
                out[name] = ("delta", tensor)
                continue
            if kind == "delta" and _core.delta_info(tensor).changed == 0:
                continue
            out[name] = (kind, tensor)
    given = {*deltas, *alone}
    for name in list(out):
        for alias in tied[name]:
            if alias not in given:
                out[alias] = out[name]
    for name in out:
        copied.refuse_unsure(name, {*out, *given})
    return out


def _read(
    model: nn.Module, base: dict[str, Tensor], source: Any, prefer: str | None, trust: str
) -> tuple[dict[str, Tensor | Experts], dict[str, Tensor], list[str]]:
    """Deltas, each checked against its base, tensors stored alone, and missing ones, by their names in the model."""
    if isinstance(source, (StateDelta, Mapping)):
        if trust != "digest" and not isinstance(source, StateDelta):
            raise ValueError(
                "resident deltas have no sha256 of their base to trust it by (trust='sha256'); load a package that was packed "
                "so"
            )
        deltas, alone, removed = _in_memory(source)
        found, ignored = names.matched(model, base, (*deltas, *alone, *removed))
        if found or ignored:
            renamed = [_renamed(kind, found, ignored) for kind in (deltas, alone, dict.fromkeys(removed))]
            deltas, alone, removed = renamed[0], renamed[1], list(renamed[2])
            names.report(ignored)
        deltas = {name: _preferred(delta, base.get(name), prefer) for name, delta in deltas.items()}
        files = None if base.keys() >= {*deltas, *alone} else stored(model, base)
        words = base if files is None else files.base
        unchecked = set(deltas)
    else:
        description = _described(source)
        entries = description["entries"]
        parts = {p["name"] for e in entries for p in e["base_parts"] if "name" in p}
        given = (
            {n for e in entries for n in (e["name"], e["base_name"]) if n}
            | parts
            | set(description["removed_names"])
        )
        files = None if base.keys() >= {e["name"] for e in entries} else stored(model, base)
        words = base if files is None else files.base
        found, ignored = names.matched(model, words, given)
        words = {**words, **{name: words[own] for name, own in found.items()}}
        for entry in entries:
            name = entry["base_name"] or entry["name"]
            if entry["base"] is not None and name in words and list(words[name].shape) == entry["shape"]:
                _same_dtype(name, entry["dtype"], words[name])
        loaded = checkpoint.load_deltas(words, source, prefer=prefer, skip=frozenset(ignored), trust=trust)
        # What is a delta of several base tensors, or of one with other rows, is given whole.
        apart = {e["name"] for e in entries if (e["base"] is None or e["base_parts"]) and not e["same"]}
        apart |= {e["name"] for e in entries if e["same"] in apart}
        deltas = {n: t for n, t in loaded.items() if n not in apart}
        alone = {n: t for n, t in loaded.items() if n in apart}
        removed = [name for name in description["removed_names"] if name not in ignored]
        # Loading has checked a delta against the tensor that it was made of, which need not be the one of its own name.
        unchecked = {e["name"] for e in entries if e["same"] or e["base_name"] not in (None, e["name"])}
        if trust != "digest":
            _same_words(entries, unchecked & set(deltas), words)
        names.report([n for n in ignored if n in {e["name"] for e in entries}])
    mine = {name: delta for name, delta in deltas.items() if name in unchecked and name in words}
    known = digests.elsewhere({name: words[name] for name in mine if not _streams(mine[name])})
    for name, delta in mine.items():
        _check(name, words[name], delta, known.get(name))
    if not isinstance(source, (StateDelta, Mapping)):
        deltas, alone = _renamed(deltas, found, ()), _renamed(alone, found, ())
        removed = [found.get(name, name) for name in removed]
    if files is None:
        return deltas, alone, removed
    lost = [files.whole(name) for name in removed if name in files.base]
    return files.deltas(deltas), {files.whole(name): t for name, t in alone.items()}, lost


def _same_words(entries: list[dict[str, Any]], mine: set[str], words: Mapping[str, Tensor]) -> None:
    """ValueError unless a tensor whose delta was made of another name's base has that base's words, of which loading has
    compared the sha256.
    """
    for name, base_name in ((e["name"], e["base_name"] or e["name"]) for e in entries if e["name"] in mine):
        if name not in words or base_name not in words or words[name] is words[base_name]:
            continue
        one, other = (_core.on_host(n, words[n]).view(-1).view(torch.uint8) for n in (name, base_name))
        if not torch.equal(one, other):
            raise ValueError(
                f"tensor `{name}`: its delta is one of the base's `{base_name}`, whose words it does not have here"
            )


def _described(source: Any) -> dict[str, Any]:
    """What a package holds; TypeError or ValueError, with what to do, where it is none."""
    if isinstance(source, nn.Module) or not isinstance(source, (str, os.PathLike)):
        raise TypeError(
            f"a fine-tune must be a package's path, what xorz.diff gives, or a mapping of names to deltas, but is "
            f"{type(source).__name__}"
        )
    if os.path.isdir(source):
        raise ValueError(
            f"{source} is a folder, and a tenant is loaded from a package: make one with `xorz pack BASE {source} NAME.xorz`"
        )
    return checkpoint.inspect(source)


def _same_dtype(name: str, found: str, base: Tensor) -> None:
    """ValueError if a tensor of the model is of another dtype than the fine-tune was made of."""
    own = _core.dtype_name(base.dtype)
    if found != own:
        raise ValueError(
            f"tensor `{name}` is {own} in the model, and the fine-tune was made of it in {found}; load the model in the dtype "
            'of its checkpoint (transformers: from_pretrained(..., dtype="auto"))'
        )


def _renamed(tensors: Mapping[str, Any], found: Mapping[str, str], ignored: Any) -> dict[str, Any]:
    """By the model's names, without what it ignores."""
    return {found.get(name, name): t for name, t in tensors.items() if name not in ignored}


_OTHER = {"speed": "exponent", "memory": "sparse"}


def _preferred(delta: Any, base: Tensor | None, prefer: str | None) -> Any:
    """A delta that was made in memory, encoded anew where it was for the other aim, as packages' are; the check of what it is a
    delta of comes later, on whatever is handed on.
    """
    if prefer is None or base is None or not isinstance(delta, Tensor):
        return delta
    try:
        if _core.delta_info(delta).encoding != _OTHER[_core.resolved(prefer)]:
            return delta
        words = _core.on_host("base", base)
        _core.delta_matches(delta, words)
        return _ops.delta_encode(words, _ops.delta_restore(words, delta), prefer=prefer)
    except (RuntimeError, ValueError):
        return delta


def _in_memory(
    source: StateDelta | Mapping[str, Tensor],
) -> tuple[dict[str, Tensor], dict[str, Tensor], list[str]]:
    if not isinstance(source, StateDelta):
        return dict(source), {}, []
    deltas, alone = dict(source.deltas), dict(source.alone)
    for name, first in source.ties.items():
        for kind in (deltas, alone):
            if first in kind:
                kind[name] = kind[first]
    return deltas, alone, list(source.removed)


def _streams(delta: Any) -> bool:
    """Whether only the base's words tell of a forged delta that its streams are too short."""
    is_bytes = isinstance(delta, Tensor) and delta.dtype == torch.uint8 and delta.dim() == 1
    try:
        return is_bytes and _core.delta_info(delta).encoding == "exponent"
    except ValueError:
        return False  # which `_check` will say


def _check(name: str, base: Tensor, delta: Any, known: bytes | None) -> None:
    """Errors as `Tenants.load`. `known`: the base's digest, where its words are on a GPU."""
    if not isinstance(delta, Tensor):
        raise TypeError(f"tensor `{name}`: a delta must be a tensor, but is {type(delta).__name__}")
    if delta.dtype != torch.uint8:
        raise TypeError(
            f"tensor `{name}`: a delta is a 1-D uint8 tensor, as xorz.diff and xorz.delta_encode make it, but this is "
            f"{delta.dtype} {list(delta.shape)}: a fine-tune's own tensors are loaded by xorz.diff(base, fine_tuned)"
        )
    try:
        info = _core.delta_info(delta)
        if info.shape == tuple(base.shape) or info.shape == (base.numel(),):
            _same_dtype(name, _core.dtype_name(info.dtype), base)
        if known is None:
            _core.delta_matches(delta, _core.on_host(name, base))
        else:
            _core.delta_matches_known(delta, base, known)
    except ValueError as error:
        text = str(error)
        raise ValueError(text if text.startswith("tensor `") else f"tensor `{name}`: {text}") from None


def _ties(base: dict[str, Tensor]) -> dict[str, list[str]]:
    """Name -> the other names of the same tensor."""
    groups: dict[Any, list[str]] = {}
    for name, tensor in base.items():
        groups.setdefault(_key(tensor), []).append(name)
    return {name: [other for other in group if other != name] for group in groups.values() for name in group}


def _places(model: nn.Module) -> dict[str, list[tuple[Site, str]]]:
    """Name in the state_dict -> the attached module and its name of it."""
    out: dict[str, list[tuple[Site, str]]] = {}
    for prefix, module in model.named_modules(remove_duplicate=False):
        site = module.__dict__.get("_xorz")
        if site is not None:
            for name in (*module._parameters, *module._buffers):
                out.setdefault(f"{prefix}.{name}" if prefix else name, []).append((site, name))
    return out


def _one(
    out: Prepared,
    site: Site,
    param: str,
    name: str,
    kind: str,
    tensor: Any,
    base: Tensor,
    small: dict[str, list[tuple[Site, str, Tensor]]],
) -> None:
    if site.keeps and not site.plain:
        raise ValueError(
            f"tensor `{name}` is changed, and {site.name} keeps tensors in `{site.keeps[0]}` that are neither parameters nor "
            "buffers: made of the base's weights, they would be used for all tenants; clear it before attach"
        )
    if site.derived and site.kind in COMPUTING and site.owner.mode == "deterministic":
        raise ValueError(
            f"tensor `{name}` is changed, and {site.name} has kept values in `{min(site.derived)}` that may be made from its "
            'weights: it is served on dense weights, whose bits depend on the batch; attach with mode="fast"'
        )
    if kind == "alone":
        _alone(out, site, param, name, tensor, base)
    elif kind == "experts":
        _add_experts(out, site, param, tensor)
    elif _computes(site, param):
        out.deltas.append((site, param, tensor))
    elif site.kind == "experts":
        _add_experts(out, site, param, _experts(tensor, base.cpu()))
    elif site.kind in ("linear", "conv1d", "embedding") and param == "bias":
        out.values.append((site, param, restored_as(base.cpu(), tensor)))
    elif _is_matrix(base) and not site.plain:
        # A module of the user's own may multiply by it.
        out.deltas.append((site, param, tensor))
    else:
        small.setdefault(name, []).append((site, param, tensor))


def _is_matrix(base: Tensor) -> bool:
    return base.dim() == 2 and base.dtype in FLOATS and base.is_contiguous() and min(base.shape) > 1


def _add_experts(out: Prepared, site: Site, param: str, experts: Experts) -> None:
    out.deltas += [(site, f"{param}.{expert}", d) for expert, d in enumerate(experts) if d is not None]


def _computes(site: Site, param: str) -> bool:
    """Whether an op computes with this parameter's delta as it is."""
    if site.kind == "attention":
        return param in ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")
    return site.kind in ("linear", "conv1d", "embedding") and param == "weight"


def _alone(out: Prepared, site: Site, param: str, name: str, tensor: Tensor, base: Tensor) -> None:
    """A tensor of another shape or dtype than the base's: a table with more tokens is served alone, others are not."""
    grown = tensor.dtype == base.dtype and tensor.dim() == base.dim() and tensor.shape[1:] == base.shape[1:]
    if not grown or site.kind not in ("linear", "embedding"):
        raise ValueError(
            f"tensor `{name}` is {_text(tensor)} in the fine-tune and {_text(base)} in the model; only embeddings and output "
            "layers may differ, in their number of rows"
        )
    out.values.append((site, param, tensor))
    out.alone = True


def _text(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"


def _experts(delta: Tensor, base: Tensor) -> Experts:
    """A stack's delta, cut into one per expert, each a matrix of its own; None where nothing changes."""
    rows = base.reshape(base.size(0), -1)
    out: Experts = []
    for expert in range(base.size(0)):
        tuned = _ops.delta_restore(rows, delta, rows=(expert, expert + 1)).view(base.shape[1:])
        part = _ops.delta_encode(base[expert], tuned)
        out.append(part if _core.delta_info(part).changed else None)
    return out
