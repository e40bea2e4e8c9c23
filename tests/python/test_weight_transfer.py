"""Promise: what TRL calls brings all engines to each version or none, leaves none of them paused when it fails, and goes
through what TRL gives it to the end, since other ranks gather with it. Engines are servers here that note what they are asked.
"""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch
import xorz
from safetensors.torch import save_file
from xorz.vllm import client
from xorz.vllm.trl import XorzWeightTransfer


class Engine:
    """Answers vLLM's routes; `wrong` are those that it refuses, `late` so many /health before it is there."""

    def __init__(self, late=0):
        self.asked, self.bodies, self.wrong, self.late = [], [], {}, late
        engine = self

        class Routes(BaseHTTPRequestHandler):
            def do_GET(self):
                engine.late -= 1
                self.reply(200 if engine.late < 0 else 503, {})

            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["content-length"])))
                route = body.get("method") or self.path[1:]
                engine.asked.append(route)
                engine.bodies.append(body)
                if route in engine.wrong:
                    return self.reply(500, {"error": {"message": engine.wrong[route]}})
                known = {"xorz_sync_prepared": "", "xorz_sync_report": {"version": "1", "bytes": 9}}
                self.reply(200, {"results": [known.get(route, True)]})

            def reply(self, status, content):
                text = json.dumps(content).encode()
                self.send_response(status)
                self.send_header("content-length", str(len(text)))
                self.end_headers()
                self.wfile.write(text)

            def log_message(self, *_):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Routes)
        self.address = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def changes(self):
        """What it was asked that is no question."""
        return [
            r.removeprefix("xorz_") for r in self.asked if r not in ("xorz_sync_prepared", "xorz_sync_report")
        ]


UPDATE = ["sync_prepare", "start_weight_update", "update_weights", "finish_weight_update"]
WORDS = {"a": torch.arange(64, dtype=torch.bfloat16).view(8, 8), "b": torch.ones(8, dtype=torch.bfloat16)}


@pytest.fixture
def engines():
    made = [Engine(), Engine()]
    yield made
    for engine in made:
        engine.server.shutdown()
        engine.server.server_close()


@pytest.fixture
def base(tmp_path):
    (tmp_path / "base").mkdir()
    save_file(WORDS, tmp_path / "base" / "model.safetensors")
    return tmp_path / "base"


class Given:
    """What TRL gives, and how much of it was taken."""

    def __init__(self, **words):
        self.words, self.taken = words, 0

    def __iter__(self):
        for name, tensor in self.words.items():
            self.taken += 1
            yield name, tensor


def fp32(step=0.0):
    return {name: tensor.float() + step for name, tensor in WORDS.items()}


@pytest.mark.parametrize("pause", [None, "keep", "wait", "abort"])
def test_a_sync(engines, base, tmp_path, pause):
    addresses = [engine.address for engine in engines]
    transfer = XorzWeightTransfer(base, tmp_path / "run", addresses, keep=2, trust="sha256", pause=pause)
    engines[1].late = 1
    transfer.init_weight_transfer()
    for step in (0.0, 1.0):
        transfer.pause()
        transfer.send_weights(iter(Given(**fp32(step))))
        transfer.resume()
    transfer.destroy()
    transfer.destroy()
    around = [[f"pause?mode={pause}"], ["resume"]] if pause else [[], []]
    for engine in engines:
        assert engine.changes() == ["init_weight_transfer_engine", *(2 * [*around[0], *UPDATE, *around[1]])]
        assert engine.bodies[0] == {"init_info": {"keep": 2, "trust": "sha256"}}
        sent = [body["update_info"] for body in engine.bodies if "update_info" in body]
        assert sent == [{"source": str(tmp_path / "run"), "version": n} for n in (1, 2)]
    assert transfer.number == 2 and transfer.reports == [{"version": "1", "bytes": 9}] * 2
    chain = xorz.Versions(WORDS, tmp_path / "run")
    for number, step in ((1, 0.0), (2, 1.0)):
        for name, words in chain.state_dict(number).items():
            assert torch.equal(words, fp32(step)[name].bfloat16())


@pytest.mark.parametrize(
    ("given", "why"),
    [
        ({"a": WORDS["a"]}, "new lacks the tensor `b`"),
        ({"c": torch.ones(3), **fp32(2.0)}, "new has a tensor `c`, which the base lacks"),
        ({"a": torch.ones(4, 4), "b": WORDS["b"]}, r"tensor `a` is \[4, 4\]"),
    ],
)
def test_what_cannot_be_published_changes_no_engine(engines, base, tmp_path, given, why):
    transfer = XorzWeightTransfer(base, tmp_path / "run", engines[0].address, pause="wait")
    transfer.init_weight_transfer()
    transfer.pause()
    words = Given(**given)
    with pytest.raises((KeyError, ValueError), match=why):
        transfer.send_weights(iter(words))
    assert words.taken == len(given)
    assert engines[0].changes() == ["init_weight_transfer_engine", "pause?mode=wait", "resume"]
    # And the next is taken.
    transfer.send_weights(iter(Given(**fp32(1.0))))
    assert engines[0].changes()[3:] == UPDATE and transfer.number == 1
    transfer.destroy()


def test_what_one_engine_refuses_no_engine_takes(engines, base, tmp_path):
    first, second = engines
    transfer = XorzWeightTransfer(base, tmp_path / "run", [first.address, second.address], pause="keep")
    transfer.init_weight_transfer()
    second.wrong["xorz_sync_prepare"] = "it has other words"
    transfer.pause()
    with pytest.raises(client.UpdateError, match=f"{second.address}.*it has other words"):
        transfer.send_weights(iter(Given(**fp32(1.0))))
    assert first.changes()[-2:] == ["sync_prepare", "resume"] and second.changes()[-1] == "resume"
    assert "finish_weight_update" not in first.asked and transfer.number == 0
    transfer.destroy()


def test_an_engine_that_cannot_be_paused_leaves_none_paused(engines, base, tmp_path):
    first, second = engines
    transfer = XorzWeightTransfer(base, tmp_path / "run", [first.address, second.address], pause="wait")
    second.wrong["pause?mode=wait"] = "not now"
    with pytest.raises(client.UpdateError, match=f"{second.address}: pause.*not now"):
        transfer.pause()
    assert first.asked == ["pause?mode=wait", "resume"] and second.asked == ["pause?mode=wait"]
    first.wrong["resume"] = "gone"
    with pytest.raises(client.UpdateError, match="gone"):
        client.resume([first.address, second.address])
    assert second.asked[-1] == "resume"


def test_a_version_that_cannot_be_written_is_said_once(engines, base, tmp_path):
    transfer = XorzWeightTransfer(base, tmp_path / "run", engines[0].address)
    transfer.init_weight_transfer()
    (tmp_path / "run" / "versions.json").write_text("no list")
    with pytest.raises(ValueError, match=r"versions\.json"):
        transfer.send_weights(iter(Given(**fp32(1.0))))
    transfer.destroy()
    assert engines[0].changes() == ["init_weight_transfer_engine"]


def test_an_engine_that_never_answers_is_named(base, tmp_path):
    transfer = XorzWeightTransfer(base, tmp_path / "run", "http://127.0.0.1:9", start=0.0)
    with pytest.raises(client.UpdateError, match=r"127\.0\.0\.1:9: the engine has not answered within 0 s"):
        transfer.init_weight_transfer()
    transfer.destroy()


def test_misuse_is_named(base, tmp_path):
    with pytest.raises(ValueError, match="pause must be None or one of abort, wait, keep, but is 'stop'"):
        XorzWeightTransfer(base, tmp_path, "http://a", pause="stop")
    with pytest.raises(ValueError, match="at least one engine"):
        XorzWeightTransfer(base, tmp_path, [])
