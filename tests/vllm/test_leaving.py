"""Promise: an adapter that leaves is forgotten when nobody needs it any more, and not while it is being loaded again."""

import asyncio
from types import SimpleNamespace

import engines
import models
import pytest
import xorz.vllm
from vllm.entrypoints.openai.models.protocol import BaseModelPath
from vllm.entrypoints.openai.models.serving import OpenAIServingModels
from vllm.entrypoints.serve.lora.protocol import LoadLoRAAdapterRequest
from xorz.vllm import layers, serving


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
