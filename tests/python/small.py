"""A Llama in little of torch's own modules, its fine-tunes, and who serves them from threads. No promise is tested here."""

import copy
import threading

import torch
import xorz
from torch import nn

F = nn.functional


VOCAB, WIDTH, LENGTH = 48, 32, 4


class Block(nn.Module):
    def __init__(self, width, heads=2):
        super().__init__()
        self.heads = heads
        self.before, self.between = nn.RMSNorm(width), nn.RMSNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width, bias=False)
        self.gate, self.up = nn.Linear(width, 2 * width, bias=False), nn.Linear(width, 2 * width, bias=False)
        self.down = nn.Linear(2 * width, width)

    def forward(self, x):
        q, k, v = self.qkv(self.before(x)).unflatten(-1, (3, self.heads, -1)).transpose(1, 3).unbind(2)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
        x = x + self.out(mixed)
        y = self.between(x)
        return x + self.down(F.silu(self.gate(y)) * self.up(y))


class Small(nn.Module):
    """A Llama in little, of torch's own modules."""

    def __init__(self, vocab=VOCAB, width=WIDTH, blocks=1):
        super().__init__()
        self.embed = nn.Embedding(vocab, width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(blocks))
        self.norm, self.head = nn.RMSNorm(width), nn.Linear(width, vocab)

    def forward(self, ids):
        x = self.embed(ids)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def make_base(**options):
    torch.manual_seed(0)
    return Small(**options).eval()


def fine_tuned(base, seed):
    out, g = copy.deepcopy(base), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in out.parameters():
            p += (
                0.2
                * p.std().clamp(0.1)
                * torch.randn(p.shape, generator=g)
                * (torch.rand(p.shape, generator=g) < 0.3)
            )
    return out


def differ_everywhere(outputs):
    return all(bool((a != b).all()) for i, a in enumerate(outputs) for b in outputs[:i])


def served(**options):
    """(base, tenants with a and b, ids, {name: what plain fine-tunes give})."""
    base = make_base()
    tuned = {"a": fine_tuned(base, 1), "b": fine_tuned(base, 2), None: copy.deepcopy(base)}
    tenants = xorz.attach(base, **options)
    for name in "ab":
        tenants.load(name, xorz.diff(base, tuned[name]))
    ids = torch.randint(0, VOCAB, (3, LENGTH), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        want = {name: model(ids) for name, model in tuned.items()}
    assert differ_everywhere(list(want.values()))
    return base, tenants, ids, want


def close(a, b):
    return torch.allclose(a, b, atol=1e-4, rtol=1e-4)


def in_thread(call):
    """What `call` gives or raises in a thread of its own."""
    out = []

    def run():
        try:
            out.append(call())
        except BaseException as error:
            out.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    return out[0]


def use_and_call(tenants, names, ids):
    with tenants.use(names):
        return tenants.model(ids)
