"""The versions of one training run: a chain v0 -> v1 -> v2 ..., each a small package that is a step from the one before.

A folder holds, for each version, the package of its step (`000007-DIGEST.xorz`), for some also one against the base
(`000008-DIGEST.key.xorz`), so that a jump takes few steps, and `versions.json`, which says what belongs to the chain. Nothing
is added to the format of packages: a version's digest is one over the digests of all its tensors, and a package has those of
the tensors it is a step from. Files appear whole, the list last: a killed run leaves the chain as it was before or after.
"""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from . import _core, _ops, locks
from .checkpoint import PathLike
from .diff import StateDelta, StateDict, place, tensors_of, text_of
from .digests import digest_of, digests_of

_LIST, _LOCK = "versions.json", "versions.lock"
_FORMAT, _FORMAT_VERSION = "xorz-versions", 1
_OURS = re.compile(r"[0-9]{6,}-[0-9a-f]{32}(\.key)?\.xorz|\.part-[0-9]+(\.key)?\.xorz|\.versions\.json")
_DIGEST = re.compile(r"[0-9a-f]{32}")
_NUMBERED = re.compile(r"(?P<folder>.+)@(?P<number>[0-9]{1,18})", re.DOTALL)


class Versions:
    """The versions of a run in a folder, all with the tensors of one base: the same names, dtypes and shapes.

        run = xorz.Versions(base, "run/")             # made, or opened again; any number of processes may
        run.publish(model.state_dict())               # the trainer: a step from the head, and the new head
        run.append("step.xorz")                       # or somebody else's step, if it is one from the head
        tenants.load("newest", run.delta(run.head))   # a server: any version against the base
        xorz.apply_(model, run.delta(7, since=9))     # in place, from any version to any other

    Methods read the folder's list anew, so that what another process publishes is seen; those that change it lock it. All work
    tensor by tensor: besides what they return, a few copies of the largest tensor are held, never a model.
    """

    def __init__(
        self, base: StateDict | nn.Module, folder: PathLike, *, keyframe: int = 8, trust: str = "digest"
    ) -> None:
        """Open the chain in `folder`, or begin one there.

        Args:
            base: version 0: a state_dict or a module, on whatever device. It is read where it is, not copied, and must not
                change: a changed tensor is refused by its digest.
            folder: made if it is missing.
            keyframe: every so many versions, publish and append also write a package against the base. 1 makes jumps
                cheapest and takes the most disk.
            trust: "sha256" writes steps that keep the sha256 of each tensor they are a step from, and takes only such steps,
                each compared before it is used; digests find mistakes, but not who makes a tensor with the digest of another.

        Raises:
            TypeError: `base` is neither, or has a tensor that packages cannot hold (named); ValueError: the chain in `folder`
                is of another base (both digests are named), its list is damaged, or `keyframe` is below 1; OSError.
        """
        if isinstance(keyframe, bool) or not isinstance(keyframe, int):
            raise TypeError(f"keyframe must be an int, but is {type(keyframe).__name__}")
        if keyframe < 1:
            raise ValueError(f"keyframe must be at least 1, but is {keyframe}")
        if trust not in ("digest", "sha256"):
            raise ValueError(f'trust must be "digest" or "sha256", but is {trust!r}')
        self.trust = trust
        self._base = {name: tensor.detach() for name, tensor in tensors_of("base", base).items()}
        for name, tensor in self._base.items():
            if tensor.dtype not in _core.DTYPES:
                raise TypeError(f"base: `{name}` has dtype {tensor.dtype}, which a package cannot hold")
        firsts: dict[Any, str] = {}
        self._first = {name: firsts.setdefault(place(tensor), name) for name, tensor in self._base.items()}
        self._digests = {name: digest.hex() for name, digest in digests_of(self._base).items()}
        self.folder, self.keyframe = Path(folder), keyframe
        # A chain that is there is only read: whoever serves it need not be allowed to change it.
        if not (self.folder / _LIST).exists():
            self.folder.mkdir(parents=True, exist_ok=True)
            with self._locked():
                if not (self.folder / _LIST).exists():
                    self._begin()
        self._read()

    # Asking which versions there are.

    @property
    def head(self) -> int:
        """The newest version's number; 0 if there is but the base."""
        return len(self._read())

    def digest(self, number: int) -> str:
        """The digest of a version, 32 hexadecimal digits: one of its tensors' names, dtypes, shapes and digests."""
        return self._known(self._read(), number)

    def path(self, number: int) -> Path:
        """The package that is the step from version `number - 1` to `number`: what to send to another chain's `append`.

        KeyError: no such version, or 0, which has no step.
        """
        versions = self._read()
        self._known(versions, number)
        if number == 0:
            raise KeyError("version 0 is the base, which is no step from another")
        return self._step(number, versions[number - 1]["digest"])

    def tenant(self, number: int) -> Path:
        """The package of a version against the base: what servers load as a tenant. `FOLDER@NUMBER` names it, too.

        KeyError: no such version; ValueError: it has no such package, since it was published without `as_tenant`.
        """
        self._known(self._read(), number)
        return against_base(self.folder, number)[1]

    def __repr__(self) -> str:
        """The folder, the number of versions, and the bytes that they take."""
        versions = self._read()
        total = sum(v["bytes"] for v in versions)
        return f"Versions({str(self.folder)!r}; versions 0 to {len(versions)}, {total:,} bytes of steps)"

    # Adding and dropping.

    def publish(self, new: StateDict | nn.Module, *, as_tenant: bool = False) -> int:
        """Make `new` the next version, and say its number. It must not change meanwhile.

        Args:
            new: a state_dict or module with the tensors that the base has.
            as_tenant: write the package against the base, too, so that the version can be served beside others; see `tenant`.

        Raises:
            TypeError, KeyError, ValueError: `new` is no state_dict, lacks a tensor or has another one, or one of another dtype
                or shape (named); OSError. The chain is as before then.
        """
        tensors = tensors_of("new", new)
        self._check_names("new", {n: (_core.dtype_name(t.dtype), list(t.shape)) for n, t in tensors.items()})
        each = ((name, tensor, None) for name, tensor in tensors.items())
        return self.publish_from(None, each, as_tenant=as_tenant)[0]

    def publish_from(
        self,
        last: str | None,
        tensors: Iterable[tuple[str, Tensor, Tensor | None]],
        *,
        as_tenant: bool = False,
    ) -> tuple[int, str]:
        """`publish`, for whoever still has the head's tensors, so that they need not be restored; see `xorz.Publisher`.

        Args:
            last: the digest of the version whose tensors are given as old ones; where the head is another one by now they are
                restored all the same. None: none is given.
            tensors: each of the base's tensors once: name, the next version's, on whatever device, and the old one.
            as_tenant: as in `publish`.

        Returns:
            The number and the digest of the version; errors as `publish`.
        """
        with self._locked() as versions, ExitStack() as stack:
            number = len(versions) + 1
            part = self._part()
            held = last is not None and last == self._known(versions, number - 1)
            chain = [] if held else self._open(versions, number - 1, stack)
            step = stack.enter_context(_core.Writer(part, _core.options(trust=self.trust)))
            key = self._key_writer(number, stack, as_tenant)
            digests, kinds = {}, {}
            for name, tensor, old in tensors:
                kinds[name] = _core.dtype_name(tensor.dtype), list(tensor.shape)
                self._check_kind("new", name, kinds[name])
                fresh = _core.on_host(name, tensor)
                step.add(name, fresh, old if held else self._walk(name, chain))
                if key is not None:
                    key.add(name, fresh, self._base[name])
                digests[name] = digest_of(fresh).hex()
                # Before the next ones are made.
                del tensor, fresh, old
            self._check_names("new", kinds)
            step.finish()
            identity = self._identity(digests)
            return self._finish(versions, part, key, identity), identity

    def append(self, package: PathLike) -> int:
        """Make the fine-tune of `package`, a step from the head, the next version, and say its number.

        The package is copied, and restored once (tensor by tensor), so that what is in the chain is known to be whole. A
        `StateDelta` does not say what its unchanged tensors were, so its place cannot be known; `publish` what it makes.

        Raises:
            ValueError: it is no step from the head (the digest of what it is a step from, the head's, and the version wanted
                are named), a damaged package, or has other tensors than the base (named); TypeError: no path; OSError. The
                chain is as before then.
        """
        if not isinstance(package, (str, os.PathLike)):
            raise TypeError(f"package must be a path, but is {type(package).__name__}")
        with self._locked() as versions, ExitStack() as stack:
            part = self._part()
            # What is wrong with the copy is wrong with the file that the user knows.
            stack.enter_context(_named(part, package))
            shutil.copyfile(package, part)
            locks.sync(part)
            opened = stack.enter_context(_core.Package(part, self.trust))
            self._check_names(
                str(package), {n: (e["dtype"], e["shape"]) for n, e in opened.entries.items()}, ties=True
            )
            self._check_parent(package, versions, self._parent(package, opened))
            chain = [*self._open(versions, len(versions), stack), opened]
            key = self._key_writer(len(versions) + 1, stack)
            digests = {}
            for name, base in self._base.items():
                fresh = self._walk(name, chain)
                if key is not None:
                    key.add(name, fresh, base)
                digests[name] = digest_of(fresh).hex()
            return self._finish(versions, part, key, self._identity(digests))

    def rollback(self, number: int) -> None:
        """Make version `number` the head, and delete those after it. KeyError: no such version.

        To serve or hold an earlier version and keep the later ones, take it with `delta` or `state_dict`.
        """
        with self._locked() as versions:
            self._known(versions, number)
            self._commit(versions[:number])

    # Taking versions out.

    def delta(self, number: int, since: int = 0, *, prefer: str = "auto") -> StateDelta:
        """What turns version `since` (the base) into version `number`, later or earlier: for `Tenants.load` and `apply_`.

        The same as `xorz.diff` of the two state_dicts gives; the tensors of both are checked against their digests.

        Raises:
            KeyError: no such version; ValueError: a package is damaged or the base has changed (the tensor is named); OSError.
        """
        if prefer not in ("auto", "memory", "speed"):
            raise ValueError(f'prefer must be "auto", "memory" or "speed", but is {prefer!r}')
        out, unchanged, digests = StateDelta(), [], {}
        for name, old, new in self._pairs(number, since):
            before = self._digests[name] if since == 0 else digest_of(old).hex()
            after = digest_of(new).hex()
            digests[name] = before, after
            first = self._first[name]
            if first != name and digests[first] == (before, after):
                out.ties[name] = first
                continue
            out.tensor_bytes += new.nbytes
            out.words += new.numel()
            if before == after:
                unchanged.append(name)
            else:
                out.deltas[name] = _ops.delta_encode(old, new, prefer=prefer)
                out.changed += _core.delta_info(out.deltas[name]).changed
        out.unchanged = tuple(unchanged)
        return out

    def state_dict(self, number: int) -> dict[str, Tensor]:
        """A version's tensors, bit for bit, on the CPU; those that share memory in the base and are equal are one tensor.

        The only method that makes a whole model. Errors as `delta`.
        """
        out: dict[str, Tensor] = {}
        for name, _, new in self._pairs(number, 0):
            tied = out.get(self._first[name])
            same = tied is not None and digest_of(tied) == digest_of(new)
            # The base is copied: a training that goes on from it must not change version 0.
            out[name] = tied if same else new.clone() if number == 0 else new
        return out

    def pack(self, number: int, path: PathLike, since: int = 0, *, prefer: str = "memory") -> dict[str, Any]:
        """Write the package `path` of version `number` against version `since` (the base), and give its totals.

        A tenant loaded from such a file can be evicted to it. Errors as `delta`.
        """
        with _core.Writer(path, _core.options(prefer, trust=self.trust)) as writer:
            for name, old, new in self._pairs(number, since):
                writer.add(name, new, old)
            return writer.finish()

    # Tensors.

    def _pairs(self, number: int, since: int) -> Iterator[tuple[str, Tensor, Tensor]]:
        """Each tensor's name, and it in both versions, whose digests are compared when the last one has been given."""
        versions = self._read()
        wanted = {v: self._known(versions, v) for v in (since, number)}
        with ExitStack() as stack:
            chains = {v: self._open(versions, v, stack) for v in wanted}
            found: dict[int, dict[str, str]] = {v: {} for v in wanted}
            for name in self._base:
                tensors = {v: self._walk(name, chain) for v, chain in chains.items()}
                for v, tensor in tensors.items():
                    found[v][name] = self._digests[name] if v == 0 else digest_of(tensor).hex()
                yield name, tensors[since], tensors[number]
            for v, digest in wanted.items():
                self._compare(v, digest, self._identity(found[v]))

    def _compare(self, number: int, want: str, found: str) -> None:
        if found != want:
            raise ValueError(
                f"version {number} in {self.folder} is damaged: its digest is {want}, but its packages give {found}"
            )

    def _walk(self, name: str, chain: Sequence[_core.Package]) -> Tensor:
        """A tensor after the steps of `chain`, which begins at the base; each compares the digest of what it is given."""
        tensor = _core.on_host(name, self._base[name])
        for package in chain:
            entry = self._entry(package, name)
            tensor = package.restore(entry["name"], tensor)
        return tensor

    def _entry(self, package: _core.Package, name: str) -> dict[str, Any]:
        """A file holds but one of the names that share memory."""
        found = package.entries.get(name)
        if found is None:
            first = self._first[name]
            found = next(
                package.entries[n] for n, f in self._first.items() if f == first and n in package.entries
            )
        return found

    def _open(self, versions: list[dict[str, Any]], number: int, stack: ExitStack) -> list[_core.Package]:
        """The packages that lead from the base to version `number`, as few as there are."""
        paths = []
        for v in range(number, 0, -1):
            digest = versions[v - 1]["digest"]
            if versions[v - 1]["key"] and self._key(v, digest).exists():
                paths.append(self._key(v, digest))
                break
            paths.append(self._step(v, digest))
        return [stack.enter_context(_core.Package(path, self.trust)) for path in reversed(paths)]

    # Digests.

    def _identity(self, digests: dict[str, str]) -> str:
        """The digest of a version whose tensors have these, of which packages keep 16 digits for small tensors."""
        lines = [
            f"{name}\0{_core.dtype_name(t.dtype)}\0{list(t.shape)}\0{digests[name][:16]}"
            for name, t in sorted(self._base.items())
        ]
        return hashlib.sha256("\0\0".join(lines).encode()).hexdigest()[:32]

    def _known(self, versions: list[dict[str, Any]], number: int) -> str:
        if isinstance(number, bool) or not isinstance(number, int):
            raise TypeError(f"a version's number must be an int, but is {type(number).__name__}")
        if not 0 <= number <= len(versions):
            raise KeyError(f"there is no version {number}, only 0 to {len(versions)}")
        return self._identity(self._digests) if number == 0 else versions[number - 1]["digest"]

    def _parent(self, path: PathLike, package: _core.Package) -> str:
        """The digest of the version that a package is a step from."""
        found = {}
        for name in self._base:
            entry = self._entry(package, name)
            # A tensor that equals another one did so in the parent version, too; no writer records it otherwise.
            entry = package.entries.get(entry["same"]) if entry["same"] else entry
            if entry is None or entry["base"] is None:
                raise ValueError(
                    f"{path}: tensor `{name}` is stored alone, so it is no step from another version's"
                )
            found[name] = entry["base"]
        return self._identity(found)

    def _check_parent(self, path: PathLike, versions: list[dict[str, Any]], parent: str) -> None:
        head = len(versions)
        known = [self._known(versions, v) for v in range(head + 1)]
        if parent == known[head]:
            return
        if parent in known:
            of = f"which is version {known.index(parent)}"
        else:
            of = f"which is none of versions 0 to {head}"
        raise ValueError(
            f"{path} is a step from digest {parent}, {of}, but the head is version {head} with digest {known[head]}; "
            f"what is wanted is version {head + 1}, a step from that"
        )

    def _check_names(self, what: str, kinds: dict[str, tuple[str, list[int]]], ties: bool = False) -> None:
        """All versions have the base's tensors; with `ties`, one name of those that share memory is enough."""
        for name, kind in kinds.items():
            self._check_kind(what, name, kind)
        present = {self._first[name] for name in kinds}
        for name in self._base:
            if name not in kinds and not (ties and self._first[name] in present):
                raise (ValueError if ties else KeyError)(
                    f"{what} lacks the tensor `{name}`, which the base has"
                )

    def _check_kind(self, what: str, name: str, kind: tuple[str, list[int]]) -> None:
        if name not in self._base:
            raise ValueError(f"{what} has a tensor `{name}`, which the base lacks")
        want = self._base[name]
        if kind != (_core.dtype_name(want.dtype), list(want.shape)):
            raise ValueError(
                f"{what}: tensor `{name}` is {kind[0]} {kind[1]}, but the base's is {text_of(want)}"
            )

    # Files.

    def _step(self, number: int, digest: str) -> Path:
        return _step_in(self.folder, number, digest)

    def _key(self, number: int, digest: str) -> Path:
        return _key_in(self.folder, number, digest)

    def _part(self, key: bool = False) -> Path:
        return self.folder / f".part-{os.getpid()}{'.key' if key else ''}.xorz"

    def _key_writer(self, number: int, stack: ExitStack, wanted: bool = False) -> _core.Writer | None:
        # The first step is against the base as it is.
        if number == 1 or (number % self.keyframe and not wanted):
            return None
        return stack.enter_context(_core.Writer(self._part(key=True), _core.options(trust=self.trust)))

    def _finish(
        self, versions: list[dict[str, Any]], part: Path, key: _core.Writer | None, digest: str
    ) -> int:
        number = len(versions) + 1
        if key is not None:
            key.finish()
            os.replace(self._part(key=True), self._key(number, digest))
        os.replace(part, self._step(number, digest))
        size = self._step(number, digest).stat().st_size
        self._commit([*versions, {"digest": digest, "bytes": size, "key": key is not None}])
        return number

    @contextmanager
    def _locked(self) -> Iterator[list[dict[str, Any]]]:
        """The list, which nobody else changes inside; what no list names is deleted at the end."""
        with locks.held(self.folder / _LOCK):
            exists = (self.folder / _LIST).exists()
            try:
                yield self._read() if exists else []
            finally:
                with suppress(OSError, ValueError):
                    self._sweep()

    def _begin(self) -> None:
        found = sorted(
            p.name for p in self.folder.iterdir() if re.match("[0-9]", p.name) and _OURS.fullmatch(p.name)
        )
        if found:
            raise ValueError(
                f"{self.folder} holds {found[0]}, but no {_LIST}: bring the list back, or name another folder"
            )
        self._commit([])

    def _sweep(self) -> None:
        keep = set()
        for number, version in enumerate(self._read(), 1):
            keep |= {self._step(number, version["digest"]).name}
            keep |= {self._key(number, version["digest"]).name} if version["key"] else set()
        for path in self.folder.iterdir():
            if _OURS.fullmatch(path.name) and path.name not in keep:
                path.unlink()

    def _commit(self, versions: list[dict[str, Any]]) -> None:
        """Write the list: from here on the chain is another."""
        locks.sync(self.folder)
        part = self.folder / f".{_LIST}"
        base = self._identity(self._digests)
        content = {"format": _FORMAT, "format_version": _FORMAT_VERSION, "base": base, "versions": versions}
        with open(part, "w") as file:
            json.dump(content, file, indent=0)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, self.folder / _LIST)
        locks.sync(self.folder)

    def _read(self) -> list[dict[str, Any]]:
        content = _listed(self.folder)
        base = self._identity(self._digests)
        if content["base"] != base:
            raise ValueError(
                f"{self.folder} holds versions of another base: theirs has digest {content['base']}, this one {base}"
            )
        return content["versions"]


def chain_of(source: PathLike) -> tuple[Path, int | None] | None:
    """The folder of versions that a path names, and which: `run/` is its newest (None), `run@17` that one; else None."""
    text = os.fsdecode(source)
    if os.path.lexists(text):
        return (Path(text), None) if os.path.isfile(os.path.join(text, _LIST)) else None
    named = _NUMBERED.fullmatch(text)
    if named is None or not os.path.isfile(os.path.join(named["folder"], _LIST)):
        return None
    return Path(named["folder"]), int(named["number"])


def against_base(folder: PathLike, number: int | None = None) -> tuple[int, Path]:
    """A version (the newest) of the chain in `folder`, and its package against the base, which need not be at hand.

    Raises:
        OSError: there is no such version; ValueError: it has no such package, or the list is damaged.
    """
    versions = _listed(Path(folder))["versions"]
    number = len(versions) if number is None else number
    if not 0 <= number <= len(versions):
        raise FileNotFoundError(f"there is no version {number} in {folder}, only 0 to {len(versions)}")
    if number == 0:
        raise ValueError(f"version 0 in {folder} is the base itself, and no tenant of it")
    version = versions[number - 1]
    path = _key_in(Path(folder), number, version["digest"])
    if number == 1:
        path = _step_in(Path(folder), number, version["digest"])
    elif not version["key"] or not path.exists():
        raise ValueError(
            f"version {number} in {folder} has no package against the base, which a tenant is: publish versions with "
            f"as_tenant=True, or load what Versions.pack({number}, PATH) writes"
        )
    return number, path


def _step_in(folder: Path, number: int, digest: str) -> Path:
    return folder / f"{number:06d}-{digest}.xorz"


def _key_in(folder: Path, number: int, digest: str) -> Path:
    return folder / f"{number:06d}-{digest}.key.xorz"


def _listed(folder: Path) -> dict[str, Any]:
    """The list of the chain in `folder`: the base's digest, and the versions."""
    path = folder / _LIST
    try:
        if path.exists() and not path.is_file():
            raise ValueError("it is no regular file")
        content = json.loads(path.read_bytes())
        _check_list(content)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged: {error}") from None
    return content


def _check_list(content: Any) -> None:
    if not isinstance(content, dict) or content.get("format") != _FORMAT:
        raise ValueError("it is no list of versions")
    if content.get("format_version") != _FORMAT_VERSION:
        raise ValueError(
            f"format version {content.get('format_version')!r} is unknown; this is {_FORMAT_VERSION}"
        )
    versions = content.get("versions")
    if not _is_digest(content.get("base")) or not isinstance(versions, list):
        raise ValueError("the base's digest or the versions are missing")
    for number, version in enumerate(versions, 1):
        kinds = {"digest": str, "bytes": int, "key": bool}
        if not isinstance(version, dict) or {n: type(v) for n, v in version.items()} != kinds:
            raise ValueError(f"version {number} is not digest, bytes and key")
        if not _is_digest(version["digest"]):
            raise ValueError(f"version {number} has no digest, but {version['digest']!r}")


def _is_digest(value: Any) -> bool:
    return isinstance(value, str) and _DIGEST.fullmatch(value) is not None


@contextmanager
def _named(part: Path, package: PathLike) -> Iterator[None]:
    """Errors of `part`, a copy of `package`, as errors of `package`."""
    try:
        yield
    except (OSError, ValueError) as error:
        said = str(error)
        if str(part) not in said:
            raise
        raise type(error)(said.replace(str(part), os.fsdecode(package))) from None
