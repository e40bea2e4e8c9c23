"""Promise: vLLM's own trainer interface brings a model under training, fp32 masters of it, into the engine, step after step, as
vLLM would load it from a checkpoint; a step that an engine has missed is made up by the next.
"""

import shutil

import engines
import models
import pytest
import torch
import xorz
from engines import PROMPTS, ask
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM
from vllm.distributed.weight_transfer.base import ModuleSource
from vllm.distributed.weight_transfer.factory import WeightTransferTrainerFactory
from xorz.vllm.client import UpdateError, update
from xorz.vllm.trainer import XorzTrainerInitInfo


class Client:
    """vLLM's protocol, over an engine in this process."""

    def __init__(self, llm):
        self.llm, self.down = llm, False

    def init_weight_transfer_engine(self, info):
        self.llm.init_weight_transfer_engine({"init_info": info})

    def start_weight_update(self):
        if self.down:
            raise ConnectionError("the engine is not there")
        self.llm.start_weight_update()

    def update_weights(self, info):
        self.llm.update_weights({"update_info": info})

    def finish_weight_update(self, weight_version=None):
        self.llm.finish_weight_update(weight_version)


@pytest.mark.parametrize("trust", ["digest", "sha256"])
def test_a_model_under_training(tmp_path, trust):
    base = models.base("llama", engines.FOLDER)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    llm = engines.engine(base, weight_transfer_config={"backend": "xorz"})
    try:
        client = Client(llm)
        init = XorzTrainerInitInfo(str(base), str(tmp_path / "run"), rank=0, trust=trust)
        trainer = WeightTransferTrainerFactory.trainer_init(init, client=client, source=ModuleSource(model))
        optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
        said = [[s.tokens for s in ask(llm, PROMPTS)]]
        for step in range(4):
            tokens = torch.randint(
                0, models.VOCABULARY, (2, 32), generator=torch.Generator().manual_seed(step)
            )
            model(tokens, labels=tokens).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            client.down = step == 1
            if client.down:
                with pytest.raises(ConnectionError):
                    trainer.send_weights()
                assert [s.tokens for s in ask(llm, PROMPTS)] == said[-1]
                continue
            trainer.send_weights()
            assert llm.get_weight_version() == str(step + 1) and trainer.number == step + 1
            said.append([s.tokens for s in ask(llm, PROMPTS)])
        for step in (1, 3):
            entries = xorz.inspect(trainer.publisher.versions.path(step))["entries"]
            assert {"base_sha256" in e for e in entries} == {trust == "sha256"}
        # What the trainer keeps to, its engines do.
        if trust == "sha256":
            old, new = (trainer.publisher.versions.state_dict(n) for n in (4, 3))
            xorz.pack(old, new, tmp_path / "step.xorz")
            with pytest.raises(UpdateError, match="no sha256 of the base's"):
                update(llm, tmp_path / "step.xorz")
        assert len({str(s) for s in said}) == len(said)
        # As vLLM loads it, from files that nobody of xorz has written.
        folder = tmp_path / "final"
        shutil.copytree(base, folder, ignore=shutil.ignore_patterns("*.safetensors", "done"))
        state = {name: param.detach().to(torch.bfloat16) for name, param in model.named_parameters()}
        save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
        served = llm.llm_engine.model_executor.driver_worker.worker.get_model()
        before = {name: param.data.clone() for name, param in served.named_parameters()}
        llm.collective_rpc("reload_weights", kwargs={"weights_path": str(folder)})
        for name, param in served.named_parameters():
            assert torch.equal(param.data.view(torch.int16), before[name].view(torch.int16)), name
        assert [s.tokens for s in ask(llm, PROMPTS)] == said[-1]
        trainer.shutdown()
    finally:
        engines.stop(llm)


def test_it_needs_a_source(tmp_path):
    init = XorzTrainerInitInfo("base", str(tmp_path), rank=0)
    with pytest.raises(ValueError, match="needs a source of weights"):
        WeightTransferTrainerFactory.trainer_init(init, client=None)
