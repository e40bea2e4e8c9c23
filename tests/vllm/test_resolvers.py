"""Promise: whoever asks a server for a tenant that nobody has loaded gets her, from whichever folder or repository vLLM's
resolvers look into; a name leads into those folders and nowhere else.
"""

import asyncio
import json
import os
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import engines
import models
import pytest
from test_server import PROMPTS, Server
from xorz.vllm.resolvers import PackageResolver, taking_packages, without_packages

sys.path.append(str(Path(__file__).parents[1] / "python"))
import hub as hubs

HOSTILE = (
    "../outside",
    "..",
    "team/../../outside",
    "team//A",
    "/A",
    "A/",
    "./A",
    ".hidden",
    "team/.hidden",
    "A\0",
    "A\n",
    "",
    "x" * 253,
    "x" * 300,
    "x/" * 3000 + "x",
)


@pytest.fixture(scope="module")
def said():
    """What each full model says to each prompt, by name and prompt; an engine without adapters has them one after another."""
    paths = [models.tenant("llama", name, engines.FOLDER)[0] for name in "ABC"]
    answers = engines.references([models.base("llama", engines.FOLDER), *paths], prompts=PROMPTS)
    return {
        (name, prompt): said.tokens[:6]
        for name, each in zip(("base", *"ABC"), answers, strict=True)
        for prompt, said in zip(PROMPTS, each, strict=True)
    }


def package(name):
    return models.tenant("llama", name, engines.FOLDER)[1]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A folder for xorz and one for vLLM's resolver, in a folder with a package that no name may lead to."""
    import xorz

    above = tmp_path_factory.mktemp("above")
    shutil.copy(package("C"), above / "outside.xorz")
    mine, theirs = above / "mine", above / "theirs"
    (mine / "team" / "north").mkdir(parents=True)
    theirs.mkdir()
    shutil.copy(package("A"), mine / "A.xorz")
    shutil.copy(package("C"), mine / ".hidden.xorz")
    shutil.copy(package("B"), mine / "team" / "north" / "bob.xorz")
    xorz.save_folder(package("B"), theirs / "bea", "wherever/it/was", name="any")
    shutil.copy(package("C"), theirs / "cyd.xorz")
    (theirs / "lora").mkdir()
    about = {"peft_type": "LORA", "base_model_name_or_path": str(models.base("llama", engines.FOLDER))}
    (theirs / "lora" / "adapter_config.json").write_text(json.dumps(about))
    (theirs / "bad.xorz").write_bytes(package("A").read_bytes()[:-50])
    return mine, theirs


@pytest.fixture(scope="module")
def server(folders, said, tmp_path_factory):
    import xorz

    with hubs.running() as (hub, address):
        folder = xorz.save_folder(package("C"), tmp_path_factory.mktemp("hub") / "carol", "org/base")
        hub.files["org/tenants"] = {f"carol/{p.name}": p.read_bytes() for p in folder.iterdir()}
        more = {
            "VLLM_LORA_RESOLVER_CACHE_DIR": str(folders[1]),
            "VLLM_LORA_RESOLVER_HF_REPO_LIST": "org/tenants",
            "VLLM_PLUGINS": "xorz,lora_filesystem_resolver,lora_hf_hub_resolver",
            "HF_ENDPOINT": address,
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_CACHE": str(tmp_path_factory.mktemp("cache")),
        }
        log = tmp_path_factory.mktemp("log") / "server.log"
        out = Server(models.base("llama", engines.FOLDER), log, folders[0], mode="exact", env=more)
        yield out
        out.stop()


FOUND = {"A": "A", "team/north/bob": "B", "bea": "B", "cyd": "C", "org/tenants/carol": "C"}


def test_tenants_are_found_when_they_are_first_asked_for(server, said):
    assert {m["id"] for m in json.loads(server.get("/v1/models"))["data"]} == {"base"}
    for asked, name in FOUND.items():
        for prompt in PROMPTS:
            assert server.complete(asked, prompt, 6) == said[name, prompt], asked
    assert {m["id"] for m in json.loads(server.get("/v1/models"))["data"]} == {"base", *FOUND}


def test_hostile_names_find_nothing_and_harm_nobody(server, said):
    before = server.get("/v1/models")
    for name in (
        *HOSTILE,
        "x" * 250,
        "outside",
        "nobody",
        "A.xorz",
        "team",
        "org/tenants",
        "org/tenants/../x",
    ):
        if name:
            status, text = server.post("/v1/completions", model=name, prompt="x", max_tokens=1)
            assert status == 404, (name, status, text)
    assert {m["id"] for m in json.loads(server.get("/v1/models"))["data"]} == {
        m["id"] for m in json.loads(before)["data"]
    }
    assert server.complete("base", PROMPTS[0], 6) == said["base", PROMPTS[0]]


def test_what_is_found_and_unfit_is_said_to_who_asks(server, said):
    status, text = server.post("/v1/completions", model="bad", prompt="x", max_tokens=1)
    assert status == 400 and "'bad'" in text and "follow the header" in text, text
    status, text = server.post("/v1/completions", model="lora", prompt="x", max_tokens=1)
    assert status == 400 and "this is a LoRA adapter" in text, text
    assert server.complete("base", PROMPTS[0], 6) == said["base", PROMPTS[0]]


def found(resolver, name):
    return asyncio.run(resolver.resolve_lora("base", name))


def test_a_resolver_gives_what_lies_in_its_folder(folders, tmp_path):
    from vllm.plugins.lora_resolvers.filesystem_resolver import FilesystemResolver

    plain = FilesystemResolver(str(folders[0]))
    resolvers = [PackageResolver(folders[0]), *taking_packages([plain])]
    for resolver in resolvers:
        lora = found(resolver, "A")
        assert lora.lora_path == str(folders[0] / "A.xorz") and lora.lora_name.startswith("A@xorz-")
        names = (*HOSTILE, "A\ud800", "x" * 250, "\u00e4" * 125, "nobody", "team")
        assert {name: found(resolver, name) for name in names} == dict.fromkeys(names)
    # vLLM's own is as it was, for engines that serve no packages.
    assert found(plain, "A") is None
    assert without_packages(resolvers) == resolvers[1:]
    with pytest.raises(ValueError, match="holds 2 packages"):
        for name in ("a", "b"):
            (tmp_path / "two").mkdir(exist_ok=True)
            (tmp_path / "two" / f"{name}.xorz").write_bytes(b"")
        found(PackageResolver(tmp_path), "two")


def test_a_resolver_of_somebody_else_may_give_a_package(folders, monkeypatch):
    """And one that fails leaves the next ones their turn."""
    import xorz.vllm
    from vllm.entrypoints.openai.models.serving import OpenAIServingModels as Models
    from xorz.vllm.layers import XorzConfig

    xorz.vllm.register()
    asked = []

    class Theirs:
        def __init__(self, answer):
            self.answer = answer

        async def resolve_lora(self, base_model_name, lora_name):
            asked.append((base_model_name, lora_name))
            if isinstance(self.answer, Exception):
                raise self.answer
            return self.answer

    async def load(request):
        loaded[request.lora_name] = request.lora_path

    from vllm.lora.request import LoRARequest

    loaded, path = {}, str(folders[0] / "A.xorz")
    engine = SimpleNamespace(vllm_config=SimpleNamespace(quant_config=XorzConfig()))
    answers = [None, OSError("the bucket is closed"), LoRARequest("any", 7, path), ValueError("not asked")]
    server = SimpleNamespace(
        engine_client=engine,
        lora_requests=loaded,
        lora_resolvers=[Theirs(answer) for answer in answers],
        model_config=SimpleNamespace(model="base"),
        load_lora_adapter=load,
    )
    assert asyncio.run(Models.resolve_lora(server, "alice")) == path
    assert asked == [("base", "alice")] * 3 and os.path.exists(path)
    loaded.clear()
    server.lora_resolvers = server.lora_resolvers[:2]
    refused = asyncio.run(Models.resolve_lora(server, "alice"))
    assert refused.error.code == 400 and "the bucket is closed" in refused.error.message
    server.lora_resolvers = server.lora_resolvers[:1]
    assert asyncio.run(Models.resolve_lora(server, "alice")).error.code == 404
