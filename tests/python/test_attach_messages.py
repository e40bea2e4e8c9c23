"""Promise: who uses `attach` otherwise than it is meant gets a sentence that says what to do, and nothing is left behind."""

import copy
import io
import os

import pytest
import torch
import xorz
from cases import tuned_of
from torch import nn


def pair(dtype=torch.float32):
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8)).eval().to(dtype)
    return base, tuned_of(base, 1)


@pytest.mark.parametrize(
    "part", [lambda m: m, lambda m: m[0], lambda m: m[1]], ids=["model", "linear", "norm"]
)
def test_an_attached_model_is_not_saved_or_copied_itself(part):
    base, _ = pair()
    tenants = xorz.attach(copy.deepcopy(base))
    for take in (
        lambda: torch.save(part(tenants.model), io.BytesIO()),
        lambda: copy.deepcopy(part(tenants.model)),
    ):
        with pytest.raises(TypeError, match=r"attached to tenants; call tenants\.detach\(\)"):
            take()
    file = io.BytesIO()
    torch.save(tenants.model.state_dict(), file)
    file.seek(0)
    assert all(torch.equal(t, base.state_dict()[n]) for n, t in torch.load(file, weights_only=True).items())
    copy.deepcopy(tenants.detach())


@pytest.mark.parametrize("names", [5, 1.5, torch.Size])
def test_names_of_another_kind_are_refused(names):
    tenants = xorz.attach(pair()[0])
    with pytest.raises(TypeError, match="names must be a tenant's name, None, or a list"):
        tenants.use(names)


@pytest.mark.filterwarnings("ignore")
def test_what_is_no_fine_tune_is_refused_with_what_to_do(tmp_path):
    base, tuned = pair()
    tenants = xorz.attach(copy.deepcopy(base))
    for source, error, words in (
        (tmp_path, ValueError, r"is a folder.*xorz pack"),
        (5, TypeError, "must be a package's path"),
        (tuned, TypeError, r"xorz\.diff"),
        (tuned.state_dict(), TypeError, r"xorz\.diff\(base, fine_tuned\)"),
    ):
        with pytest.raises(error, match=words):
            tenants.load("a", source)
    assert tenants.names() == []


@pytest.mark.parametrize("file", [False, True], ids=["memory", "file"])
def test_a_model_of_another_dtype_is_told_so(file, tmp_path):
    base, tuned = pair(torch.bfloat16)
    tenants = xorz.attach(pair()[0])
    if file:
        xorz.pack(base.state_dict(), tuned.state_dict(), tmp_path / "a.xorz")
    with pytest.raises(
        ValueError, match=r"is F32 in the model, and the fine-tune was made of it in BF16.*dtype=\"auto\""
    ):
        tenants.load("a", tmp_path / "a.xorz" if file else xorz.diff(base, tuned))


def test_a_relative_path_is_read_again_from_another_folder(tmp_path, monkeypatch):
    base, tuned = pair()
    monkeypatch.chdir(tmp_path)
    for name, model in (("a", tuned), ("b", tuned_of(base, 2))):
        xorz.pack(base.state_dict(), model.state_dict(), f"{name}.xorz")
    tenants = xorz.attach(copy.deepcopy(base), budget=1024)
    tenants.load("a", "a.xorz")
    tenants.load("b", "b.xorz")
    assert not tenants.resident("a")
    monkeypatch.chdir("/")
    x = torch.randn(2, 8)
    with torch.no_grad(), tenants.use("a"):
        torch.testing.assert_close(tenants.model(x), tuned(x))


def test_where_addresses_are_few_a_budget_is_named():
    import resource

    base, _ = pair()
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        said = b"nothing"
        try:
            size = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
            resource.setrlimit(resource.RLIMIT_AS, (size + (1 << 28),) * 2)
            try:
                xorz.attach(base)
            except MemoryError as error:
                said = str(error).encode()
            xorz.attach(base, budget="1 MiB").detach()
        except BaseException as error:
            said = repr(error).encode()
        os.write(writer, said)
        os._exit(0)
    os.close(writer)
    os.waitpid(child, 0)
    said = os.read(reader, 4096)
    os.close(reader)
    assert b'give attach a budget, such as budget="1 GiB"' in said, said


def test_weights_without_plain_words_are_refused_by_name():
    class Quantized(torch.Tensor):
        @staticmethod
        def __new__(cls, words):
            out = torch.Tensor._make_wrapper_subclass(cls, words.shape, dtype=words.dtype)
            out.words = words
            return out

        def __tensor_flatten__(self):
            return ["words"], None

        @staticmethod
        def __tensor_unflatten__(inner, meta, size, stride):
            return Quantized(inner["words"])

        @classmethod
        def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
            if func is torch.ops.aten.detach.default:
                return Quantized(args[0].words)
            raise NotImplementedError(str(func))

    model = nn.Sequential(nn.Linear(8, 8))
    model[0].weight = nn.Parameter(Quantized(model[0].weight.detach()), requires_grad=False)
    with pytest.raises(
        ValueError, match=r"`0\.weight` is a Quantized, .*attach the model before it is quantized"
    ):
        xorz.attach(model)
    assert type(model[0]) is nn.Linear


def test_the_text_of_tenants_never_raises():
    base, tuned = pair()
    tenants = xorz.attach(base)
    tenants.load("a", xorz.diff(copy.deepcopy(tuned), tuned))
    assert "1 loaded" in repr(tenants)
    del base[0]
    assert "1 loaded" in repr(tenants)
    with pytest.raises(RuntimeError, match="was replaced or removed"), tenants.use("a"):
        pass
