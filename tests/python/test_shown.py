"""Promise: what notebooks show is what the text says, harmless whatever names say; bars show in terminals and nowhere else."""

import ctypes
import fcntl
import io
import os
import pty
import re
import struct
import subprocess
import sys
import termios
import textwrap

import pytest
import torch
import xorz
from torch import nn
from xorz import _core, progress

EVIL = "<script>alert(1)</script>"


@pytest.fixture
def tenants():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU())
    attached = xorz.attach(model)
    attached.load(EVIL, xorz.diff(model, {n: w + 1 for n, w in model.state_dict().items()}))
    return attached


def cells(html):
    return [re.sub(r"<[^>]*>", "", cell) for cell in re.findall(r"<td>(.*?)</td>", html)]


def test_tables_of_notebooks_say_what_the_text_says(tenants):
    summary, memory = tenants.summary(), tenants.memory()
    assert isinstance(summary, str) and str(summary).startswith("module ") and EVIL in summary
    shown = cells(summary._repr_html_())
    assert shown[:2] == ["0", "Linear"] and shown[2] in summary
    assert shown[3] == "&lt;script&gt;alert(1)&lt;/script&gt;"
    assert memory == dict(memory) and memory["total"] == sum(v for k, v in memory.items() if k != "total")
    assert cells(memory._repr_html_()) == [text for k, v in memory.items() for text in (k, f"{v:,}")]
    whole = tenants._repr_html_()
    assert (
        cells(whole)[1:3] == ["in memory", f"{tenants.sizes()[EVIL]:,}"]
        and cells(memory._repr_html_())[-1] in whole
    )
    for html in (summary._repr_html_(), memory._repr_html_(), whole):
        assert "<script" not in html and html.count("<table>") == html.count("</table>") > 0
    assert "&lt;script&gt;" in whole and "&lt;script&gt;" in summary._repr_html_()


CODE = """
    import torch, xorz
    base = {"w": torch.zeros(512, 512), "v": torch.zeros(8)}
    xorz.pack(base, {n: w + 1 for n, w in base.items()}, "a.xorz")
    xorz.load_deltas(base, "a.xorz")
"""


def in_a_terminal(tmp_path, **environment):
    """What the code writes to a stderr that is a terminal."""
    mine, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 100, 0, 0))
    env = {**os.environ, "TERM": "xterm", **environment}
    command = [sys.executable, "-c", textwrap.dedent(CODE)]
    done = subprocess.Popen(command, cwd=tmp_path, env=env, stderr=theirs, stdout=subprocess.PIPE)
    os.close(theirs)
    shown = b""
    while True:
        try:
            block = os.read(mine, 4096)
        except OSError:
            break
        if not block:
            break
        shown += block
    os.close(mine)
    assert done.wait() == 0 and done.stdout.read() == b"", shown
    done.stdout.close()
    return shown.decode()


def test_bars_show_in_terminals_and_nowhere_else(tmp_path):
    pytest.importorskip("tqdm")
    shown = in_a_terminal(tmp_path)
    assert "packing" in shown and "loading a.xorz" in shown and "0%|" in shown
    assert in_a_terminal(tmp_path, HF_HUB_DISABLE_PROGRESS_BARS="1") == ""
    command = [sys.executable, "-c", textwrap.dedent(CODE)]
    piped = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert piped.returncode == 0 and piped.stderr == piped.stdout == ""


def test_nothing_is_shown_without_a_stderr_or_without_tqdm(monkeypatch):
    monkeypatch.setattr(sys, "stderr", None)
    with progress.bar(total=3) as shown:
        shown.update(3)
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    monkeypatch.setitem(sys.modules, "tqdm", None)
    monkeypatch.setitem(sys.modules, "tqdm.auto", None)
    with progress.bar(total=3, unit="B") as shown:
        shown.update()
    assert sys.stderr.getvalue() == ""


def test_jobs_over_files_tell_how_far_they_are_and_count_each_byte_once(tmp_path, monkeypatch):
    save_file = pytest.importorskip("safetensors.torch").save_file
    torch.manual_seed(1)
    base = {f"w{i}": torch.randn(512, 1024).bfloat16() for i in range(32)}
    save_file(base, tmp_path / "base")
    save_file({n: w + 1e-3 * torch.randn(w.shape).bfloat16() for n, w in base.items()}, tmp_path / "tuned")
    size = os.path.getsize(tmp_path / "tuned")
    bars = []

    class Bar:
        def __init__(self, total, unit, desc):
            self.desc, self.totals, self.done, self.updates = desc, [total], 0, 0
            bars.append(self)

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        def update(self, amount):
            self.done, self.updates = self.done + amount, self.updates + (amount > 0)

        def reset(self, total):
            self.totals.append(total)
            self.done = 0

    monkeypatch.setattr(_core, "bar", Bar)
    monkeypatch.setattr(_core, "_WORTH_A_BAR", 0.0)
    monkeypatch.setattr(_core, "_LOOK", 0.002)
    report = xorz.pack(tmp_path / "base", tmp_path / "tuned", tmp_path / "p", jobs=1)
    xorz.unpack(tmp_path / "base", tmp_path / "p", tmp_path / "out", jobs=1)
    xorz.verify(tmp_path / "base", tmp_path / "p", jobs=1)
    xorz.pack_fleet(tmp_path / "base", {tmp_path / "tuned": tmp_path / "q"}, jobs=1)
    assert report["files"][0]["bytes"] == size
    assert [b.desc for b in bars] == ["packing", "unpacking", "verifying", "packing"]
    for shown in bars:
        # All but the file's header, which is no work.
        assert (shown.totals[-1], shown.done) == (size, sum(w.nbytes for w in base.values())), shown.desc
        assert shown.updates > 3, f"{shown.desc}: told {shown.updates} times"
    # Where there is nothing to write to, the job is refused before it begins.
    paths = [str(tmp_path / name).encode() for name in ("base", "p")]
    room = (ctypes.c_uint64 * 4)()
    for stop in (None, ctypes.cast(ctypes.byref(room, 4), ctypes.POINTER(ctypes.c_uint32))):
        run = _core._Run(1, _core._RUN_WATCHED, stop)
        with pytest.raises(ValueError, match="xorz_watch"):
            _core._json("xorz_verify_files", *paths, None, ctypes.byref(run))
