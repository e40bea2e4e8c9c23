"""Memory for tenants: whoever is idle makes room, and what is free is room, however it is split."""

import itertools
import random
import subprocess
import sys

import pytest
import torch
import xorz
from torch import nn
from xorz.serve.residency import Residency, padded


def test_free_bytes_are_room_however_they_are_split():
    residency = Residency(1 << 20)
    never = lambda: False  # noqa: E731
    blocks = residency.place([torch.full((1 << 10,), 7, dtype=torch.uint8)] * 1024, never)
    # Every second one goes: half of the bytes are free, in gaps of 1 KiB.
    residency.release(blocks[::2])
    assert residency.free == 1 << 19
    (large,) = residency.place([torch.arange(1 << 19).to(torch.uint8)], never)
    for offset, length in blocks[1::2]:
        assert bool((residency.arena.tensor[offset : offset + length] == 7).all())
    found = residency.arena.tensor[large[0] : sum(large)]
    assert torch.equal(found, torch.arange(1 << 19).to(torch.uint8))
    assert residency.free == 0 and residency.used == 1 << 20
    # The limit is one of bytes, not of addresses.
    with pytest.raises(MemoryError, match="only 0 are free"):
        residency.place([torch.zeros(1, dtype=torch.uint8)], never)


def test_pieces_in_use_never_keep_out_what_fits():
    # Tenants of many sizes come and go at random, some of them in use, up to the last free byte.
    order = random.Random(3)
    residency = Residency(1 << 20)
    held: dict[int, list[tuple[int, int]]] = {}
    for step in range(4000):
        sizes = [padded(order.choice((64, 640, 5000, 40_000, 120_000))) for _ in range(order.randint(1, 5))]
        total = sum(sizes)
        while residency.free < total:
            residency.release(held.pop(order.choice(list(held))))
        held[step] = residency.place([torch.zeros(n, dtype=torch.uint8) for n in sizes], lambda: False)
        assert residency.used == sum(padded(n) for pieces in held.values() for _, n in pieces)
        assert residency.used <= 1 << 20


def test_where_addresses_are_counted_one_model_leaves_some_for_others():
    code = (
        "import resource, xorz\n"
        "from xorz.serve.residency import Residency\n"
        "resource.setrlimit(resource.RLIMIT_DATA, (20 << 30, 20 << 30))\n"
        "held = [Residency(1 << 30) for _ in range(8)]\n"
        "print(sum(r.arena.tensor.numel() >= 1 << 30 for r in held))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.stdout.strip(), done.returncode) == ("8", 0), done.stderr


SIZES = (48, 256, 96, 320, 64)


def _model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Linear(a, b, bias=False) for a, b in itertools.pairwise((*SIZES, SIZES[0]))))


def _tuned(base: nn.Module, seed: int) -> dict[str, torch.Tensor]:
    """Some weights change much and others little, other ones in each tenant."""
    g = torch.Generator().manual_seed(seed)
    out = {}
    for name, tensor in base.state_dict().items():
        share = (0.02, 0.2, 1.0)[int(torch.randint(3, (), generator=g))]
        moved = torch.rand(tensor.shape, generator=g) < share
        out[name] = torch.where(moved, tensor + torch.randn(tensor.shape, generator=g) / 64, tensor)
    return out


def test_idle_tenants_make_room_whatever_was_used_before(tmp_path):
    base, count = _model(), 8
    tuned = {f"t{i}": _tuned(base, i) for i in range(count)}
    state = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    alone = xorz.attach(_model())
    for name, state_dict in tuned.items():
        xorz.pack(state, state_dict, tmp_path / name)
        alone.load(name, tmp_path / name)
    sizes = alone.sizes()
    alone.detach()
    # Room for any two at once, and not a byte more.
    budget = sum(sorted(sizes.values())[-2:])
    x = torch.randn(2, SIZES[0])
    want = {}
    for name, state_dict in tuned.items():
        plain = _model()
        plain.load_state_dict(state_dict)
        want[name] = plain(x).detach()
    tenants = xorz.attach(base, budget=budget, mode="exact")
    for name in tuned:
        tenants.load(name, tmp_path / name)
    order = random.Random(5)
    for _ in range(300):
        first, second = order.sample(sorted(tuned), 2)
        with tenants.use(first):
            with tenants.use(second):
                assert torch.equal(base(x), want[second])
            assert torch.equal(base(x), want[first])
        assert tenants.memory()["deltas"] <= budget
        if order.random() < 0.1:
            name = order.choice(sorted(tuned))
            tenants.swap(name, tmp_path / name)
    tenants.detach()


def test_a_tenant_in_memory_alone_is_swapped_in_its_own_room():
    base = _model()
    state = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    first, second = (xorz.diff(state, _tuned(base, seed)) for seed in (1, 2))
    alone = xorz.attach(_model())
    alone.load("a", first)
    alone.load("b", second)
    budget = max(alone.sizes().values())
    alone.detach()
    tenants = xorz.attach(base, budget=budget)
    tenants.load("a", xorz.diff(state, _tuned(base, 1)))
    tenants.swap("a", xorz.diff(state, _tuned(base, 2)))
    x = torch.randn(2, SIZES[0])
    plain = _model()
    plain.load_state_dict(_tuned(_model(), 2))
    with tenants.use("a"):
        torch.testing.assert_close(base(x), plain(x))
        # In use, the old one stays, and there is no room for another.
        with pytest.raises(MemoryError, match="budget"):
            tenants.swap("a", xorz.diff(state, _tuned(_model(), 1)))
        torch.testing.assert_close(base(x), plain(x))
    tenants.detach()
