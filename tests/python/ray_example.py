"""Starts the examples that serve on a local Ray cluster, for their tests."""

import os
import socket
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import xorz

# What Ray says where it gives its own processes up, after 30 and 60 s, on a machine that does something else, too.
GIVEN_UP = ("timed out during startup", "HTTP proxies not available")


def _launched(command, log, ready, **options):
    """The example when its log says that it is ready, or has ended; started again where Ray gave up."""
    for _ in range(5):
        with open(log, "w") as out:
            process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, **options)
        deadline = time.monotonic() + 900
        while ready not in log.read_text() and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.5)
        if process.poll() is None or not any(text in log.read_text() for text in GIVEN_UP):
            break
    return process


@contextmanager
def started(script, folder, *options, ending=120, **environment):
    """The address of the example, run in `folder` with these options; told to, it must end within `ending` seconds."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    env = {**os.environ, "PYTHONPATH": str(Path(xorz.__file__).parents[1]), **environment}
    # As nice as their parent: beside other work they would hardly begin.
    env |= {"RAY_USAGE_STATS_ENABLED": "0", "RAY_worker_niceness": "0"}
    env |= {f"RAY_SERVE_PROXY_{check}_CHECK_TIMEOUT_S": "120" for check in ("READY", "HEALTH")}
    command = [sys.executable, str(script), "--port", str(port), "--cpus", "0.5", *options]
    log, ready = folder / f"log{port}", f" at http://127.0.0.1:{port}"
    process = _launched(command, log, ready, cwd=folder, env=env)
    try:
        assert ready in log.read_text() and process.poll() is None, log.read_text()[-4000:]
        yield f"http://127.0.0.1:{port}"
        process.terminate()
        assert process.wait(ending) == 0, log.read_text()[-6000:]
    finally:
        process.kill()
        process.wait()
