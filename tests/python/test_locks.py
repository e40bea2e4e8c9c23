"""Promise: on file systems that sync no folders or have no locks, chains of versions work, and nobody's lock is taken."""

import errno
import fcntl
import os
import subprocess
import sys
import threading
import time

import pytest
import torch
import xorz
from xorz import locks

CODES = [errno.EINVAL, errno.ENOTSUP, errno.ENOSYS, errno.ENOLCK, errno.EPERM]


def refuse_flock(monkeypatch, code=errno.ENOSYS):
    def flock(*_):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "flock", flock)


def refuse_folders(monkeypatch, code):
    real = os.fsync

    def fsync(handle):
        if os.path.isdir(f"/proc/self/fd/{handle}"):
            raise OSError(code, os.strerror(code))
        real(handle)

    monkeypatch.setattr(os, "fsync", fsync)


def chain(folder):
    base = {"w": torch.arange(4096, dtype=torch.float32).reshape(64, 64)}
    run = xorz.Versions(base, folder)
    new = {"w": base["w"] + 1}
    assert run.publish(new) == 1
    assert torch.equal(run.state_dict(1)["w"], new["w"])
    return run


@pytest.mark.parametrize("code", CODES)
def test_chains_work_where_locks_and_syncs_are_refused(tmp_path, monkeypatch, code):
    refuse_flock(monkeypatch, code)
    refuse_folders(monkeypatch, code)
    chain(tmp_path / "run")
    assert not [p for p in (tmp_path / "run").iterdir() if ".held" in p.name]


@pytest.mark.parametrize("code", [errno.EIO, errno.ENOSPC])
def test_a_disk_that_fails_is_an_error(tmp_path, monkeypatch, code):
    refuse_folders(monkeypatch, code)
    with pytest.raises(OSError, match=os.strerror(code)):
        chain(tmp_path / "run")


def test_a_lock_that_is_a_file_is_held_by_one_at_a_time(tmp_path, monkeypatch):
    refuse_flock(monkeypatch)
    inside, most = [0], [0]

    def work():
        for _ in range(20):
            with locks.held(tmp_path / "lock"):
                inside[0] += 1
                most[0] = max(most[0], inside[0])
                time.sleep(0.001)
                inside[0] -= 1

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == [1]
    assert [p.name for p in tmp_path.iterdir()] == ["lock"]


def test_a_lock_of_a_process_that_is_no_more_is_taken_and_of_another_machine_is_named(tmp_path, monkeypatch):
    refuse_flock(monkeypatch)
    held = tmp_path / "lock.held"
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    held.write_text(f"{locks.socket.gethostname()} {ended.pid} 1")
    with locks.held(tmp_path / "lock"):
        assert held.read_text().split()[1] == str(os.getpid())
    monkeypatch.setattr(locks, "PATIENCE", 0.2)
    held.write_text("elsewhere 1 1")
    with pytest.raises(TimeoutError, match=r"lock.held is held by `elsewhere 1 1`.*remove the file"):
        with locks.held(tmp_path / "lock"):
            pass
    assert held.exists()


def test_a_damaged_package_is_named_as_the_user_knows_it(tmp_path):
    run = chain(tmp_path / "run")
    good = tmp_path / "step.xorz"
    run.pack(1, good)
    cut = tmp_path / "cut.xorz"
    for length in (3, 100, good.stat().st_size - 7):
        cut.write_bytes(good.read_bytes()[:length])
        with pytest.raises(ValueError, match=r"cut.xorz") as error:
            run.append(cut)
        assert ".part-" not in str(error.value)
