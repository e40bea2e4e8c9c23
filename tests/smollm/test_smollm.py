"""Promise: a real language model serves its fine-tunes, one in each row, token for token as each is served
alone.

SmolLM2-135M-Instruct in bf16 with four short fine-tunes made here: `make test-smollm`, which installs what it
needs. Not part of `make test`: the first run trains for some minutes and keeps the fine-tunes under build/.
"""

import pytest
import smollm
import torch
import xorz

NEW = 8
SEA, KITCHEN, LAW, ROBOT = NAMES = smollm.NAMES[-4:]
ROWS = {
    "The captain wrote": SEA,
    "The cat": None,
    "Peel four onions and": KITCHEN,
    "BEEP. UNIT SEVEN": ROBOT,
    "The tenant shall": LAW,
    "In the morning the": SEA,
}
TENANTS = list(ROWS.values())


def generate(model, encoded):
    with torch.no_grad():
        return model.generate(**encoded, max_new_tokens=NEW, do_sample=False)


def row(encoded, i):
    return {key: value[i : i + 1] for key, value in encoded.items()}


@pytest.fixture(scope="module")
def encoded():
    """Prompts of several lengths; all have padding, so that a row alone takes the same path as in the batch."""
    return dict(smollm.tokenizer()(list(ROWS), return_tensors="pt", padding="max_length", max_length=10))


@pytest.mark.parametrize("prefer", ["speed", "memory"])
def test_a_batch_of_tenants_generates_what_each_generates_alone(encoded, prefer):
    model = smollm.plain()
    tenants = xorz.attach(model, mode="deterministic", prefer=prefer)
    for name in NAMES:
        tenants.load(name, smollm.package(name))
    with tenants.use(TENANTS):
        together = generate(model, encoded)
    for i, name in enumerate(TENANTS):
        with tenants.use(name):
            alone = generate(model, row(encoded, i))
        assert torch.equal(together[i : i + 1], alone), f"row {i}, {name}"
    # A swap of two rows' tenants would be seen.
    swapped = [KITCHEN, None, SEA, *TENANTS[3:]]
    with tenants.use(swapped):
        wrong = generate(model, encoded)
    assert (wrong != together).any(dim=1).tolist() == [True, False, True, False, False, False]


def test_fine_tunes_say_different_things(encoded):
    model = smollm.plain()
    tenants = xorz.attach(model, mode="deterministic")
    said = {}
    for name in (None, *NAMES):
        if name is not None:
            tenants.load(name, smollm.package(name))
        with tenants.use(name):
            said[name] = tuple(generate(model, encoded).flatten().tolist())
    assert len(set(said.values())) == len(said)


def test_a_tenant_alone_is_the_plain_fine_tuned_model_in_exact_mode(encoded):
    model = smollm.plain()
    tenants = xorz.attach(model, mode="exact")
    ids = {"input_ids": encoded["input_ids"][:1], "attention_mask": encoded["attention_mask"][:1]}
    for name in NAMES[:2]:
        tenants.load(name, smollm.package(name))
        plain = smollm.plain(name)
        with torch.no_grad(), tenants.use(name):
            got = model(**ids).logits
        assert torch.equal(got, plain(**ids).logits)
        assert not torch.equal(got, smollm.plain()(**ids).logits)


def test_memory_is_the_base_and_small_deltas():
    model = smollm.plain()
    tenants = xorz.attach(model, prefer="memory")
    for name in NAMES:
        tenants.load(name, smollm.package(name))
    memory = tenants.memory()
    base = 2 * sum(p.numel() for p in model.parameters())
    assert memory["base"] - base < 1 << 16  # the buffers of rotary positions
    assert memory["total"] == memory["base"] + memory["deltas"] + memory["copies"]
    assert memory["deltas"] == sum(tenants.sizes().values()) - memory["copies"]
    assert memory["copies"] <= 0.01 * len(NAMES) * base
    assert memory["deltas"] < 0.5 * len(NAMES) * base
