"""Promise: Ctrl-C ends a job over files soon, with KeyboardInterrupt and nothing left behind; a chain of versions can be read
by whoever may read it; pipes in the place of its files keep nobody waiting; tensors without words ask for no work."""

import os
import signal
import stat
import subprocess
import sys
import tempfile
import time

import pytest
import torch
import xorz
from safetensors.torch import save_file

_JOB = """
import sys, time
import xorz
print("ready", flush=True)
start = time.monotonic()
try:
    {call}
    print("done", time.monotonic() - start)
except KeyboardInterrupt:
    print("interrupted", time.monotonic() - start)
"""


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """A base and a fine-tune that take long to pack by zstd's slowest way, and a package of them."""
    folder = tmp_path_factory.mktemp("interrupts")
    g = torch.Generator().manual_seed(0)
    base = {
        f"w{i}": torch.randint(0, 1 << 15, (2048, 2048), generator=g, dtype=torch.int16) for i in range(12)
    }
    tuned = {
        name: t ^ torch.randint(0, 4, t.shape, generator=g, dtype=torch.int16) for name, t in base.items()
    }
    save_file(base, folder / "base.safetensors")
    save_file(tuned, folder / "tuned.safetensors")
    return folder


def test_ctrl_c_ends_a_job_soon_and_leaves_nothing(checkpoints):
    out = checkpoints / "out"
    out.mkdir()
    call = 'xorz.pack("base.safetensors", "tuned.safetensors", "out/p", codec="xor", level=19, jobs=1)'
    child = subprocess.Popen(
        [sys.executable, "-c", _JOB.format(call=call)],
        cwd=checkpoints,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "XORZ_CACHE_DIR": ""},
        # What a shell starts in the background is told to ignore Ctrl-C, and so would be what it starts.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    assert child.stdout.readline() == "ready\n"
    time.sleep(0.7)
    assert child.poll() is None
    child.send_signal(signal.SIGINT)
    sent = time.monotonic()
    said, _ = child.communicate(timeout=120)
    took = time.monotonic() - sent
    assert said.startswith("interrupted"), said
    assert took < 5, f"{took:.1f} s from the signal to the end; {said}"
    assert list(out.iterdir()) == []


def test_the_thread_that_does_a_job_hands_on_what_it_says(checkpoints):
    with pytest.raises(OSError, match=r"missing\.safetensors"):
        xorz.pack(checkpoints / "missing.safetensors", checkpoints / "tuned.safetensors", checkpoints / "p")
    with pytest.raises(ValueError, match="not a xorz package"):
        xorz.verify(checkpoints / "base.safetensors", checkpoints / "tuned.safetensors")


def _as_nobody(work) -> str:
    """What `work` raises in a process of a user who owns nothing; an empty string if it does not."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            if os.getuid() == 0:
                os.setgid(54_321)
                os.setuid(54_321)
            try:
                work()
                said = b""
            except BaseException as error:
                said = repr(error).encode()
            os.write(write, said)
        finally:
            os._exit(0)
    os.close(write)
    with open(read, "rb") as pipe:
        said = pipe.read().decode()
    os.waitpid(child, 0)
    return said


def test_a_chain_is_read_without_permission_to_change_it(tmp_path):
    torch.set_num_threads(1)
    base = {"w": torch.arange(600, dtype=torch.float32).reshape(20, 30)}
    new = {"w": base["w"] + 1}
    run = xorz.Versions(base, tmp_path / "run")
    assert run.publish(new) == 1
    (tmp_path / "run" / "versions.lock").unlink()
    # Those that pytest has made, more of them where several processes of it run.
    made = tmp_path.relative_to(tempfile.gettempdir()).parts
    for path in [*tmp_path.parents[: len(made) - 1], tmp_path]:
        path.chmod(path.stat().st_mode | stat.S_IXOTH | stat.S_IXGRP)
    (tmp_path / "run").chmod(0o555)
    before = sorted(p.name for p in (tmp_path / "run").iterdir())

    def read():
        opened = xorz.Versions(base, tmp_path / "run")
        assert opened.head == 1
        assert torch.equal(opened.state_dict(1)["w"], new["w"])
        opened.delta(1)

    def change():
        xorz.Versions(base, tmp_path / "run").publish(base)

    try:
        assert _as_nobody(read) == ""
        assert "PermissionError" in _as_nobody(change)
        assert sorted(p.name for p in (tmp_path / "run").iterdir()) == before
    finally:
        (tmp_path / "run").chmod(0o755)


def test_pipes_in_the_place_of_a_chain_s_files_keep_nobody_waiting(tmp_path):
    base = {"w": torch.arange(600, dtype=torch.float32)}
    (tmp_path / "run").mkdir()
    os.mkfifo(tmp_path / "run" / "versions.lock")
    run = xorz.Versions(base, tmp_path / "run")
    assert run.publish({"w": base["w"] + 1}) == 1
    os.replace(tmp_path / "run" / "versions.lock", tmp_path / "run" / "versions.json")
    with pytest.raises(ValueError, match="no regular file"):
        run.head  # noqa: B018
    with pytest.raises(ValueError, match="no regular file"):
        xorz.Versions(base, tmp_path / "run")


@pytest.mark.parametrize("shape", [(1 << 44, 0), (0, 1 << 44), (1 << 25, 0)])
def test_tensors_without_words_ask_for_no_work(shape):
    ops = torch.ops.xorz
    hollow = torch.empty(shape, dtype=torch.float32)
    delta = ops.delta_encode(torch.zeros(3, 0), torch.zeros(3, 0))
    calls = [
        lambda: ops.delta_encode(hollow, hollow),
        lambda: ops.delta_restore(hollow, delta),
        lambda: ops.delta_linear(torch.empty(0, shape[1]), hollow, None, delta),
        lambda: ops.delta_slice(delta, hollow, 0, 0, 1),
        lambda: ops.delta_concat([delta], [hollow], 0),
        lambda: ops.delta_check(delta, hollow),
        lambda: ops.delta_apply_(hollow, delta),
    ]
    start = time.monotonic()
    for call in calls:
        # The rule itself, or the shapes that do not fit; both name the shape.
        with pytest.raises((RuntimeError, ValueError), match=r"has no words|but .* is|\[3, 0\]") as refused:
            call()
        assert str(max(shape)) in str(refused.value)
    assert time.monotonic() - start < 5
