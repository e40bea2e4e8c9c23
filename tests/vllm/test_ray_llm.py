"""Promise: `examples/ray_llm.py` answers each request over HTTP as an engine over that full fine-tune does, with tenants from a
folder or from a bucket; who asks for what is no tenant is told.

`make test-ray-llm` installs Ray beside vLLM for it.
"""

import json
import os
import shutil
import sys
import threading
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlparse
from xml.sax.saxutils import escape

import engines
import models
import pytest
import xorz
from engines import NEW, PROMPTS

sys.path.append(str(Path(__file__).parents[1] / "python"))
from ray_example import started

pytest.importorskip("ray", reason="ray is not installed: make test-ray-llm installs it beside vLLM")
pytest.importorskip("boto3", reason="boto3 is not installed: make test-ray-llm installs it beside vLLM")

SCRIPT = Path(__file__).parents[2] / "examples" / "ray_llm.py"
KIND, NAMES = "llama", (None, "A", "B", "C")


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """The base, a folder of tenants (packages, and a folder with one), and what an engine over each full model says."""
    base = models.base(KIND, engines.FOLDER)
    made = {name: models.tenant(KIND, name, engines.FOLDER) for name in NAMES[1:]}
    tenants = tmp_path_factory.mktemp("tenants")
    for name, (_, package) in made.items():
        if name == "C":
            xorz.save_folder(package, tenants / name, "any/base", name="weights")
        else:
            shutil.copy(package, tenants / package.name)
    (tenants / "broken.xorz").write_bytes(made["A"][1].read_bytes()[:-9])
    said = engines.references([base, *(full for full, _ in made.values())])
    tokenizer = models.PreTrainedTokenizerFast.from_pretrained(base)
    # A last token may be a part of a character, which a server keeps to itself.
    texts = [[tokenizer.decode(one.tokens).rstrip("\ufffd") for one in each] for each in said]
    answers = dict(zip(NAMES, texts, strict=True))
    assert len({text for each in answers.values() for text in each}) == len(NAMES) * len(PROMPTS)
    return base, tenants, answers


def served(folder, base, tenants, **environment):
    options = (
        "--model",
        str(base),
        "--tenants",
        str(tenants),
        "--length",
        "256",
        "--mixed",
        "2",
        "--cached",
        "4",
    )
    options += ("--mode", "exact", "--budget", "256 MiB")
    environment["VLLM_ENABLE_V1_MULTIPROCESSING"] = "1"
    return started(SCRIPT, folder, *options, ending=180, **environment)


def ask(address, name, prompt):
    """(status, the text or what is wrong)."""
    body = {"model": f"base:{name}" if name else "base", "prompt": prompt, "max_tokens": NEW}
    body |= {"temperature": 0, "ignore_eos": True, "skip_special_tokens": False}
    request = urllib.request.Request(
        f"{address}/v1/completions", json.dumps(body).encode(), {"content-type": "application/json"}
    )
    try:
        with urllib.request.urlopen(request, timeout=300) as reply:
            return reply.status, json.load(reply)["choices"][0]["text"].rstrip("\ufffd")
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read().decode()


def right(address, answers, names):
    """Each of these tenants, all at once, says what its full fine-tune does."""
    asked = [(name, i) for name in names for i in range(len(PROMPTS))]
    with ThreadPoolExecutor(len(asked)) as pool:
        got = list(pool.map(lambda one: ask(address, one[0], PROMPTS[one[1]]), asked))
    assert got == [(200, answers[name][i]) for name, i in asked]


def test_a_folder_s_tenants_are_loaded_when_they_are_asked_for(world, tmp_path):
    base, tenants, answers = world
    with served(tmp_path, base, tenants) as address:
        right(address, answers, [None])
        right(address, answers, NAMES)
        for name in ("nobody", "../base", "C/weights", ".", "A.xorz"):
            status, text = ask(address, name, PROMPTS[0])
            assert status == 404 and "there is no tenant" in text, (name, status, text)
        status, text = ask(address, "broken", PROMPTS[0])
        assert status == 422 and "'base:broken'" in text and "Traceback" not in text, (status, text)
        right(address, answers, NAMES)


class Bucket(BaseHTTPRequestHandler):
    """As much of S3 as Ray asks for: objects, and lists of them."""

    protocol_version = "HTTP/1.1"
    folder: Path
    asked: list

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        url = urlparse(self.path)
        query, (_, bucket, *rest) = parse_qs(url.query), unquote(url.path).split("/", 2)
        key = rest[0] if rest else ""
        self.asked.append((self.command, bucket, key))
        file = self.folder / key
        if "list-type" in query:
            prefix = query.get("prefix", [""])[0]
            keys = [str(p.relative_to(self.folder)) for p in self.folder.rglob("*") if p.is_file()]
            found = {k: (self.folder / k).stat().st_size for k in sorted(keys) if k.startswith(prefix)}
            lines = [f"<Contents><Key>{escape(k)}</Key><Size>{n}</Size></Contents>" for k, n in found.items()]
            body = f"<Name>{bucket}</Name><IsTruncated>false</IsTruncated>{''.join(lines)}"
            return self.answer(200, f"<ListBucketResult>{body}</ListBucketResult>".encode())
        if not key or not file.is_file():
            return self.answer(404, b"<Error><Code>NoSuchKey</Code></Error>")
        return self.answer(200, file.read_bytes())

    def answer(self, status, body):
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("ETag", '"e"')
        self.send_header("Last-Modified", "Thu, 01 Jan 2026 00:00:00 GMT")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, *_):
        pass


def test_a_bucket_s_folders_are_fetched_when_they_are_asked_for(world, tmp_path):
    base, tenants, answers = world
    for name in "AB":
        xorz.save_folder(
            tenants / f"{name}.xorz", tmp_path / "bucket" / "tenants" / f"{name}{os.getpid()}", "any/base"
        )
    kind = type("Mine", (Bucket,), {"folder": tmp_path / "bucket", "asked": []})
    with ThreadingHTTPServer(("127.0.0.1", 0), kind) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        keys = {"AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b", "AWS_DEFAULT_REGION": "us-east-1"}
        keys["AWS_ENDPOINT_URL"] = f"http://127.0.0.1:{server.server_port}"
        try:
            with served(tmp_path, base, "s3://bucket/tenants", **keys) as address:
                # What there is may have been listed, and is not fetched.
                assert not [key for _, _, key in kind.asked if key]
                mine = {None: answers[None]} | {f"{name}{os.getpid()}": answers[name] for name in "AB"}
                right(address, mine, mine)
                assert any(key.endswith(".xorz") for _, _, key in kind.asked), kind.asked
                status, text = ask(address, "nobody", PROMPTS[0])
                assert status == 404 and "nobody" in text, (status, text)
                right(address, mine, mine)
        finally:
            server.shutdown()
