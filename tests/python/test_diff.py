"""Promise: `diff` and `apply_` turn one state_dict into another in place, bit for bit, whatever its tensors
are; what does not fit is refused by name before a word changes."""

import copy
import io
import pickle
import re

import pytest
import torch
import xorz
from conftest import ENCODINGS, fine_tune, random_weight, same_bits
from torch import nn

ALL_DTYPES = [
    *(torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.bool),
    *(
        torch.uint8,
        torch.int8,
        torch.int16,
        torch.int32,
        torch.int64,
        torch.uint16,
        torch.uint32,
        torch.uint64,
    ),
    *(
        torch.float8_e4m3fn,
        torch.float8_e5m2,
        torch.float8_e4m3fnuz,
        torch.float8_e5m2fnuz,
        torch.float8_e8m0fnu,
    ),
    *(torch.complex64, torch.complex128),
]


def raw(t):
    """All bytes of a tensor, those of a view in its own order."""
    t = t.detach()
    t = torch.view_as_real(t.resolve_conj()) if t.is_complex() else t
    return t.contiguous().reshape(-1).view(torch.uint8)


def equal(a, b):
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(raw(a), raw(b))


def all_equal(a, b):
    return list(sorted(a)) == list(sorted(b)) and all(equal(a[n], b[n]) for n in a)


def clone(sd):
    return {n: t.clone() for n, t in sd.items()}


def random_words(shape, dtype, seed):
    """Random bits of any dtype: NaNs with payloads, infinities, -0.0 and denormals among them."""
    size = torch.empty(0, dtype=dtype).element_size()
    high = 2 if dtype == torch.bool else 256
    count = torch.Size(shape).numel() * size
    words = torch.randint(0, high, (count,), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    return words.view(dtype).reshape(shape)


@pytest.mark.parametrize("dtype", ALL_DTYPES, ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize("prefer", ["memory", "speed"])
def test_every_dtype_comes_out_bit_for_bit(dtype, prefer):
    old = {
        str(s): random_words(s, dtype, i)
        for i, s in enumerate([(), (1,), (77,), (40, 33), (5, 6, 7), (0, 3)])
    }
    new = {}
    for i, (name, t) in enumerate(old.items()):
        other = raw(random_words(t.shape, dtype, 100 + i))
        size = t.element_size()
        pick = torch.rand(t.numel(), generator=torch.Generator().manual_seed(i)) < 0.2
        words = torch.where(pick.repeat_interleave(size), other, raw(t))
        new[name] = words.view(dtype).reshape(t.shape)
    target, before = clone(old), {n: t.data_ptr() for n, t in old.items()}
    delta = xorz.diff(old, new, prefer=prefer)
    places = {n: t.data_ptr() for n, t in target.items()}
    assert xorz.apply_(target, delta) is target
    assert all_equal(target, new) and {n: t.data_ptr() for n, t in target.items()} == places
    assert {n: t.data_ptr() for n, t in old.items()} == before and not delta.alone
    assert all_equal(xorz.apply_(clone(target), xorz.diff(target, old)), old)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_special_values_survive_both_ways(dtype):
    bits = {torch.float32: torch.int32}.get(dtype, torch.int16)
    one = torch.tensor([1.0], dtype=dtype).view(bits)
    inf = torch.tensor([float("inf")], dtype=dtype).view(bits)
    sign = torch.tensor([-0.0], dtype=dtype).view(bits)
    special = torch.cat([sign, inf, inf | sign, inf | 1, inf | 5, (inf | 1) | sign, sign * 0 + 1, sign | 1])
    plain = one.repeat(len(special))
    for old, new in ((plain, special), (special, plain), (special, special.flip(0))):
        old, new = {"w": old.view(dtype)}, {"w": new.view(dtype)}
        assert equal(xorz.apply_(clone(old), xorz.diff(old, new))["w"], new["w"])


def model_pair(seed=0):
    torch.manual_seed(seed)
    old = nn.Sequential(nn.Linear(30, 20), nn.BatchNorm1d(20), nn.Linear(20, 30, bias=False)).bfloat16()
    new = copy.deepcopy(old)
    with torch.no_grad():
        for p in new.parameters():
            p.add_(torch.randn_like(p) * 0.01)
        new[1].num_batches_tracked += 3
    return old.eval(), new.eval()


def test_a_model_is_changed_in_place_and_its_parameters_still_train():
    old, new = model_pair()
    delta = xorz.diff(old, new)
    places = [p.data_ptr() for p in old.parameters()]
    versions = [p._version for p in old.parameters()]
    x = torch.randn(4, 30, dtype=torch.bfloat16)
    stale = old(x).sum()
    assert xorz.apply_(old, delta) is old
    assert all_equal(old.state_dict(), new.state_dict())
    assert [p.data_ptr() for p in old.parameters()] == places and all(
        p.requires_grad for p in old.parameters()
    )
    assert all(p._version > v for p, v in zip(old.parameters(), versions, strict=True))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        stale.backward()
    old(x).sum().backward()
    assert old[0].weight.grad is not None
    with pytest.raises(ValueError, match="digest"):
        xorz.apply_(old, delta)
    assert all_equal(old.state_dict(), new.state_dict())


def test_a_delta_says_what_it_is_and_travels(tmp_path):
    base, tuned = {}, {}
    for i, encoding in enumerate(ENCODINGS):
        base[encoding] = random_weight(64, 70, torch.bfloat16, i)
        tuned[encoding] = fine_tune(base[encoding], encoding)
    base["gone"], tuned["new"] = torch.zeros(3), torch.ones(5)
    delta = xorz.diff(base, tuned)
    assert delta.unchanged == ("unchanged",) and delta.removed == ("gone",) and list(delta.alone) == ["new"]
    changed = sum(int((base[n].view(torch.int16) != tuned[n].view(torch.int16)).sum()) for n in ENCODINGS)
    assert (delta.changed, delta.words) == (changed, 4 * 64 * 70)
    assert delta.nbytes == sum(d.nbytes for d in delta.deltas.values()) + 20
    assert delta.tensor_bytes == sum(t.nbytes for t in tuned.values())
    text = repr(delta)
    assert f"{changed:,} of {delta.words:,}" in text and "3 changed, 1 unchanged, 1 alone, 1 removed" in text
    file = io.BytesIO()
    torch.save(delta, file)
    assert len(file.getvalue()) < delta.nbytes + 5000
    file.seek(0)
    for again in (torch.load(file), pickle.loads(pickle.dumps(delta)), copy.deepcopy(delta)):
        assert all_equal(xorz.apply_(clone(base), again), tuned) and repr(again) == text


def test_what_did_not_change_costs_nothing():
    base = {str(i): random_weight(200, 200, torch.float32, i) for i in range(20)}
    tuned = clone(base)
    delta = xorz.diff(base, tuned)
    assert delta.nbytes == 0 and not delta.deltas and len(delta.unchanged) == 20 and delta.changed == 0
    assert len(pickle.dumps(delta)) < 1000
    tuned["7"].view(torch.int32)[3, 4] ^= 1
    delta = xorz.diff(base, tuned)
    assert list(delta.deltas) == ["7"] and delta.changed == 1 and delta.nbytes < 1000
    assert all_equal(xorz.apply_(base, delta), tuned)


def test_the_same_memory_twice_is_told():
    sd = {"w": torch.randn(4)}
    with pytest.warns(UserWarning, match="clone the old state_dict"):
        assert xorz.diff(sd, dict(sd)).nbytes == 0


def test_five_thousand_tiny_tensors():
    g = torch.Generator().manual_seed(1)
    old = {f"layer.{i}.x": torch.randn(1 + i % 7, generator=g) for i in range(5000)}
    new = {n: t + (i % 2) for i, (n, t) in enumerate(old.items())}
    delta = xorz.diff(old, new)
    assert len(delta.unchanged) == 2500
    assert all_equal(xorz.apply_(clone(old), delta), new)


def test_views_are_changed_where_they_are():
    def strided(seed):
        whole = random_weight(40, 60, torch.float32, seed)
        return whole, {
            "t": whole[:20].T,
            "even": whole[20:, ::2],
            "odd": whole[20:, 1::2],
            "part": whole[:, :0],
        }

    (base, old), (_, new) = strided(0), strided(1)
    assert not old["t"].is_contiguous() and not old["even"].is_contiguous()
    wanted = {n: t.clone() for n, t in new.items()}
    delta = xorz.diff(old, new)
    assert len(delta.deltas) == 3
    xorz.apply_(old, delta)
    assert all_equal(old, wanted) and torch.equal(base[20:, 1::2], wanted["odd"])


def tied(seed, same):
    a = random_weight(30, 20, torch.bfloat16, seed)
    return {
        "embed": a,
        "norm": random_weight(1, 20, torch.bfloat16, seed + 9),
        "head": a if same else a.clone(),
    }


def test_tied_tensors_are_diffed_and_changed_once():
    old, new = tied(0, True), tied(1, True)
    delta = xorz.diff(old, new)
    assert delta.ties == {"head": "embed"} and sorted(delta.deltas) == ["embed", "norm"]
    target = tied(0, True)
    xorz.apply_(target, delta)
    assert all_equal(target, new) and target["embed"] is target["head"]
    # Where the target has two tensors of the same words, both are changed.
    assert all_equal(xorz.apply_(tied(0, False), delta), new)
    # A tie that the fine-tune made; a tie that it made from tensors that differed before.
    assert xorz.diff(tied(0, False), new).ties == {"head": "embed"}
    different = {**tied(0, False), "head": random_weight(30, 20, torch.bfloat16, 5)}
    delta = xorz.diff(different, new)
    assert not delta.ties and all_equal(xorz.apply_(clone(different), delta), new)
    # New tensors that are tied stay one tensor.
    fresh = xorz.apply_({}, xorz.diff({}, new))
    assert all_equal(fresh, new) and fresh["embed"] is fresh["head"]


def test_a_tie_in_the_target_that_the_fine_tune_broke_is_refused():
    old = tied(0, False)
    new = {**old, "head": random_weight(30, 20, torch.bfloat16, 3), "norm": old["norm"] + 1}
    target = tied(0, True)
    before = clone(target)
    with pytest.raises(
        ValueError, match=r"`head` and `embed` are one tensor|`embed` and `head` are one tensor"
    ):
        xorz.apply_(target, xorz.diff(old, new))
    new["embed"] = random_weight(30, 20, torch.bfloat16, 4)
    with pytest.raises(ValueError, match="are one tensor in the target, but two in the delta"):
        xorz.apply_(target, xorz.diff(old, new))
    assert all_equal(target, before)
    # Both changed alike, though diffed apart: one change.
    new["embed"] = new["head"].clone()
    delta = xorz.diff(old, new)
    assert len(delta.deltas) == 3 and all_equal(xorz.apply_(target, delta), new)


def test_tied_parameters_of_a_module_are_changed_once():
    def make(seed):
        torch.manual_seed(seed)
        m = nn.Module()
        m.embed, m.head = nn.Embedding(30, 20), nn.Linear(20, 30, bias=False)
        m.head.weight = m.embed.weight
        return m

    old, new = make(0), make(1)
    delta = xorz.diff(old, new)
    assert len(delta.deltas) == 1 and len(delta.ties) == 1
    xorz.apply_(old, delta)
    assert all_equal(old.state_dict(), new.state_dict()) and old.head.weight is old.embed.weight


def test_tensors_that_overlap_are_refused():
    whole = random_weight(6, 10, torch.float32)
    old = {"qkv": whole, "q": whole[:2]}
    new = {n: t + 1 for n, t in old.items()}
    delta, before = xorz.diff(old, new), whole.clone()
    with pytest.raises(ValueError, match=r"`q(kv)?`.* shares words with `q(kv)?`"):
        xorz.apply_(old, delta)
    wide = {"w": torch.zeros(1, 4).expand(3, 4)}
    with pytest.raises(ValueError, match=r"`w` .* shares words with itself"):
        xorz.apply_(wide, xorz.diff(wide, {"w": torch.ones(3, 4)}))
    assert torch.equal(whole, before) and not wide["w"].any()
    # A view that does not change, of a tensor that does, is changed with it all the same: refused, too.
    with pytest.raises(ValueError, match="shares words"):
        xorz.apply_(old, xorz.diff(clone(old), {"qkv": whole + 1, "q": whole[:2].clone()}))


def refused(target, delta, error, match):
    before = clone(dict(target.state_dict() if isinstance(target, nn.Module) else target))
    names = list(before)
    with pytest.raises(error, match=match):
        xorz.apply_(target, delta)
    after = dict(target.state_dict() if isinstance(target, nn.Module) else target)
    assert list(after) == names and all_equal(after, before)


def test_another_base_is_refused_before_anything_changes():
    old, new = model_pair()
    delta = xorz.diff(old, new)
    other = copy.deepcopy(old)
    with torch.no_grad():
        # The last tensor, so that everything else would have been changed before it.
        other[2].weight.view(torch.int16)[29, 19] ^= 1
    refused(other, delta, ValueError, r"`2\.weight`.*digest [0-9a-f]{32}.*digest [0-9a-f]{32}")
    sd = dict(old.state_dict())
    refused(
        {**sd, "2.weight": sd["2.weight"].float()},
        delta,
        ValueError,
        r"`2\.weight` is float32 \[30, 20\].*bfloat16",
    )
    refused(
        {**sd, "2.weight": sd["2.weight"][:29]}, delta, ValueError, r"`2\.weight`.*\[30, 20\].*\[29, 20\]"
    )
    refused({n: t for n, t in sd.items() if n != "2.weight"}, delta, KeyError, r"no tensor `2\.weight`")
    refused({n: t for n, t in sd.items() if n != "1.running_mean"}, delta, KeyError, "1.running_mean")
    broken = copy.deepcopy(delta)
    broken.deltas["2.weight"][-100] ^= 1
    refused(old, broken, ValueError, r"`2\.weight`")
    broken.deltas["2.weight"] = torch.zeros(100, dtype=torch.uint8)
    refused(old, broken, ValueError, "delta|magic|begin")
    broken.deltas["2.weight"] = None
    refused(old, broken, TypeError, r"2\.weight.*NoneType")


def forged(blob, base):
    """The delta with both of its digests made good for `base`: here the refusals say which those would be."""
    for at, told in ((112, r"this base has digest (\w{32})"), (160, r"its bytes have digest (\w{32})")):
        with pytest.raises((ValueError, RuntimeError), match=told) as refusal:
            torch.ops.xorz.delta_check(blob, base)
        right = bytes.fromhex(re.search(told, str(refusal.value))[1])
        blob[at : at + 16] = torch.tensor(list(right), dtype=torch.uint8)
    return blob


@pytest.mark.parametrize("which", [1, 2])
def test_a_later_delta_that_is_forged_leaves_the_tensors_before_it_as_they_were(which):
    old = {name: random_weight(64, 96, torch.bfloat16, seed) for seed, name in enumerate("abc")}
    g = torch.Generator().manual_seed(7)
    tuned = {n: (w.float() + 1e-3 * torch.randn(w.shape, generator=g)).bfloat16() for n, w in old.items()}
    delta, name, target = xorz.diff(old, tuned), "abc"[which], clone(old)
    # How wide a change is stored follows from the base's exponent, so that of other words the streams end elsewhere.
    target[name] = old[name] * 64
    delta.deltas[name] = forged(delta.deltas[name].clone(), target[name])
    with pytest.raises((ValueError, RuntimeError), match="tile 0") as refusal:
        torch.ops.xorz.delta_check(delta.deltas[name], target[name])
    assert "digest" not in str(refusal.value)
    refused(target, delta, ValueError, f"tensor `{name}`.*tile")


def test_a_module_takes_no_tensors_of_another_kind():
    old, new = model_pair()
    sd = dict(new.state_dict())
    resized = {**sd, "2.weight": torch.zeros(31, 20, dtype=torch.bfloat16)}
    message = r"`2\.weight`: the delta brings bfloat16 \[31, 20\], but the module has bfloat16 \[30, 20\]"
    refused(old, xorz.diff(old, resized), ValueError, message)
    refused(
        old,
        xorz.diff(old, {**sd, "3.bias": torch.zeros(2)}),
        ValueError,
        r"`3\.bias`.*float32 \[2\].*no such tensor",
    )
    fewer = {n: t for n, t in sd.items() if n != "0.bias"}
    refused(old, xorz.diff(old, fewer), ValueError, r"`0\.bias`.*removes it.*bfloat16 \[20\]")
    # A dict takes all of that.
    for wanted in (resized, {**sd, "3.bias": torch.zeros(2)}, fewer):
        assert all_equal(xorz.apply_(clone(old.state_dict()), xorz.diff(old, wanted)), wanted)
    # So does a module that has room already.
    delta = xorz.diff(old, resized)
    roomy = copy.deepcopy(old)
    roomy[2] = nn.Linear(20, 31, bias=False).bfloat16()
    assert all_equal(xorz.apply_(roomy, delta).state_dict(), resized)


def test_what_a_delta_holds_is_its_own():
    old, new = (
        {"w": torch.randn(9), "keep": torch.randn(3)},
        {"w": torch.randn(9), "keep": torch.randn(3), "n": torch.ones(4)},
    )
    wanted, delta = clone(new), xorz.diff(old, new)
    new["n"].zero_()
    new["w"].zero_()
    first, second = xorz.apply_(clone(old), delta), xorz.apply_(clone(old), delta)
    assert all_equal(first, wanted) and all_equal(second, wanted)
    first["n"].zero_()
    assert all_equal(second, wanted)


def test_arguments_of_other_kinds_are_refused():
    sd, delta = {"w": torch.ones(2)}, xorz.diff({"w": torch.ones(2)}, {"w": torch.zeros(2)})
    for call, error, match in [
        (lambda: xorz.diff([], sd), TypeError, "old must be a state_dict or a module, but is list"),
        (lambda: xorz.diff(sd, {"w": 3}), TypeError, "new: `w` must be a tensor, but is int"),
        (lambda: xorz.diff({3: sd["w"]}, sd), TypeError, "must be a str, but is int"),
        (lambda: xorz.diff(sd, {"w": torch.ones(2, device="meta")}), TypeError, "dense tensor with data"),
        (lambda: xorz.diff(sd, {"w": torch.ones(2).to_sparse()}), TypeError, "dense tensor with data"),
        (
            lambda: xorz.diff(sd, {"w": torch.ones(2, dtype=torch.complex64).conj()}),
            TypeError,
            "resolve_conj",
        ),
        (lambda: xorz.diff(sd, sd, prefer="size"), ValueError, "'size'"),
        (lambda: xorz.apply_(sd, {}), TypeError, "delta must be a StateDelta, but is dict"),
        (lambda: xorz.apply_([], delta), TypeError, "target must be a state_dict or a module, but is list"),
        (lambda: xorz.apply_({"w": None}, delta), TypeError, "`w` must be a tensor, but is NoneType"),
    ]:
        with pytest.raises(error, match=match):
            call()
    with torch.inference_mode():
        frozen = {"w": torch.ones(2)}
    with pytest.raises(ValueError, match="inference_mode"):
        xorz.apply_(frozen, delta)
    with torch.inference_mode():
        assert torch.equal(xorz.apply_(frozen, delta)["w"], torch.zeros(2))


def test_the_deltas_are_those_of_the_op():
    old, new = {"w": random_weight(40, 50, torch.float16)}, {"w": random_weight(40, 50, torch.float16, 2)}
    for prefer in ("memory", "speed"):
        delta = xorz.diff(old, new, prefer=prefer).deltas["w"]
        assert torch.equal(delta, xorz.delta_encode(old["w"], new["w"], prefer=prefer))
        assert same_bits(xorz.delta_restore(old["w"], delta), new["w"])
