"""Promise: one libxorz_torch.so, built once, runs unmodified in every torch from 2.10 on and in any Python.

`make test-abi`. Builds the wheel, installs it (nothing is compiled again; the sha256 of the library is
compared) beside each torch below, and there runs check.py and the project's Python tests. What the torches
gave is then compared among them: the bits of every op, the words of every error, and each one's archives
loaded by all the others.

    run.py [--only TORCH[/PYTHON]]... [--no-suite] [--list]

Environments with torch and the tests' requirements, 5 to 7 GB each, are made once, in $XORZ_ABI_VENVS (or
xorz/abi in the user's cache), and never hold xorz. Interpreters come from PATH or pyenv; an environment
without one is an error.
"""

import argparse
import fcntl
import hashlib
import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
import xml.etree.ElementTree as xml
import zipfile
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
BUILD = ROOT / "build" / "abi"
ARCHIVES = ("script", "trace", "freeze", "export", "package")

# (torch, Python); None: the developer's environment, that the library was built in.
MATRIX = (("2.10", "3.10"), ("2.11", "3.12"), ("2.13", "3.13"), ("2.15", None), ("2.15", "3.12"))

DEVELOPERS = f"{sys.version_info.major}.{sys.version_info.minor}"

# Tests of the build's own tools or of the source tree: the bytes they look at are the same here.
LEFT_OUT = {
    "tests/python/test_library.py::test_its_torch_abi_is_stable": "reads the library's bytes; its tool needs Python 3.11",
    "tests/python/test_wheel.py": "of the source tree and the wheel, not of torch",
    "tests/python/test_readme.py::test_paths_that_the_readme_links_exist": "of the source tree",
}

# What another torch cannot read, by torch's own doing: (archive, writer, reader) -> why.
TORCH_LIMITS: dict[tuple[str, str, str], str] = {}


def fail(text: str) -> None:
    raise SystemExit(f"test-abi: {text}")


def run(*command, **kwargs) -> subprocess.CompletedProcess:
    return subprocess.run([str(part) for part in command], **kwargs)


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def interpreter(version: str) -> str | None:
    """Where a Python of this version is: on PATH if it runs there, else one of pyenv's."""
    command = [f"python{version}", "-c", "import ensurepip, sys, venv; print(sys.executable)"]
    tries = [os.environ]
    if shutil.which("pyenv"):
        listed = run("pyenv", "versions", "--bare", capture_output=True, text=True).stdout.split()
        tries += [os.environ | {"PYENV_VERSION": v} for v in listed if v.startswith(version + ".")]
    for env in tries:
        if shutil.which(command[0]):
            done = run(*command, capture_output=True, text=True, env=env)
            if done.returncode == 0:
                return done.stdout.strip()
    return None


def venvs() -> Path:
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("XORZ_ABI_VENVS") or Path(cache) / "xorz" / "abi")


def cached_python(torch: str, python: str) -> Path:
    """The cached environment with this torch; made if it is missing, incomplete or of other requirements."""
    folder = venvs() / f"torch{torch}-python{python}"
    wanted = [f"torch=={torch}.*"]
    lines = (HERE / "requirements.txt").read_text().splitlines()
    wanted += [line for line in lines if line and not line.startswith("#")]
    stamp = folder / ".xorz-requirements"
    folder.parent.mkdir(parents=True, exist_ok=True)
    with (folder.parent / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not stamp.exists() or stamp.read_text().splitlines() != wanted:
            found = interpreter(python)
            if not found:
                fail(f"no python{python} on PATH or in pyenv, for torch {torch}; use --only to leave it out")
            free = shutil.disk_usage(folder.parent).free >> 30
            if free < 10:
                fail(
                    f"torch {torch} takes 5 to 7 GB, more while it unpacks; {folder.parent} has {free} GB free"
                )
            print(f"test-abi: making {folder} (once)", flush=True)
            run(found, "-m", "venv", "--clear", folder, check=True)
            pip = (
                folder / "bin" / "python",
                "-m",
                "pip",
                "install",
                "--quiet",
                "--disable-pip-version-check",
            )
            run(*pip, "--no-cache-dir", *wanted, check=True)
            stamp.write_text("\n".join(wanted) + "\n")
    return folder / "bin" / "python"


def build_wheel() -> tuple[Path, str]:
    """The wheel out of `make build`'s build folder, and the sha256 of its library, which is the installed one's."""
    folder = BUILD / "wheel"
    shutil.rmtree(folder, ignore_errors=True)
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    pip = (sys.executable, "-m", "pip", "wheel", "--quiet", "--disable-pip-version-check")
    run(
        *pip,
        "--no-build-isolation",
        "--no-deps",
        "-w",
        folder,
        ROOT,
        check=True,
        env=os.environ | {"PATH": path},
    )
    [wheel] = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        library = sha256(archive.read("xorz/libxorz_torch.so"))
    files = importlib.metadata.files("xorz") or []
    installed = [f.locate() for f in files if f.name == "libxorz_torch.so"]
    if not installed or sha256(Path(installed[0]).read_bytes()) != library:
        fail("the wheel's library is not the one that `make build` installed; run `make build`")
    return wheel, library


@dataclass
class Environment:
    """One torch with the wheel on top, in a thin environment of its own that sees the packages of the cached one."""

    torch: str
    python: str | None

    @property
    def name(self) -> str:
        return f"torch{self.torch}-python{self.python or DEVELOPERS}"

    @property
    def folder(self) -> Path:
        return BUILD / self.name

    @property
    def exchange(self) -> Path:
        return BUILD / "exchange" / self.name

    def command(self, *args) -> list[str]:
        return [str(self.folder / "bin" / "python"), *map(str, args)]

    def install(self, wheel: Path, library: str) -> None:
        below = cached_python(self.torch, self.python) if self.python else Path(sys.executable)
        run(below, "-m", "venv", "--without-pip", "--clear", self.folder, check=True)
        code = "import site, sys; print(*[p for p in sys.path if p.endswith('-packages')], sep='\\n')"
        seen = run(below, "-c", code, check=True, capture_output=True, text=True).stdout
        own = run(*self.command("-c", code), check=True, capture_output=True, text=True).stdout.strip()
        # Lines of a .pth come after the environment's own folder: its xorz is the one that is found.
        (Path(own) / "torch.pth").write_text(seen)
        pip = (below, "-m", "pip", "--python", self.folder / "bin" / "python", "--disable-pip-version-check")
        run(*pip, "install", "--quiet", "--no-deps", "--force-reinstall", wheel, check=True)
        installed = Path(own) / "xorz" / "libxorz_torch.so"
        if sha256(installed.read_bytes()) != library:
            fail(f"{self.name}: the installed library is another one")

    def check(self, inputs: Path) -> dict:
        self.exchange.mkdir(parents=True)
        command = self.command(HERE / "check.py", "write", inputs, self.exchange)
        with (self.folder / "check.log").open("w") as log:
            done = run(*command, stdout=subprocess.PIPE, stderr=log, text=True, cwd=self.folder)
        if done.returncode:
            print((self.folder / "check.log").read_text()[-4000:])
            fail(f"{self.name}: check.py ended with {done.returncode}")
        result = json.loads(done.stdout.splitlines()[-1])
        if not result["torch"].startswith(self.torch + "."):
            fail(f"{self.name}: this is torch {result['torch']}")
        return result

    def read(self, writer: "Environment") -> dict:
        """What this torch makes of another one's archives, {archive: "ok" or what went wrong}."""
        command = self.command(HERE / "check.py", "read", writer.exchange, *ARCHIVES)
        done = run(*command, capture_output=True, text=True, cwd=self.folder)
        if done.returncode:
            return dict.fromkeys(ARCHIVES, f"exit code {done.returncode}: {done.stderr[-300:]}")
        return json.loads(done.stdout.splitlines()[-1])

    def suite(self) -> dict:
        """The project's own tests: counts, and each failure and skip by name."""
        report, left_out = self.folder / "suite.xml", []
        for test in LEFT_OUT:
            left_out += ["--deselect", test]
        command = self.command("-m", "pytest", f"--junitxml={report}", *left_out, "tests/python")
        with (self.folder / "suite.log").open("w") as log:
            run(*command, cwd=ROOT, stdout=log, stderr=log)
        if not report.exists():
            print((self.folder / "suite.log").read_text()[-4000:])
            fail(f"{self.name}: the tests did not start")
        found = {"passed": 0, "failed": [], "skipped": []}
        for case in xml.parse(report).iter("testcase"):
            name = f"{case.get('classname').rpartition('.')[2]}::{case.get('name')}"
            if (skip := case.find("skipped")) is not None:
                found["skipped"].append(f"{name}: {skip.get('message')}")
            elif (
                bad := next((case.find(k) for k in ("failure", "error") if case.find(k) is not None), None)
            ) is not None:
                found["failed"].append(f"{name}: {(bad.get('message') or '').splitlines()[:1]}")
            else:
                found["passed"] += 1
        return found


def table(head: list[str], rows: list[list[str]]) -> None:
    widths = [max(len(str(row[i])) for row in [head, *rows]) for i in range(len(head))]
    for row in [head, ["-" * w for w in widths], *rows]:
        print("| " + " | ".join(str(cell).ljust(w) for cell, w in zip(row, widths, strict=True)) + " |")
    print(flush=True)


def compare(environments: list[Environment], results: dict[str, dict]) -> list[str]:
    """What differs between the torches: bits of outputs, words of errors, archives that another one cannot read."""
    wrong = []
    first = results[environments[0].name]
    for env in environments:
        mine = results[env.name]
        wrong += [f"{env.name}: {check}: {said}" for check, said in mine["checks"].items() if said != "ok"]
        if mine["digests"].keys() != first["digests"].keys():
            wrong.append(f"{env.name}: other outputs than in {environments[0].name}")
        for name in mine["digests"].keys() & first["digests"].keys():
            if mine["digests"][name] != first["digests"][name]:
                wrong.append(f"{env.name}: other bits of {name} than in {environments[0].name}")
        words = (env.exchange / "misuses.json").read_text()
        if words != (environments[0].exchange / "misuses.json").read_text():
            wrong.append(f"{env.name}: other words for misuses than in {environments[0].name}")
    print(f"Outputs compared bit for bit among all: {len(first['digests'])} in each.\n")
    said = {(w.name, r.name): r.read(w) for w in environments for r in environments}
    rows = []
    for archive in ARCHIVES:
        for writer in environments:
            row = [archive, writer.name]
            for reader in environments:
                found = said[writer.name, reader.name][archive]
                why = TORCH_LIMITS.get((archive, writer.torch, reader.torch))
                if found != "ok" and not why:
                    wrong.append(f"{reader.name} cannot read {archive} of {writer.name}: {found}")
                row.append("ok" if found == "ok" else f"torch: {why}" if why else "FAILED")
            rows.append(row)
    table(["archive", "written by", *(f"read by {e.name}" for e in environments)], rows)
    return wrong


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", action="append", metavar="TORCH[/PYTHON]", help="leave out all others")
    parser.add_argument("--no-suite", action="store_true", help="check.py only, without the project's tests")
    parser.add_argument("--list", action="store_true", help="say where each environment is or will be")
    args = parser.parse_args()
    environments = [Environment(*pair) for pair in MATRIX]
    if args.only:
        wanted = [re.compile(re.escape(o.replace("/", "-python")) + "(-|$)") for o in args.only]
        environments = [e for e in environments if any(w.match(e.name.removeprefix("torch")) for w in wanted)]
    if args.list:
        for env in environments:
            print(env.name, venvs() / env.name if env.python else "the developer's environment")
        return 0
    if not environments:
        fail(f"--only leaves none of {', '.join(Environment(*pair).name for pair in MATRIX)}")
    os.environ["XORZ_CACHE_DIR"] = ""
    BUILD.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(BUILD / "exchange", ignore_errors=True)
    wheel, library = build_wheel()
    print(f"test-abi: {wheel.name}; libxorz_torch.so {library}", flush=True)
    inputs = BUILD / "exchange" / "inputs.safetensors"
    inputs.parent.mkdir()
    results, suites = {}, {}
    for env in environments:
        env.install(wheel, library)
        if not inputs.exists():
            run(*env.command(HERE / "check.py", "inputs", inputs), check=True, cwd=env.folder)
        results[env.name] = env.check(inputs)
        if not args.no_suite:
            suites[env.name] = env.suite()
            print(f"test-abi: {env.name}: {suites[env.name]['passed']} tests passed", flush=True)
    checks = list(results[environments[0].name]["checks"])
    rows = [
        [e.name, results[e.name]["torch"], results[e.name]["python"], results[e.name]["library"][:12]]
        + ["ok" if results[e.name]["checks"][c] == "ok" else "FAILED" for c in checks]
        for e in environments
    ]
    table(["environment", "torch", "Python", "sha256", *(c.replace("_", " ") for c in checks)], rows)
    wrong = compare(environments, results)
    if suites:
        counts = {n: [s["passed"], len(s["failed"]), len(s["skipped"])] for n, s in suites.items()}
        table(["the project's tests in", "passed", "failed", "skipped"], [[n, *c] for n, c in counts.items()])
        for name, suite in suites.items():
            for skipped in suite["skipped"]:
                print(f"skipped in {name}: {skipped}")
            wrong += [f"{name}: {failed}" for failed in suite["failed"]]
        for test, why in LEFT_OUT.items():
            print(f"left out everywhere: {test}: {why}")
    for line in wrong:
        print(f"WRONG {line}")
    print("test-abi: " + (f"{len(wrong)} wrong" if wrong else "all agree"))
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
