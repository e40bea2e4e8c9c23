"""Promise: `examples/server.py` gives every prompt its own tenant's answer, in batches of mixed tenants and
while tenants come and go; what is refused is refused in JSON, with the right status.

The answers are compared with those of plain fine-tuned models, computed here without `xorz.attach`, one
prompt at a time and unpadded. Padding and batching round differently, so prompts are chosen whose every
greedy token wins by a margin far above what rounding can do in float32 (MARGIN against some 1e-5), and whose
answers differ between all tenants: then a right server, in whichever mode, gives exactly these tokens, and an
answer computed with another tenant's weights is noticed.
"""

import copy
import json
import os
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest
import torch
import xorz

for needed in ("fastapi", "uvicorn"):
    pytest.importorskip(needed)
transformers = pytest.importorskip("transformers")

ROOT = Path(__file__).resolve().parents[2]
ONE_THREAD = {**os.environ, "OMP_NUM_THREADS": "1"}
NAMES = (None, "a", "b", "c", "d")
MARGIN = 1e-3
AT_LEAST, AT_MOST = 5.0, 90.0  # seconds of load: as long as it takes to see each kind of answer some times


def fine_tuned(base, seed):
    """A fine-tune that answers otherwise than the base, in a copy."""
    out, g = copy.deepcopy(base), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in out.parameters():
            p += 0.05 * torch.randn(p.shape, generator=g) * (torch.rand(p.shape, generator=g) < 0.3)
    return out


@torch.no_grad()
def answer(model, ids, tokens):
    """Greedy continuation, and by how much each token won; no cache, no padding, no generate()."""
    ids, margin = list(ids), float("inf")
    for _ in range(tokens):
        values, best = model(torch.tensor([ids])).logits[0, -1].topk(2)
        ids.append(best[0].item())
        margin = min(margin, (values[0] - values[1]).item())
    return ids[-tokens:], margin


@pytest.fixture(scope="module")
def world(tmp_path_factory, one_thread):
    """(folder, prompts with each tenant's answers)."""
    folder = tmp_path_factory.mktemp("server")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=199,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.2,
    )
    models = {None: transformers.LlamaForCausalLM(config).eval()}
    models[None].save_pretrained(folder / "model")
    (folder / "packages").mkdir()
    for seed, name in enumerate(NAMES[1:], 1):
        models[name] = fine_tuned(models[None], seed)
        xorz.pack(models[None].state_dict(), models[name].state_dict(), folder / "packages" / f"{name}.xorz")
    xorz.pack(models["a"].state_dict(), models["b"].state_dict(), folder / "packages" / "other.xorz")
    (folder / "packages" / "broken.xorz").write_bytes((folder / "packages" / "a.xorz").read_bytes()[:-9])
    (folder / "outside.xorz").write_bytes((folder / "packages" / "a.xorz").read_bytes())
    (folder / "packages" / "link.xorz").symlink_to(folder / "outside.xorz")
    g, prompts = torch.Generator().manual_seed(5), []
    while len(prompts) < 12:
        ids = torch.randint(0, 199, (1 + len(prompts) % 11,), generator=g).tolist()
        tokens = 2 + len(prompts) % 3
        found = {name or "": answer(model, ids, tokens) for name, model in models.items()}
        answers = {name: a for name, (a, _) in found.items()}
        if min(m for _, m in found.values()) > MARGIN and len(set(map(tuple, answers.values()))) == len(
            NAMES
        ):
            prompts.append({"ids": ids, "tokens": tokens, "answers": answers})
    return folder, prompts


@pytest.fixture(scope="module")
def server(world):
    """The server's address; it runs in a process of its own."""
    folder = world[0]
    command = [
        sys.executable,
        str(ROOT / "examples/server.py"),
        "--port",
        "0",
        "--model",
        str(folder / "model"),
    ]
    command += ["--packages", str(folder / "packages"), "--window", "0.02", "--budget", "1 GiB"]
    with open(folder / "log", "w") as log:
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=log, text=True, cwd=folder, env=ONE_THREAD
        )
    try:
        line = process.stdout.readline()
        assert " at http://127.0.0.1:" in line, (folder / "log").read_text()
        yield line.split(" at ")[1].strip()
    finally:
        process.terminate()
        assert process.wait(20) in (0, -15), (folder / "log").read_text()
        process.stdout.close()


def ask(url, method, path, body=None):
    """(status, JSON). Errors are JSON, too."""
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url + path, data, {"content-type": "application/json"}, method=method)
    for _ in range(100):
        try:
            with urllib.request.urlopen(request, timeout=60) as reply:
                return reply.status, json.load(reply)
        except urllib.error.HTTPError as error:
            with error:
                return error.code, json.load(error)
        except urllib.error.URLError:
            time.sleep(0.1)  # bound, but not listening yet
    raise AssertionError(f"{url} does not answer")


# Runs in a process of its own: many threads, each with its own connection, no torch.
CLIENT = """
import http.client, json, random, sys, threading, time
host, names = sys.argv[1], json.loads(sys.argv[2])
threads, at_least, at_most = map(float, sys.argv[3:])
prompts = json.load(sys.stdin)
start, lock = time.monotonic(), threading.Lock()
right, gone, wrong = {}, 0, []

def enough():
    kinds = sum(map(len, names.values()))
    return gone > 2 and len(right) == kinds and min(right.values()) > 5

def work(seed):
    global gone
    pick, connection = random.Random(seed), http.client.HTTPConnection(host, timeout=60)
    while (spent := time.monotonic() - start) < at_least or (spent < at_most and not wrong and not enough()):
        prompt, name = pick.choice(prompts), pick.choice(list(names))
        body = {"ids": prompt["ids"], "tokens": prompt["tokens"], "tenant": name or None}
        connection.request("POST", "/generate", json.dumps(body), {"content-type": "application/json"})
        reply = connection.getresponse()
        got, may_be_gone = json.load(reply), len(names[name]) > 1
        with lock:
            served = [t for t in names[name] if reply.status == 200 and got == {"ids": prompt["answers"][t]}]
            if served:
                key = f"{name}={served[0]}"
                right[key] = right.get(key, 0) + 1
            elif reply.status == 404 and may_be_gone:
                gone += 1
            else:
                wrong.append([name, prompt, reply.status, got])

all = [threading.Thread(target=work, args=(i,)) for i in range(int(threads))]
[t.start() for t in all]
[t.join() for t in all]
print(json.dumps({"right": right, "gone": gone, "wrong": wrong}))
"""


def test_every_answer_under_load_is_the_tenants_own(world, server):
    folder, prompts = world
    for name in ("a", "b"):
        assert ask(server, "PUT", f"/tenants/{name}", {"package": f"{name}.xorz"}) == (201, {"loaded": name})
    # What may answer under each name: x is loaded as c and as d by turns.
    names = {"": [""], "a": ["a"], "b": ["b"], "x": ["c", "d"]}
    command = [sys.executable, "-c", CLIENT, server.removeprefix("http://"), json.dumps(names)]
    command += ["12", str(AT_LEAST), str(AT_MOST)]
    client = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    client.stdin.write(json.dumps(prompts))
    client.stdin.close()
    turns = 0
    while client.poll() is None:
        package = "cd"[turns % 2] + ".xorz"
        assert ask(server, "PUT", "/tenants/x", {"package": package})[0] == 201
        time.sleep(0.25)
        assert ask(server, "DELETE", "/tenants/x") == (200, {"unloaded": "x"})
        time.sleep(0.1)
        turns += 1
    result = json.loads(client.stdout.read())
    client.stdout.close()
    assert client.returncode == 0 and not result["wrong"], result["wrong"][:3]
    right = result["right"]
    assert set(right) == {"=", "a=a", "b=b", "x=c", "x=d"} and result["gone"] and turns >= 3, (result, turns)
    assert sum(right.values()) > 50, right
    status, health = ask(server, "GET", "/health")
    assert status == 200 and health["status"] == "ok" and sorted(health["tenants"]) == ["a", "b"]
    # Batches were real ones, of more than one tenant.
    assert health["mixed"] > 5 and health["batches"] < 0.8 * health["prompts"], health
    assert health["prompts"] >= sum(right.values())
    log = (folder / "log").read_text()
    assert "Traceback" not in log and "ERROR" not in log, log


def test_what_is_refused_is_refused_in_json_with_its_status(world, server):
    folder, prompts = world
    put = lambda name, package: ask(server, "PUT", f"/tenants/{name}", {"package": package})  # noqa: E731
    assert put("mine", "a.xorz")[0] == 201
    try:
        outside = (
            "../outside.xorz",
            str(folder / "outside.xorz"),
            "link.xorz",
            "x/../../outside.xorz",
            "",
            ".",
            "no.xorz",
        )
        for package in outside:
            status, body = put("new", package)
            assert status == 400 and "there is no package" in body["detail"], (package, body)
        assert put("mine", "b.xorz")[0] == 409
        for package, word in (("broken.xorz", ""), ("other.xorz", "digest")):
            status, body = put("new", package)
            assert status == 400 and word in body["detail"], body
        assert put("new", "zero\0.xorz")[0] == 400
        for method, path, body, want in [
            ("DELETE", "/tenants/new", None, 404),
            ("POST", "/generate", {"tenant": "new", "ids": [1]}, 404),
            ("POST", "/generate", {"tenant": "mine", "ids": [1, 199]}, 400),
            ("POST", "/generate", {"tenant": "mine", "ids": [-1]}, 400),
            ("POST", "/generate", {"tenant": "mine", "ids": []}, 422),
            ("POST", "/generate", {"ids": [1], "tokens": 10**9}, 422),
            ("POST", "/generate", {"tenant": 7, "ids": [1]}, 422),
            ("PUT", "/tenants/new", {}, 422),
            ("GET", "/nothing", None, 404),
        ]:
            status, found = ask(server, method, path, body)
            assert status == want and found["detail"], (method, path, body, status, found)
        for prompt in prompts[:4]:
            body = {"tenant": "mine", "ids": prompt["ids"], "tokens": prompt["tokens"]}
            assert ask(server, "POST", "/generate", body) == (200, {"ids": prompt["answers"]["a"]})
    finally:
        assert ask(server, "DELETE", "/tenants/mine")[0] == 200
