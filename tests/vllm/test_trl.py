"""Promise: TRL's AsyncGRPOTrainer trains with `XorzWeightTransfer`: its first sync, which changes nothing, is taken, and at the
end the engine that it rolled out with says what a fresh engine over the trained model says.

`make test-trl` installs TRL beside vLLM for it. TRL's trainer asks for a GPU in two places: its attention is FlashAttention 3,
which it fetches from the Hub (`_flash_attn` in `trl/experimental/async_grpo/packing.py`), and it asks for the GPU's name
(`get_peak_flops_per_device` in `trl/trainer/utils.py`). Here torch's attention stands for the one, and nothing for the other.
"""

import inspect
import json
import shutil
from types import SimpleNamespace

import engines
import models
import pytest
import torch
import xorz
from engines import NEW, PROMPTS
from safetensors.torch import load_file, save_file
from test_server import OPTIONS, Server
from xorz.vllm.trl import XorzWeightTransfer

pytest.importorskip("trl", reason="trl is not installed: make test-trl installs it beside vLLM")

STEPS = 3


def even(completion_ids, **_):
    """The reward: the share of even tokens."""
    return [sum(token % 2 == 0 for token in ids) / max(1, len(ids)) for ids in completion_ids]


def attention(q, k, v, starts, ends, _most_q, _most_k, softmax_scale=None, causal=True, window_size=(-1, -1)):
    """What FlashAttention's function of this name gives for segments laid end to end, the last query at the last key."""
    assert causal and window_size == (-1, -1)
    out = []
    for (a, b), (c, d) in zip(
        *(list(zip(x[:-1].tolist(), x[1:].tolist(), strict=True)) for x in (starts, ends)), strict=True
    ):
        mask = torch.ones(b - a, d - c, dtype=torch.bool).tril(d - c - (b - a))
        each = (t.transpose(0, 1)[None] for t in (q[a:b], k[c:d], v[c:d]))
        said = torch.nn.functional.scaled_dot_product_attention(
            *each, attn_mask=mask, scale=softmax_scale, enable_gqa=True
        )
        out.append(said[0].transpose(0, 1))
    return torch.cat(out)


def test_it_is_what_trl_calls():
    from trl.experimental.async_distillation.async_distillation_trainer import WeightTransferProtocol as Other
    from trl.experimental.async_grpo.async_grpo_trainer import WeightTransferProtocol

    for protocol in (WeightTransferProtocol, Other):
        asked = {name: f for name, f in vars(protocol).items() if inspect.isfunction(f) and name[0] != "_"}
        assert set(asked) == {"init_weight_transfer", "pause", "send_weights", "resume", "destroy"}
        for name, function in asked.items():
            assert list(inspect.signature(getattr(XorzWeightTransfer, name)).parameters) == list(
                inspect.signature(function).parameters
            )


def test_a_run(tmp_path, monkeypatch):
    from datasets import Dataset
    from trl.chat_template_utils import qwen3_chat_template
    from trl.experimental.async_grpo import AsyncGRPOConfig, AsyncGRPOTrainer, async_grpo_trainer, packing

    monkeypatch.setattr(async_grpo_trainer, "get_peak_flops_per_device", lambda *_: None)
    monkeypatch.setattr(packing, "_flash_attn", lambda: SimpleNamespace(flash_attn_varlen_func=attention))
    base = tmp_path / "base"
    shutil.copytree(models.base("llama", engines.FOLDER), base)
    tokenizer = models.PreTrainedTokenizerFast.from_pretrained(base)
    # TRL parses answers by the templates that it knows.
    tokenizer.chat_template = qwen3_chat_template
    tokenizer.save_pretrained(base)
    monkeypatch.setenv("VLLM_SERVER_DEV_MODE", "1")
    # TRL asks for the model by its path.
    options = f'{OPTIONS} --weight-transfer-config {{"backend":"xorz"}} --served-model-name {base}'
    server = Server(base, tmp_path / "server.log", options=options, mode="exact")
    address = f"http://127.0.0.1:{server.port}"
    try:
        transfer = XorzWeightTransfer(base, tmp_path / "run", address)
        reports = []
        sent = transfer.send_weights

        def send(iterator):
            sent(iterator)
            reports.extend(transfer.reports)

        monkeypatch.setattr(transfer, "send_weights", send)
        config = AsyncGRPOConfig(
            output_dir=str(tmp_path / "out"),
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            per_device_train_batch_size=8,
            num_generations=4,
            max_completion_length=8,
            max_steps=STEPS,
            learning_rate=3e-3,
            token_budget=256,
            vllm_server_base_url=address,
            report_to=[],
            save_strategy="no",
        )
        prompts = [[{"role": "user", "content": text}] for text in PROMPTS * 4]
        trainer = AsyncGRPOTrainer(
            str(base),
            reward_funcs=even,
            args=config,
            train_dataset=Dataset.from_dict({"prompt": prompts}),
            weight_transfer=transfer,
        )
        trainer.train()
        assert transfer.publisher is None and transfer.number == STEPS + 1
        assert [report["version"] for report in reports] == [str(n) for n in range(1, STEPS + 2)]
        assert reports[0]["changed"] == 0 and all(report["changed"] > 0 for report in reports[1:])
        assert json.loads(server.get("/weight_info")) == {"weight_version": str(STEPS + 1)}
        got = [server.complete(str(base), prompt, tokens=NEW) for prompt in PROMPTS]
    finally:
        server.stop()
    final = tmp_path / "final"
    shutil.copytree(base, final)
    trained = {n: p.detach().to(torch.bfloat16) for n, p in trainer.model.named_parameters()}
    save_file(trained, final / "model.safetensors", metadata={"format": "pt"})
    before = load_file(base / "model.safetensors")
    chain = xorz.Versions(before, tmp_path / "run")
    for name, words in chain.state_dict(STEPS + 1).items():
        assert torch.equal(words.view(torch.int16), trained[name].view(torch.int16)), name
    assert any(not torch.equal(before[name], trained[name]) for name in trained)
    old, new = engines.references([base, final])
    assert got == [said.tokens for said in new] and got != [said.tokens for said in old]
