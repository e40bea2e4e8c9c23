"""Promise: an adapter that leaves is forgotten when nobody needs it any more, and not while it is being loaded again;
a request takes nothing that a client is just loading."""

import asyncio
import threading
import time
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import engines
import models
import pytest
import xorz.vllm
from vllm.entrypoints.openai.models.protocol import BaseModelPath
from vllm.entrypoints.openai.models.serving import OpenAIServingModels
from vllm.entrypoints.serve.lora.protocol import LoadLoRAAdapterRequest
from vllm.lora.request import LoRARequest
from xorz.vllm import layers, manager, serving


class Engine:
    """What the server asks of an engine: it knows the adapters that it was told of, and reads when it may."""

    def __init__(self):
        self.vllm_config = SimpleNamespace(quant_config=layers.XorzConfig())
        self.model_config = self.renderer = self.input_processor = None
        self.output_processor = SimpleNamespace(request_states={})
        self.known, self.forgotten = set(), []
        self.reads, self.wrong = asyncio.Event(), ""
        self.reads.set()

    async def collective_rpc(self, method, args=()):
        adapter = args[0]
        if method == "xorz_prefetch":
            self.known.add(adapter)
        elif method == "xorz_prefetched":
            if adapter not in self.known:
                return ["it was forgotten"]
            return [self.wrong if self.reads.is_set() else None]
        else:
            assert method == "xorz_forget", method
            self.known.discard(adapter)
            self.forgotten.append(adapter)
        return [None]

    async def add_lora(self, lora):
        assert lora.lora_name in self.known
        return True


@pytest.fixture
def server(monkeypatch):
    """vLLM's own half of a server, over such an engine, and how to publish a package as `news`."""
    xorz.vllm.register()
    monkeypatch.setattr(serving, "GRACE_SECONDS", 0.2)

    def made():
        engine = Engine()
        out = OpenAIServingModels(engine, [BaseModelPath(name="base", model_path="base")])

        async def publish(name):
            path = str(models.tenant("llama", name, engines.FOLDER)[1])
            request = LoadLoRAAdapterRequest(lora_name="news", lora_path=path, load_inplace=True)
            return await out.load_lora_adapter(request)

        return engine, out, publish

    return made


def test_what_is_loaded_again_is_not_forgotten_meanwhile(server):
    async def story():
        engine, out, publish = server()
        for name in "AB":
            assert "Success" in await publish(name)
        first = xorz.vllm.request("news", models.tenant("llama", "A", engines.FOLDER)[1]).lora_name
        # The first one is on its way out. It is wanted again, and reading takes longer than nobody asks for it.
        engine.reads.clear()
        again = asyncio.create_task(publish("A"))
        await asyncio.sleep(0.6)
        assert engine.forgotten == [] and not again.done()
        engine.reads.set()
        answer = await again
        assert isinstance(answer, str) and "Success" in answer, answer
        second = xorz.vllm.request("news", models.tenant("llama", "B", engines.FOLDER)[1]).lora_name
        await asyncio.sleep(0.6)
        assert engine.forgotten == [second] and engine.known == {first}
        assert out.lora_requests["news"].lora_name == first

    asyncio.run(story())


def test_what_could_not_be_loaded_is_forgotten_unless_it_is_served(server):
    async def story():
        engine, out, publish = server()
        assert "Success" in await publish("A")
        engine.wrong = "it is damaged"
        answer = await publish("B")
        assert "it is damaged" in answer.error.message
        await asyncio.sleep(0.6)
        gone = xorz.vllm.request("news", models.tenant("llama", "B", engines.FOLDER)[1]).lora_name
        assert engine.forgotten == [gone] and out.lora_requests["news"].lora_name in engine.known

    asyncio.run(story())


class Loader:
    """Reads packages of one word: what they hold, and whether they are damaged."""

    generation = 0

    def load(self, path, content):
        text = Path(path).read_text()
        if "damaged" in text:
            raise ValueError("it is damaged")
        return SimpleNamespace(bytes=len(text), text=text)


@pytest.fixture
def worker():
    """A worker's half, which reads by `Loader`."""
    out = object.__new__(manager.XorzWorkerManager)
    out._reader, out._opening = ThreadPoolExecutor(1), threading.Lock()
    out._ahead, out._open = {}, OrderedDict()
    out._adapter_manager = SimpleNamespace(loader=Loader(), _registered_adapters=SimpleNamespace(cache={}))
    yield out
    out._reader.shutdown()


def read(worker, adapter):
    """What a client is told."""
    while (answer := worker.prefetched(adapter)) is None:
        time.sleep(0.01)
    return answer


@pytest.mark.parametrize("other", ["good", "damaged"])
def test_a_request_takes_nothing_that_a_client_is_loading_under_its_adapter_s_name(
    worker, tmp_path, other, monkeypatch
):
    """The adapter was evicted; an engine ends where it meets a package that is unfit."""
    taken = []
    monkeypatch.setattr(manager, "Adapter", lambda number, name, prepared: taken.append(prepared.text))
    mine, new = tmp_path / "mine", tmp_path / "new"
    mine.write_text("mine")
    new.write_text(other)
    adapter = "A@xorz-" + "0" * 32
    worker.prefetch(adapter, str(mine))
    assert read(worker, adapter) == ""
    worker._load_adapter(LoRARequest(adapter, 1, str(mine)))
    # Read when the request needs it: by its own file, and the client is told what is right for the other one.
    for _ in range(2):
        worker.prefetch(adapter, str(new))
        worker._load_adapter(LoRARequest(adapter, 1, str(mine)))
        said = read(worker, adapter)
        assert ("damaged" in said) == (other == "damaged") and "forgotten" not in said
    assert taken == ["mine"] * 3
    worker.forget(adapter)
    assert not worker._open and not worker._ahead
