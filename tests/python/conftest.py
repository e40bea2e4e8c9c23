"""Data that forces each encoding, and comparisons of bits. No promise is tested here."""

import os

import pytest
import torch
import xorz

# No test is to read or fill the cache of whoever runs it.
os.environ["XORZ_CACHE_DIR"] = ""

ENCODINGS = ("unchanged", "sparse", "exponent", "raw")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
BITS = {torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.float16: torch.int16}
PREFER = {"unchanged": "speed", "sparse": "speed", "exponent": "memory", "raw": "memory"}


def bits(t: torch.Tensor) -> torch.Tensor:
    return t.detach().contiguous().view(BITS[t.dtype]) if t.dtype in BITS else t


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(bits(a), bits(b))


def random_weight(n: int, k: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    return (torch.randn(n, k, generator=torch.Generator().manual_seed(seed)) * 0.05).to(dtype)


def fine_tune(base: torch.Tensor, encoding: str, seed: int = 1) -> torch.Tensor:
    """A fine-tune of `base` whose delta takes `encoding` at PREFER[encoding]."""
    g = torch.Generator().manual_seed(seed)
    words = bits(base).clone()
    if encoding == "sparse":
        changed = torch.rand(words.shape, generator=g) < 0.03
        if words.numel():
            changed.view(-1)[0] = True
        words = torch.where(
            changed, words + torch.randint(1, 4, words.shape, generator=g, dtype=words.dtype), words
        )
    elif encoding == "exponent":
        words = words + torch.randint(-3, 4, words.shape, generator=g, dtype=words.dtype)
    elif encoding == "raw":
        fresh = torch.randn(words.shape, generator=g) * torch.exp(4 * torch.randn(words.shape, generator=g))
        fresh = fresh.clamp(-1000, 1000)
        low = torch.randint(-(2**15), 2**15 - 1, words.shape, generator=g, dtype=words.dtype)
        words = bits(fresh.to(base.dtype)) ^ (low & (0xFFFF if words.dtype == torch.int32 else 0x7F))
    return words.view(base.dtype)


def make_delta(base: torch.Tensor, encoding: str, seed: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    """(fine_tuned, delta) with the header's encoding byte asserted."""
    tuned = fine_tune(base, encoding, seed)
    delta = xorz.delta_encode(base, tuned, prefer=PREFER[encoding])
    assert int(delta[10]) == ENCODINGS.index(encoding), (encoding, xorz.delta_info(delta))
    return tuned, delta


def bound(x: torch.Tensor, tuned: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """Generous for one output: the summation's own error, and two roundings to the dtype."""
    total = x.double().abs() @ tuned.double().abs().T
    if bias is not None:
        total = total + bias.double().abs()
    return total * (tuned.shape[1] + 8) * 2.0**-23 + total * 2 * torch.finfo(x.dtype).eps + 1e-30


def close(y: torch.Tensor, x: torch.Tensor, tuned: torch.Tensor, bias: torch.Tensor | None) -> bool:
    want = x.double() @ tuned.double().T
    if bias is not None:
        want = want + bias.double()
    return y.shape == want.shape and bool(((y.double() - want).abs() <= bound(x, tuned, bias)).all())


@pytest.fixture(scope="module")
def one_thread():
    """Models this small gain nothing from more, and threads that wait for each other take minutes on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(params=ENCODINGS)
def encoding(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(params=DTYPES, ids=lambda d: str(d).removeprefix("torch."))
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param
