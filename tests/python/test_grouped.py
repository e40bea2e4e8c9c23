"""Promise: a batch of many tenants on one base gives each row what `delta_linear` gives it with its tenant's delta: bit for
bit in deterministic mode, `F.linear` in exact mode; it is fit for autograd and compilation, and refuses misuse in words."""

import random

import pytest
import torch
import xorz
from conftest import ENCODINGS, make_delta, random_weight, same_bits
from torch.library import opcheck

ops = torch.ops.xorz
F = torch.nn.functional
N, K = 45, 130


class Fleet:
    """One tenant of each encoding and an empty slot, in an arena whose gaps are full of rubbish."""

    def __init__(self, dtype, n=N, k=K, encodings=(*ENCODINGS, "empty", "sparse"), with_bias=True):
        self.base = random_weight(n, k, dtype)
        self.tuned, self.deltas, slots, parts, at = [], [], [], [], 0
        for i, encoding in enumerate(encodings):
            if encoding == "empty":
                self.tuned.append(self.base)
                self.deltas.append(None)
                slots.append((77, 0))
                continue
            tuned, delta = make_delta(self.base, encoding, seed=10 + i)
            if encoding == "raw":
                tuned = torch.nan_to_num(tuned, posinf=1, neginf=1).clamp(-1e3, 1e3)
                delta = xorz.delta_encode(self.base, tuned, prefer="memory")
            slots.append((at, delta.numel()))
            fill = torch.full((64 + -delta.numel() % 64,), 0xEE, dtype=torch.uint8)
            parts += [delta, fill]
            at += delta.numel() + fill.numel()
            self.tuned.append(tuned)
            self.deltas.append(delta)
        self.arena = torch.cat(parts) if parts else torch.empty(0, dtype=torch.uint8)
        self.slots = torch.tensor(slots, dtype=torch.int64).reshape(-1, 2)
        self.biases = random_weight(len(slots) + 1, n, dtype, seed=5) if with_bias else None
        self.unchanged = xorz.delta_encode(self.base, self.base)

    def __call__(self, x, rows, mode="fast"):
        rows = torch.as_tensor(rows, dtype=torch.int32)
        return ops.delta_linear_grouped(x, self.base, self.biases, self.arena, self.slots, rows, mode=mode)

    def bias(self, tenant):
        return None if self.biases is None else self.biases[tenant]

    def weight(self, tenant):
        return self.base if tenant < 0 else self.tuned[tenant]

    def alone(self, x, tenant, mode):
        """What `delta_linear` gives these rows of one tenant."""
        delta = None if tenant < 0 else self.deltas[tenant]
        delta = self.unchanged if delta is None else delta
        return ops.delta_linear(x, self.base, self.bias(tenant), delta, mode=mode)


def maps(s, m, seed=0):
    """Row maps: all different, all one, the base alone, most of one tenant, any."""
    r = random.Random(seed)
    yield [i % (s + 1) - 1 for i in range(m)]
    yield [r.randrange(s)] * m
    yield [-1] * m
    yield [0 if r.random() < 0.8 else r.randrange(-1, s) for _ in range(m)]
    yield [r.randrange(-1, s) for _ in range(m)]


@pytest.mark.parametrize("m", [1, 2, 7, 16, 17, 40])
def test_deterministic_rows_are_those_of_the_tenant_alone(dtype, m):
    fleet = Fleet(dtype)
    x = random_weight(m, K, dtype, seed=3)
    for rows in maps(len(fleet.slots), m, seed=m):
        y = fleet(x, rows, "deterministic")
        for i, tenant in enumerate(rows):
            assert same_bits(y[i : i + 1], fleet.alone(x[i : i + 1], tenant, "deterministic")), (i, tenant)


@pytest.mark.parametrize("m", [1, 3, 16, 40, 90])
def test_fast_rows_are_products_with_the_tenants_weights(dtype, m):
    fleet = Fleet(dtype)
    x = random_weight(m, K, dtype, seed=3)
    for rows in maps(len(fleet.slots), m, seed=m):
        y = fleet(x, rows)
        for i, tenant in enumerate(rows):
            w, b = fleet.weight(tenant).double(), fleet.bias(tenant).double()
            want = x[i].double() @ w.T + b
            size = x[i].double().abs() @ w.abs().T + b.abs()
            limit = size * ((K + 8) * 2.0**-23 + 2 * torch.finfo(dtype).eps) + 1e-30
            assert bool(((y[i].double() - want).abs() <= limit).all()), (i, tenant)
        assert same_bits(fleet(x, rows), y)


@pytest.mark.parametrize("m", [1, 2, 9, 40])
def test_exact_rows_are_those_of_linear(dtype, m):
    fleet = Fleet(dtype)
    x = random_weight(m, K, dtype, seed=3)
    for rows in maps(len(fleet.slots), m, seed=m):
        y = fleet(x, rows, "exact")
        for tenant in set(rows):
            mine = torch.tensor(rows) == tenant
            assert same_bits(y[mine], F.linear(x[mine], fleet.weight(tenant), fleet.bias(tenant)))


def test_gradients_are_those_of_each_tenants_linear():
    fleet = Fleet(torch.float32)
    rows = torch.tensor([3, -1, 0, 1, 1, 5, 4, 2, -1, 0, 1, 5], dtype=torch.int32)
    x = torch.randn(3, 4, K, requires_grad=True)
    biases = fleet.biases.requires_grad_()
    g = torch.randn(3, 4, N)
    y = ops.delta_linear_grouped(x, fleet.base, biases, fleet.arena, fleet.slots, rows)
    got = torch.autograd.grad(y, (x, biases), g)
    flat = x.reshape(-1, K)
    want = torch.stack([F.linear(flat[i], fleet.weight(t), biases[t]) for i, t in enumerate(rows.tolist())])
    want = torch.autograd.grad(want.reshape(3, 4, N), (x, biases), g)
    for a, c in zip(got, want, strict=True):
        torch.testing.assert_close(a, c, rtol=1e-4, atol=1e-3)
    # Each row has the bits that the op for one tenant gives it.
    grads = ops.delta_linear_grouped_grad_input(g, fleet.base, fleet.arena, fleet.slots, rows).reshape(-1, K)
    for i, t in enumerate(rows.tolist()):
        delta = fleet.unchanged if t < 0 or fleet.deltas[t] is None else fleet.deltas[t]
        alone = ops.delta_linear_grad_input(g.reshape(-1, N)[i], fleet.base, delta)
        assert same_bits(grads[i], alone)
    # Linear in its argument.
    h = g.clone().requires_grad_()
    out = ops.delta_linear_grouped_grad_input(h, fleet.base, fleet.arena, fleet.slots, rows)
    (twice,) = torch.autograd.grad(out, (h,), x.detach())
    plain = ops.delta_linear_grouped(x.detach(), fleet.base, None, fleet.arena, fleet.slots, rows)
    assert same_bits(twice, plain)


def test_odd_and_empty_sizes(dtype):
    for n, k in [(0, 5), (5, 0), (1, 1), (33, 257), (1, 300), (300, 1)]:
        fleet = Fleet(dtype, n, k, encodings=("unchanged", "empty"))
        for mode in ("fast", "deterministic", "exact"):
            for m in (0, 1, 3, 40):
                x = random_weight(m, k, dtype, seed=2)
                rows = [i % 3 - 1 for i in range(m)]
                y = fleet(x, rows, mode)
                assert y.shape == (m, n)
                for i, t in enumerate(rows):
                    assert mode == "exact" or same_bits(y[i : i + 1], fleet.alone(x[i : i + 1], t, mode))
        none = Fleet(dtype, n, k, encodings=())
        x = random_weight(3, k, dtype, seed=2)
        y = none(x.reshape(3, 1, k), [-1] * 3, "deterministic")
        assert same_bits(y.reshape(3, n), none.alone(x, -1, "deterministic"))
        g = random_weight(3, n, dtype, seed=2)
        rows = torch.tensor([-1, 0, 1], dtype=torch.int32)
        gx = ops.delta_linear_grouped_grad_input(g, fleet.base, fleet.arena, fleet.slots, rows)
        assert same_bits(gx, ops.delta_linear_grad_input(g, fleet.base, fleet.unchanged))


@pytest.mark.filterwarnings(
    "ignore:The .grad attribute of a Tensor that is not a leaf"
)  # torch's own, in opcheck
def test_opcheck(dtype):
    fleet = Fleet(dtype)
    x = random_weight(6, K, dtype).requires_grad_()
    rows = torch.tensor([4, -1, 0, 2, 2, 3], dtype=torch.int32)
    biases = fleet.biases.clone().requires_grad_()
    rest = (fleet.arena, fleet.slots, rows)
    opcheck(ops.delta_linear_grouped.default, (x, fleet.base, biases, *rest))
    opcheck(
        ops.delta_linear_grouped.default,
        (x.detach().reshape(2, 3, K), fleet.base, None, *rest),
        {"mode": "deterministic"},
    )
    opcheck(ops.delta_linear_grouped.default, (x.detach(), fleet.base, None, *rest), {"mode": "exact"})
    g = random_weight(6, N, dtype).requires_grad_()
    opcheck(ops.delta_linear_grouped_grad_input.default, (g, fleet.base, *rest))
