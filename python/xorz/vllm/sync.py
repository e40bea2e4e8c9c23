"""vLLM's weight transfer by packages: `--weight-transfer-config '{"backend": "xorz"}'`; see docs/rl.md.

An update names a version: a package that is a step from the words that the engine serves, or one of a folder of
`xorz.Versions`. `update_weights` fetches it and checks it whole, and changes nothing; `finish_weight_update` changes the
words in place, in every process or in none. `replaced` then starts the engine anew: the prefix cache is empty, running
requests are computed from their first token, tenants of the old base are unloaded, by name.
"""

import base64
import binascii
import os
import tempfile
import threading
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.logger import init_logger

from .. import _core
from ..versions import Versions
from . import in_place, packages, pieces, update
from .manager import Settings, folder_of, refuse
from .on_device import OnDevice
from .plan import plan

logger = init_logger("vllm.xorz")


@dataclass
class XorzInitInfo(WeightTransferInitInfo):
    """What `init_weight_transfer_engine` takes; nothing is needed.

    Attributes:
        version: what the words are called that the engine has loaded.
        keep: so many versions before the newest can be rolled back to without a file. Each takes about what its update took.
        trust: "sha256" takes only packages that keep the sha256 of what they are a step from, and compares it; "digest" has no
            say where the engine was started with the setting `trust` of "sha256". None is that setting.
    """

    version: str | int = 0
    keep: int = 1
    trust: str | None = None

    def __post_init__(self) -> None:
        """ValueError for a number of versions that is none, and for another word of `trust`."""
        if self.trust is not None:
            packages.check_trust(self.trust)
        if isinstance(self.keep, bool) or not isinstance(self.keep, int) or self.keep < 0:
            raise ValueError(f"xorz: keep must be a number of versions, 0 or more, but is {self.keep!r}")


@dataclass
class XorzUpdateInfo(WeightTransferUpdateInfo):
    """What `update_weights` takes: one of `source`, `package` and `rollback`.

    Attributes:
        source: a package's path, or its address for fsspec (`s3://...`, `http://...`); or a folder of `xorz.Versions`.
        package: a package's bytes in base64.
        version: of a folder, which (the newest if None); of a package, what to call it (its digest if None).
        digest: what `xorz.vllm.digest` must give for the package, if given.
        rollback: go back to `version`, one of the last, or to the one before if that is None.
    """

    source: str | None = None
    package: str | None = None
    version: str | int | None = None
    digest: str | None = None
    rollback: bool = False

    def __post_init__(self) -> None:
        """ValueError unless it says one thing."""
        given = [
            name for name in ("source", "package", "rollback") if getattr(self, name) not in (None, False)
        ]
        if len(given) != 1:
            raise ValueError(
                f"xorz: an update is one of source, package and rollback, but {' and '.join(given) or 'none'} is given"
            )
        for name, kinds in (("source", str), ("package", str), ("version", (str, int)), ("digest", str)):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, kinds) or isinstance(value, bool)):
                raise ValueError(f"xorz: {name} of an update is {value!r}, a {type(value).__name__}")


@dataclass
class Report:
    """What an update was, and took; for `xorz_sync_report`.

    Attributes:
        version: that is served.
        since: the one before.
        bytes: of the package that was fetched; 0 for a jump within a folder, and a rollback.
        changed: words that differ.
        words: of the model, in this process.
        fetch: seconds.
        check: seconds, of reading it against the words that are there, and of preparing the way back.
        apply: seconds, in which no request is served.
        held: bytes held for it and the way back, which are the same ones, in a file of the system's temporary folder.
    """

    version: str
    since: str
    bytes: int = 0
    changed: int = 0
    words: int = 0
    fetch: float = 0.0
    check: float = 0.0
    apply: float = 0.0
    held: int = 0


@dataclass
class _Next:
    """An update that waits for `finish`."""

    info: XorzUpdateInfo
    staged: update.Staged
    report: Report
    generation: int
    identity: str | None = None
    same: dict[str, str] = field(default_factory=dict)
    sums: dict[str, str] = field(default_factory=dict)
    back: int = 0


@dataclass
class _Past:
    """A version that was served, and the way back to it from the one after it."""

    version: str
    identity: str | None
    ways: update.Way
    changed: int


class XorzWeightTransferEngine(WeightTransferEngine[XorzInitInfo, XorzUpdateInfo]):
    """One process's part of an engine whose base is updated by packages.

    Attributes:
        took_back: whether an update that failed has left the words as they were; False where not even that could be done.
    """

    init_info_cls = XorzInitInfo
    update_info_cls = XorzUpdateInfo
    supports_draft_weight_update = False

    def __init__(self, config: Any, vllm_config: Any, device: Any, model: Any) -> None:
        """As vLLM's; ValueError for engines that cannot be updated."""
        super().__init__(config, vllm_config, device, model)
        refuse(in_place.unserved(vllm_config, device))
        if vllm_config.parallel_config.pipeline_parallel_size > 1:
            raise ValueError("xorz: weight transfer with pipeline parallelism is not served")
        if vllm_config.parallel_config.enable_expert_parallel:
            raise ValueError("xorz: weight transfer with expert parallelism is not served")
        self._hand = update.OnHost()
        if torch.device(device).type != "cpu":
            in_place.check_layers(model)
            pieces.check_model(model, vllm_config)
            in_place.check_device(device)
            self._hand = OnDevice(device)
        self.took_back = True
        self.version, self.identity, self.keep = "0", None, 1
        self.trust = self._least = Settings.of(vllm_config).trust
        self.report: Report | None = None
        # What versions are counted from, whatever vLLM loads later.
        self._folder = folder_of(vllm_config)
        self._words: update.Words | None = None
        self._next: _Next | None = None
        self._past: deque[_Past] = deque()
        # Of tensors that the last update has left as they were, digest and sha256.
        self._digests: dict[str, str] = {}
        self._sums: dict[str, str] = {}
        self._chains: dict[tuple[str, str], Versions] = {}
        self._own = False
        # Counts what the words have been: what was checked against other words is not applied.
        self._generation = 0
        self._preparing = threading.Lock()
        self._prepared: _Next | Exception | None = None
        model.xorz_sync = self

    # vLLM's life cycle.

    def init_transfer_engine(self, init_info: XorzInitInfo) -> None:
        """Follow the model's own loader, once; it may be called again, which forgets the versions to roll back to.

        ValueError for less trust than the engine was started with.
        """
        trust = init_info.trust or self._least
        if trust != "sha256" and self._least == "sha256":
            raise ValueError(
                f"xorz: trust is {trust!r} in the init info, but the engine was started with xorz.trust {self._least!r}"
            )
        if trust != self.trust:
            # What was checked by the other word is checked again. In this order: it may be being prepared.
            self.trust = trust
            self._generation += 1
            self._next = self._prepared = None
        self.version, self.keep = str(init_info.version), init_info.keep
        self._past.clear()
        self._model()

    def start_weight_update(self) -> None:
        """Begin; an update that was received and not finished is forgotten."""
        self._next = None

    def update_weights(self, update_info: dict[str, Any]) -> None:
        """See `receive_weights`; it asks nothing of a device that would have to be waited for."""
        self.receive_weights(self.parse_update_info(update_info))

    def receive_weights(self, update_info: XorzUpdateInfo) -> None:
        """Fetch and check; nothing changes.

        Raises:
            OSError; ValueError: damaged, incomplete, a step from another version (both digests are named), a version that is
                served already, or it changes what the model's loader computes with (the tensor is named); KeyError: no such
                version. In every process if in one.
        """
        if self._next is not None:
            raise ValueError("xorz: an update is one package; finish it before the next")
        ready, self._prepared = self._prepared, None
        fresh = isinstance(ready, _Next) and ready.generation == self._generation
        if fresh and ready.info == update_info:
            self._next = ready
        else:
            self._next = self._prepare(update_info)

    def finish_weight_update(self) -> None:
        """Change the words, in every process or in none.

        Raises:
            ValueError: nothing was received, or a process has failed; the words are what they were.
        """
        ready, self._next = self._next, None
        words = self._model()
        words.group.agree(None if ready else ValueError("xorz: finish_weight_update: nothing was received"))
        began = time.perf_counter()
        try:
            with torch.inference_mode():
                ways = update.apply(words, ready.staged)
        except update.Broken:
            self.took_back = False
            raise
        ready.report.apply = time.perf_counter() - began
        self._served(ready, ways)

    def _served(self, ready: _Next, ways: update.Way) -> None:
        """The words are the new version's."""
        for _ in range(ready.back):
            self._past.pop()
        if not ready.back:
            self._past.append(_Past(self.version, self.identity, ways, ready.report.changed))
        while len(self._past) > self.keep:
            self._past.popleft()
        self._digests, self._sums = ready.same, ready.sums
        self.version, self.identity, self.report = ready.report.version, ready.identity, ready.report
        self._own, self._generation = True, self._generation + 1
        logger.info("xorz: version %s is served: %s", self.version, asdict(ready.report))

    def shutdown(self) -> None:
        """No file or connection stays open between updates."""
        self._next = self._prepared = None

    def base_replaced(self) -> None:
        """Called after every replacement of the model's words, this engine's own included."""
        if self._own:
            self._own = False
            return
        self._past.clear()
        self._generation += 1
        self._digests, self._sums, self._chains, self._words = {}, {}, {}, None
        self._next = self._prepared = None
        self.version, self.identity, self.took_back = "unknown", None, True

    # Beside it.

    def prepare(self, update_info: dict[str, Any]) -> bool:
        """Do what `receive_weights` does in a thread, while requests are served; it then takes what was prepared.

        False with tensor parallelism, where the processes have to do it at the same time: `receive_weights` will.
        """
        info = self.parse_update_info(update_info)
        if self._model().group.size > 1:
            return False
        if not self._preparing.acquire(blocking=False):
            raise RuntimeError("xorz: another update is being prepared")
        self._prepared = None

        def work() -> None:
            try:
                self._prepared = self._prepare(info)
            except Exception as error:
                self._prepared = error
            finally:
                self._preparing.release()

        threading.Thread(target=work, name="xorz-update", daemon=True).start()
        return True

    def prepared(self) -> str | None:
        """None while it is prepared, "" when it has been, or what is wrong."""
        if self._preparing.locked():
            return None
        if isinstance(self._prepared, Exception):
            return str(self._prepared)
        return "" if self._prepared is not None else "nothing is being prepared"

    # An update.

    def _model(self) -> update.Words:
        if self._words is None:
            from vllm.distributed import get_tp_group

            tp = get_tp_group()
            group = update.Group(tp.cpu_group, tp.rank_in_group, tp.world_size)
            base = packages.Checkpoint(self._folder)
            _check_words(self.model, self.device)
            self._words = update.Words(self.model, base, plan(self.model, base.tensors), group, self._hand)
        return self._words

    def _prepare(self, info: XorzUpdateInfo) -> _Next:
        words = self._model()
        words.read()
        # Before anything is read that may be another one by the end.
        began, generation, seen = time.perf_counter(), self._generation, words.seen()
        with torch.inference_mode():
            if info.rollback:
                out = self._backwards(info)
            elif info.source is not None and (Path(info.source) / "versions.json").exists():
                out = self._of_folder(info)
            else:
                with self._fetched(info) as path:
                    fetched = time.perf_counter() - began
                    out = self._of_package(info, path)
                    out.report.fetch = fetched
        update.trim()
        out.generation, out.staged.seen = generation, seen
        out.report.check = time.perf_counter() - began - out.report.fetch
        out.report.changed, out.report.held = out.staged.changed, out.staged.bytes
        out.report.words = sum(p.numel() for p in words.params.values())
        return out

    @contextmanager
    def _fetched(self, info: XorzUpdateInfo) -> Iterator[str]:
        """The package as a file on this machine."""
        if info.source is not None and "://" not in info.source:
            yield info.source
            return
        with tempfile.NamedTemporaryFile(prefix="xorz-update-", suffix=".xorz") as file:
            if info.package is not None:
                try:
                    file.write(base64.b64decode(info.package, validate=True))
                except binascii.Error as error:
                    raise ValueError(f"xorz: the update's package is not base64: {error}") from None
            else:
                _download(info.source, file)
            file.flush()
            yield file.name

    def _of_package(
        self, info: XorzUpdateInfo, path: str, version: str | None = None, identity: str | None = None
    ) -> _Next:
        """A step from the words that are there. Collective with tensor parallelism, also where it fails."""
        words, error, changed = self._words, None, []
        out = _Next(info, update.Staged(), Report("", self.version), self._generation, identity)
        try:
            content = packages.digest(path)
            if info.digest is not None and info.digest != content:
                raise ValueError(
                    f"xorz: the package's digest is {content}, but {info.digest} is wanted: it was cut or is another"
                )
            named = version if version is not None else info.version
            out.report.version = content if named is None else str(named)
            out.report.bytes = os.path.getsize(path)
            opened = _core.Package(path, self.trust)
            changed = self._changed(opened)
        except (OSError, ValueError, KeyError) as caught:
            error = caught
        words.group.agree(error)
        with opened:
            for name, entry in opened.entries.items():
                if entry["same"] or name not in words.plan.users:
                    continue
                error = self._take(opened, name, entry, name in changed, out, error)
        words.group.agree(error)
        return out

    def _changed(self, opened: _core.Package) -> set[str]:
        words = self._words
        kinds = dict.fromkeys(words.plan.pieces, "delta")
        loader = packages.Loader(words.base, words.plan, words.params, kinds, None)
        changed = loader.changed(opened.description)
        lacking = update.missing(words.plan, opened.entries)
        if lacking:
            raise ValueError(
                f"xorz: the package is not of the whole model: it lacks `{lacking[0]}` (and {len(lacking) - 1} more)"
            )
        return changed

    def _take(
        self,
        opened: _core.Package,
        name: str,
        entry: dict[str, Any],
        changed: bool,
        out: _Next,
        error: Exception | None,
    ) -> Exception | None:
        """Check one tensor against the words that are there, and stage its change; gives what is wrong, now or before."""
        words = self._words
        by_sum = self.trust == "sha256"
        known = name in self._digests and (name in self._sums or not by_sum)
        # The other processes are waiting for this one's part.
        whole = None if known and not changed else words.whole(name)
        if error is not None:
            return error
        try:
            if changed:
                update.stage(words, opened, name, whole, out.staged)
                return None
            if by_sum and whole is not None:
                whole = words.hand.read(whole)  # once for both
            there = self._digests.get(name) or update.digest_of(whole)
            # Of small tensors packages keep 16 digits.
            if not there.startswith(entry["base"]):
                raise ValueError(f"its base has digest {entry['base']}, but the engine's words have {there}")
            out.same[name] = there
            if by_sum:
                out.sums[name] = self._sums.get(name) or update.sha256_of(whole)
                if entry["base_sha256"] != out.sums[name]:
                    raise ValueError(
                        f"its base has sha256 {entry['base_sha256']}, but the engine's words have {out.sums[name]}"
                    )
        except (OSError, ValueError, RuntimeError, MemoryError) as error:
            return ValueError(
                f"xorz: tensor `{name}`: {error}; the update must be a step from version {self.version}, which is served"
            )
        return None

    def _of_folder(self, info: XorzUpdateInfo) -> _Next:
        """A version of a chain: a step if it is the next, else the difference from the one that is served."""
        words, error, chain = self._words, None, None
        try:
            chain = self._chain(info.source)
            number = chain.head if info.version is None else _number(info.version)
            wanted = chain.digest(number)
            at = self._number_of(chain)
            if number == at:
                raise ValueError(f"xorz: version {number} is served already")
        except (OSError, ValueError, KeyError, TypeError) as caught:
            error = caught
        words.group.agree(error)
        if number == at + 1:
            return self._of_package(info, str(chain.path(number)), str(number), wanted)
        return self._jump(info, chain, at, number, wanted)

    def _jump(self, info: XorzUpdateInfo, chain: Versions, at: int, number: int, wanted: str) -> _Next:
        words, error = self._words, None
        out = _Next(info, update.Staged(), Report(str(number), self.version), self._generation, wanted)
        try:
            lacking = update.missing(words.plan, chain._base)
            if lacking:
                raise ValueError(f"xorz: {chain.folder} is of another model: it lacks `{lacking[0]}`")
            for name, old, new in chain._pairs(number, at):
                if name not in words.plan.users:
                    continue
                before = out.staged.changed
                update.between(words, name, old, new, out.staged)
                if out.staged.changed > before and name in words.plan.refused:
                    raise ValueError(
                        f"xorz: tensor `{name}` is changed, and cannot be: {words.plan.refused[name]}"
                    )
        except (OSError, ValueError, KeyError, RuntimeError, MemoryError) as caught:
            error = caught
        words.group.agree(error)
        return out

    def _chain(self, folder: str) -> Versions:
        key = folder, self.trust
        if key not in self._chains:
            self._chains[key] = _opened(self._words.base, Path(folder), self.trust)
        return self._chains[key]

    def _number_of(self, chain: Versions) -> int:
        """The version of the chain that is served."""
        if self.identity is None:
            self.identity = self._identity_in(chain)
        equal = [n for n in range(chain.head, -1, -1) if chain.digest(n) == self.identity]
        # A step may change nothing; then the words are of several versions, and which one is served has been said before.
        for number in equal:
            if str(number) == self.version:
                return number
        if equal:
            return equal[0]
        raise ValueError(
            f"xorz: the engine serves version {self.version} with digest {self.identity}, which is none of versions 0 to "
            f"{chain.head} in {chain.folder}"
        )

    def _identity_in(self, chain: Versions) -> str:
        """The digest that the words which are there have as a version of the chain. Collective with tensor parallelism.

        Tensors that the model makes nothing of are taken for the base's.
        """
        found = dict(chain._digests)
        for name in self._words.plan.users:
            if name in found:
                found[name] = self._digests.get(name) or update.digest_of(self._words.whole(name))
        return chain._identity({name: found[chain._first[name]] for name in found})

    def _backwards(self, info: XorzUpdateInfo) -> _Next:
        """To a version that was served lately, by what was kept of the way."""
        error, count = None, 0
        names = [past.version for past in self._past]
        if info.version is None:
            count = 1 if names else 0
        elif str(info.version) in names:
            count = len(names) - names.index(str(info.version))
        if not count:
            what = "the version before" if info.version is None else f"version {info.version}"
            kept = ", ".join(names) or "none"
            error = ValueError(
                f"xorz: {what} is not kept: version {self.version} is served, and of those before it {kept}; "
                "name a folder of versions as the update's source"
            )
        self._words.group.agree(error)
        past = list(self._past)[-count:]
        staged = update.backwards(p.ways for p in reversed(past))
        staged.changed = sum(p.changed for p in past)
        report = Report(past[0].version, self.version)
        return _Next(info, staged, report, self._generation, past[0].identity, back=count)


def _number(version: Any) -> int:
    if isinstance(version, str) and version.isdecimal():
        return int(version)
    if isinstance(version, int):
        return version
    raise ValueError(f"xorz: version {version!r} is no number of a folder's version")


def _opened(base: packages.Checkpoint, folder: Path, trust: str) -> Versions:
    """The chain in `folder`, over the base under the names that the chain has. ValueError if it is none of this base."""
    errors = []
    for names in _published(folder, base):
        try:
            return Versions(_as_published(base, folder, names), folder, trust=trust)
        except ValueError as error:
            errors.append(error)
    raise errors[0]


def _published(folder: Path, base: packages.Checkpoint) -> Iterator[dict[str, str]]:
    """The names that a chain may have, each with the one that it is tied to: a trainer's state has all that are tied.

    Those of the first package that can be read are right, but where it was appended and has fewer; then those of a later one.
    At last the base's own.
    """
    known: list[dict[str, str]] = []
    for path in sorted(folder.glob("[0-9]*-*.xorz")):
        try:
            with _core.Package(path) as opened:
                names = {name: entry["same"] or name for name, entry in opened.entries.items()}
        except (OSError, ValueError):
            continue  # whoever needs it will be told
        if names not in known:
            known.append(names)
            yield names
    yield {name: name for name in base.tensors}


def _as_published(base: packages.Checkpoint, folder: Path, names: dict[str, str]) -> dict[str, torch.Tensor]:
    made: dict[str, torch.Tensor] = {}
    out = {}
    for name, of in names.items():
        known = next((n for n in (name, *names) if n in base.tensors and names[n] == of), None)
        if known is None:
            raise ValueError(f"xorz: {folder} is of another model: the engine's has no tensor `{name}`")
        out[name] = made.setdefault(known, base[known])
    return out


def _download(address: str, file: Any) -> None:
    try:
        import fsspec
    except ImportError:
        raise ValueError(
            f"xorz: {address} is no path; for addresses fsspec must be installed (pip install fsspec)"
        ) from None
    with fsspec.open(address, "rb") as remote:
        while part := remote.read(1 << 20):
            file.write(part)


def _check_words(model: torch.nn.Module, device: Any) -> None:
    """ValueError where the parameters do not hold the checkpoint's words at all, or not where the engine computes."""
    kind = torch.device(device).type
    for name, param in model.named_parameters():
        if param.device.type != kind:
            raise ValueError(f"xorz: parameter `{name}` is on {param.device}, but the engine is on {device}")
        if param.numel() == 0 or param.is_meta:
            raise ValueError(
                f"xorz: parameter `{name}` holds no words: vLLM has repacked it for its CPU kernels; start the engine with "
                "--quantization xorz, which keeps them"
            )
