"""Promise: `python -m xorz.gpu_check --vllm` says where an engine's answers are not those of its tenants' whole models, beside
float64 and beside plain engines. Engines are doubles here, in transformers; vLLM's are in `tests/vllm/test_engine_check.py`.
"""

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from xorz.gpu_check import __main__ as gpu_check
from xorz.gpu_check import serving
from xorz.gpu_check.answers import PLAINLY, compared, judged
from xorz.gpu_check.family import BASE, TUNES, Family
from xorz.gpu_check.report import Report

transformers = pytest.importorskip("transformers")
CPU = torch.device("cpu")


def said(folder, prompt, dtype):
    """Eight greedy tokens, and the log-probability of each token but the first."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
    given = torch.tensor([prompt])
    options = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    out = model.generate(given, attention_mask=torch.ones_like(given), **options)
    of_all = model(out).logits[0, :-1].float().log_softmax(-1)
    return out[0, len(prompt) :].tolist(), of_all.gather(-1, out[0, 1:, None])[:, 0].tolist()


class Double(serving.Engines):
    """Engines in transformers: plain ones in bf16; those with tenants in float32, which is other sums of the same words."""

    known: ClassVar[dict] = {}
    wrong: ClassVar[dict] = {}
    memory: ClassVar[dict] = {}
    graphs = "FULL_AND_PIECEWISE"
    device_of_vllm = "cpu"
    found_in_cache = 32

    def _answer(self, words, asked, prompt, dtype, scored):
        """What the model of the words `words` says to who asks for those of `asked`."""
        key = self.family.kind, words, prompt, dtype
        if key not in self.known:
            self.known[key] = said(self.family.folders[words], self.prompts[prompt], dtype)
        tokens, logprobs = self.known[key]
        end = len(self.prompts[prompt]) - 1
        return {
            "words": asked,
            "prompt": prompt,
            "tokens": tokens,
            "logprobs": logprobs[end:],
            "prompt_logprobs": logprobs[:end] if scored else None,
            "cached": 0 if scored else self.found_in_cache,
        }

    def answer(self, way, words, packages):
        plain = packages is None
        whose = [words] if plain else [BASE, *packages]
        dtype = torch.bfloat16 if plain else torch.float32
        phases = {}
        for phase, scored in (("together", True), ("from the prefix cache", False))[: 1 if plain else 2]:
            phases[phase] = [
                self._answer(w if plain else self.wrong.get(w, w), w, i, dtype, scored)
                for i in range(len(self.prompts))
                for w in whose
            ]
        for phase, words in (("after an update in place", way.update), ("after it was rolled back", BASE)):
            if way.update and not plain:
                served = self.wrong.get(phase, words)
                phases[phase] = [
                    self._answer(served, words, i, dtype, True) for i in range(len(self.prompts))
                ]
        memory = {"before": [None], "after": [None], "deltas": [0]} | ({} if plain else self.memory)
        facts = {"device": self.device_of_vllm, "graphs": self.graphs, "second_runner": False}
        return {"phases": phases, "memory": memory, "rates": {}, "facts": facts}


@pytest.fixture(scope="module")
def kin(tmp_path_factory):
    with torch.no_grad():
        return Family("qwen3", tmp_path_factory.mktemp("qwen3"), quick=True)


@pytest.fixture(scope="module")
def reference(kin):
    with torch.no_grad():
        return serving.Reference(Double(kin, CPU, True, 60, False), dict.fromkeys(kin.folders, WAY))


WAY = serving.Way("a double", {}, {})


def judge(kin, reference, way=WAY, **wrong):
    """The checks of an engine that does something wrong."""
    report, engines = Report("CPU"), Double(kin, CPU, True, 60, False)
    for name, value in wrong.items():
        setattr(engines, name, value)
    with torch.no_grad():
        report.attempt("a double", lambda r: serving.check_served(r, engines, reference, way))
    return report


def failed(report):
    return {check["check"].split(": ")[-1]: check["wrong"] for check in report.checks if not check["passed"]}


def test_an_engine_that_serves_everybody_their_own_passes(kin, reference):
    report = judge(kin, reference)
    assert report.passed and len(report.checks) == 3, report.checks
    first = report.checks[0]
    assert first["tenants"] == [BASE, *TUNES] and first["answers"] == 12
    # All of its tokens, those of prompts but the first and those of answers.
    assert first["tokens"] == 4 * sum(n + 7 for n in (9, 40, 100))
    assert 0 < first["from_plain"] < first["from_plain_bound"] == PLAINLY * reference.scale.furthest
    assert first["from_others"] > 2 * first["from_others_bound"]


@pytest.mark.parametrize(
    "wrong",
    [
        {"sparse": "all"},
        {"sparse": BASE},
        {BASE: "sparse"},
        dict.fromkeys(TUNES, BASE),
        dict(zip(TUNES, TUNES[1:] + TUNES[:1], strict=True)),
    ],
    ids=["another's", "the base's", "a tenant's for the base", "the base for all", "each the next one's"],
)
def test_whoever_is_served_as_another_one_fails(kin, reference, wrong):
    found = failed(judge(kin, reference, wrong=wrong))
    assert set(found) == {"together", "from the prefix cache"}
    for why in found.values():
        assert "from float64 of" in why and any(f"({words}, prompt of" in why for words in wrong), why
        assert "from another model's answer, less than" in why


@pytest.mark.parametrize(
    "phase, served", [("after an update in place", BASE), ("after it was rolled back", "all")]
)
def test_a_base_that_was_not_updated_or_not_rolled_back_fails(kin, reference, phase, served):
    way = serving.Way("a double", {}, {}, update="all")
    assert judge(kin, reference, way).passed
    assert set(failed(judge(kin, reference, way, wrong={phase: served}))) == {phase}


def test_a_mixture_s_experts_are_told_apart(tmp_path):
    with torch.no_grad():
        mixture = Family("mixtral", tmp_path, quick=True)
        reference = serving.Reference(
            Double(mixture, CPU, True, 60, False), dict.fromkeys(mixture.folders, WAY)
        )
        assert judge(mixture, reference).passed
        assert set(failed(judge(mixture, reference, wrong={"sparse": "all"}))) == {
            "together",
            "from the prefix cache",
        }
        off = dict(mixture.left_out("sparse", mixture.prompts((40,))[0]))
    stacks = [name for name in off if "experts" in name]
    assert len(stacks) == 2 * 2 * 4 and all(float(by.abs().max()) > 0 for by in off.values())
    assert any(name.endswith("mlp.gate.weight") for name in off)


@pytest.mark.parametrize(
    "tensor", ["layers.1.mlp.down_proj", "layers.0.self_attn.k_proj", "layers.0.input_layernorm"]
)
def test_one_tensor_that_is_the_base_s_fails(kin, reference, monkeypatch, tensor):
    real = transformers.AutoModelForCausalLM.from_pretrained

    def lacking(path, dtype):
        out = real(path, dtype=dtype)
        if path == kin.folders["all"] and dtype is torch.float32:
            at = f"model.{tensor}.weight"
            out.get_parameter(at).copy_(real(kin.folders[BASE], dtype=dtype).get_parameter(at))
        return out

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", lacking)
    monkeypatch.setattr(Double, "known", {})
    assert "together" in failed(judge(kin, reference))


def answers_of(kin, engines, change):
    """The plain engine's own answers, changed."""
    out = [dict(answer) for answer in engines.plain.values() if answer["words"] == "all"]
    for answer in out:
        change(answer)
    return judged(compared(kin, kin.prompts((9, 40, 100)), out, engines.plain), engines.scale)


def test_a_single_log_probability_counts(kin, reference):
    def one(by):
        def change(answer):
            if answer["prompt"] == 2:
                answer["logprobs"] = [
                    *answer["logprobs"][:3],
                    answer["logprobs"][3] + by,
                    *answer["logprobs"][4:],
                ]

        return change

    with torch.no_grad():
        assert answers_of(kin, reference, lambda answer: None) is None
        for by in (4 * reference.scale.furthest, -4 * reference.scale.furthest, math.nan, -math.inf):
            why = answers_of(kin, reference, one(by))
            # 99 of the prompt come before.
            assert (
                "from float64" in why
                and "from the plain engine" in why
                and "all, prompt of 100, token 102" in why
            )


def test_many_small_errors_count(kin, reference):
    """Each within the bound of one, and all together more than rounding."""
    by = 0.9 * reference.scale.furthest

    def change(answer):
        if answer["prompt"] == 2:
            answer["prompt_logprobs"] = [p + by * (-1) ** i for i, p in enumerate(answer["prompt_logprobs"])]

    with torch.no_grad():
        assert "all: root mean square" in answers_of(kin, reference, change)


def test_a_token_that_is_not_the_likeliest_counts(kin, reference):
    def change(answer):
        if answer["prompt"] == 1:  # with its right log-probability
            answer["tokens"] = [*answer["tokens"][:-1], 5]
            exact, _ = kin.exact("all", kin.prompts((9, 40, 100))[1] + answer["tokens"])
            answer["logprobs"] = [*answer["logprobs"][:-1], float(exact[-1])]

    with torch.no_grad():
        why = answers_of(kin, reference, change)
    assert "less likely than the best one of" in why and "from float64" not in why


def test_what_else_can_be_wrong(kin, reference):
    cached = failed(judge(kin, reference, found_in_cache=0))
    assert "were not found in the prefix cache" in cached["from the prefix cache"]
    left = failed(judge(kin, reference, memory={"deltas": [0, 64]}))
    assert "[64] bytes of deltas are left" in left["tenants that went have left nothing"]
    elsewhere = judge(kin, reference, device_of_vllm="cuda")
    assert "RuntimeError: this vLLM ran on cuda, not on cpu" in elsewhere.checks[0]["wrong"]


def test_memory_of_a_gpu_may_grow_as_a_plain_engine_s_does(kin, reference, monkeypatch):
    monkeypatch.setattr(reference, "grown", [1 << 20])
    for grows, passes in ((2 << 20, True), (4 << 20, False)):
        report = judge(
            kin, reference, memory={"before": [5 << 20, 5 << 20], "after": [5 << 20, (5 << 20) + grows]}
        )
        assert report.passed == passes and not report.left_out
        assert report.checks[-1]["check"].endswith("the GPU's memory does not grow after the first answers")


def test_what_a_fine_tune_has_changed(kin):
    from safetensors.torch import load_file

    words = {name: load_file(path / "model.safetensors") for name, path in kin.folders.items()}
    shares = {
        name: {key: float((words[name][key] != w).double().mean()) for key, w in words[BASE].items()}
        for name in TUNES
    }
    matrices = [key for key, w in words[BASE].items() if w.dim() > 1]
    assert all(0.005 < shares["sparse"][key] < 0.015 for key in matrices)
    assert all(shares["all"][key] > 0.9 for key in matrices)
    changed = {key for key in matrices if shares["vectors"][key]}
    assert changed == {"model.embed_tokens.weight", "lm_head.weight"}
    assert all(shares["vectors"][key] for key in words[BASE] if key not in matrices)
    # What is said to be noticed is computed of the same models: none is the fine-tune as it is.
    with torch.no_grad():
        off = dict(kin.left_out("vectors", kin.prompts((40,))[0]))
        again, _ = kin.exact("vectors", kin.prompts((40,))[0])
        model = transformers.AutoModelForCausalLM.from_pretrained(kin.folders["vectors"], dtype=torch.float64)
        told = model(torch.tensor([kin.prompts((40,))[0]])).logits[0, :-1].log_softmax(-1)
    assert set(off) == {key for key, share in shares["vectors"].items() if share}
    assert all(float(by.abs().max()) > 0 for by in off.values())
    assert torch.equal(told.gather(-1, torch.tensor(kin.prompts((40,))[0][1:])[:, None])[:, 0], again)


def ways(device, **options):
    made, left = serving.ways_of(
        torch.device(device), options.get("quick", False), options.get("graphs", True)
    )
    return {way.name: way for way in made}, left


def test_on_a_gpu_graphs_of_both_kinds_are_tried():
    """No GPU is here: only what would be asked for."""
    made, left = ways("cuda")
    assert (
        list(made)
        == [
            "eager, deterministic",
            "eager, exact",
            "piecewise graphs",
            "vLLM's default graphs",
        ]
        and not left
    )
    assert made["eager, exact"].xorz == {"mode": "exact"} and made["eager, exact"].update == "all"
    assert made["eager, deterministic"].settings["enforce_eager"]
    assert "enforce_eager" not in made["vLLM's default graphs"].settings
    assert made["piecewise graphs"].settings["compilation_config"] == {"cudagraph_mode": "PIECEWISE"}
    assert all(way.settings["enforce_eager"] for way in ways("cuda", graphs=False)[0].values())
    made, left = ways("cpu")
    assert (
        list(made) == ["eager, deterministic", "eager, exact", "fast"]
        and "CUDA graphs: the CPU has none" in left
    )


def test_both_model_runners_and_two_devices_are_tried_where_there_are_any(monkeypatch):
    report, default = Report("a double"), serving.Way("d", {"max_loras": 3}, {}, timed=True)
    monkeypatch.setattr(serving.importlib.util, "find_spec", lambda name: None)
    assert serving.other_runner(report, default, {"second_runner": False}) is None
    assert "it needs Triton" in report.left_out[0]
    monkeypatch.setattr(serving.importlib.util, "find_spec", lambda name: name)
    for chosen, other in ((False, "1"), (True, "0")):
        way = serving.other_runner(report, default, {"second_runner": chosen})
        assert way.environment == {"VLLM_USE_V2_MODEL_RUNNER": other} and not way.timed
    gpu = torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert serving.on_two(report, gpu, default) is None and "there are not two GPUs" in report.left_out[1]
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert serving.on_two(report, gpu, default).settings == {"max_loras": 3, "tensor_parallel_size": 2}
    # The GPU that is asked for comes first, and is the one of an engine on one.
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    seen = serving.environment(torch.device("cuda:1"), Path(), plain=True)
    assert seen["CUDA_VISIBLE_DEVICES"] == "1,0" and seen["VLLM_PLUGINS"] == ""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,3")
    assert serving.environment(torch.device("cuda:1"), Path(), plain=False)["CUDA_VISIBLE_DEVICES"] == "3,5"


def test_graphs_that_vllm_did_not_make_were_not_tried():
    report = Report("a double")
    default, eager = serving.Way("d", {}, {}), serving.Way("e", {"enforce_eager": True}, {})
    piecewise = serving.Way("p", {"compilation_config": {"cudagraph_mode": "PIECEWISE"}}, {})
    for way, made in ((default, "FULL_AND_PIECEWISE"), (piecewise, "PIECEWISE"), (eager, "NONE")):
        serving.check_graphs(report, way.name, way, {"device": "cuda", "graphs": made})
    assert report.left_out == []
    serving.check_graphs(report, "d", default, {"device": "cuda", "graphs": "PIECEWISE"})
    assert report.left_out == ["d: graphs of FULL_AND_PIECEWISE: vLLM has made PIECEWISE"]
    # Of a mixture none are full.
    serving.check_graphs(report, "m", default, {"device": "cuda", "graphs": "PIECEWISE"}, True)
    assert len(report.left_out) == 1
    serving.check_graphs(report, "m", default, {"device": "cuda", "graphs": "FULL_AND_PIECEWISE"}, True)
    assert report.left_out[1] == "m: graphs of PIECEWISE: vLLM has made FULL_AND_PIECEWISE"


def test_the_whole_of_it(tmp_path, monkeypatch, capsys):
    class Short(Double):
        def answer(self, way, words, packages):
            self.prompts = self.family.prompts((9, 40, 100))
            self.asked.append((self.family.kind, way.name, words, packages is None, way.update))
            return super().answer(way, words, packages)

        asked: ClassVar[list] = []

    monkeypatch.setattr(serving, "Engines", Short)
    monkeypatch.setattr(gpu_check, "cannot_serve", lambda: None)
    found = tmp_path / "found.json"
    given = ["--vllm", "--device", "cpu", "--quick", "--json", str(found), "--folder", str(tmp_path / "kept")]
    assert gpu_check.main(given) == 0
    # One after another: each whole model without xorz, then all tenants at once.
    whole = [(BASE, "fast"), *((words, "eager, deterministic") for words in TUNES)]
    assert [(*asked[:4], asked[4] * (not asked[3])) for asked in Short.asked] == [
        *(("qwen3", way, words, True, "") for words, way in whole),
        ("qwen3", "eager, deterministic", BASE, False, ""),
        ("qwen3", "eager, exact", BASE, False, "all"),
        ("qwen3", "fast", BASE, False, ""),
        *(("mixtral", way, words, True, "") for words, way in whole),
        ("mixtral", "eager, deterministic", BASE, False, "all"),
        ("mixtral", "fast", BASE, False, ""),
    ]
    said, told = capsys.readouterr().out, json.loads(found.read_text())
    assert told["passed"] and len(told["checks"]) == 19 and "19 checks, 0 failed, 7 left out" in said
    assert {"from_plain", "from_plain_bound", "tenants"} < set(told["checks"][0])
    assert "of 61 tensors that tenants have changed 61 would be noticed, if that one" in said
    assert "mixtral: of 73 tensors that tenants have changed 73 would be noticed" in said
    assert (tmp_path / "kept" / "qwen3" / "sparse.xorz").exists()
    monkeypatch.setattr(Short, "wrong", {"vectors": "sparse"})
    given[-1] = str(tmp_path / "again")
    assert gpu_check.main(given) == 1
    assert "FAIL qwen3, fast: together" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        gpu_check.main(given)
    assert "again is there already" in capsys.readouterr().err
    # What there is no time for is left out, and what ends with an error fails.
    monkeypatch.setattr(Short, "wrong", {})
    given = [*given[:-2], "--minutes", "-1"]
    assert gpu_check.main(given) == 1  # nothing was compared
    assert "left out: qwen3, fast: -1 minutes are over" in capsys.readouterr().out


def test_an_engine_that_does_not_start_says_why(kin, monkeypatch):
    engines = serving.Engines(kin, CPU, True, 60, False)
    monkeypatch.setattr(serving.sys, "executable", "false")
    with pytest.raises(RuntimeError, match="the engine ended with exit code 1"):
        engines.answer(WAY, BASE, None)


def test_what_an_engine_ended_with_is_its_last_error(tmp_path):
    log = tmp_path / "log.txt"
    log.write_text(
        "(Main pid=1) WARNING [base.py:380] ValueError: no tokenizer\nTraceback:\nKeyError: 'a'\n"
        "(Worker pid=2) ERROR RuntimeError: xorz: 'alice' does not fit\n\n  File x\nshutting down\nbye\n"
    )
    assert serving.end_of(log) == (
        "(Worker pid=2) ERROR RuntimeError: xorz: 'alice' does not fit | File x | shutting down | bye"
    )


def test_where_there_is_no_vllm_it_says_so(capsys):
    if serving.cannot_serve() is None:
        pytest.skip("vLLM is here")
    assert gpu_check.main(["--vllm", "--device", "cpu"]) == 2
    assert "--vllm runs in the Python that has vLLM; this one has no vllm" in capsys.readouterr().err
    done = subprocess.run(
        [sys.executable, "-m", "xorz.gpu_check", "--vllm", "--device", "cpu"], capture_output=True, text=True
    )
    assert done.returncode == 2 and not done.stdout
