"""Promise: every error that a newcomer meets from Python says what is wrong and what to do; a package that is
not what its maker wanted comes with a warning. Without a fit torch or library: `test_library.py`; the
command: `../rust/package/messages.rs`."""

import os
import subprocess
import sys
import warnings

import pytest
import torch
import xorz
from conftest import fine_tune, random_weight

safetensors_torch = pytest.importorskip("safetensors.torch")


@pytest.fixture
def files(tmp_path):
    """`base`, its fine-tune `ft`, another base `other`, and the package `p`, as paths; and the state_dicts."""
    base = {"w": random_weight(64, 96, torch.bfloat16)}
    dicts = {"base": base, "ft": {"w": fine_tune(base["w"], "sparse")}, "other": {"w": base["w"] + 1}}
    for name, tensors in dicts.items():
        safetensors_torch.save_file(tensors, tmp_path / name)
    xorz.pack(tmp_path / "base", tmp_path / "ft", tmp_path / "p")
    return tmp_path, dicts


def test_no_base(files):
    folder, _ = files
    with pytest.raises(OSError, match=r"nothing: No such file or directory .*; check the path"):
        xorz.pack(folder / "nothing", folder / "ft", folder / "q")
    with pytest.raises(OSError, match=r"xorz fetches nothing: `hf download owner/model --local-dir model`"):
        xorz.pack("owner/model", folder / "ft", folder / "q")
    with pytest.raises(ValueError, match=r"is a xorz package, not a checkpoint; `xorz unpack"):
        xorz.pack(folder / "p", folder / "ft", folder / "q")
    with pytest.raises(ValueError, match=r"not a xorz package; `xorz pack BASE FINE_TUNED` makes one"):
        xorz.inspect(folder / "base")


def test_wrong_base(files):
    folder, dicts = files
    advice = r"`w`.*another base.*digest.*; give the base that it was packed against"
    with pytest.raises(ValueError, match=advice):
        xorz.restore(dicts["other"], folder / "p")
    with pytest.raises(ValueError, match=advice):
        xorz.unpack(folder / "other", folder / "p", folder / "q")
    with pytest.raises(ValueError, match=advice):
        xorz.load_deltas(folder / "other", folder / "p")
    with pytest.raises(
        KeyError, match=r"the base has no tensor `w`.*; give the base that it was packed against"
    ):
        xorz.restore({"v": dicts["base"]["w"]}, folder / "p")
    with pytest.warns(
        UserWarning, match=r"100 % .* stored alone.*the base has no tensor `w`; is it this fine-tune's base\?"
    ):
        xorz.pack({"v": dicts["base"]["w"]}, dicts["ft"], folder / "q")


def test_wrong_dtype(files):
    folder, dicts = files
    wide = {"w": dicts["base"]["w"].float()}
    with pytest.raises(
        ValueError, match=r"F32 \[64, 96\], but .* against BF16 \[64, 96\]; give the base .* in its dtype"
    ):
        xorz.restore(wide, folder / "p")
    safetensors_torch.save_file(wide, folder / "wide")
    with pytest.raises(
        ValueError,
        match=r"delta of BF16 .* has F32 .*; give the base in the dtype that it was packed against",
    ):
        xorz.unpack(folder / "wide", folder / "p", folder / "q")
    sentence = r"`w` is BF16 in the fine-tune, but F32 in the base; save both in one dtype"
    with pytest.warns(UserWarning, match=sentence) as told:
        report = xorz.pack(wide, dicts["ft"], folder / "q")
    assert report["alone"] == 1 and report["advice"] in str(told[0].message)
    assert told[0].filename == __file__, "the warning points into xorz"
    with pytest.warns(UserWarning, match=sentence):
        xorz.pack(folder / "wide", folder / "ft", folder / "q")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert "advice" not in xorz.pack(dicts["base"], dicts["ft"], folder / "q")


def test_not_safetensors(files):
    folder, dicts = files
    torch.save(dicts["ft"], folder / "ft.bin")
    with pytest.raises(ValueError, match=r"pickled weights.*safetensors.torch.save_file"):
        xorz.pack(folder / "base", folder / "ft.bin", folder / "q")
    (folder / "pointer").write_text("version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(ValueError, match=r"Git LFS pointer.*`git lfs pull`"):
        xorz.pack(folder / "base", folder / "pointer", folder / "q")
    (folder / "cut").write_bytes((folder / "ft").read_bytes()[:500])
    with pytest.raises(ValueError, match=r"the file was cut: fetch or write it again"):
        xorz.pack(folder / "base", folder / "cut", folder / "q")


def test_no_space_and_no_permission(files):
    folder, _ = files
    with pytest.raises(OSError, match=r"its folder .*nowhere does not exist; make it first"):
        xorz.pack(folder / "base", folder / "ft", folder / "nowhere" / "q")
    script = """
        import resource, signal, sys, xorz
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (512, 512))
        xorz.pack("base", "other", "q")
    """
    command = [sys.executable, "-c", "\n".join(line.strip() for line in script.splitlines())]
    done = subprocess.run(
        command, cwd=folder, capture_output=True, text=True, env={**os.environ, "XORZ_CACHE_DIR": ""}
    )
    said = done.stderr.splitlines()[-1]
    assert said.startswith("OSError: q: File too large") and "raise the limit (ulimit -f)" in said, (
        done.stderr
    )
    (folder / "closed").mkdir(mode=0o555)
    if os.getuid() == 0:
        pytest.skip("root may write anywhere; the command is tested as another user")
    with pytest.raises(OSError, match=r"Permission denied .*; allow it with chmod or chown"):
        xorz.pack(folder / "base", folder / "ft", folder / "closed" / "q")
