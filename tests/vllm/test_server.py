"""Promise: the OpenAI server answers `model="alice"` as the engine answers her; loading, failing and
unloading are seen by the client who asked for it and by nobody else.
"""

import json
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path

import models
import pytest

HERE = Path(__file__).parent
FOLDER = Path(os.environ.get("XORZ_VLLM_MODELS") or HERE.parents[1] / "build" / "vllm" / "models")
PROMPTS = ["xorz keeps one copy of the base and, per fine-tune, a small lossless delta", "Whole models"]
OPTIONS = (
    "--quantization xorz --enable-lora --max-loras 2 --max-cpu-loras 4 --max-lora-rank 1 --dtype bfloat16"
)
OPTIONS += " --enforce-eager --max-model-len 256 --max-num-seqs 8 --block-size 32"


class Server:
    """vLLM's own, in a process."""

    def __init__(self, base, log, packages=None, options=OPTIONS, mode="deterministic", env=None):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        env = {
            **os.environ,
            "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "True",
            "VLLM_CPU_KVCACHE_SPACE": "1",
            "HF_HUB_OFFLINE": "1",
            "VLLM_NO_USAGE_STATS": "1",
            "XORZ_CACHE_DIR": "",
            **(env or {}),
        }
        if packages:
            env["XORZ_VLLM_PACKAGES"] = str(packages)
        command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(base)]
        command += [
            "--served-model-name",
            "base",
            "--host",
            "127.0.0.1",
            "--port",
            str(self.port),
            *options.split(),
        ]
        extra = json.dumps({"xorz": {"mode": mode, "memory": "256 MiB"}})
        self.log = log
        with log.open("w") as out:
            self.process = subprocess.Popen(
                [*command, "--additional-config", extra], stdout=out, stderr=out, env=env
            )
        deadline = time.monotonic() + 1500
        while time.monotonic() < deadline and self.process.poll() is None:
            try:
                return self.get("/health") and None
            except OSError:
                time.sleep(1)
        raise AssertionError(log.read_text()[-4000:])

    def get(self, path):
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}{path}", timeout=300) as answer:
            return answer.read() or b"ok"

    def post(self, path, **body):
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}{path}",
            json.dumps(body).encode(),
            {"content-type": "application/json"},
        )
        try:
            with urllib.request.urlopen(request, timeout=600) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()

    def complete(self, model, prompt, tokens=8):
        status, text = self.post(
            "/v1/completions",
            model=model,
            prompt=prompt,
            max_tokens=tokens,
            temperature=0,
            return_token_ids=True,
            ignore_eos=True,
        )
        assert status == 200, text
        answer = json.loads(text)
        assert answer["model"] == model
        return answer["choices"][0]["token_ids"]

    def load(self, name, path, **more):
        return self.post("/v1/load_lora_adapter", lora_name=name, lora_path=str(path), **more)

    def stop(self):
        self.process.terminate()
        self.process.wait(120)


@pytest.fixture(scope="module")
def packages(tmp_path_factory):
    folder = tmp_path_factory.mktemp("packages")
    for name in "ABC":
        shutil.copy(models.tenant("llama", name, FOLDER)[1], folder / f"{name}.xorz")
    return folder


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """What full models say, each from a server's engine of its own settings: by name and prompt."""
    import engines
    import xorz.vllm

    base = models.base("llama", FOLDER)
    llm = engines.engine(base, mode="deterministic", max_num_seqs=8)
    said = {}
    try:
        for name in (None, *"ABC"):
            lora = name and xorz.vllm.load(llm, name, models.tenant("llama", name, FOLDER)[1])
            for prompt in PROMPTS:
                said[name or "base", prompt] = engines.ask(llm, [prompt], [lora], new=8)[0].tokens
    finally:
        engines.stop(llm)
    return said


@pytest.fixture(scope="module")
def server(packages, alone, tmp_path_factory):
    out = Server(models.base("llama", FOLDER), tmp_path_factory.mktemp("log") / "server.log", packages)
    yield out
    out.stop()


def test_base_and_tenants_at_once_loaded_when_first_asked_for(server, alone):
    got = {}

    def ask(model, prompt):
        got[model, prompt] = server.complete(model, prompt)

    threads = [threading.Thread(target=ask, args=(m, p)) for m in ("base", "A", "B") for p in PROMPTS]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert got == {key: tokens for key, tokens in alone.items() if key[0] != "C"}
    names = {card["id"]: card for card in json.loads(server.get("/v1/models"))["data"]}
    assert {"base", "A", "B"} <= set(names) and names["A"]["parent"] == "base"


def test_load_unload_and_load_again(server, alone, packages):
    status, text = server.load("mine", packages / "C.xorz")
    assert status == 200, text
    assert server.complete("mine", PROMPTS[0]) == alone["C", PROMPTS[0]]
    assert server.load("mine", packages / "A.xorz")[0] == 400
    status, text = server.load("mine", packages / "C.xorz")
    assert status == 200 and "is that already" in text
    assert server.load("mine", packages / "none.xorz")[0] == 404
    assert server.complete("mine", PROMPTS[1]) == alone["C", PROMPTS[1]]
    assert server.post("/v1/unload_lora_adapter", lora_name="mine")[0] == 200
    assert server.post("/v1/completions", model="mine", prompt="x", max_tokens=1)[0] == 404
    assert server.load("mine", packages / "A.xorz")[0] == 200
    assert server.complete("mine", PROMPTS[0]) == alone["A", PROMPTS[0]]


def test_a_package_published_under_the_same_path(server, alone, packages):
    path = packages / "news.xorz"
    for name in ("B", "C", "B"):
        shutil.copy(packages / f"{name}.xorz", packages / "part")
        (packages / "part").rename(path)
        status, text = server.load("news", path, load_inplace=True)
        assert status == 200, text
        assert [server.complete("news", p) for p in PROMPTS] == [alone[name, p] for p in PROMPTS]


def test_a_folder_with_a_package_is_a_tenant(server, alone, packages, tmp_path):
    import xorz

    folder = xorz.save_folder(packages / "A.xorz", tmp_path / "a", "base")
    status, text = server.load("ann", folder)
    assert status == 200, text
    assert server.complete("ann", PROMPTS[0]) == alone["A", PROMPTS[0]]
    # Found when it is first asked for, in the folder of packages.
    shutil.copytree(folder, packages / "late")
    assert server.complete("late", PROMPTS[1]) == alone["A", PROMPTS[1]]
    shutil.rmtree(packages / "late")
    for name in ("ann", "late"):
        assert server.post("/v1/unload_lora_adapter", lora_name=name)[0] == 200
    (folder / "B.xorz").write_bytes(b"")
    status, text = server.load("ann", folder)
    assert status == 400 and "holds 2 packages" in text, text


def test_bad_packages_are_the_client_s_error(server, alone, packages):
    bad = packages / "bad.xorz"
    bad.write_bytes((packages / "A.xorz").read_bytes()[:-50])
    status, text = server.load("bad", bad)
    assert (
        status == 400
        and text.count("'bad'") == 1
        and text.count("xorz:") == 1
        and "follow the header" in text
    )
    status, text = server.load("bad", models.tenant("llama", "A", FOLDER)[0])
    assert status == 400 and "xorz pack BASE" in text
    status, text = server.load("bad", packages / "none.xorz")
    assert status == 404 and "'bad'" in text and "No such file" in text
    other = models.tenant("qwen3", "A", FOLDER)[1]
    status, text = server.load("bad", other)
    assert status == 400 and "tensor" in text and text.count("'bad'") == 1 and text.count("xorz:") == 1
    assert server.post("/v1/completions", model="bad", prompt="x", max_tokens=1)[0] in (400, 404)
    assert server.complete("A", PROMPTS[0]) == alone["A", PROMPTS[0]]


def test_many_loads_at_once_wait_for_each_other(server, alone, packages):
    """More than are ever read at once."""
    answers = {}

    def load(name):
        answers[name] = server.load(name, packages / f"{'ABC'[int(name[4:]) % 3]}.xorz")

    threads = [threading.Thread(target=load, args=(f"many{i}",)) for i in range(48)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {name: answer for name, answer in answers.items() if answer[0] != 200} == {}
    assert server.complete("many40", PROMPTS[0]) == alone["B", PROMPTS[0]]
    for name in answers:
        assert server.post("/v1/unload_lora_adapter", lora_name=name)[0] == 200


def held(path):
    """How often the server's processes hold this file open."""
    count = 0
    for folder in Path("/proc").glob("[0-9]*/fd"):
        try:
            count += sum(os.path.realpath(link) == str(path) for link in folder.iterdir())
        except OSError:
            continue
    return count


def test_an_unloaded_tenant_s_package_is_closed(server, packages):
    path = packages / "leaving.xorz"
    shutil.copy(packages / "C.xorz", path)
    assert server.load("leaving", path)[0] == 200
    assert held(path) == 1
    assert server.post("/v1/unload_lora_adapter", lora_name="leaving")[0] == 200
    deadline = time.monotonic() + 120
    while held(path) and time.monotonic() < deadline:
        time.sleep(0.5)
    assert held(path) == 0


def test_loading_under_traffic(server, alone, packages):
    """Answers of others stay what they are while tenants are loaded, fail to load, and are unloaded."""
    got, stop = [], threading.Event()

    def traffic():
        while not stop.is_set():
            got.append(server.complete("A", PROMPTS[1]) == alone["A", PROMPTS[1]])

    thread = threading.Thread(target=traffic)
    thread.start()
    try:
        for i in range(6):
            assert server.load(f"x{i}", packages / f"{'BC'[i % 2]}.xorz")[0] == 200
            assert server.load("bad", packages / "bad.xorz")[0] in (400, 404)
            assert server.complete(f"x{i}", PROMPTS[0]) == alone["BC"[i % 2], PROMPTS[0]]
            assert server.post("/v1/unload_lora_adapter", lora_name=f"x{i}")[0] == 200
    finally:
        stop.set()
        thread.join()
    assert got and all(got)


def test_a_damaged_copy_of_a_package_that_is_served_is_refused(server, alone, packages, tmp_path):
    """It says the same of itself, so that its adapter has the same name."""
    good = (packages / "A.xorz").read_bytes()
    assert server.load("A", packages / "A.xorz", load_inplace=True)[0] == 200
    at = len(good) // 2  # of a tensor: the files that are carried along come last, and are not read
    bad = tmp_path / "damaged.xorz"
    bad.write_bytes(good[:at] + bytes([good[at] ^ 1]) + good[at + 1 :])
    for _ in range(2):
        status, text = server.load("A", bad, load_inplace=True)
        assert status == 400 and "digest" in text, text
        assert server.complete("A", PROMPTS[0]) == alone["A", PROMPTS[0]]
    bad.write_bytes(good)
    assert server.load("A", bad, load_inplace=True)[0] == 200
    assert server.complete("A", PROMPTS[1]) == alone["A", PROMPTS[1]]
