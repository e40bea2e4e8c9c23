"""Promise: `examples/ray_serve.py` gives every prompt its own tenant's answer on each replica of a local Ray cluster, where a
tenant is loaded when it is first asked for; one that is killed under load loses no requests but those that it was
answering; one that comes under load, and goes when there is none, loses none.

Answers are compared with those of plain fine-tuned models, as in `test_server.py`.
"""

import json
import os
import signal
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest
import torch
import xorz

pytest.importorskip(
    "ray.serve", reason="ray is not installed (380 MB): make test-ray installs it beside examples/"
)
transformers = pytest.importorskip("transformers")
from ray_example import started  # noqa: E402
from test_server import MARGIN, answer, fine_tuned  # noqa: E402

SCRIPT = Path(__file__).parents[2] / "examples" / "ray_serve.py"
NAMES = (None, "a", "b", "c")
CLIENTS = 8


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """The folder, and prompts with each tenant's answers, which differ."""
    folder = tmp_path_factory.mktemp("ray_serve")
    torch.manual_seed(0)
    sizes = {"vocab_size": 199, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
    config = transformers.LlamaConfig(
        **sizes, num_attention_heads=4, num_key_value_heads=2, initializer_range=0.2
    )
    models = {None: transformers.LlamaForCausalLM(config).eval()}
    models[None].save_pretrained(folder / "model")
    (folder / "tenants").mkdir()
    for seed, name in enumerate(NAMES[1:], 1):
        models[name] = fine_tuned(models[None], seed)
        path = folder / ("tenants" if name != "c" else "") / f"{name}.xorz"
        xorz.pack(models[None].state_dict(), models[name].state_dict(), path)
    # A folder with a package, whatever it is called there; and what no name may lead to.
    xorz.save_folder(folder / "c.xorz", folder / "tenants" / "c", "any/base", name="weights")
    (folder / "tenants" / "broken.xorz").write_bytes((folder / "tenants" / "a.xorz").read_bytes()[:-9])
    g, prompts = torch.Generator().manual_seed(5), []
    while len(prompts) < 6:
        ids = torch.randint(0, 199, (1 + len(prompts) % 5,), generator=g).tolist()
        found = {name: answer(model, ids, 6) for name, model in models.items()}
        answers = {name: tokens for name, (tokens, _) in found.items()}
        distinct = len(set(map(tuple, answers.values()))) == len(NAMES)
        if distinct and min(margin for _, margin in found.values()) > MARGIN:
            prompts.append((ids, answers))
    return folder, prompts


def served(folder, *options):
    options = ("--model", "model", "--tenants", "tenants", "--most", "2", *options)
    return started(SCRIPT, folder, *options, OMP_NUM_THREADS="1", XORZ_CACHE_DIR="")


def ask(address, tenant, ids, tokens=6):
    """(status, JSON or text)."""
    body = json.dumps({"tenant": tenant, "ids": ids, "tokens": tokens}).encode()
    request = urllib.request.Request(f"{address}/generate", body, {"content-type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=120) as reply:
            return reply.status, json.load(reply)
    except urllib.error.HTTPError as error:
        with error:
            text = error.read().decode()
            return error.code, json.loads(text) if text.startswith("{") else text


class Load:
    """Clients that ask for one tenant after another until they are stopped, and what each request came to."""

    def __init__(self, address, prompts, clients):
        self.address, self.prompts, self.made, self.stopped = address, prompts, [], threading.Event()
        self.threads = [threading.Thread(target=self.client, args=(i,)) for i in range(clients)]

    def client(self, turn):
        while not self.stopped.is_set():
            name, (ids, answers) = NAMES[turn % len(NAMES)], self.prompts[turn % len(self.prompts)]
            began = time.monotonic()
            try:
                status, reply = ask(self.address, name, ids)
            except OSError as error:
                status, reply = 0, str(error)
            self.made.append((began, time.monotonic(), status, name, reply, answers[name]))
            turn += 1

    def __enter__(self):
        for thread in self.threads:
            thread.start()
        return self

    def __exit__(self, *error):
        self.stopped.set()
        for thread in self.threads:
            thread.join()

    def answered(self, since=0.0):
        """(process, tenant) of what was asked since then and answered."""
        return {
            (reply["process"], name)
            for began, _, status, name, reply, _ in list(self.made)
            if status == 200 and began > since
        }

    def wait(self, condition):
        deadline = time.monotonic() + 600
        while not condition() and time.monotonic() < deadline:
            time.sleep(0.1)
        assert condition(), (len(self.made), self.answered())

    def right(self):
        """How many were answered; each as its tenant."""
        assert all(reply["ids"] == wanted for _, _, status, _, reply, wanted in self.made if status == 200)
        return sum(one[2] == 200 for one in self.made)


def lives(process):
    """Whether there is a process of this number."""
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    return True


def test_a_replica_comes_under_load_with_every_tenant_and_goes_after_it_and_no_request_is_lost(world):
    with served(world[0], "--replicas", "1", "--after", "2", "--idle", "6") as address:
        with Load(address, world[1], 1) as few:
            few.wait(lambda: len(few.made) > 4 * len(NAMES))
        [(first, _), *_] = few.answered()
        assert {process for process, _ in few.answered()} == {first}
        with Load(address, world[1], 3 * CLIENTS) as many:
            many.wait(lambda: {n for process, n in many.answered() if process != first} == set(NAMES))
        [second] = {process for process, _ in many.answered()} - {first}
        # A client that asks on meanwhile has an answer from whichever is left.
        with Load(address, world[1], 1) as again:
            again.wait(lambda: lives(first) + lives(second) == 1)
            gone = time.monotonic()
            again.wait(lambda: len(again.answered(gone)) == len(NAMES))
        assert {process for process, _ in again.answered(gone)} < {first, second}
        for load in (few, many, again):
            assert load.right() == len(load.made), [one for one in load.made if one[2] != 200]


@pytest.fixture(scope="module")
def address(world):
    """Of the example with two replicas."""
    with served(world[0], "--replicas", "2") as found:
        yield found


def test_each_replica_loads_a_tenant_when_it_is_first_asked_for(world, address):
    _, prompts = world
    seen, deadline = set(), time.monotonic() + 600
    while len(seen) < 2 * len(NAMES) and time.monotonic() < deadline:
        for name in NAMES:
            for ids, answers in prompts:
                status, reply = ask(address, name, ids)
                assert status == 200 and reply["ids"] == answers[name], (name, reply)
                seen.add((reply["process"], name))
    assert len({process for process, _ in seen}) == 2 and len(seen) == 2 * len(NAMES), seen


def test_what_is_no_tenant_is_said(world, address):
    ids, answers = world[1][0]
    for name in ("nobody", "../c", "..", ".", "", "c/weights", "a.xorz", "a\0", "x" * 5000):
        status, reply = ask(address, name, ids)
        assert status == 404 and "there is no tenant" in reply["detail"], (name, status, reply)
    status, reply = ask(address, "broken", ids)
    assert status == 422 and "header" in reply["detail"], reply
    assert ask(address, None, [500])[0] == 400 and ask(address, None, [])[0] == 422
    assert ask(address, "a", ids)[1]["ids"] == answers["a"]


def test_a_replica_that_is_killed_under_load_loses_what_it_was_answering(world, address):
    with Load(address, world[1], CLIENTS) as load:
        load.wait(lambda: len({p for p, _ in load.answered()}) == 2 and len(load.made) > 10 * CLIENTS)
        before = {process for process, _ in load.answered()}
        killed, at = min(before), time.monotonic()
        os.kill(killed, signal.SIGKILL)
        # Until the one that takes its place has been asked for every tenant.
        load.wait(lambda: {n for process, n in load.answered(at) if process not in before} == set(NAMES))
    assert load.right() > 10 * CLIENTS
    lost = [one for one in load.made if one[2] != 200]
    assert all(began <= at <= ended for began, ended, *_ in lost), (at, lost)
    assert len(lost) <= CLIENTS and killed not in {process for process, _ in load.answered(at + 1)}
