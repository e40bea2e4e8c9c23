"""Locks and syncs of files on whatever file system: those of networks and FUSE refuse some of what disks do."""

import errno
import fcntl
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

_REFUSED = {
    errno.EINVAL,
    errno.ENOTSUP,
    errno.EOPNOTSUPP,
    errno.ENOSYS,
    errno.ENOTTY,
    errno.ENOLCK,
    errno.EPERM,
    errno.EACCES,
    errno.EBADF,
    errno.EISDIR,
}
"""What a file system says that does not do a thing at all, rather than having failed at it."""

PATIENCE = 300.0
"""Seconds to wait for a lock that is a file of another machine, of which nobody can tell whether its holder lives."""


def sync(path: Path) -> None:
    """Sync a file, or a folder as far as its file system does that: CIFS and many FUSE file systems refuse folders.

    Raises:
        OSError: the disk failed, or a file cannot be synced.
    """
    folder = path.is_dir()
    try:
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
    except OSError as error:
        if not folder or error.errno not in _REFUSED:
            raise


@contextmanager
def held(path: Path) -> Iterator[None]:
    """Hold the lock `path`, which nobody else holds meanwhile, on this machine or another.

    It is the kernel's lock on that file where there is one. Where the file system refuses (Lustre without `flock`, NFS
    without its lock daemon), it is a file beside it, `PATH.held`, made by one and removed at the end; one whose maker is a
    process of this machine that is no more is removed.

    Raises:
        TimeoutError: such a file of another machine stays for `PATIENCE` seconds; it is named, and what to do. OSError.
    """
    # Without blocking: a pipe of that name would wait for its reader.
    handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NONBLOCK | os.O_CLOEXEC, 0o666)
    with open(handle, "ab") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError as error:
            if error.errno not in _REFUSED:
                raise
            with _held_by_file(path.with_name(path.name + ".held")):
                yield
            return
        yield


@contextmanager
def _held_by_file(path: Path) -> Iterator[None]:
    """The lock that is a file: making it fails for all but one."""
    mine = f"{socket.gethostname()} {os.getpid()} {time.time_ns()}"
    start, seen = time.monotonic(), ""
    while True:
        with suppress(FileExistsError):
            handle = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
            with open(handle, "w") as file:
                file.write(mine)
            break
        with suppress(OSError):
            now = path.read_text()
            if now != seen:
                # Somebody else's turn: those who wait are making progress.
                seen, start = now, time.monotonic()
            elif now and _ended(now):
                _take_away(path, now)
        if time.monotonic() - start > PATIENCE:
            raise TimeoutError(
                f"{path} is held by `{seen or 'nobody'}` for {PATIENCE:.0f} seconds; if that process is no more, "
                "remove the file"
            )
        time.sleep(0.01)
    try:
        yield
    finally:
        with suppress(OSError):
            path.unlink()


def _ended(holder: str) -> bool:
    """Whether the holder was a process of this machine that is no more."""
    host, pid, *_ = [*holder.split(" "), "", ""]
    if host != socket.gethostname() or not pid.isdigit():
        return False
    try:
        os.kill(int(pid), 0)
    except ProcessLookupError:
        return True
    except OSError:
        return False
    return False


def _take_away(path: Path, holder: str) -> None:
    """Remove the file of a holder that is no more. One at a time does so: what it has read cannot change then."""
    guard = path.with_name(path.name + ".gone")
    with suppress(FileExistsError):
        os.close(os.open(guard, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
        try:
            if path.read_text() == holder:
                path.unlink()
        finally:
            guard.unlink()
