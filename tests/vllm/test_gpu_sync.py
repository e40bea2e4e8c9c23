"""Promise: on a GPU an engine's base is updated in place by packages as it is on the CPU: after a step, a jump within a folder
and a rollback its parameters have, bit for bit, the words that its own loader makes of that version's file, where they were, so
that graphs which were captured before compute with them; what does not fit, or fails, leaves the version before and its
tenants; layers that may keep weights in another form than their parameters are refused by name when the engine starts.

vLLM's own models and layers, on the double of a GPU of tests/python, with and without `--quantization xorz` and tenants.
"""

import gpu_double
import models
import on_gpu
import pytest
import runs
import torch
import xorz
import xorz.vllm
from engines import FOLDER
from gpu_double import CUDA, Graph, OnGpu, to_gpu
from on_gpu import KINDS, ROWS, Runner, config_of, plain, said
from safetensors.torch import load_file
from torch import nn
from torch.utils._python_dispatch import _disable_current_modes
from xorz import _ops
from xorz.vllm import in_place, sync, update

alone, gpu = on_gpu.alone, on_gpu.gpu
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="a double of a GPU, beside a real one")
TRANSFER = {"weight_transfer_config": {"backend": "xorz"}}


@pytest.fixture(scope="module", params=KINDS)
def run(request, alone):
    """The versions' folders and their chain; the model that a loader has filled, on the CPU, and what it says, by version."""
    paths, chain = runs.run(request.param, FOLDER)
    twin, _ = plain(request.param)
    logits = []
    with torch.no_grad():
        for path in paths:
            twin.load_weights(iter(load_file(path / "model.safetensors").items()))
            logits.append(said(twin).float())
    return request.param, paths, chain, twin, logits


class Engine:
    """A model on the device and the part of the engine that updates it, driven as vLLM's worker drives it."""

    def __init__(self, monkeypatch, run, how="tenants", **own) -> None:
        self.kind, self.paths, self.chain, self.twin, self.logits = run
        followed = sync.plan

        # As in `Runner`: the double's parameters lack what loaders look for.
        def planned(_model, tensors):
            with _disable_current_modes():
                return followed(self.twin, tensors)

        monkeypatch.setattr(sync, "plan", planned)
        self.runner = None
        if how == "tenants":
            self.runner = Runner(monkeypatch, self.kind, **TRANSFER, **own)
            self.config, self.model = self.runner.config, self.runner.model
        else:
            settings = TRANSFER | {"enable_lora": False}
            if how == "vLLM's own":
                settings["quantization"] = None
                as_on_cuda(monkeypatch)
            self.config = config_of(self.paths[0], **settings)
            self.model = to_gpu(on_gpu.model_of(self.paths[0], **settings))
        self.sync = sync.XorzWeightTransferEngine(
            self.config.weight_transfer_config, self.config, CUDA, self.model
        )
        self.init(keep=2)

    def init(self, **info) -> None:
        self.sync.init_transfer_engine(self.sync.parse_init_info(info))

    def receive(self, **info) -> None:
        self.sync.start_weight_update()
        self.sync.update_weights(info)

    def finish(self) -> None:
        self.sync.finish_weight_update()
        if self.runner is not None:
            self.runner.mixin.reset_lora_state()
        else:
            self.sync.base_replaced()

    def to(self, number, **info) -> None:
        self.receive(**(info or {"source": str(self.chain), "version": number}))
        self.finish()
        assert self.sync.version == str(number)

    def words(self):
        return {name: param.words.clone() for name, param in self.model.named_parameters()}

    def has(self, number) -> bool:
        """Whether the words are those of a version's own file."""
        with _disable_current_modes(), torch.no_grad():
            self.twin.load_weights(iter(load_file(self.paths[number] / "model.safetensors").items()))
            wanted = dict(self.twin.named_parameters())
            return wanted.keys() == self.words().keys() and all(
                torch.equal(update.bits(words), update.bits(wanted[name].data))
                for name, words in self.words().items()
            )

    def says(self, out, number) -> bool:
        """Whether logits are a version's, and no other one's."""
        far = [(out.words.float() - logits).abs().max() for logits in self.logits]
        others = min(distance for n, distance in enumerate(far) if n != number)
        return bool(far[number] < 0.1 * others)


def as_on_cuda(monkeypatch) -> None:
    """vLLM's own layers keep their words on CUDA, and multiply by them; its package for the CPU repacks them."""
    from vllm.model_executor.layers import linear, vocab_parallel_embedding
    from vllm.model_executor.layers.utils import default_unquantized_gemm

    for module in (linear, vocab_parallel_embedding):
        monkeypatch.setattr(module, "dispatch_unquantized_gemm", lambda *_: default_unquantized_gemm)
    for cls in (linear.UnquantizedLinearMethod, vocab_parallel_embedding.UnquantizedEmbeddingMethod):
        monkeypatch.setattr(cls, "process_weights_after_loading", lambda self, layer: None)


@pytest.mark.parametrize("how", ["tenants", "no tenants", "vLLM's own"])
def test_steps_jumps_and_rollbacks_are_read_by_a_graph_that_was_captured_before(run, gpu, monkeypatch, how):
    made = Engine(monkeypatch, run, how)
    places = {name: p.data_ptr() for name, p in made.model.named_parameters()}
    ids, rows = OnGpu(on_gpu.IDS.clone()), OnGpu(on_gpu.PLACES.clone())
    if made.runner is not None:
        graph, out = made.runner.captured()
    else:
        with Graph() as graph:
            out = said(made.model, ids, rows)
    graph.replay()
    assert made.has(0) and made.says(out, 0)

    def is_at(number):
        graph.replay()
        assert made.has(number) and made.says(out, number)
        assert {name: p.data_ptr() for name, p in made.model.named_parameters()} == places

    for number in (1, 2):
        made.receive(source=str(made.chain), version=number)
        is_at(number - 1)  # nothing has changed
        made.finish()
        is_at(number)
        report = made.sync.report
        assert 0.01 < report.changed / report.words < 0.05 and report.held > 0
    made.to(4)  # a jump
    is_at(4)
    made.to(2, rollback=True)
    is_at(2)
    made.to(1, rollback=True)
    is_at(1)
    made.to(0)  # a jump back
    is_at(0)
    step = xorz.Versions(load_file(made.paths[0] / "model.safetensors"), made.chain).path(1)
    made.to("one", source=str(step), version="one", digest=xorz.vllm.digest(step))
    is_at(1)


def test_tenants_of_the_base_before_are_gone_and_those_of_the_next_are_served(run, gpu, monkeypatch):
    made = Engine(monkeypatch, run)
    runner = made.runner
    graph, out = runner.captured()
    runner.load("A")
    runner.set(["A", None] * (ROWS // 2))
    graph.replay()
    assert runner.wrong(out, ["A", None] * (ROWS // 2)) == []
    made.to(1)
    assert not runner.worker.list_adapters()
    runner.set([None] * ROWS)
    graph.replay()
    assert made.says(out, 1)
    with pytest.raises(ValueError, match=r"is not made of the words of .* replaced after loading"):
        runner.load("A")
    made.to(0, rollback=True)
    runner.load("A")
    runner.set(["A", None] * (ROWS // 2))
    graph.replay()
    assert runner.wrong(out, ["A", None] * (ROWS // 2)) == []


def test_prepared_in_a_thread_while_steps_are_asked(run, gpu, monkeypatch):
    made = Engine(monkeypatch, run)
    graph, out = made.runner.captured()
    info = {"source": str(made.chain), "version": 1}
    assert made.sync.prepare(info)
    while made.sync.prepared() is None:
        graph.replay()
        assert made.says(out, 0)
    assert made.sync.prepared() == ""
    ready = made.sync._prepared
    made.receive(**info)
    assert made.sync._next is ready  # it was not read again
    made.finish()
    graph.replay()
    assert made.has(1) and made.says(out, 1)


def test_words_are_trusted_by_their_sha256_there_too(run, gpu, monkeypatch, tmp_path):
    made = Engine(monkeypatch, run)
    old, new, third = (load_file(path / "model.safetensors") for path in made.paths[:3])
    name = "model.layers.0.mlp.down_proj.weight"
    changed = {n: new[n] if n == name else old[n] for n in old}
    xorz.pack(old, changed, tmp_path / "1.xorz", trust="sha256")
    for forged in ("model.norm.weight", name):
        path = runs.forged(tmp_path / "1.xorz", forged, tmp_path / "forged.xorz")
        made.init(trust="sha256")
        with pytest.raises(ValueError, match=f"tensor `{forged}`: .*sha256"):
            made.receive(source=str(path))
    with _disable_current_modes():
        xorz.pack(old, third, tmp_path / "plain.xorz")
    with pytest.raises(ValueError, match="sha256"):
        made.receive(source=str(tmp_path / "plain.xorz"))
    assert made.has(0)
    made.to("one", source=str(tmp_path / "1.xorz"), version="one")
    with _disable_current_modes(), torch.no_grad():
        made.twin.load_weights(iter(changed.items()))
        wanted = dict(made.twin.named_parameters())
        assert all(torch.equal(update.bits(w), update.bits(wanted[n].data)) for n, w in made.words().items())


def test_what_does_not_fit_changes_nothing(run, gpu, monkeypatch, tmp_path):
    made = Engine(monkeypatch, run)
    versions = xorz.Versions(load_file(made.paths[0] / "model.safetensors"), made.chain)
    before = made.words()
    wrong = {
        "a later step": (
            dict(source=str(versions.path(3))),
            "tensor .* digest .*; the update must be a step",
        ),
        "no such version": (dict(source=str(made.chain), version=9), "there is no version 9"),
        "served": (dict(source=str(made.chain), version=0), "version 0 is served already"),
        "nothing kept": (dict(rollback=True), "the version before is not kept"),
    }
    for info, text in wrong.values():
        with pytest.raises((ValueError, KeyError), match=text):
            made.receive(**info)
        with pytest.raises(ValueError, match="nothing was received"):
            made.sync.finish_weight_update()
    after = made.words()
    assert all(torch.equal(before[n], after[n]) for n in before) and made.has(0)
    # A word of another tensor than those that change, and one that torch has not seen.
    name = "model.norm.weight"
    norm = dict(made.model.named_parameters())[name]
    made.receive(source=str(made.chain), version=1)
    norm.words[3] += 1
    with pytest.raises(ValueError, match=rf"`{name}`, rows 0 to 128: the words have digest \w+, .* for \w+"):
        made.sync.finish_weight_update()
    norm.words.copy_(before[name])
    assert made.has(0) and made.sync.took_back and made.sync.version == "0"
    made.to(1)
    assert made.has(1)


@pytest.mark.parametrize("fails", [0, 7])
def test_a_failure_half_way_leaves_the_version_before_and_its_tenants(run, gpu, monkeypatch, fails):
    made = Engine(monkeypatch, run)
    made.runner.load("A")
    plain_op, calls = _ops.delta_apply_, []

    def failing(weight, delta):
        calls.append(1)
        if len(calls) == fails + 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return plain_op(weight, delta)

    made.receive(source=str(made.chain), version=1)
    monkeypatch.setattr(_ops, "delta_apply_", failing)
    with pytest.raises(RuntimeError, match="out of memory"):
        made.sync.finish_weight_update()
    monkeypatch.setattr(_ops, "delta_apply_", plain_op)
    assert made.has(0) and made.sync.took_back and made.sync.version == "0"
    made.runner.set(["A"] * ROWS)
    assert made.runner.wrong(made.runner.step(), ["A"] * ROWS) == []
    made.to(1)
    assert made.has(1)


def test_what_cannot_be_taken_back_is_said(run, gpu, monkeypatch):
    made = Engine(monkeypatch, run)
    plain_op, calls = _ops.delta_apply_, []

    def failing(weight, delta):
        calls.append(1)
        if len(calls) > 4:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return plain_op(weight, delta)

    made.receive(source=str(made.chain), version=1)
    monkeypatch.setattr(_ops, "delta_apply_", failing)
    with pytest.raises(update.Broken, match="could not be taken back: the model holds neither version"):
        made.sync.finish_weight_update()
    # By which the engine knows that its cache is of no use, and its tenants are nobody's fine-tunes.
    assert not made.sync.took_back


def test_words_on_another_device_than_the_engine_s_are_refused(run, gpu, monkeypatch):
    made = Engine(monkeypatch, run, "no tenants")
    norm = made.model.model.norm
    norm.weight = nn.Parameter(norm.weight.words, requires_grad=False)
    made.sync.base_replaced()
    with pytest.raises(
        ValueError, match=r"parameter `model\.norm\.weight` is on cpu, but the engine is on cuda:0"
    ):
        made.init()


def test_an_engine_that_cannot_be_updated_does_not_start(run, gpu, monkeypatch):
    """Whatever its settings are; without `--quantization xorz` nobody has looked at them before."""
    made = Engine(monkeypatch, run, "vLLM's own")

    def start():
        sync.XorzWeightTransferEngine(made.config.weight_transfer_config, made.config, CUDA, made.model)

    start()
    with monkeypatch.context() as asleep:
        asleep.setattr(made.config.model_config, "enable_sleep_mode", True)
        with pytest.raises(ValueError, match=r"sleep mode .* is not served on a GPU"):
            start()
    layer = made.model.model.layers[1].mlp.down_proj
    layer.quant_method = named("Fp8LinearMethod")
    with pytest.raises(
        ValueError, match=r"layer `model\.layers\.1\.mlp\.down_proj` is computed by Fp8LinearMethod"
    ):
        start()


def test_gpus_and_installations_that_cannot_do_it(run, gpu, monkeypatch):
    with monkeypatch.context() as less:
        less.setattr(gpu_double, "KERNELS", gpu_double.KERNELS - {"delta_apply_"})
        with pytest.raises(RuntimeError, match="delta_apply_: this op has no CUDA kernel"):
            Engine(less, run)
    with monkeypatch.context() as old:
        old.setattr(torch.cuda, "get_device_capability", lambda device=None: (7, 5))
        with pytest.raises(ValueError, match=r"cuda:0 has compute capability 7\.5; the kernels need 8\.0"):
            Engine(old, run)
    with monkeypatch.context() as wrong:
        wrong.setattr(_ops, "delta_apply_", lambda weight, delta: None)
        with pytest.raises(RuntimeError, match=r"do not restore words; run python -m xorz\.gpu_check"):
            Engine(wrong, run)


def layer(**attributes):
    out = nn.Module()
    for name, value in attributes.items():
        setattr(out, name, value)
    return nn.Sequential(nn.Linear(2, 2), out)


def named(kind, **body):
    return type(kind, (), body)()


class Repacks(nn.Module):
    """Makes something of its weights when they are loaded."""

    def process_weights_after_loading(self):
        raise AssertionError


class Latent(nn.Module):
    """Attention that multiplies weights into each other."""

    impl = named("Impl", sinks=None)

    def process_weights_after_loading(self, dtype):
        raise AssertionError


class MLAttention(Latent):
    """What it is called."""


KEPT = {
    "a quantization": (
        layer(quant_method=named("Fp8LinearMethod")),
        "layer `1` is computed by Fp8LinearMethod",
    ),
    "experts in another order": (
        layer(
            quant_method=named(
                "UnquantizedFusedMoEMethod", unquantized_backend=named("B", name="FLASHINFER_TRTLLM")
            )
        ),
        r"UnquantizedFusedMoEMethod \(FLASHINFER_TRTLLM\)",
    ),
    "a hook of the model's own": (Repacks(), "the model is computed by Repacks"),
    "a hook of a layer's own": (nn.Sequential(Repacks()), "layer `0` is computed by Repacks"),
    "gates in one matrix": (layer(_fse_fuse_gate=True), "layer `1` is computed by Module with joined gates"),
    "attention with sinks": (
        layer(impl=named("FlashInferImpl", sinks=[1]), process_weights_after_loading=print),
        "layer `1` is computed by FlashInferImpl with sinks",
    ),
    "latent attention": (nn.Sequential(MLAttention()), "layer `0` is computed by MLAttention"),
    "a model for one make of GPU": (
        type("Own", (nn.Module,), {"__module__": "vllm.models.some.nvidia.model"})(),
        r"Own is not served on a GPU",
    ),
}


@pytest.mark.parametrize("model, text", KEPT.values(), ids=KEPT)
def test_layers_that_may_keep_weights_in_another_form_are_refused_by_name(model, text):
    with pytest.raises(ValueError, match=text):
        in_place.check_layers(model)


@pytest.mark.parametrize("quantization", ["xorz", None])
def test_layers_that_compute_with_their_parameters_as_they_were_loaded_are_not(
    alone, monkeypatch, quantization
):
    kept = named("UnquantizedFusedMoEMethod", unquantized_backend=named("B", name="TRITON"))
    in_place.check_layers(layer(quant_method=kept))
    in_place.check_layers(layer(quant_method=None))
    in_place.check_layers(nn.Sequential(Latent()))
    as_on_cuda(monkeypatch)
    for kind in KINDS:
        settings = TRANSFER | {"enable_lora": False, "quantization": quantization}
        model = on_gpu.model_of(models.base(kind, FOLDER), attends=True, **settings)
        hooks = [m for m in model.modules() if hasattr(m, "process_weights_after_loading")]
        assert len(hooks) == len(model.model.layers)
        in_place.check_layers(model)
