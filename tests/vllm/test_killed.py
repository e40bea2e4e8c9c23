"""Promise: an engine that is killed in the middle of an update takes nobody with it: all others serve the version
before, whole. Started again it serves what it was started from, whole; it catches up by the fewest packages, and then
says what a fresh engine over those words says.
"""

import json
import os
import shutil
import time

import engines
import pytest
import runs
import xorz
from test_server import OPTIONS, Server
from xorz.vllm import client

# A plugin of vLLM's, which all processes of the server load. It kills the one that does what it is told for the nth time.
PLUGIN = """
import os
import signal


def register():
    where, count = os.environ["KILLED_AT"].split(":")
    from xorz import _core
    from xorz.vllm import client, update

    owner, name = {
        "reading": (_core.Package, "exchanges"),
        "changing": (_core, "exchange_apply"),
        "changed": (update, "apply"),
    }[where]
    plain, calls = getattr(owner, name), []

    def killing(*args, **kwargs):
        calls.append(1)
        last = len(calls) == int(count)
        if last and where == "changed":
            plain(*args, **kwargs)
        if last:
            os.kill(os.getpid(), signal.SIGKILL)
        return plain(*args, **kwargs)

    setattr(owner, name, killing)
"""


@pytest.fixture(scope="module")
def made():
    """The versions' folders, the chain, and what an engine over each says, which vLLM alone has loaded."""
    paths, chain = runs.run("llama", engines.FOLDER)
    return paths, chain, dict(enumerate(engines.references(paths)))


@pytest.fixture
def server(made, tmp_path, monkeypatch):
    """Starts servers that take updates, all over version 0."""
    monkeypatch.setenv("VLLM_SERVER_DEV_MODE", "1")
    options = OPTIONS.replace(" --enable-lora", "") + ' --weight-transfer-config {"backend":"xorz"}'
    started = []

    def start(env=None):
        log = tmp_path / f"server-{len(started)}.log"
        started.append(Server(made[0][0], log, options=options, mode="exact", env=env))
        return started[-1]

    yield start
    for each in started:
        each.stop()


def plugin(folder, point):
    """What to start a server with, so that it is killed at `point`."""
    info = folder / "killed-0.dist-info"
    info.mkdir(parents=True)
    (folder / "killed.py").write_text(PLUGIN)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: killed\nVersion: 0\n")
    (info / "entry_points.txt").write_text("[vllm.general_plugins]\nkilled = killed:register\n")
    path = os.pathsep.join(p for p in (str(folder), os.environ.get("PYTHONPATH")) if p)
    return {"PYTHONPATH": path, "KILLED_AT": point}


def address(server):
    return f"http://127.0.0.1:{server.port}"


def says(server, said):
    for which, prompt in enumerate(engines.PROMPTS):
        for _ in range(2):  # the second time from the cache
            assert server.complete("base", prompt, tokens=engines.NEW) == said[which].tokens


@pytest.fixture(scope="module")
def one(made):
    """Another engine of the same trainer, in this process."""
    out = engines.engine(made[0][0], enable_lora=False, weight_transfer_config={"backend": "xorz"})
    yield out
    engines.stop(out)


def tokens(llm):
    return [s.tokens for s in engines.ask(llm, engines.PROMPTS)]


@pytest.mark.parametrize("where, calls", [("reading", 5), ("changing", 5), ("changed", 1)])
def test_an_engine_that_is_killed(where, calls, made, one, server, tmp_path):
    """While it reads version 2, with part of its words changed, and with all of them changed before it has said so."""
    _paths, plain, said = made
    chain = shutil.copytree(plain, tmp_path / "run")
    # Its first update comes through.
    step = next(chain.glob("000001-*[0-9a-f].xorz"))
    count = 1 if where == "changed" else sum(e["changed"] > 0 for e in xorz.inspect(step)["entries"])
    other = server(plugin(tmp_path / "plugin", f"{where}:{count + calls}"))
    client.update([one, address(other)], chain, 1)
    says(other, said[1])
    began = time.monotonic()
    with pytest.raises(client.UpdateError, match=r"127\.0\.0\.1"):
        client.update([one, address(other)], chain, 2)
    # Nobody waits for what a dead engine will never say (the client would, for ten minutes).
    assert time.monotonic() - began < 200
    other.process.wait(120)
    assert "EngineDeadError" in other.log.read_text()
    assert one.get_weight_version() == "1" and tokens(one) == [s.tokens for s in said[1]]
    back = server()
    assert json.loads(back.get("/weight_info"))["weight_version"] in ("0", "default")
    says(back, said[0])
    # The package of version 2 against the base is all that it takes.
    kept = step.read_bytes()
    step.unlink()
    [report] = client.update(address(back), chain, 2)
    assert (report["since"], report["version"]) == ("0", "2")
    says(back, said[2])
    step.write_bytes(kept)
    reports = client.update([one, address(back)], chain, 3)
    assert [report["since"] for report in reports] == ["1", "2"]
    assert tokens(one) == [s.tokens for s in said[3]]
    says(back, said[3])
