"""Promise: the installed command shows progress on a terminal and nowhere else, and writes no package to a terminal."""

import fcntl
import os
import pty
import struct
import subprocess
import sysconfig
import termios
from pathlib import Path

import pytest
import torch
from conftest import fine_tune, random_weight

safetensors_torch = pytest.importorskip("safetensors.torch")
COMMAND = Path(sysconfig.get_path("scripts")) / "xorz"


@pytest.fixture
def folder(tmp_path):
    base = random_weight(512, 512, torch.bfloat16)
    safetensors_torch.save_file({"w": base}, tmp_path / "base")
    safetensors_torch.save_file({"w": fine_tune(base, "sparse")}, tmp_path / "ft")
    return tmp_path


def on_terminal(folder, *args, stream):
    """Exit code, standard output, and what a terminal shows that is `stream`."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 25, 100, 0, 0))
    streams = {
        "stdin": subprocess.DEVNULL,
        "stdout": subprocess.PIPE,
        "stderr": subprocess.PIPE,
        stream: theirs,
    }
    child = subprocess.Popen([COMMAND, *args], cwd=folder, env={**os.environ, "TERM": "xterm"}, **streams)
    os.close(theirs)
    shown = b""
    while True:
        try:
            part = os.read(ours, 4096)
        except OSError:  # what Linux says when the other end is closed
            break
        if not part:
            break
        shown += part
    out, err = child.communicate()
    os.close(ours)
    return child.returncode, out, err, shown


@pytest.mark.parametrize(
    "args",
    [
        ("pack", "base", "ft", "-o", "p.xorz"),
        ("unpack", "base", "p.xorz", "-o", "out"),
        ("verify", "base", "p.xorz", "ft"),
        ("digest", "base"),
    ],
)
def test_progress_is_shown_on_a_terminal_and_can_be_silenced(folder, args):
    subprocess.run([COMMAND, "pack", "base", "ft", "-o", "p.xorz", "-q"], cwd=folder, check=True)
    piped = subprocess.run([COMMAND, *args], cwd=folder, capture_output=True, check=True)
    assert piped.stdout and not piped.stderr
    (folder / "out").unlink(missing_ok=True)
    code, out, _, shown = on_terminal(folder, *args, stream="stderr")
    assert code == 0 and out == piped.stdout
    assert args[0].encode() in shown and b" of 512.0" in shown
    # Wiped off at the end: nothing but the clearing of the line comes after the last picture of the bar.
    assert shown.endswith(b"\r\x1b[2K"), shown[-100:]
    (folder / "out").unlink(missing_ok=True)
    assert on_terminal(folder, *args, "--quiet", stream="stderr")[3] == b""


def test_a_terminal_gets_no_package_and_gives_none(folder):
    for args in (("pack", "base", "ft", "-o", "-"), ("unpack", "base", "p.xorz", "-o", "-")):
        code, _, err, shown = on_terminal(folder, *args, stream="stdout")
        assert code == 2 and b"standard output is a terminal" in err and shown == b""
    code, out, err, _ = on_terminal(folder, "inspect", "-", stream="stdin")
    assert code == 2 and b"standard input is a terminal" in err and out == b""
