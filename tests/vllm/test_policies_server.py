"""Promise: a server's clients ask for `policy` and are answered by one version alone, which the answer names, while
versions are published; none waits or fails. Versions that are too old cannot be asked for, and their packages are closed.
What one of several engines cannot load is published in none.
"""

import json
import threading
import time

import engines
import pytest
import runs
import xorz
import xorz.vllm
from test_policies import published
from test_server import OPTIONS, Server, held
from xorz.vllm import client


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """The versions' folders, the chain, and what each says as a tenant of an engine of the server's settings, from a package
    of its full checkpoint. That this is what an engine over the checkpoint says is for `test_policies`: there products have its
    very bits, here they are other kernels'.
    """
    paths, _chain = runs.run("llama", engines.FOLDER)
    folder = tmp_path_factory.mktemp("packages")
    llm = engines.engine(paths[0], mode="deterministic", max_num_seqs=8)
    said = {}
    try:
        for number, path in enumerate(paths[1:], 1):
            xorz.pack(paths[0], path, folder / f"{number}.xorz")
            lora = xorz.vllm.load(llm, str(number), folder / f"{number}.xorz")
            said[number] = [engines.ask(llm, [prompt], [lora])[0].tokens for prompt in engines.PROMPTS]
    finally:
        engines.stop(llm)
    for which in range(len(engines.PROMPTS)):
        assert len({str(each[which]) for each in said.values()}) == len(said)
    return paths, published(paths, tmp_path_factory.mktemp("run")), said


@pytest.fixture(scope="module")
def server(made, tmp_path_factory):
    options = OPTIONS.replace("--max-loras 2", "--max-loras 4") + " --enable-prefix-caching"
    out = Server(made[0][0], tmp_path_factory.mktemp("log") / "server.log", options=options)
    yield out
    out.stop()


def ask(server, model, prompt):
    status, text = server.post(
        "/v1/completions",
        model=model,
        prompt=prompt,
        max_tokens=engines.NEW,
        temperature=0,
        return_token_ids=True,
        ignore_eos=True,
    )
    answer = json.loads(text)
    return status, answer.get("model"), answer["choices"][0]["token_ids"] if status == 200 else text


def models_of(server):
    return {card["id"]: card["parent"] for card in json.loads(server.get("/v1/models"))["data"]}


def test_versions_under_traffic(made, server):
    _paths, chain, said = made
    address, got, stop = f"http://127.0.0.1:{server.port}", [], threading.Event()
    assert client.publish(address, "policy", chain, 1) == "policy-v1"

    def traffic(which):
        while not stop.is_set():
            began = time.monotonic()
            got.append((began, which, *ask(server, "policy", engines.PROMPTS[which])))

    threads = [threading.Thread(target=traffic, args=(i % 2,)) for i in range(3)]
    marks = {1: 0.0}
    for thread in threads:
        thread.start()
    try:
        for number in (2, 3, 4):
            time.sleep(2)
            client.publish([address], "policy", chain, number)
            marks[number] = time.monotonic()
            assert models_of(server) == {
                "base": None,
                "policy": f"policy-v{number}",
                f"policy-v{number}": "base",
                f"policy-v{number - 1}": "base",
            }
        time.sleep(2)
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    seen = set()
    for began, which, status, model, tokens in got:
        assert status == 200, tokens
        number = int(model.removeprefix("policy-v"))
        assert tokens == said[number][which]
        assert number >= max(n for n, mark in marks.items() if mark <= began)
        seen.add(number)
    assert seen == {1, 2, 3, 4}
    assert ask(server, "policy-v3", engines.PROMPTS[0]) == (200, "policy-v3", said[3][0])
    assert ask(server, "policy-v2", engines.PROMPTS[0])[0] == 404
    [old] = chain.glob("000002-*.key.xorz")
    deadline = time.monotonic() + 120
    while held(old) and time.monotonic() < deadline:
        time.sleep(0.5)
    assert held(old) == 0


def test_all_engines_or_none(made, server):
    _paths, chain, said = made
    address = f"http://127.0.0.1:{server.port}"
    client.publish(address, "other", chain, 1)
    with pytest.raises(client.UpdateError, match=r"127\.0\.0\.1:9"):
        client.publish([address, "http://127.0.0.1:9"], "other", chain, 2)
    assert models_of(server)["other"] == "other-v1" and "other-v2" not in models_of(server)
    for version, why in ((9, "there is no version 9"), (0, "is the base itself")):
        with pytest.raises(client.UpdateError, match=why):
            client.publish(address, "other", chain, version)
    with pytest.raises(client.UpdateError, match="conflicts with a served base model"):
        client.publish(address, "base", chain, 3)
    assert "base-v3" not in models_of(server)
    # Without a number the folder is its newest version, over vLLM's own route.
    status, text = server.load("third", chain)
    assert status == 200 and "'third' is 'third-v4' from now on" in text
    assert ask(server, "third", engines.PROMPTS[1]) == (200, "third-v4", said[4][1])
    assert server.post("/v1/unload_lora_adapter", lora_name="third")[0] == 200
    assert ask(server, "third-v4", engines.PROMPTS[1])[0] == 200
