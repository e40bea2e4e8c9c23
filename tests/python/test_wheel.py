"""Promise: what is shipped. The wheel holds the package, the library and the command, needs no newer system
than it says, and the source archive builds without git. Building and installing both from nothing: `make
test-wheel`."""

import os
import re
import shutil
import subprocess
import sys
import tarfile
from importlib import metadata
from pathlib import Path

import pytest
import xorz

ROOT = Path(__file__).parents[2]
COMMAND = Path(sys.executable).with_name("xorz")

# What manylinux_2_34 allows (PEP 600; Debian 12, Ubuntu 22.04, RHEL 9 and newer have it): the newest symbol
# version of each system library.
MANYLINUX_2_34 = {"GLIBC": (2, 34), "GLIBCXX": (3, 4, 29), "CXXABI": (1, 3, 13), "GCC": (12, 0, 0)}
SYSTEM = {"libstdc++.so.6", "libgcc_s.so.1", "libc.so.6", "libm.so.6", "ld-linux-x86-64.so.2"}
# A linker takes the symbols of the system it runs on: the promise speaks of builds on glibc 2.36 (Debian 12)
# or older.
BUILT_ON = tuple(map(int, os.confstr("CS_GNU_LIBC_VERSION").split()[1].split(".")))


def readelf(option, path):
    assert shutil.which("readelf"), "readelf is missing; install binutils"
    done = subprocess.run(["readelf", "-W", option, str(path)], capture_output=True, text=True, check=True)
    return done.stdout


def newest(path):
    """The newest version of each set of symbols that a file needs, {"GLIBC": (2, 34), ...}."""
    found = {}
    for name, version in re.findall(r"Name: ([A-Z]+)_([\d.]+)", readelf("-V", path)):
        found[name] = max(found.get(name, ()), tuple(map(int, version.split("."))))
    return found


@pytest.mark.parametrize("path", [xorz.library_path, COMMAND], ids=["library", "command"])
def test_it_runs_on_every_system_with_glibc_2_34(path):
    if BUILT_ON > (2, 36):
        pytest.skip(f"built on glibc {BUILT_ON}, newer than the systems that this promise speaks of")
    needs = newest(path)
    assert "GLIBC" in needs and set(needs) <= set(MANYLINUX_2_34), needs
    over = {name: version for name, version in needs.items() if version > MANYLINUX_2_34[name]}
    assert not over, f"{path.name} needs {over}"


@pytest.mark.parametrize(
    ("path", "also"), [(xorz.library_path, {"libtorch_cpu.so"}), (COMMAND, set())], ids=["library", "command"]
)
def test_it_links_the_system_and_nothing_else(path, also):
    dynamic = readelf("-d", path)
    needed = set(re.findall(r"NEEDED.*\[(.*)\]", dynamic))
    assert also <= needed <= SYSTEM | also, needed
    assert not re.search("RPATH|RUNPATH|TEXTREL", dynamic)
    # No stack that is executable, no section that stays writable after relocation.
    segments = readelf("-l", path)
    assert re.search(r"GNU_STACK.* RW ", segments) and "GNU_RELRO" in segments


def test_the_wheel_is_for_any_python_and_holds_what_it_should():
    wheel = metadata.distribution("xorz")
    tags = re.findall(r"^Tag: (.*)$", wheel.read_text("WHEEL"), re.M)
    assert tags == ["py3-none-linux_x86_64"]
    assert wheel.metadata["Requires-Python"] == ">=3.10"
    assert wheel.metadata.get_all("Requires-Dist") == ["torch>=2.10"]
    files = {str(f) for f in wheel.files if "__pycache__" not in str(f) and "dist-info" not in str(f)}
    sources = {
        f"xorz/{f.relative_to(ROOT / 'python/xorz')}"
        for f in (ROOT / "python/xorz").rglob("*")
        if f.is_file() and f.suffix in (".py", ".typed")
    }
    headers = {f for f in files if re.fullmatch(r"xorz/include/[\w.]+\.h", f)}
    assert files - headers == sources | {"xorz/libxorz_torch.so", "../../../bin/xorz"}
    licences = {Path(f).name for f in wheel.files if "/licenses/" in str(f)}
    assert licences == {"LICENSE-APACHE", "LICENSE-MIT", "THIRD-PARTY-LICENSES"}


@pytest.fixture(scope="module")
def sdist(tmp_path_factory):
    """The files of the source archive, {path: size}."""
    pytest.importorskip("scikit_build_core", reason="the build's own package is not installed here")
    out = tmp_path_factory.mktemp("sdist")
    code = "import sys; from scikit_build_core.build import build_sdist; build_sdist(sys.argv[1])"
    subprocess.run([sys.executable, "-c", code, str(out)], cwd=ROOT, check=True, capture_output=True)
    [archive] = out.glob("*.tar.gz")
    assert archive.name == f"xorz-{xorz.__version__}.tar.gz"
    with tarfile.open(archive) as tar:
        top = archive.name.removesuffix(".tar.gz") + "/"
        assert all(member.isfile() and member.name.startswith(top) for member in tar)
        return {member.name.removeprefix(top): member.size for member in tar}


def test_the_source_archive_holds_what_a_build_and_its_tests_need(sdist):
    needed = "Cargo.toml Cargo.lock build.rs CMakeLists.txt pyproject.toml LICENSE-APACHE LICENSE-MIT README.md Makefile"
    assert {*needed.split(), "THIRD-PARTY-LICENSES", "deny.toml"} <= set(sdist)
    for folder in ("src", "csrc", "cuda", "python", "tests", "benches", "examples"):
        for path in (ROOT / folder).rglob("*"):
            name = str(path.relative_to(ROOT))
            ignored = re.search(
                r"__pycache__|\.pyc$|\.(so|hypothesis)$|^tests/fuzz/(target|artifacts|corpus)/", name
            )
            if path.is_file() and not ignored:
                assert sdist.get(name) == path.stat().st_size, name


def test_the_source_archive_holds_nothing_that_was_built(sdist):
    built = re.compile(r"(^|/)(build|target|dist|\.venv|\.git|__pycache__)/|\.(so|a|o|rlib|pyc|whl)$")
    assert [name for name in sdist if built.search(name)] == []
    assert sum(sdist.values()) < 16 << 20, sorted(sdist.items(), key=lambda item: -item[1])[:5]
