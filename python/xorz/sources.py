"""Where a package is: a file, a folder that holds one, a repository of the Hugging Face Hub, or any address of fsspec.

Whatever is not on this machine is fetched once, under a name that goes with its version there, and appears when it is whole.
A package that was fetched is as untrusted as any other: its table is checked before it is given away, its contents when they
are read.
"""

import hashlib
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from . import _core, locks, versions
from .progress import bar

SUFFIX = ".xorz"
_SCHEME = re.compile(r"([a-zA-Z][a-zA-Z0-9+.-]+)(::|://)")
# owner/name, as the Hub spells it, and perhaps @revision.
_HUB = re.compile(r"(?P<repo>[\w.-]+/[\w.-]+)(?:/(?P<path>[^@]+\.xorz))?(?:@(?P<revision>[\w./-]+))?")
_BLOCK = 4 << 20


def located(source: str | os.PathLike[str]) -> Path:
    """The package's path on this machine.

    Args:
        source: a package; a folder with one `.xorz` in it; a folder of `xorz.Versions`, of which it is the newest version, or
            `FOLDER@NUMBER` for another (published with `as_tenant`); `owner/name` or `hf://owner/name` of the Hub, with
            `/FILE.xorz` where it holds several and `@REVISION` for another than main, fetched by huggingface_hub into its cache
            (private ones with its token); or an address that fsspec opens (`s3://`, `gs://`, `https://`, ...), of a package or
            of a folder with one, fetched into `$XORZ_CACHE_DIR/fetched` (`~/.cache/xorz/fetched` by default). A path that
            exists here is never looked for elsewhere.

    Raises:
        FileNotFoundError: there is none; ValueError: a folder with no package or several, or what was fetched is none;
        ModuleNotFoundError: the address needs a library that is not installed; OSError, and what the library raises.
    """
    text = os.fspath(source)
    if not isinstance(text, str):
        return Path(os.fsdecode(text))
    chain = versions.chain_of(text)
    if chain is not None:
        return versions.against_base(*chain)[1]
    scheme = _SCHEME.match(text)
    if scheme is None or os.path.exists(text):
        path = Path(text)
        if path.is_dir():
            return path / only((p.name for p in path.iterdir()), text)
        hub = None if os.path.lexists(text) or text.endswith(SUFFIX) else _HUB.fullmatch(text)
        return path if hub is None else _of_hub(text, hub)
    if scheme[1] == "hf":
        hub = _HUB.fullmatch(text[len("hf://") :])
        if hub is None:
            raise ValueError(
                f"{text!r} is not hf://owner/name, hf://owner/name/FILE.xorz or one of those with @REVISION"
            )
        return _of_hub(text, hub)
    return _fetched(text)


def folder_of(source: str | os.PathLike[str]) -> Path | None:
    """The folder around a tenant's package, on this machine, where `source` names a folder; None where it names a file."""
    found = located(source)
    text = os.fspath(source)
    named = text.rpartition("@")[0] if _SCHEME.match(str(text)) and "@" in text else text
    return None if str(named).endswith(SUFFIX) else found.parent


def is_elsewhere(source: str | os.PathLike[str]) -> bool:
    """Whether `located` would look for it somewhere else: an address, or what may be a repository of the Hub."""
    text = str(source)
    if os.path.lexists(text) or versions.chain_of(text) is not None:
        return False
    return bool(_SCHEME.match(text)) or (not text.endswith(SUFFIX) and bool(_HUB.fullmatch(text)))


def packages(names: Iterable[str]) -> list[str]:
    """Those of a folder's files that are packages by their names, in order; none that are hidden, as macOS's droppings are."""
    return sorted(n for n in names if n.endswith(SUFFIX) and not n.startswith("."))


def only(names: Iterable[str], where: str) -> str:
    """The one package among the names of a folder's files."""
    found = packages(names)
    if not found:
        raise ValueError(
            f"{where} is a folder that holds no package ({SUFFIX}); `xorz pack BASE {where} OUT{SUFFIX}` makes one"
        )
    if len(found) > 1:
        raise ValueError(
            f"{where} holds {len(found)} packages ({', '.join(found[:3])}, ...); name one of them"
        )
    return found[0]


def _of_hub(text: str, match: re.Match[str]) -> Path:
    try:
        import huggingface_hub
        from huggingface_hub.errors import RepositoryNotFoundError
    except ModuleNotFoundError as error:
        raise FileNotFoundError(
            f"there is no {text!r} here, and to look for it on the Hub huggingface_hub is needed: pip install huggingface_hub"
        ) from error
    repo, revision, name = match["repo"], match["revision"], match["path"]
    try:
        # The small files beside a package are those of a model: its card, its config, its tokenizer. Of weights there are none.
        folder = huggingface_hub.snapshot_download(
            repo,
            revision=revision,
            allow_patterns=[name or f"*{SUFFIX}", "*.json", "*.txt", "*.model", "*.jinja", "README.md"],
        )
    except RepositoryNotFoundError as error:
        raise FileNotFoundError(
            f"there is no {text!r} here, and no repository of that name on the Hub: {error}"
        ) from error
    path = Path(folder) / (name or only((p.name for p in Path(folder).iterdir()), text))
    if not path.exists():
        raise FileNotFoundError(f"{repo} on the Hub holds no {name}")
    return _checked(path, text)


def _checked(path: Path, text: str) -> Path:
    """Nothing that is no package is given away as one."""
    try:
        with _core.Package(path):
            return path
    except ValueError as error:
        raise ValueError(f"what {text} gave is no package: {error}") from error


def cache() -> Path:
    """The folder of what is fetched through fsspec, made if it is missing.

    FileNotFoundError: the user wants no cache; PermissionError: it is another user's, or others may write to it.
    """
    said = os.environ.get("XORZ_CACHE_DIR")
    if said == "":
        raise FileNotFoundError(
            "XORZ_CACHE_DIR is empty, so that there is no place for what is fetched; name a folder"
        )
    home = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    folder = Path(said or os.path.join(home, "xorz")) / "fetched"
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    found = folder.stat()
    if found.st_uid != os.geteuid() or found.st_mode & 0o022:
        raise PermissionError(
            f"{folder} is another user's, or others may write to it: nothing is fetched into it or believed"
        )
    return folder


# What file systems of fsspec call the version of a file: its name, its checksum, or when it was changed.
_VERSION = (
    "ETag",
    "etag",
    "Content-MD5",
    "Digest",
    "md5",
    "md5Hash",
    "checksum",
    "generation",
    "Last-Modified",
)
_VERSION += ("LastModified", "last_modified", "mtime", "updated", "created")


def _fetched(text: str) -> Path:
    try:
        import fsspec
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f"to fetch {text}, fsspec is needed: pip install fsspec") from error
    files, path = fsspec.core.url_to_fs(text)
    if not path.endswith(SUFFIX) and files.isdir(path):
        names = {str(p).rstrip("/").rpartition("/")[2]: p for p in files.ls(path, detail=False)}
        path = names[only(names, text)]
    info = files.info(path)
    version = [str(info[key]) for key in _VERSION if info.get(key)]
    about = (files.unstrip_protocol(path), str(info.get("size")), *version)
    key = hashlib.sha256("\0".join(about).encode()).hexdigest()[:32]
    folder = cache()
    whole = folder / f"{key}-{path.rpartition('/')[2]}"
    with locks.held(folder / f"{key}.lock"):
        part = folder / f"{key}.part"
        if not version:
            # Nobody can tell whether it is still what was fetched before.
            part.unlink(missing_ok=True)
        elif whole.exists():
            return _checked(whole, text)
        _fetch(files, path, info.get("size"), part, whole, text)
    return whole


def _fetch(files: Any, path: str, size: int | None, part: Path, whole: Path, text: str) -> None:
    """Goes on where an earlier try ended, since the part's name goes with the version."""
    have = part.stat().st_size if part.exists() else 0
    if size is not None and have > size:
        have = 0
    with files.open(path, "rb") as source, open(part, "r+b" if have else "wb") as out:
        if have:
            source.seek(have)
            out.seek(have)
        with bar(total=size, initial=have, unit="B", desc=f"fetching {path.rpartition('/')[2]}") as shown:
            while block := source.read(_BLOCK):
                out.write(block)
                shown.update(len(block))
        out.truncate()
        out.flush()
        os.fsync(out.fileno())
        got = out.tell()
    if size is not None and got != size:
        raise OSError(
            f"{text} ended after {got:,} of {size:,} bytes; what came is kept, and the next try goes on from there"
        )
    try:
        _checked(part, text)
    except ValueError:
        part.unlink()
        raise
    os.replace(part, whole)
