"""Whole checkpoints: pack a fine-tune against its base, give it back, or load its deltas. No kernel is called here."""

import os
import warnings
from collections.abc import Callable, Container, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor

from . import _core, digests, extra
from .progress import bar

StateDict = Mapping[str, Tensor]
PathLike = str | os.PathLike[str]


def _is_path(what: str, value: Any) -> bool:
    if isinstance(value, (str, os.PathLike)):
        return True
    if isinstance(value, Mapping):
        return False
    raise TypeError(f"{what} must be a state_dict or a path, but is {type(value).__name__}")


def pack(
    base: StateDict | PathLike,
    fine_tuned: StateDict | PathLike,
    path: PathLike,
    *,
    prefer: str = "memory",
    codec: str | None = None,
    level: int = 0,
    jobs: int | None = None,
    trust: str = "digest",
    fast: bool = False,
) -> dict[str, Any]:
    """Write the package `path`, from which `base` gives `fine_tuned` back bit for bit.

    Args:
        base: state_dict of the base, or its path: a safetensors file, or a folder of them, sharded or not.
        fine_tuned: the same of the fine-tune; a folder's other files (config, tokenizer) are carried along.
            Tensors that the base lacks, or has in another dtype or shape, are stored alone; of those that have more or fewer
            rows (or columns, channels, positions) those in common are a delta. Extra state that is bytes is kept as a uint8
            tensor, None is left out.
        path: the package; it appears when it is complete.
        prefer: what deltas are encoded for, "memory" or "speed".
        codec: None (the smallest, tensor by tensor), "resident", "resident-zstd", "planes", "predicted" or "xor".
        level: of zstd; 0 is the default.
        jobs: threads for paths; None is one per core. State_dicts take the calling thread. The bytes are the same.
        trust: "sha256" keeps the sha256 of each base tensor, which others can trust a base by; it takes longer.
        fast: leave out the codecs that take long to make and to load, "predicted" and "xor": the package is larger.

    Returns:
        Totals: tensors, changed, words, tensor_bytes, package_bytes and more. Where most of the fine-tune is no delta (another
        dtype, another model), `advice` says why, and a UserWarning is given.

    Raises:
        TypeError: an argument is neither state_dict nor path, or of both kinds; ValueError: a broken file or unknown option;
        OSError: a file that cannot be read or written.
    """
    options, run = _core.options(prefer, codec, level, trust=trust, fast=fast), _core.run(jobs)
    from_files = _is_path("base", base)
    if from_files != _is_path("fine_tuned", fine_tuned):
        raise TypeError("base and fine_tuned must both be state_dicts or both be paths")
    if from_files:
        return _advised(_core.pack_files(base, fine_tuned, path, options, run))
    base, fine_tuned = extra.plain("base", base), extra.plain("fine_tuned", fine_tuned)
    total = sum(map(_size, fine_tuned.values()))
    with _core.Writer(path, options) as writer, bar(total=total, unit="B", desc="packing") as shown:
        for name, tensor in fine_tuned.items():
            writer.add(name, tensor, base.get(name))
            shown.update(_size(tensor))
        for name in base:
            if name not in fine_tuned:
                writer.removed(name)
        return _advised(writer.finish())


def _size(value: Any) -> int:
    """Bytes of a tensor; of what is none that can be packed, none: whoever packs it says what is wrong."""
    return value.nbytes if isinstance(value, Tensor) and value.layout == torch.strided else 0


def pack_fleet(
    base: PathLike | Sequence[PathLike],
    fine_tuned: Mapping[PathLike, PathLike],
    *,
    prefer: str = "memory",
    codec: str | None = None,
    level: int = 0,
    jobs: int | None = None,
    trust: str = "digest",
    fast: bool = False,
) -> list[dict[str, Any]]:
    """Pack many fine-tunes of one base in one run, which reads the base once; each package is what `pack` makes of it alone.

    Args:
        base: path of the base, or of several, of which each fine-tune takes the nearest one, by a sample of its words.
        fine_tuned: for the path of each fine-tune that of its package. Its folder must be there.
        prefer, codec, level, jobs, trust, fast: as `pack`.

    Returns:
        For each fine-tune, in order, `fine_tuned`, `package`, `base`, `distances` and `report`, the totals that `pack` gives.
        Distances, from each base where there are several, are the share of its bits that lie below the highest one in which a
        word differs from the base's.

    Raises:
        TypeError: an argument is no path; ValueError, OSError: a base cannot be read, or some fine-tunes could not be packed.
        The packages of all others are there then; `packages` of the exception lists all, with `error` in place of a `report`.
    """
    options, run = _core.options(prefer, codec, level, trust=trust, fast=fast), _core.run(jobs)
    bases = [base] if isinstance(base, (str, os.PathLike)) else base
    if not isinstance(bases, (list, tuple)) or not all(isinstance(b, (str, os.PathLike)) for b in bases):
        raise TypeError(f"base must be a path or a list of paths, but is {type(base).__name__}")
    if not isinstance(fine_tuned, Mapping):
        raise TypeError(
            f"fine_tuned must map the path of each fine-tune to that of its package, but is {type(fine_tuned).__name__}"
        )
    found = _core.pack_fleet(list(bases), list(fine_tuned), list(fine_tuned.values()), options, run)[
        "packages"
    ]
    failed = [line for line in found if "error" in line]
    if failed:
        told = "; ".join(f"{line['fine_tuned']}: {line['error']}" for line in failed)
        error = _core.failure(
            failed[0]["kind"], f"{len(failed)} of {len(found)} checkpoints were not packed: {told}"
        )
        error.packages = found  # type: ignore[attr-defined]
        raise error
    for line in found:
        if advice := line["report"].get("advice"):
            warnings.warn(f"xorz.pack_fleet: {line['fine_tuned']}: {advice}", stacklevel=2)
    return found


def _advised(report: dict[str, Any]) -> dict[str, Any]:
    """Warn the caller of `pack` where most of the fine-tune is no delta: a package is there, but not what they wanted."""
    if advice := report.get("advice"):
        warnings.warn(f"xorz.pack: {advice}", stacklevel=3)
    return report


def unpack(
    base: PathLike,
    package: PathLike,
    out: PathLike,
    *,
    jobs: int | None = None,
    sha256: bool = True,
    trust: str = "digest",
) -> dict[str, Any]:
    """Write the fine-tuned checkpoint, byte for byte the packed one, from the base's path and a package.

    Args:
        base: safetensors file, or folder of them; it may be sharded otherwise than when the package was made.
        package: the package.
        out: a safetensors file, or a folder (new or empty) if the package was made from one; appears when it is complete.
        jobs: threads; None is one per core.
        sha256: whether to compute and compare each restored file's; tensors are compared by digest in any case.
        trust: "sha256" compares that of each base tensor, too, before anything is made of it: a digest finds mistakes, but who
            wants to can make other words of the same one. Needs a package that was packed so.

    Returns:
        Totals, as `pack`.

    Raises:
        ValueError: another base (tensor and both digests are named), a damaged package, or one without the sha256 asked for;
        OSError: as `pack`.
    """
    return _core.unpack_files(base, package, out, _core.run(jobs, sha256, trust))


def verify(
    base: PathLike,
    package: PathLike,
    fine_tuned: PathLike | None = None,
    *,
    jobs: int | None = None,
    sha256: bool = True,
    trust: str = "digest",
) -> dict[str, Any]:
    """Restore everything without writing it, comparing digests, and `fine_tuned` if given; the rest as `unpack`."""
    return _core.verify_files(base, package, fine_tuned, _core.run(jobs, sha256, trust))


def _base_of(entry: dict[str, Any], base: StateDict) -> Tensor | None:
    if entry["base"] is None:
        return None
    if entry["base_parts"]:
        return _joined(entry, base)
    return _core.on_host(*_named(entry, base))


def _named(entry: dict[str, Any], base: StateDict) -> tuple[str, Tensor]:
    """The name and the tensor that an entry is a delta of, wherever it is; of the entry's dtype and shape."""
    name = entry["base_name"] or entry["name"]
    if name not in base:
        raise KeyError(
            f"the base has no tensor `{name}`, which the package's `{entry['name']}` is a delta of; give the base that it "
            "was packed against"
        )
    tensor = _core.dense(name, base[name])
    found, shape = _core.dtype_name(tensor.dtype), _core.shape_of(tensor)
    if (found, shape) != (entry["dtype"], entry["shape"]):
        raise ValueError(
            f"tensor `{name}`: the base has {found} {shape}, "
            f"but the package was made against {entry['dtype']} {entry['shape']}; give the base that it was packed against, "
            "in its dtype"
        )
    return name, tensor


def _joined(entry: dict[str, Any], base: StateDict) -> Tensor:
    """The base of a tensor with other rows than the base's, or of a stack: put together as the package says."""
    pieces: list[Tensor] = []
    for part in entry["base_parts"]:
        name, at, count = part.get("name"), part.get("at", 0), part["bytes"]
        if name is None:
            pieces.append(torch.zeros(count, dtype=torch.uint8))
            continue
        if name not in base:
            raise KeyError(
                f"the base has no tensor `{name}`, which the package's `{entry['name']}` is a delta of; give the base that it "
                "was packed against"
            )
        words = _core.on_host(name, base[name]).reshape(-1).view(torch.uint8)
        if _core.dtype_name(base[name].dtype) != entry["dtype"] or words.numel() < at + count:
            raise ValueError(
                f"tensor `{entry['name']}` is a delta of bytes {at} to {at + count} of {entry['dtype']}, but the base's "
                f"`{name}` is {_core.dtype_name(base[name].dtype)} {list(base[name].shape)}; give the base that it was packed "
                "against"
            )
        pieces.append(words[at : at + count])
    out = _core.room(entry)
    torch.cat(pieces, out=out.view(-1).view(torch.uint8))
    return out


def restore(base: StateDict, package: PathLike, *, trust: str = "digest") -> dict[str, Tensor]:
    """The fine-tune's state_dict, bit for bit, on the CPU; tensors that were the same one in its file are one. `trust` as
    `unpack`.

    Raises:
        KeyError: `base` lacks a tensor; ValueError: it has another one (both digests are named), or the package is damaged;
        OSError.
    """
    if _is_path("base", base):
        raise TypeError("base must be a state_dict; for files there is unpack()")
    base = extra.plain("base", base)
    with _core.Package(package, trust) as opened:
        out = {
            name: opened.restore(name, _base_of(entry, base))
            for name, entry in opened.entries.items()
            if not entry["same"]
        }
        return {name: out[entry["same"] or name] for name, entry in opened.entries.items()}


def load_deltas(
    base: StateDict | PathLike,
    package: PathLike,
    *,
    prefer: str | None = "auto",
    jobs: int | None = None,
    skip: Container[str] = (),
    trust: str = "digest",
) -> dict[str, Tensor]:
    """Per tensor name its resident delta (1-D uint8), checked against `base`; tensors stored alone are given whole, and so are
    those that are no delta of one tensor of the base, but of one with other rows, of several or of a piece (`base_parts`).

    No dense matrix is made on the way. `prefer` re-encodes for "speed" or "memory" where the package holds the other;
    None takes what it holds, which is the fastest. A base given by its path is read only for what must be encoded anew,
    and once for its digests, which the user's cache keeps. The words of tensors on a GPU stay there, whose digests are
    computed by it; only one that must be encoded anew is copied, for as long as that takes. `jobs` threads; None is one
    per core. Tensors named in `skip` are left out. `trust` as `unpack`; with "sha256" every base tensor is read. Errors
    as `restore`.
    """
    if _is_path("base", base):
        with _core.Base(base, _core.run(jobs)) as old:
            return _load_each(
                package,
                trust,
                jobs,
                lambda opened, name, _: opened.resident_from(name, old, prefer),
                lambda opened, name, _: opened.restore_from(name, old),
                skip,
            )
    base = extra.plain("base", base)
    known: dict[str, bytes] = {}

    def begin(mine: dict[str, dict[str, Any]]) -> None:
        if trust != "sha256":
            names = {
                e["base_name"] or n for n, e in mine.items() if e["base"] is not None and not e["base_parts"]
            }
            known.update(digests.elsewhere({name: base[name] for name in sorted(names & base.keys())}))

    def resident(opened: _core.Package, name: str, entry: dict[str, Any]) -> Tensor:
        at, words = _named(entry, base)
        made = opened.resident_known(name, words, known[at], prefer) if at in known else None
        return opened.resident(name, _core.on_host(at, words), prefer) if made is None else made

    return _load_each(
        package,
        trust,
        jobs,
        resident,
        lambda opened, name, entry: opened.restore(name, _base_of(entry, base)),
        skip,
        begin,
    )


def _load_each(
    package: PathLike,
    trust: str,
    jobs: int | None,
    resident: Callable[[_core.Package, str, dict[str, Any]], Tensor],
    whole: Callable[[_core.Package, str, dict[str, Any]], Tensor],
    skip: Container[str],
    begin: Callable[[dict[str, dict[str, Any]]], None] = lambda _: None,
) -> dict[str, Tensor]:
    """Every tensor of the package, several at a time; of several errors, that of the first tensor. `begin` is told of the
    entries before the first.
    """

    def load(name: str, entry: dict[str, Any]) -> Tensor:
        if entry["base"] is None:
            return opened.restore(name, None)
        return whole(opened, name, entry) if entry["base_parts"] else resident(opened, name, entry)

    workers = _core.run(jobs).jobs or len(os.sched_getaffinity(0))
    with _core.Package(package, trust) as opened, ThreadPoolExecutor(workers) as pool, ExitStack() as stack:
        mine = {n: e for n, e in opened.entries.items() if not e["same"] and n not in skip}
        begin(mine)
        total = sum(entry["bytes"] for entry in mine.values())
        shown = stack.enter_context(bar(total=total, unit="B", desc=f"loading {os.path.basename(package)}"))
        # Large tensors first, so that no large one is begun when all others are done.
        order = sorted(mine, key=lambda name: -mine[name]["bytes"])
        waiting = {name: pool.submit(load, name, mine[name]) for name in order}
        try:
            for name in order:
                if waiting[name].exception() is not None:
                    break
                shown.update(mine[name]["bytes"])
            out = {name: waiting[name].result() for name in mine}
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
        kept = {name: entry["same"] or name for name, entry in opened.entries.items() if name not in skip}
        return {name: out[first] for name, first in kept.items() if first in out}


def inspect(package: PathLike) -> dict[str, Any]:
    """What a package holds: totals, `removed_names`, and `entries` with dtype, shape, codec, encoding and sizes."""
    with _core.Package(package) as opened:
        return opened.description
