"""Promise: where checkpoint tensors go in a model is read off its own loader (renamed, fused, cut), what
computes with them is found out, and an adapter's name changes with its package. Without vLLM; in vLLM:
tests/vllm.
"""

import subprocess
import sys

import pytest
import torch
import xorz
from torch import nn
from xorz.vllm.packages import digest, named, split_name
from xorz.vllm.plan import Piece, parameters, plan

F32 = torch.float32


class Fused(nn.Module):
    """q, k and v one below the other, as process `rank` of two holds them; `weird`: what loaders may not do."""

    def __init__(self, rank=0, weird=None):
        super().__init__()
        self.qkv = nn.Parameter(torch.randn(4 + 2 + 2, 6))
        self.down = nn.Parameter(torch.randn(5, 3))
        self.bias = nn.Parameter(torch.randn(8))
        self.rank, self.weird = rank, weird

    def load_weights(self, weights):
        rows = {"q": (0, 4), "k": (4, 2), "v": (6, 2)}
        for name, tensor in weights:
            kind, _, what = name.partition(".")
            if kind in rows:
                at, n = rows[kind]
                to = self.qkv if what == "weight" else self.bias
                part = tensor.narrow(0, self.rank * n, n)
                if self.weird == kind:
                    part = part * 2
                to.data.narrow(0, at, n).copy_(part)
            elif kind == "down":
                part = tensor[:, self.rank * 3 : (self.rank + 1) * 3]
                self.down.data.copy_(part.flip(0) if self.weird == "down" else part)


STORED = {f"{name}.weight": (F32, (rows, 6)) for name, rows in (("q", 8), ("k", 4), ("v", 4))}
STORED |= {f"{name}.bias": (F32, (rows,)) for name, rows in (("q", 8), ("k", 4), ("v", 4))}
STORED |= {"down.weight": (F32, (5, 6))}


@pytest.mark.parametrize("rank", [0, 1])
def test_fused_and_cut_parameters_are_followed(rank):
    model = Fused(rank)
    before = {name: param.detach().clone() for name, param in model.named_parameters()}
    found = plan(model, STORED)
    assert found.refused == {}
    assert found.pieces["qkv"] == [
        Piece("q.weight", (4 * rank, 4 * rank + 4), (0, 6), (0, 4), (0, 6)),
        Piece("k.weight", (2 * rank, 2 * rank + 2), (0, 6), (4, 6), (0, 6)),
        Piece("v.weight", (2 * rank, 2 * rank + 2), (0, 6), (6, 8), (0, 6)),
    ]
    assert found.pieces["down"] == [Piece("down.weight", (0, 5), (3 * rank, 3 * rank + 3), (0, 5), (0, 3))]
    assert [piece.name for piece in found.pieces["bias"]] == ["q.bias", "k.bias", "v.bias"]
    assert found.users["k.weight"] == ["qkv"]
    assert all(torch.equal(param, before[name]) for name, param in model.named_parameters())

    # What the plan says is what the loader does to real words.
    torch.manual_seed(0)
    words = {name: torch.randn(shape) for name, (_, shape) in STORED.items()}
    model.load_weights(words.items())
    for name, pieces in found.pieces.items():
        served = dict(model.named_parameters())[name].detach().reshape(len(model.get_parameter(name)), -1)
        for p in pieces:
            stored = words[p.name].reshape(len(words[p.name]), -1)[slice(*p.rows), slice(*p.cols)]
            assert torch.equal(served[slice(*p.to_rows), slice(*p.to_cols)], stored)


@pytest.mark.parametrize(
    ("weird", "stored", "refused", "why"),
    [
        ("k", STORED, "k.weight", "computes with it"),
        ("down", STORED, "down.weight", "computes with it (flip)"),
        (None, STORED | {"q.weight": (torch.float16, (8, 6))}, "q.weight", "torch.float16"),
        (None, STORED | {"rotary.inv_freq": (F32, (4,))}, "rotary.inv_freq", "makes no parameter of it"),
        (None, {n: s for n, s in STORED.items() if n != "k.weight"}, "v.weight", "leaves gaps"),
    ],
)
def test_what_cannot_be_followed_is_refused_by_name(weird, stored, refused, why):
    found = plan(Fused(weird=weird), stored)
    assert why in found.refused[refused]
    assert "down.weight" not in found.refused or refused == "down.weight"


class Experts(nn.Module):
    """Gates above ups of three experts, and what process `rank` of two holds of them; `weird`: see below."""

    def __init__(self, rank=0, weird=None):
        super().__init__()
        self.w13 = nn.Parameter(torch.randn(3, 8, 6))
        self.w2 = nn.Parameter(torch.randn(3, 6, 4))
        self.rank, self.weird = rank, weird

    def load_weights(self, weights):
        for name, tensor in weights:
            if tensor.dim() == 3:
                self.w2.data.copy_(tensor[:, :, :4])
                continue
            expert, what = name.split(".")
            expert = int(expert)
            if what == "down":
                self.w2.data[expert].copy_(tensor.narrow(1, 4 * self.rank, 4))
                continue
            to = self.w13.data[expert].narrow(0, 0 if what == "gate" else 4, 4)
            part = tensor.narrow(0, 4 * self.rank, 4)
            if self.weird == "across" and name == "1.up":
                # The last rows of one expert and the first of the next.
                to = self.w13.data.view(24, 6).narrow(0, 14, 4)
            to.copy_(part)


EXPERTS = {f"{e}.{what}": (F32, (8, 6)) for e in range(3) for what in ("gate", "up")}
EXPERTS |= {f"{e}.down": (F32, (6, 8)) for e in range(3)}


@pytest.mark.parametrize("rank", [0, 1])
def test_experts_in_a_stack_are_followed_one_by_one(rank):
    model = Experts(rank)
    found = plan(model, EXPERTS)
    assert found.refused == {}
    rows = (4 * rank, 4 * rank + 4)
    for e in range(3):
        assert found.pieces[f"w13[{e}]"] == [
            Piece(f"{e}.gate", rows, (0, 6), (0, 4), (0, 6)),
            Piece(f"{e}.up", rows, (0, 6), (4, 8), (0, 6)),
        ]
        assert found.pieces[f"w2[{e}]"] == [Piece(f"{e}.down", (0, 6), rows, (0, 6), (0, 4))]
    assert found.users["2.up"] == ["w13[2]"] and set(found.pieces) == set(parameters(model))
    torch.manual_seed(0)
    words = {name: torch.randn(shape) for name, (_, shape) in EXPERTS.items()}
    model.load_weights(words.items())
    for name, held in parameters(model).items():
        for p in found.pieces[name]:
            stored = words[p.name][slice(*p.rows), slice(*p.cols)]
            assert torch.equal(held[slice(*p.to_rows), slice(*p.to_cols)], stored)


def test_experts_that_cannot_be_followed_are_refused_by_name():
    missing = plan(Experts(), {n: s for n, s in EXPERTS.items() if n != "1.gate"})
    assert set(missing.refused) == {"1.up"} and "leaves gaps" in missing.refused["1.up"]
    across = plan(Experts(weird="across"), EXPERTS)
    assert "reorders" in across.refused["1.up"]
    stacked = plan(
        Experts(), {n: s for n, s in EXPERTS.items() if "down" not in n} | {"down": (F32, (3, 6, 8))}
    )
    assert "it has 3 dimensions" in stacked.refused["down"] and set(stacked.refused) == {"down"}
    other = plan(Experts(), EXPERTS | {"0.up": (torch.float8_e4m3fn, (8, 6))})
    assert "torch.float8_e4m3fn, but the model computes in torch.float32" in other.refused["0.up"]


def test_a_package_s_adapter_is_another_one_when_it_is_published_anew(tmp_path):
    from safetensors.torch import save_file

    base = torch.randn(64, 64)
    save_file({"w": base}, tmp_path / "base.safetensors")
    names = []
    for row in (0, 1, 0):
        tuned = base.clone()
        tuned[row] += 1
        save_file({"w": tuned}, tmp_path / "tuned.safetensors")
        xorz.pack(tmp_path / "base.safetensors", tmp_path / "tuned.safetensors", tmp_path / "a.xorz")
        names.append(named("alice", digest(tmp_path / "a.xorz")))
    assert names[0] == names[2] != names[1]
    assert split_name(names[0]) == ("alice", digest(tmp_path / "a.xorz"))
    assert split_name("alice") == ("alice", None) and split_name("a@xorz-12") == ("a@xorz-12", None)
    (tmp_path / "a.xorz").write_bytes((tmp_path / "a.xorz").read_bytes()[:20])
    with pytest.raises(ValueError, match=r"a\.xorz"):
        digest(tmp_path / "a.xorz")


def test_xorz_imports_nothing_of_vllm_and_the_plugin_is_announced():
    code = (
        "import sys, importlib.metadata as m, xorz, xorz.vllm; assert 'vllm' not in sys.modules;"
        "[e] = [e for e in m.entry_points(group='vllm.general_plugins') if e.name == 'xorz'];"
        "assert e.load() is xorz.vllm.register"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
