"""Promise: while tenants are loaded, unloaded, swapped and evicted under it, every row is computed with its
own tenant's weights, or there is an error; and of many that ask at once, each gets its due.

`python tests/python/test_stress.py 100000` (`make stress`) runs the long form of the first test and prints
what happened.
"""

import collections
import copy
import os
import random
import sys
import tempfile
import threading
import time
from pathlib import Path

import pytest
import torch
import xorz
from small import LENGTH, VOCAB, differ_everywhere, fine_tuned, make_base, use_and_call

pytestmark = pytest.mark.usefixtures("one_thread")

FORWARDS = int(os.environ.get("XORZ_STRESS_FORWARDS", "2500"))


def alone(base, source, ids):
    """[ids, length, vocab]: each row computed with one tenant and no company, in a model of its own."""
    tenants = xorz.attach(copy.deepcopy(base), mode="deterministic")
    if source is not None:
        tenants.load("only", source)
    with torch.no_grad(), tenants.use(None if source is None else "only"):
        return torch.cat([tenants.model(row[None]) for row in ids])


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
        # Room for all that workers can hold at once (two each), and for one more that is loaded meanwhile,
        # and some.
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
