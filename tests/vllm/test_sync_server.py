"""Promise: a server takes updates under traffic: no request fails, whoever asks between two updates is answered by that version
alone, and a tenant of a version before is not there any more. With tensor parallelism the same words change in every process.
"""

import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import engines
import pytest
import runs
import xorz
from test_server import OPTIONS, Server
from xorz.vllm import client

HERE = Path(__file__).parent


def test_updates_under_traffic(tmp_path, monkeypatch):
    paths, chain = runs.run("llama", engines.FOLDER)
    said = dict(enumerate(engines.references(paths)))
    xorz.pack(paths[0], paths[2], tmp_path / "alice.xorz")
    monkeypatch.setenv("VLLM_SERVER_DEV_MODE", "1")
    options = OPTIONS + ' --weight-transfer-config {"backend":"xorz"}'
    # As the references: in another mode last bits differ, and one token of version 1 is nearly a draw.
    server = Server(paths[0], tmp_path / "server.log", options=options, mode="exact")
    address, got, stop, marks = f"http://127.0.0.1:{server.port}", [], threading.Event(), {}

    def traffic(which):
        while not stop.is_set():
            began = time.monotonic()
            tokens = server.complete("base", engines.PROMPTS[which], tokens=engines.NEW)
            got.append((began, time.monotonic(), which, tokens))

    try:
        assert server.load("alice", tmp_path / "alice.xorz")[0] == 200
        assert server.complete("alice", engines.PROMPTS[0], tokens=engines.NEW) == said[2][0].tokens
        threads = [threading.Thread(target=traffic, args=(i % 2,)) for i in range(3)]
        for thread in threads:
            thread.start()
        for number in (1, 2, 3, 0):
            began = time.monotonic()
            [report] = client.update(address, chain, number)
            marks[number] = began, time.monotonic()
            assert report["version"] == str(number)
            assert json.loads(server.get("/weight_info")) == {"weight_version": str(number)}
            served = {card["id"] for card in json.loads(server.get("/v1/models"))["data"]}
            assert served == {"base"}
            with pytest.raises(client.UpdateError, match=f"version {number} is served already"):
                client.update(address, chain, number)
            time.sleep(3)
        stop.set()
        for thread in threads:
            thread.join()
        assert server.post("/v1/completions", model="alice", prompt="x", max_tokens=1)[0] == 404
        client.rollback(address)
        assert server.complete("base", engines.PROMPTS[1], tokens=engines.NEW) == said[3][1].tokens
    finally:
        stop.set()
        server.stop()
    order = [1, 2, 3, 0]
    for number, after in zip(order, [*order[1:], None], strict=True):
        until = marks[after][0] if after is not None else float("inf")
        mine = [g for g in got if g[0] > marks[number][1] and g[1] < until]
        assert mine and all(tokens == said[number][which].tokens for _, _, which, tokens in mine)


def child(path, settings, *words):
    env = os.environ | ({"VLLM_CPU_OMP_THREADS_BIND": "0|1"} if os.cpu_count() > 1 else {})
    command = [sys.executable, HERE / "sync_child.py", path, json.dumps(settings), *words]
    done = subprocess.run([str(w) for w in command], capture_output=True, text=True, env=env, timeout=3000)
    assert done.returncode == 0, done.stderr[-3000:]
    [line] = [line for line in done.stdout.splitlines() if line.startswith('{"said"')]
    return json.loads(line)["said"]


def test_tensor_parallel():
    paths, chain = runs.run("qwen2", engines.FOLDER)
    settings = {"tensor_parallel_size": 2}
    got = child(paths[0], settings, chain, 1, 2, 4, "back")
    wanted = [child(paths[number], settings)[0] for number in (2, 4)]
    assert [got[2], got[3]] == wanted and got[4] == got[2] and len({json.dumps(s) for s in got}) == 4
