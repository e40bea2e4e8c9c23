"""Promise: `examples/ray_pack.py` packs a folder of checkpoints on a local Ray cluster of two workers; each package is what
`xorz.pack` makes; a worker that is killed midway loses nothing: its task is done again, and no half-made file stays."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import xorz
from safetensors.torch import save_file

pytest.importorskip("ray", reason="ray is not installed (285 MB): make test-ray installs it beside examples/")

SCRIPT = Path(__file__).parents[2] / "examples" / "ray_pack.py"
NAMES = ["a", "b", "c", "d.safetensors"]


@pytest.fixture
def family(tmp_path):
    """A base and four fine-tunes of 32 MiB: a task takes about a second."""
    generator = torch.Generator().manual_seed(5)
    base = {f"layers.{i}.weight": torch.randn(2048, 1024, generator=generator).bfloat16() for i in range(8)}
    save_file(base, tmp_path / "base.safetensors")
    (tmp_path / "runs").mkdir()
    for name in NAMES:
        tuned = {
            key: (w.float() + 1e-3 * torch.randn(w.shape, generator=generator)).bfloat16()
            for key, w in base.items()
        }
        path = tmp_path / "runs" / name
        if path.suffix:
            save_file(tuned, path)
        else:
            path.mkdir()
            save_file(tuned, path / "model.safetensors")
            (path / "config.json").write_text("{}")
    return tmp_path


def started(folder):
    """The example, at work."""
    env = {**os.environ, "PYTHONPATH": str(Path(xorz.__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    # Workers as nice as their parent: on a machine that does something else, too, they would hardly begin.
    env |= {"RAY_USAGE_STATS_ENABLED": "0", "RAY_worker_niceness": "0"}
    command = [sys.executable, str(SCRIPT), "base.safetensors", "runs", "packages", "--workers", "2"]
    return subprocess.Popen(
        command, cwd=folder, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def kill_a_worker_midway(folder, process):
    """Kill -9 the first worker that has begun to write a package; its checkpoint's name, and the output so far."""
    said = []
    for line in process.stdout:
        said.append(line)
        if found := re.search(r"(\S+): process (\d+) on", re.sub(r"\x1b\[\d+m", "", line)):
            name, pid = found[1], int(found[2])
            package = folder / "packages" / f"{name.removesuffix('.safetensors')}.xorz"
            # A spool lies in the folder, without a name, from when there is something to store until the package is whole.
            deadline = time.monotonic() + 60
            while time.monotonic() < deadline and not package.exists():
                if any(str(folder / "packages") in target for target in open_files(pid)):
                    os.kill(pid, signal.SIGKILL)
                    assert not package.exists()
                    return name, said
            raise AssertionError(f"{name} was packed before its worker could be killed: {said}")
    raise AssertionError(f"no task was begun: {said}")


def open_files(pid):
    """What the files of a process are called."""
    found = []
    for link in Path(f"/proc/{pid}/fd").glob("*"):
        try:
            found.append(os.readlink(link))
        except OSError:
            continue  # closed by now
    return found


@pytest.mark.parametrize("killed", [False, True])
def test_every_checkpoint_is_packed_and_verified_though_a_worker_is_killed(family, killed):
    with started(family) as process:
        try:
            name, said = kill_a_worker_midway(family, process) if killed else (None, [])
            said += process.stdout.readlines()
            code = process.wait(timeout=300)
        finally:
            process.kill()
    text = re.sub(r"\x1b\[\d+m", "", "".join(said))
    assert code == 0, text
    assert text.count("packed, ") == len(NAMES) and "4 of 4 packed and verified" in text, text
    if killed:
        assert len(set(re.findall(rf"{re.escape(name)}: process (\d+) on", text))) >= 2, text
    packages = family / "packages"
    assert sorted(p.name for p in packages.iterdir()) == ["a.xorz", "b.xorz", "c.xorz", "d.xorz"]
    for checkpoint in NAMES:
        package = packages / f"{checkpoint.removesuffix('.safetensors')}.xorz"
        xorz.pack(family / "base.safetensors", family / "runs" / checkpoint, family / "alone.xorz")
        assert package.read_bytes() == (family / "alone.xorz").read_bytes(), checkpoint
        xorz.verify(family / "base.safetensors", package, family / "runs" / checkpoint)


def test_a_run_that_is_started_again_makes_what_is_missing_and_names_what_cannot_be_packed(family):
    with started(family) as process:
        assert process.wait(timeout=300) == 0, process.stdout.read()
    packages = family / "packages"
    before = (packages / "a.xorz").stat()
    (packages / "b.xorz").write_bytes(b"of another kind")
    (packages / "c.xorz").unlink()
    cut = (family / "runs" / "d.safetensors").read_bytes()[:-1000]
    (family / "runs" / "d.safetensors").write_bytes(cut)
    with started(family) as process:
        text = process.stdout.read()
        assert process.wait(timeout=300) == 1, text
    text = re.sub(r"\x1b\[\d+m", "", text)
    assert "a: was there" in text and "b: packed" in text and "c: packed" in text and "3 of 4" in text, text
    assert re.search(r"d\.safetensors: .*cut", text), text
    after = (packages / "a.xorz").stat()
    assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
    for name in "abc":
        xorz.verify(family / "base.safetensors", packages / f"{name}.xorz", family / "runs" / name)
