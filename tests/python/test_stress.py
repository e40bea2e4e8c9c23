"""Promise: under threads, tasks, graphs and tenants that come and go, every row is computed with its own tenant's weights, or
there is an error.

`python tests/python/test_stress.py 100000` (`make stress`) runs the long form of the first test and prints what happened.
"""

import asyncio
import collections
import contextvars
import copy
import ctypes
import gc
import os
import random
import sys
import tempfile
import threading
import time
import weakref
from pathlib import Path

import pytest
import torch
import xorz
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

F = nn.functional
FORWARDS = int(os.environ.get("XORZ_STRESS_FORWARDS", "2500"))
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


@pytest.fixture(autouse=True)
def one_thread():
    """Products this small only wait for a second one; the threads here are the tests' own."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def alone(base, source, ids):
    """[ids, length, vocab]: each row computed with one tenant and no company, in a model of its own."""
    tenants = xorz.attach(copy.deepcopy(base), mode="deterministic")
    if source is not None:
        tenants.load("only", source)
    with torch.no_grad(), tenants.use(None if source is None else "only"):
        return torch.cat([tenants.model(row[None]) for row in ids])


def differ_everywhere(outputs):
    return all(bool((a != b).all()) for i, a in enumerate(outputs) for b in outputs[:i])


class Stress:
    """Workers that check every row, while others load, unload, swap and, by a small budget, evict."""

    VARIANTS = 13
    WORKERS = 3

    def __init__(self, folder, seed=0):
        self.base, self.seed = make_base(), seed
        self.paths, self.want = {}, {}
        self.ids = torch.randint(0, VOCAB, (8, LENGTH), generator=torch.Generator().manual_seed(1))
        self.want[None] = alone(self.base, None, self.ids)
        for v in range(self.VARIANTS):
            tuned = fine_tuned(self.base, 100 + v)
            self.paths[v] = Path(folder) / f"{v}.xorz"
            xorz.pack(self.base.state_dict(), tuned.state_dict(), self.paths[v])
            self.want[v] = alone(self.base, self.paths[v], self.ids)
            with torch.no_grad():
                plain = tuned(self.ids)
            assert torch.allclose(self.want[v], plain, atol=1e-3, rtol=1e-3)
        assert differ_everywhere(list(self.want.values()))
        # What may answer under a name: t* stay, c* come and go, s is swapped.
        self.may = {
            None: (None,),
            **{f"t{v}": (v,) for v in range(6)},
            **{f"c{v}": (v,) for v in range(6, 10)},
        }
        self.may["s"] = (10, 11, 12)
        self.counts, self.lock, self.wrong = collections.Counter(), threading.Lock(), []
        self.done = threading.Event()

    def run(self, forwards):
        probe = xorz.attach(self.base, mode="deterministic")
        probe.load("t0", self.paths[0])
        size = probe.sizes()["t0"]
        probe.detach()
        # Room for all that workers can hold at once (two each), and for one more that is loaded meanwhile, and some.
        self.tenants = xorz.attach(self.base, mode="deterministic", budget=int(8.5 * size))
        evict = self.tenants._evict

        def counted(tenant):
            self.counts["evictions"] += tenant.slot is not None and not tenant.gone
            evict(tenant)

        self.tenants._evict = counted
        for name, variants in self.may.items():
            if name is not None and name[0] in "ts":
                self.tenants.load(name, self.paths[variants[0]])
        self.counts["evictions"] = 0
        self.total = forwards
        jobs = [self.work] * self.WORKERS + [self.come_and_go, self.swap]
        threads = [threading.Thread(target=self.guard, args=(job, i)) for i, job in enumerate(jobs)]
        start = time.monotonic()
        for t in threads:
            t.start()
        for t in threads[: self.WORKERS]:
            t.join()
        self.done.set()
        for t in threads:
            t.join()
        self.counts["seconds"] = round(time.monotonic() - start)
        assert self.tenants.memory()["deltas"] <= self.tenants.budget
        for name in self.tenants.names():
            self.tenants.unload(name)
        memory = self.tenants.memory()
        assert memory["deltas"] == memory["copies"] == 0, memory
        self.tenants.detach()

    def guard(self, job, seed):
        try:
            job(random.Random(1000 * self.seed + seed))
        except BaseException as error:
            self.wrong.append(repr(error))
            self.done.set()
            raise

    def take(self):
        with self.lock:
            return self.counts["forwards"] < self.total and not self.done.is_set()

    def work(self, pick):
        while self.take():
            two = pick.sample(list(self.may), 2)
            names = [pick.choice((None, *two)) for _ in range(pick.randint(1, 6))]
            rows = [pick.randrange(len(self.ids)) for _ in names]
            try:
                with torch.no_grad(), self.tenants.use(names):
                    got = self.tenants.model(self.ids[rows])
                    again = self.tenants.model(self.ids[rows]) if pick.random() < 0.1 else got
            except KeyError:
                # Only a name that comes and goes may be missing.
                assert any(n is not None and n[0] == "c" for n in names), names
                self.count("missing")
                continue
            except MemoryError:
                self.count("no room")
                continue
            # A swapped name is one variant for as long as a `use` lasts.
            variants = {n: [v for v in self.may[n] if torch.equal(got[names.index(n)], self.want[v][rows[names.index(n)]])]
                        for n in set(names)}  # fmt: skip
            right = [
                bool(variants[n]) and torch.equal(g, self.want[variants[n][0]][r])
                for n, r, g in zip(names, rows, got, strict=True)
            ]
            self.count("forwards", rows=len(names), mixed=len(set(names)) > 1, mismatches=right.count(False))
            if not all(right) or not torch.equal(got, again):
                self.wrong.append((names, rows, right))
                self.done.set()

    def count(self, what, **more):
        with self.lock:
            self.counts.update({what: 1, **more})

    def come_and_go(self, pick):
        names, here = [n for n in self.may if n is not None and n[0] == "c"], set()
        while not self.done.is_set():
            name = pick.choice(names)
            try:
                if name in here:
                    self.tenants.unload(name)
                    here.remove(name)
                    self.count("unloads")
                else:
                    self.tenants.load(name, self.paths[self.may[name][0]])
                    here.add(name)
                    self.count("loads")
            except MemoryError:
                self.count("no room")
            time.sleep(0.002)

    def swap(self, pick):
        while not self.done.is_set():
            try:
                self.tenants.swap("s", self.paths[pick.choice(self.may["s"])])
                self.count("swaps")
            except MemoryError:
                self.count("no room")
            time.sleep(0.003)


def test_under_load_unload_swap_and_evict_every_row_is_its_tenants(tmp_path):
    stress = Stress(tmp_path)
    stress.run(FORWARDS)
    counts = stress.counts
    assert not stress.wrong, stress.wrong[:3]
    assert counts["mismatches"] == 0 and counts["forwards"] >= FORWARDS, counts
    assert counts["mixed"] > 0.3 * counts["forwards"] and counts["rows"] > 2 * counts["forwards"], counts
    assert min(counts[c] for c in ("loads", "unloads", "swaps", "evictions")) > 10, counts


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


def test_another_load_in_the_midst_of_a_forward_changes_nothing_in_it():
    """Two threads, made one: the second one's load happens exactly between two steps of the first one's forward."""
    base, tenants, ids, want = served()
    plain = make_base()
    others = {f"n{i}": fine_tuned(plain, 10 + i) for i in range(12)}
    deltas = {name: xorz.diff(plain, model) for name, model in others.items()}
    left = list(deltas)

    class Interrupted(dict):
        def items(self):
            found = list(super().items())
            count = 1 if len(left) > 8 else len(left)
            # One at first; then so many that the tables of slots must grow.
            for name in [left.pop(0) for _ in range(count)]:
                tenants.load(name, deltas[name])
            return found

    sites = [
        s for s in tenants.sites.values() if s.kind == "linear" and s.name.endswith(("qkv", "down", "head"))
    ]
    for site in sites:
        site.values = Interrupted(site.values)
    while left:
        for site in sites:
            site._biases = None
        with torch.no_grad(), tenants.use(["a", None, "b"]):
            y = base(ids)
        assert all(close(y[i], want[n][i]) for i, n in enumerate(["a", None, "b"]))
    for name, model in others.items():
        with torch.no_grad(), tenants.use([None, name, "a"]):
            y = base(ids)
        with torch.no_grad():
            assert close(y[1], model(ids)[1]) and close(y[0], want[None][0]) and close(y[2], want["a"][2]), (
                name
            )


def test_tasks_of_asyncio_have_each_their_own_tenants():
    base, tenants, ids, want = served()

    async def task(i):
        name = ("a", "b", None)[i % 3]
        for _ in range(4):
            with tenants.use(name):
                await asyncio.sleep(0.001 * (i % 4))
                with torch.no_grad():
                    y = base(ids)
                # A task started inside has them, too.
                z = await asyncio.create_task(child())
                await asyncio.sleep(0)
            assert close(y, want[name]) and torch.equal(y, z)
            with pytest.raises(RuntimeError, match="no tenant is active"):
                base(ids)
        return name

    async def child():
        await asyncio.sleep(0.001)
        with torch.no_grad():
            return base(ids)

    async def outlive():
        with tenants.use("a"):
            late = asyncio.create_task(child())
        with pytest.raises(RuntimeError, match="the use of 'a' has ended"):
            await late

    async def main():
        done = await asyncio.gather(*(task(i) for i in range(12)))
        assert len(done) == 12
        await outlive()

    asyncio.run(main())


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


def test_threads_have_the_tenants_they_are_given_and_no_others():
    base, tenants, ids, want = served()
    with torch.no_grad(), tenants.use("a"):
        lost = in_thread(lambda: base(ids))
        assert isinstance(lost, RuntimeError) and "no tenant is active" in str(lost)
        context = contextvars.copy_context()
        got = in_thread(lambda: context.run(base, ids))
        assert close(got, want["a"])
        with tenants.use("b"):
            inner = contextvars.copy_context()
            # The thread's own `use` does not reach anybody else.
            both = in_thread(lambda: inner.run(lambda: (base(ids), use_and_call(tenants, None, ids))))
            assert close(both[0], want["b"]) and close(both[1], want[None])
        assert close(base(ids), want["a"])


def use_and_call(tenants, names, ids):
    with tenants.use(names):
        return tenants.model(ids)


def test_a_use_that_ends_under_a_running_thread_is_an_error_there_and_never_another_tenant():
    base, tenants, ids, _ = served()
    inside, go = threading.Event(), threading.Event()

    def stop(*_):
        inside.set()
        assert go.wait(30)

    hook = base.blocks[0].gate.register_forward_pre_hook(stop)
    out = []
    with torch.no_grad(), tenants.use(["a", "b", "a"]):
        context = contextvars.copy_context()
        thread = threading.Thread(target=lambda: out.append(in_thread(lambda: context.run(base, ids))))
        thread.start()
        assert inside.wait(30)
    for name in "ab":
        tenants.unload(name)
    assert tenants.memory()["deltas"] == 0
    # Their places go to others at once.
    tenants.load("c", xorz.diff(base, fine_tuned(make_base(), 3)))
    go.set()
    thread.join()
    hook.remove()
    assert isinstance(out[0], RuntimeError) and "the use of 'a', 'b' has ended" in str(out[0]), out


def test_what_a_running_product_reads_is_not_given_away():
    _, tenants, _, _ = served()
    with tenants.use(["a", "b"]):
        rows = tenants.active.get()
        rows.begin()  # as a module does when it is called
    for name in "ab":
        tenants.unload(name)
    assert tenants.memory()["deltas"] > 0 and len(tenants._slots) == 2
    rows.end()
    assert tenants.memory()["deltas"] == 0 and not tenants._slots
    with pytest.raises(RuntimeError, match="has ended"):
        rows.begin()


def checkpointed(model, ids, **options):
    """Small.forward with each block recomputed in the backward pass; gives the gradient at the blocks' input."""
    x = model.embed(ids).detach().requires_grad_()
    y = x
    for block in model.blocks:
        y = checkpoint(block, y, use_reentrant=False, **options) if options.pop("on", True) else block(y)
    return x, model.head(model.norm(y)).square().sum()


def test_gradient_checkpointing_carries_its_tenants_or_raises():
    base, tenants, ids, _ = served()
    names = ["a", None, "b"]
    with tenants.use(names):
        x, loss = checkpointed(base, ids, on=False)
        loss.backward()
        plain = x.grad
        x, loss = checkpointed(base, ids, context_fn=tenants.carry)
    # After the `use`, and with another one open.
    with tenants.use("b"):
        loss.backward()
    assert torch.equal(x.grad, plain)
    for i, name in enumerate(names):
        with tenants.use(name):
            x, loss = checkpointed(base, ids[i : i + 1], context_fn=tenants.carry)
        loss.backward()
        assert close(x.grad, plain[i : i + 1])
    assert not close(plain[0], plain[2])
    with tenants.use(names):
        x, loss = checkpointed(base, ids)
        with pytest.raises(RuntimeError, match=r"context_fn=tenants\.carry"):
            loss.backward()
    del loss, x
    # What a graph carries stays until the graph is gone.
    with tenants.use("a"):
        x, loss = checkpointed(base, ids, context_fn=tenants.carry)
    tenants.unload("a")
    assert len(tenants._slots) == 2
    loss.backward()
    del loss, x
    gc.collect()
    assert len(tenants._slots) == 1


def test_a_backward_pass_whose_tenant_is_gone_is_an_error():
    base, tenants, ids, _ = served()
    with tenants.use(["a", None, "b"]):
        _, loss = checkpointed(base, ids, on=False)
    loss.backward(retain_graph=True)
    tenants.unload("a")
    with pytest.raises(RuntimeError, match="resident delta"):
        loss.backward(retain_graph=True)
    tenants.load("c", xorz.diff(base, fine_tuned(make_base(), 3)))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward(retain_graph=True)


def test_compiled_once_whatever_the_tenants():
    base, tenants, ids, want = served()
    count = CompileCounterWithBackend("aot_eager")
    torch._dynamo.reset()
    compiled = torch.compile(base, backend=count, fullgraph=True, dynamic=False)

    def check(names):
        with torch.no_grad(), tenants.use(names):
            y = compiled(ids)
        each = names if isinstance(names, list) else [names] * 3
        assert all(close(y[i], want[n][i]) for i, n in enumerate(each)), names

    check("a")
    for names in (["a", "b", None], ["b", "b", "a"], None, "b"):
        check(names)
    for i in range(6):  # more than there were slots
        tuned = fine_tuned(make_base(), 20 + i)
        tenants.load(f"n{i}", xorz.diff(base, tuned))
        with torch.no_grad():
            want[f"n{i}"] = tuned(ids)
        check([f"n{i}", "a", None])
    tenants.unload("n0")
    tenants.swap("b", xorz.diff(base, fine_tuned(make_base(), 1)))
    want["b"] = want["a"]
    check(["n5", "b", "a"])
    assert count.frame_count == 1, count.frame_count
    with pytest.raises(RuntimeError, match="no tenant is active"), torch.no_grad():
        compiled(ids)
    # Another thread compiles nothing either, and has its own tenants.
    with torch.no_grad():
        got = in_thread(lambda: use_compiled(tenants, compiled, ids))
    assert close(got, want["n3"]) and count.frame_count == 1
    torch._dynamo.reset()


def use_compiled(tenants, compiled, ids):
    with torch.no_grad(), tenants.use("n3"):
        return compiled(ids)


def test_of_many_that_load_unload_or_use_at_once_each_gets_its_due(tmp_path):
    base = make_base()
    path = tmp_path / "a.xorz"
    xorz.pack(base.state_dict(), fine_tuned(base, 1).state_dict(), path)
    tenants = xorz.attach(base)
    tenants.load("size", path)
    size = tenants.sizes()["size"]
    tenants.detach()

    def at_once(calls):
        barrier, out = threading.Barrier(len(calls)), [None] * len(calls)

        def run(i):
            barrier.wait()
            try:
                calls[i]()
            except Exception as error:
                out[i] = type(error)

        threads = [threading.Thread(target=run, args=(i,)) for i in range(len(calls))]
        for t in threads:
            t.start()
        for t in threads:
            t.join()
        return collections.Counter(out)

    tenants = xorz.attach(base, budget=2 * size + size // 2)
    for _ in range(5):
        assert at_once([lambda: tenants.load("x", path)] * 6) == {None: 1, ValueError: 5}
        assert tenants.names() == ["x"] and tenants.memory()["deltas"] + tenants.memory()["copies"] == size
        assert at_once([lambda: tenants.unload("x")] * 6) == {None: 1, KeyError: 5}
        assert tenants.memory()["deltas"] == 0 and not tenants._slots
    # All from files: whatever does not fit is evicted. Nobody else's is taken while it is held.
    assert at_once([lambda i=i: tenants.load(f"x{i}", path) for i in range(6)]) == {None: 6}
    assert len(tenants.sizes()) == 2 and len(tenants.names()) == 6
    with tenants.use("x0"), tenants.use("x1"):
        assert at_once([lambda i=i: use_and_call(tenants, f"x{i}", torch.zeros(1, 2, dtype=torch.int64))
                        for i in (2, 3, 4, 5, 0, 1)]) == {None: 2, MemoryError: 4}  # fmt: skip
        assert sorted(tenants.sizes()) == ["x0", "x1"]
        with pytest.raises(MemoryError, match="budget"):
            tenants.load("y", path)
        assert "y" not in tenants.names()
    use_and_call(tenants, "x4", torch.zeros(1, 2, dtype=torch.int64))
    with pytest.raises(KeyError, match="'y'"):
        tenants.use("y").__enter__()
    # Six that want the same evicted tenant read it once.
    assert not tenants.resident("x5")
    ids = torch.zeros(1, 2, dtype=torch.int64)
    assert at_once([lambda: use_and_call(tenants, "x5", ids)] * 6) == {None: 6}
    assert len(tenants.sizes()) == 2 and tenants.memory()["deltas"] + tenants.memory()["copies"] == 2 * size
    assert all(t.pins == 0 for t in tenants._slots.values())


def resident_bytes():
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def test_memory_is_what_it_says_and_returns_to_where_it_was():
    base = nn.Sequential(nn.Linear(2048, 4096))
    tuned = {
        n: torch.where(torch.rand(p.shape) < 0.3, p.detach() * 1.01, p.detach())
        for n, p in base.named_parameters()
    }
    delta = xorz.diff(base.state_dict(), tuned)
    del tuned
    kept = [weakref.ref(t) for t in delta.deltas.values()]
    tenants = xorz.attach(base)
    x = torch.randn(1, 2048)
    tenants.load("warm", delta)
    use_and_call(tenants, "warm", x)
    tenants.unload("warm")
    before = resident_bytes()
    for cycle in range(3):
        for i in range(10):
            tenants.load(f"{cycle}.{i}", delta)
        with torch.no_grad(), tenants.use(f"{cycle}.1"):
            base(x)
        memory, now = tenants.memory(), resident_bytes()
        grown = memory["deltas"] + memory["copies"]
        # Against what the tenants take, never against the process: that is as large as the tests before this one left it.
        assert grown > 100 << 20 and abs(now - before - grown) < 0.05 * grown + (4 << 20), (
            before,
            now,
            grown,
        )
        if cycle == 2:
            # A tenant keeps its deltas once, in the arena, not what it was loaded from.
            del delta
            gc.collect()
            assert not any(ref() is not None for ref in kept)
        for name in tenants.names():
            tenants.unload(name)
        after = resident_bytes()
        assert after < before + 0.05 * grown + (4 << 20), (cycle, before, after, grown)


if __name__ == "__main__":
    torch.set_num_threads(1)
    os.environ["XORZ_CACHE_DIR"] = ""
    with tempfile.TemporaryDirectory() as folder:
        stress = Stress(folder, seed=int(time.time()))
        stress.run(int(sys.argv[1]) if len(sys.argv) > 1 else 100_000)
    print(
        f"{Stress.WORKERS} workers, 2 that load, unload and swap:",
        dict(stress.counts),
        "wrong:",
        stress.wrong[:3],
    )
    sys.exit(bool(stress.wrong or stress.counts["mismatches"]))
