"""Promise: tenants come, go and fail under traffic, and nobody is answered by another's weights, or by old ones."""

import random
import shutil

import engines
import models
import pytest
import torch
import xorz
import xorz.vllm
from engines import PROMPTS, ask
from safetensors.torch import load_file
from vllm import SamplingParams

KIND = "llama"
TWELVE = [f"t{i}" for i in range(12)]


@pytest.fixture(scope="module")
def llm():
    """Four slots, and memory for six tenants: of twelve, half are always on disk."""
    out = engines.engine(
        models.base(KIND, engines.FOLDER),
        mode="deterministic",
        max_loras=4,
        max_cpu_loras=6,
        enable_prefix_caching=True,
    )
    yield out
    engines.stop(out)


@pytest.fixture(scope="module")
def twelve():
    """Packages of twelve fine-tunes."""
    made = {name: models.tenant(KIND, name, engines.FOLDER, seed=i + 100) for i, name in enumerate(TWELVE)}
    return {name: package for name, (_folder, package) in made.items()}


def test_500_requests_over_12_tenants_on_4_slots(llm, twelve):
    requests = {None: None} | {name: xorz.vllm.request(name, package) for name, package in twelve.items()}
    alone = {name: ask(llm, PROMPTS, [lora] * len(PROMPTS), new=4) for name, lora in requests.items()}
    assert len({tuple(s.tokens) for said in alone.values() for s in said}) > 20
    llm.reset_prefix_cache()
    draw = random.Random(0)
    asked = [(draw.choice([None, *TWELVE]), draw.randrange(len(PROMPTS))) for _ in range(500)]
    got = ask(llm, [PROMPTS[p] for _, p in asked], [requests[name] for name, _ in asked], new=4)
    assert [g.tokens for g in got] == [alone[name][p].tokens for name, p in asked]
    found = engines.manager(llm)
    assert len(found._registered_adapters.cache) <= 6 and len(found._active_adapters.cache) <= 4
    held = {piece for lora in found._registered_adapters.cache.values() for piece in lora.pieces}
    assert found.arena.used == sum(-(-length // 64) * 64 for _, length in held)


def test_a_tenant_is_removed_while_it_is_answered(llm, twelve):
    lora = xorz.vllm.load(llm, "t0", twelve["t0"])
    alone = ask(llm, PROMPTS[:1], [lora], new=12)
    llm.reset_prefix_cache()
    engine, params = llm.llm_engine, SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
    engine.add_request("gone", PROMPTS[0], params, lora_request=lora)
    said = {}
    for step in range(100):
        if step == 4:
            assert engine.remove_lora(lora.lora_int_id)
        for out in engine.step():
            if out.finished:
                said[out.request_id] = list(out.outputs[0].token_ids)
        if not engine.has_unfinished_requests():
            break
    assert said == {"gone": alone[0].tokens}


def test_a_package_published_anew_is_another_adapter(llm, twelve, tmp_path):
    path = tmp_path / "alice.xorz"
    shutil.copy(twelve["t1"], path)
    first = xorz.vllm.load(llm, "alice", path)
    before = ask(llm, PROMPTS, [first] * 2)
    shutil.copy(twelve["t2"], tmp_path / "new")
    (tmp_path / "new").rename(path)
    second = xorz.vllm.load(llm, "alice", path)
    assert (first.lora_name, first.lora_int_id) != (second.lora_name, second.lora_int_id)
    # Both at once, and the first one's blocks are in the prefix cache.
    both = ask(llm, [PROMPTS[0]] * 2, [first, second])
    wanted = ask(llm, PROMPTS[:1], [xorz.vllm.load(llm, "t2", twelve["t2"])])
    assert [b.tokens for b in both] == [before[0].tokens, wanted[0].tokens]
    # Dropped and asked for again, the first is still what it was, though its name is the second's file.
    assert llm.llm_engine.remove_lora(first.lora_int_id)
    llm.reset_prefix_cache()
    assert [s.tokens for s in ask(llm, PROMPTS, [first] * 2)] == [s.tokens for s in before]


def broken(tmp_path, base, twelve):
    """Packages that cannot be served, and words of why."""
    words = load_file(base / "model.safetensors")
    good = twelve["t3"].read_bytes()
    cut, flipped = tmp_path / "cut.xorz", tmp_path / "flipped.xorz"
    cut.write_bytes(good[: len(good) // 2])
    at = len(good) // 2  # of a tensor: the files that are carried along come last, and are not read
    flipped.write_bytes(good[:at] + bytes([good[at] ^ 1]) + good[at + 1 :])

    def pack(name, old, new):
        xorz.pack(old, new, tmp_path / name)
        return tmp_path / name

    other = words | {
        "model.norm.weight": words["model.norm.weight"] + 1,
        "lm_head.weight": words["lm_head.weight"] * 2,
    }
    tuned = other | {"lm_head.weight": other["lm_head.weight"] + 1}
    wider = words | {"lm_head.weight": torch.cat([words["lm_head.weight"]] * 2)}
    fewer = {name: word for name, word in words.items() if name != "model.layers.1.mlp.down_proj.weight"}
    more = words | {"extra.weight": torch.zeros(4, 4, dtype=torch.bfloat16)}
    return {
        tmp_path / "none.xorz": "No such file",
        cut: "cut.xorz",
        flipped: "flipped|digest|check",
        pack("other.xorz", other, tuned): "lm_head.weight",
        pack("wider.xorz", words, wider): r"`lm_head.weight` is BF16 \[2000, 128\], but not in the base",
        pack("fewer.xorz", words, fewer): "`model.layers.1.mlp.down_proj.weight` is not in the fine-tune",
        pack("more.xorz", words, more): "`extra.weight` is stored alone",
    }


def test_bad_packages_are_refused_and_the_engine_serves_on(llm, twelve, tmp_path):
    lora = xorz.vllm.load(llm, "t4", twelve["t4"])
    before = ask(llm, PROMPTS, [lora, None])
    used = engines.manager(llm).arena.used
    for path, why in broken(tmp_path, models.base(KIND, engines.FOLDER), twelve).items():
        with pytest.raises((OSError, ValueError), match=why):
            xorz.vllm.load(llm, "bad", path)
    plain = type(lora)("plain", 99, str(twelve["t5"]))
    with pytest.raises(ValueError, match=r"no digest in its name; make it with xorz\.vllm\.request"):
        llm.llm_engine.add_lora(plain)
    changed = xorz.vllm.request("changed", twelve["t5"])
    changed.lora_path = str(twelve["t6"])
    with pytest.raises(ValueError, match="was changed since it was named"):
        llm.llm_engine.add_lora(changed)
    assert engines.manager(llm).arena.used == used
    llm.reset_prefix_cache()
    assert [s.tokens for s in ask(llm, PROMPTS, [lora, None])] == [s.tokens for s in before]


def test_tenants_make_room_by_their_bytes(llm, twelve):
    found = engines.manager(llm)
    alone = ask(llm, PROMPTS, [xorz.vllm.load(llm, "t7", twelve["t7"])] * 2)
    found.remove_all_adapters()
    assert found.arena.used == 0
    first, second, _third = (xorz.vllm.load(llm, name, twelve[name]) for name in ("t0", "t1", "t2"))
    size = found.arena.used // 3
    limit = found.residency.capacity  # the arena has more addresses
    full = limit - found.arena.used - size // 2
    hog = found.arena.allocate(full)
    try:
        lora = xorz.vllm.load(llm, "t7", twelve["t7"])
        left = found._registered_adapters.cache
        assert first.lora_int_id not in left and lora.lora_int_id in left and len(left) >= 2
        llm.reset_prefix_cache()
        assert [s.tokens for s in ask(llm, PROMPTS, [lora] * 2)] == [s.tokens for s in alone]
    finally:
        found.arena.free(hog, full)
    found.remove_all_adapters()
    hog = found.arena.allocate(limit - size // 2)
    try:
        with pytest.raises(ValueError, match=r"'t1' takes .* bytes of the .* that xorz\.memory gives all"):
            llm.llm_engine.add_lora(second)
    finally:
        found.arena.free(hog, limit - size // 2)
    assert found.arena.used == 0
    llm.llm_engine.add_lora(second)


def test_a_base_that_was_replaced_in_the_engine_is_noticed(llm, twelve):
    found = engines.manager(llm)
    name = "model.layers.0.mlp.gate_up_proj.weight"
    found.loader._proved.discard(name)
    word = found.params[name]
    kept = word[3, 5].clone()
    word[3, 5] += 1
    try:
        with pytest.raises(ValueError, match=f"`{name}` is not made of the words of"):
            xorz.vllm.load(llm, "t8", twelve["t8"])
    finally:
        word[3, 5] = kept
    xorz.vllm.load(llm, "t8", twelve["t8"])


def test_loading_makes_no_dense_matrix(llm, twelve, monkeypatch):
    """Of all that is restored on the way, nothing is larger than a vector."""
    from xorz import _ops

    plain, restored = _ops.delta_restore, []
    monkeypatch.setattr(
        _ops, "delta_restore", lambda base, delta: restored.append(base.dim()) or plain(base, delta)
    )
    lora = xorz.vllm.request("t9", twelve["t9"])
    llm.llm_engine.remove_lora(lora.lora_int_id)
    llm.llm_engine.add_lora(lora)
    assert restored and set(restored) == {1}


def test_saved_words_are_the_plan_s(llm):
    """What the engine computes with is, piece by piece, what the checkpoint holds."""
    loader = engines.manager(llm).loader
    words = load_file(models.base(KIND, engines.FOLDER) / "model.safetensors")
    assert set(loader.plan.users) == set(words) and not loader.plan.refused
    qkv = loader.plan.pieces["model.layers.0.self_attn.qkv_proj.weight"]
    assert [p.name.split(".")[-2] for p in qkv] == ["q_proj", "k_proj", "v_proj"]
    for param, pieces in loader.plan.pieces.items():
        served = loader.params[param].reshape(loader.params[param].size(0), -1)
        for piece in pieces:
            stored = words[piece.name].reshape(words[piece.name].size(0), -1)
            assert torch.equal(served[slice(*piece.to_rows)], stored[slice(*piece.rows), slice(*piece.cols)])
