"""Promise: who builds xorz gets its CUDA kernels where an nvcc is to be had, compiled once for the same sources;
where none is, the build goes on and says so in one sentence, or stops if the kernels were asked for.

Doubles stand for nvcc and for the package index: what the real ones make is seen by `make cuda-gate` and
`make test-wheel`.
"""

import base64
import hashlib
import itertools
import os
import shutil
import struct
import subprocess
import sys
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
CUDA = ROOT / "cuda"
sys.path.insert(0, str(ROOT / "tests" / "wheel"))
import fatbin_images  # noqa: E402

SCRIPTS = Path(sys.executable).parent
CMAKE = shutil.which("cmake", path=os.pathsep.join([str(SCRIPTS), os.environ.get("PATH", "")]))

pytestmark = pytest.mark.skipif(CMAKE is None or sys.platform != "linux", reason="needs Linux and cmake")

# Writes what it was called with and the sources that it was to compile, so that other sources are other kernels.
NVCC = """#!/bin/sh
case "$1" in
  --version) echo "Cuda compilation tools, release ${FAKE_RELEASE:-13.2}, V13.2.86"; exit 0 ;;
  --list-gpu-code) printf 'sm_80\\nsm_86\\nsm_89\\nsm_90\\nsm_100\\nsm_120\\n'; exit 0 ;;
esac
echo called >> "$FAKE_CALLS"
[ -z "$FAKE_FAILS" ] || { echo "no space for a fatbin" >&2; exit 2; }
all="$*"
while [ "$1" != -I ]; do shift; done
{ echo "$all"; cat "$2"/*.cu "$2"/*.cuh; } > xorz.fatbin
"""


class Machine:
    """A user with a cache, a fake nvcc and a copy of the kernels' sources."""

    def __init__(self, tmp: Path) -> None:
        self.tmp, self.calls, self.builds = tmp, tmp / "calls", itertools.count()
        self.cuda = tmp / "cuda"
        shutil.copytree(CUDA, self.cuda, ignore=shutil.ignore_patterns("__pycache__"))
        self.nvcc = tmp / "nvcc"
        self.nvcc.write_text(NVCC)
        self.nvcc.chmod(0o755)
        plain = {k: v for k, v in os.environ.items() if not k.startswith(("XORZ_", "FAKE_", "PIP_", "XDG_"))}
        path = os.pathsep.join([str(SCRIPTS), plain.get("PATH", "")])
        self.env = {**plain, "PATH": path, "HOME": str(tmp), "FAKE_CALLS": str(self.calls)}

    def compiled(self) -> int:
        """How often nvcc has compiled."""
        return len(self.calls.read_text().splitlines()) if self.calls.exists() else 0

    def build(self, **env: str) -> tuple[subprocess.CompletedProcess, Path]:
        """As build.rs does, in a folder of its own."""
        into = self.tmp / f"build{next(self.builds)}"
        env, run = {**self.env, **env}, {"capture_output": True, "text": True}
        given = [f"-DXORZ_NVCC={self.nvcc}", "-DXORZ_NVCC_THREADS=2", "-G", "Ninja"]
        done = subprocess.run([CMAKE, "-S", self.cuda, "-B", into, *given], env=env, **run)
        if done.returncode == 0:
            done = subprocess.run([CMAKE, "--build", into, "--target", "kernels"], env=env, **run)
        return done, into / "xorz.fatbin"

    def kernels(self, **env: str) -> str:
        done, fatbin = self.build(**env)
        assert done.returncode == 0, done.stdout + done.stderr
        return fatbin.read_text()

    def chosen(self, **env: str) -> subprocess.CompletedProcess:
        """Which nvcc a build would take."""
        script = self.tmp / "chosen.cmake"
        script.write_text(
            f'include({CUDA}/nvcc.cmake)\nxorz_find_nvcc("{sys.executable}")\n'
            'message(STATUS "nvcc: ${NVCC}; without: ${WITHOUT}")\n'
        )
        return subprocess.run([CMAKE, "-P", script], env={**self.env, **env}, capture_output=True, text=True)


@pytest.fixture
def machine(tmp_path):
    return Machine(tmp_path)


def test_kernels_are_compiled_once_for_the_same_sources(machine):
    first = machine.kernels()
    for arch in (80, 86, 89, 90, 100, 120):
        assert f"-gencode arch=compute_{arch},code=sm_{arch}" in first
    assert "-gencode arch=compute_80,code=compute_80" in first and "--compress-mode=size" in first
    assert machine.kernels() == first and machine.compiled() == 1
    # Sources that have changed, another compiler, other flags; and then those before, which are still there.
    source = machine.cuda / "word.cuh"
    plain = source.read_text()
    source.write_text(plain + "// Other words.\n")
    assert "Other words." in machine.kernels() and machine.compiled() == 2
    assert machine.kernels(FAKE_RELEASE="12.6") != first and machine.compiled() == 3
    source.write_text(plain)
    assert machine.kernels() == first and machine.compiled() == 3


def test_a_source_more_or_less_or_renamed_is_compiled(machine):
    machine.kernels()
    (machine.cuda / "more.cu").write_text("// More.\n")
    assert "More." in machine.kernels()
    (machine.cuda / "more.cu").rename(machine.cuda / "other.cu")
    assert "More." in machine.kernels() and machine.compiled() == 3
    (machine.cuda / "other.cu").unlink()
    assert "More." not in machine.kernels() and machine.compiled() == 3


@pytest.mark.parametrize("damage", [lambda b: b[:-1], lambda b: bytes([b[0] ^ 1]) + b[1:], lambda b: b""])
def test_damaged_kernels_are_compiled_anew(machine, damage):
    first = machine.kernels()
    [kept] = (machine.tmp / ".cache" / "xorz" / "kernels").iterdir()
    kept.write_bytes(damage(kept.read_bytes()))
    assert machine.kernels() == first and machine.compiled() == 2
    # What was damaged has been replaced.
    assert machine.kernels() == first and machine.compiled() == 2


def test_the_cache_is_where_the_user_says_and_does_without(machine):
    machine.kernels(XORZ_CUDA_KERNELS=str(machine.tmp / "mine"))
    machine.kernels(XDG_CACHE_HOME=str(machine.tmp / "xdg"))
    for folder in ("mine", "xdg/xorz/kernels"):
        [kept] = (machine.tmp / folder).iterdir()
        assert kept.suffix == ".fatbin"
    # Nowhere to keep it: a file in the folder's place.
    (machine.tmp / "file").write_text("")
    for _ in range(2):
        machine.kernels(XORZ_CUDA_KERNELS=str(machine.tmp / "file" / "kernels"))
    assert machine.compiled() == 4


def test_a_compiler_that_fails_ends_the_build_and_leaves_nothing(machine):
    done, fatbin = machine.build(FAKE_FAILS="1")
    said = done.stdout + done.stderr
    assert done.returncode != 0 and not fatbin.exists()
    assert "no space for a fatbin" in said and "XORZ_CUDA=0 builds xorz without them" in " ".join(
        said.split()
    )
    cache = machine.tmp / ".cache" / "xorz" / "kernels"
    assert not cache.exists() or not list(cache.iterdir())
    machine.kernels()


def test_builds_at_once_end_well(machine):
    with ThreadPoolExecutor(3) as pool:
        assert len(set(pool.map(lambda _: machine.kernels(), range(3)))) == 1
    kept = list((machine.tmp / ".cache" / "xorz" / "kernels").iterdir())
    assert [one.suffix for one in kept] == [".fatbin"]


def test_who_names_an_nvcc_gets_it_and_who_wants_none_gets_none(machine):
    done = machine.chosen(XORZ_NVCC=str(machine.nvcc))
    assert done.returncode == 0 and f"nvcc: {machine.nvcc}; without: \n" in done.stdout
    # Also where one is named.
    done = machine.chosen(XORZ_CUDA="0", XORZ_NVCC=str(machine.nvcc))
    assert done.returncode == 0 and "nvcc: ; without: XORZ_CUDA was 0\n" in done.stdout
    done = machine.chosen(XORZ_CUDA="yes")
    assert done.returncode != 0 and "XORZ_CUDA is 'yes'" in done.stderr
    # On PATH.
    path = os.pathsep.join([str(machine.tmp), machine.env["PATH"]])
    done = machine.chosen(PATH=path)
    assert done.returncode == 0 and f"nvcc: {machine.nvcc}; without: \n" in done.stdout


def none_here() -> bool:
    folders = [os.environ.get("PATH", ""), "/usr/local/cuda/bin", "/usr/bin", "/usr/local/bin"]
    return shutil.which("nvcc", path=os.pathsep.join(folders)) is None


needs_none = pytest.mark.skipif(not none_here(), reason="this machine has an nvcc, which is taken")
# Without a network, whatever this machine has: an index that is not asked.
OFFLINE = {"PIP_NO_INDEX": "1"}


@needs_none
def test_without_a_network_the_build_goes_on_and_says_so_once(machine):
    tools = machine.tmp / "tools"
    done = machine.chosen(**OFFLINE, XORZ_CUDA_TOOLS=str(tools))
    assert done.returncode == 0 and "nvcc: ; without: nvcc could not be fetched\n" in done.stdout
    said = " ".join(done.stderr.split())
    assert said.count("could not be fetched: ERROR: No matching distribution found for nvidia-cuda-nvcc") == 1
    assert "xorz is built without CUDA kernels, and refuses CUDA tensors" in said
    # Whoever asked for kernels is not given a library without.
    done = machine.chosen(**OFFLINE, XORZ_CUDA_TOOLS=str(tools), XORZ_CUDA="1")
    said = " ".join(done.stderr.split())
    assert done.returncode != 0 and "could not be fetched" in said and "XORZ_CUDA=0 builds without" in said


@needs_none
def test_a_folder_that_cannot_be_made_is_named(machine):
    (machine.tmp / "file").write_text("")
    tools = machine.tmp / "file" / "tools"
    done = machine.chosen(XORZ_CUDA_TOOLS=str(tools))
    said = " ".join(done.stderr.split())
    assert done.returncode == 0 and "Not a directory" in said and "built without CUDA kernels" in said


def wheel(folder: Path, requirement: str) -> None:
    """A wheel of that name and version; of nvcc, with one inside."""
    name, version = requirement.split("==")
    stem = f"{name.replace('-', '_')}-{version}"
    files = {f"{stem}.dist-info/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"}
    files[f"{stem}.dist-info/WHEEL"] = (
        "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
    )
    if name == "nvidia-cuda-nvcc":
        files["nvidia/cu13/bin/nvcc"] = NVCC
    lines = []
    for path, text in files.items():
        digest = base64.urlsafe_b64encode(hashlib.sha256(text.encode()).digest()).rstrip(b"=").decode()
        lines.append(f"{path},sha256={digest},{len(text.encode())}\n")
    files[f"{stem}.dist-info/RECORD"] = "".join(lines) + f"{stem}.dist-info/RECORD,,\n"
    with zipfile.ZipFile(folder / f"{stem}-py3-none-any.whl", "w") as out:
        for path, text in files.items():
            out.writestr(path, text)


@needs_none
def test_nvcc_is_fetched_once_whoever_else_builds_and_wherever_pip_installs_to(machine):
    index = machine.tmp / "index"
    index.mkdir()
    for line in (CUDA / "requirements.txt").read_text().splitlines():
        if "==" in line:
            wheel(index, line)
    env = {**OFFLINE, "PIP_FIND_LINKS": str(index), "XORZ_CUDA_TOOLS": str(machine.tmp / "tools")}
    # As in a build that pip isolates, and for a user who installs elsewhere.
    (machine.tmp / "isolated").mkdir()
    (machine.tmp / "isolated" / "sitecustomize.py").write_text("raise SystemExit('not for this Python')\n")
    foreign = {"PYTHONPATH": str(machine.tmp / "isolated"), "PIP_TARGET": str(machine.tmp / "target")}
    run = {"capture_output": True, "text": True, "env": {**machine.env, **env, **foreign}}
    # -S: the build's own Python reads no sitecustomize either.
    command = [sys.executable, "-S", CUDA / "toolchain.py"]
    with ThreadPoolExecutor(2) as pool:
        both = list(pool.map(lambda _: subprocess.run(command, **run), range(2)))
    assert all(done.returncode == 0 for done in both), both
    assert both[0].stdout == both[1].stdout and both[0].stdout.strip().endswith("nvidia/cu13/bin/nvcc")
    assert sum("fetching nvcc" in done.stderr for done in both) == 1
    assert not (machine.tmp / "target").exists()
    # Then it is there, network or not.
    done = machine.chosen(XORZ_CUDA_TOOLS=env["XORZ_CUDA_TOOLS"], XORZ_CUDA="1", **OFFLINE)
    assert done.returncode == 0 and both[0].stdout.strip() in done.stdout, done.stderr


def fatbin(images: list[tuple[int, int, int]]) -> bytes:
    """Images of kind, compute capability and size, as nvcc writes them."""
    body = b"".join(
        struct.pack("<HHIQIIHHI", kind, 257, 64, size, size, 64, 8, 1, arch) + bytes(32) + b"\xb5" * size
        for kind, arch, size in images
    )
    return struct.pack("<IHHQ", 0xBA55ED50, 1, 16, len(body)) + body


def test_a_library_without_some_kernels_is_told_from_one_with_all(tmp_path, capsys):
    whole = [(1, 80, 300), *((2, arch, 100 + arch) for arch in (80, 86, 89, 90, 100, 120))]
    junk = b"\x7fELF" + b"\x50\xed\x55\xba" * 5 + bytes(77)
    for images, lacks in ((whole, None), (whole[1:], "ptx80"), (whole[:-1], "sm120"), ([], "sm80")):
        library = junk + (fatbin(images) if images else b"") + junk
        names = {f"{'ptx' if kind == 1 else 'sm'}{arch}": 64 + size for kind, arch, size in images}
        assert fatbin_images.images(library) == names
        path = tmp_path / "xorz-0.whl"
        with zipfile.ZipFile(path, "w") as wheel:
            wheel.writestr("xorz/libxorz_torch.so", library)
        assert fatbin_images.main([str(path)]) == (0 if lacks is None else 1)
        said = capsys.readouterr()
        assert (lacks is None and not said.err) or lacks in said.err
    # What is cut ends the search, and nothing else.
    assert fatbin_images.images(junk + fatbin(whole)[:-1]) == {}
