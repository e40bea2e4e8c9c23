"""Promise: state_dicts of any dtype, with rows more or fewer, or with extra state, pack small and come back."""

import io

import pytest
import safetensors.torch
import torch
import xorz
from torch import nn

OTHERS = [
    "complex64",
    "complex128",
    "complex32",
    "float8_e4m3fnuz",
    "float8_e5m2fnuz",
    "float8_e8m0fnu",
    "float4_e2m1fn_x2",
]


def words(tensor):
    return (
        tensor.contiguous().reshape(-1).view(torch.uint8)
        if tensor.dim()
        else tensor.reshape(1).view(torch.uint8)
    )


@pytest.mark.filterwarnings("ignore:ComplexHalf")
@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.parametrize("shape", [(64, 96), (3072,), (4, 16, 48)])
def test_dtypes_without_a_code_are_deltas_by_their_words(tmp_path, name, shape):
    if not hasattr(torch, name):
        pytest.skip(f"this torch has no {name}")
    dtype = getattr(torch, name)
    torch.manual_seed(1)
    size = torch.empty(0, dtype=dtype).element_size()
    old = torch.randint(0, 256, (*shape[:-1], shape[-1] * size), dtype=torch.uint8)
    new = old.clone()
    new.view(-1)[::97] ^= 1
    base, tuned = {"w": old.view(dtype), "b": torch.ones(4)}, {"w": new.view(dtype), "b": torch.ones(4)}
    report = xorz.pack(base, tuned, tmp_path / "p.xorz")
    assert report["alone"] == 0 and report["package_bytes"] < old.numel() // 2 + 4096
    entry = next(e for e in xorz.inspect(tmp_path / "p.xorz")["entries"] if e["name"] == "w")
    assert entry["base"] is not None and entry["stored_bytes"] < old.numel() // 4 + 512
    back = xorz.restore(base, tmp_path / "p.xorz")
    assert back["w"].dtype == dtype and back["w"].shape == tuned["w"].shape
    assert torch.equal(words(back["w"]), words(tuned["w"]))
    # Another base is refused: the words are compared.
    base["w"] = tuned["w"]
    with pytest.raises(ValueError, match=r"another base"):
        xorz.restore(base, tmp_path / "p.xorz")


def grown(rows):
    torch.manual_seed(2)
    base = {"embed.weight": torch.randn(1000, 64).bfloat16(), "other": torch.randn(8, 8)}
    tuned = {n: t.clone() for n, t in base.items()}
    tuned["embed.weight"].view(torch.int16)[::7, ::5] += 1
    more = torch.randn(8, 64).bfloat16()
    whole = tuned["embed.weight"]
    tuned["embed.weight"] = torch.cat([whole, more]) if rows > 0 else whole[:rows].contiguous()
    return base, tuned


@pytest.mark.parametrize("rows", [8, -8])
@pytest.mark.parametrize("from_files", [False, True])
def test_tensors_with_other_rows_are_deltas_and_load_whole(tmp_path, rows, from_files):
    base, tuned = grown(rows)
    paths = tmp_path / "base.safetensors", tmp_path / "tuned.safetensors"
    safetensors.torch.save_file(base, paths[0])
    safetensors.torch.save_file(tuned, paths[1])
    package = tmp_path / "p.xorz"
    report = xorz.pack(*(paths if from_files else (base, tuned)), package)
    assert report["alone"] == 0 and report["package_bytes"] < tuned["embed.weight"].nbytes // 4
    for how in (base, paths[0]):
        loaded = xorz.load_deltas(how, package)
        assert torch.equal(loaded["embed.weight"], tuned["embed.weight"])
        assert loaded["other"].dtype == torch.uint8
    back = xorz.restore(base, package)
    assert all(torch.equal(back[n], t) for n, t in tuned.items())
    with pytest.raises(KeyError, match=r"embed.weight"):
        xorz.restore({"other": base["other"]}, package)
    short = {**base, "embed.weight": base["embed.weight"][:100]}
    with pytest.raises(ValueError, match=r"embed.weight.*\[100, 64\]"):
        xorz.restore(short, package)
    other = {**base, "embed.weight": tuned["embed.weight"]}
    with pytest.raises(ValueError, match=r"another base|give the base"):
        xorz.restore(other, package)


class Extra(nn.Linear):
    """A layer with state of its own, as TransformerEngine's have it: bytes, a buffer of them, or nothing."""

    def __init__(self, state):
        super().__init__(8, 8)
        self.state = state

    def get_extra_state(self):
        return self.state

    def set_extra_state(self, state):
        self.state = state


@pytest.mark.parametrize("make", [bytes, bytearray, io.BytesIO, lambda b: None])
def test_extra_state_is_kept_as_bytes(tmp_path, make):
    old, new = Extra(make(b"scales of before")), Extra(make(b"scales of now"))
    base, tuned = old.state_dict(), new.state_dict()
    assert "_extra_state" in base
    xorz.pack(base, tuned, tmp_path / "p.xorz")
    back = xorz.restore(base, tmp_path / "p.xorz")
    assert torch.equal(back["weight"], new.weight)
    if make(b"") is None:
        assert "_extra_state" not in back
    else:
        assert bytes(back["_extra_state"].numpy()) == b"scales of now"
    # And in place: a module is told, a dict is given it, of the kind that it had.
    delta = xorz.diff(base, tuned)
    target = Extra(make(b"scales of before"))
    with torch.no_grad():
        for name in ("weight", "bias"):
            getattr(target, name).copy_(getattr(old, name))
    given = {n: v.clone() if isinstance(v, torch.Tensor) else v for n, v in base.items()}
    xorz.apply_(given, delta)
    assert torch.equal(given["weight"], new.weight)
    xorz.apply_(target, delta)
    assert torch.equal(target.weight, new.weight)
    for state in (given["_extra_state"], target.state):
        if make(b"") is None:
            assert state is None
        else:
            assert type(state) is type(make(b""))
            assert (state.getvalue() if isinstance(state, io.BytesIO) else bytes(state)) == b"scales of now"


def test_extra_state_that_is_no_bytes_is_refused_with_advice(tmp_path):
    base = Extra({"scale": 1}).state_dict()
    with pytest.raises(TypeError, match=r"_extra_state.*dict.*leave it out"):
        xorz.pack(base, base, tmp_path / "p.xorz")
    with pytest.raises(TypeError, match=r"_extra_state.*dict.*leave it out"):
        xorz.diff(base, base)
