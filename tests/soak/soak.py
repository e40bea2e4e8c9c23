"""Hours of serving in minutes: `python tests/soak/soak.py 60` (`make soak MINUTES=60`).

One model whose budget holds a few of its many tenants. Threads and asyncio tasks ask for one tenant at a time and are compared
bit by bit with the plain fine-tuned model, run on the same row (`mode="exact"`); then threads ask for mixed batches, each row
of which is compared bit by bit with its tenant alone (`mode="deterministic"`, compared with the plain model by tolerance).
Meanwhile tenants are loaded, unloaded, swapped and evicted, and packages that are cut, damaged, of another base or no packages
at all are loaded, which must be refused and leave nothing. At the end tenants are loaded 10,000 times, and what the process
holds must not grow.
"""

import asyncio
import collections
import os
import random
import sys
import tempfile
import threading
import time
from pathlib import Path

os.environ["XORZ_CACHE_DIR"] = ""
sys.path.insert(0, str(Path(__file__).parents[1] / "python"))

import torch
import xorz
from small import LENGTH, VOCAB, fine_tuned, make_base
from test_stress import Stress

TUNED, ROWS, LOADS = 9, 8, 10_000


def resident() -> int:
    """Bytes of memory that the process holds."""
    with open("/proc/self/statm") as statm:
        return int(statm.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


class Soak:
    """Everything that runs against one model."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.counts, self.wrong = folder, collections.Counter(), []
        self.ids = torch.randint(0, VOCAB, (ROWS, 1, LENGTH), generator=torch.Generator().manual_seed(1))
        self.lock, self.done = threading.Lock(), threading.Event()
        plain = {None: make_base()}
        for v in range(TUNED):
            plain[v] = fine_tuned(plain[None], 100 + v)
            xorz.pack(plain[None].state_dict(), plain[v].state_dict(), self.path(v))
        with torch.no_grad():
            self.want = {v: [model(row) for row in self.ids] for v, model in plain.items()}
        outs = [row for rows in self.want.values() for row in rows]
        assert all(not torch.equal(a, b) for i, a in enumerate(outs) for b in outs[:i])
        self.bad = self.make_bad(plain)
        self.plain = plain

    def path(self, v: int) -> Path:
        return self.folder / f"{v}.xorz"

    def make_bad(self, plain) -> list[Path]:
        """Packages that must be refused."""
        good, out = self.path(0).read_bytes(), []
        other = make_base()
        with torch.no_grad():
            for p in other.parameters():
                p += 1
        xorz.pack(other.state_dict(), plain[0].state_dict(), self.folder / "other.xorz")
        texts = {
            "cut": good[: len(good) // 2],
            "flipped": good[:-100] + bytes([good[-100] ^ 1]) + good[-99:],
            "header": good[:40] + b"?" + good[41:],
            "empty": b"",
            "text": b"no package" * 100,
        }
        for name, data in texts.items():
            out.append(self.folder / f"{name}.xorz")
            out[-1].write_bytes(data)
        return [*out, self.folder / "other.xorz", self.folder, self.folder / "missing.xorz"]

    def count(self, what: str) -> None:
        with self.lock:
            self.counts[what] += 1

    def check(self, name: str | None, i: int, got: torch.Tensor) -> None:
        variants = (None,) if name is None else (6, 7, 8) if name == "swapped" else (int(name[1:]),)
        self.count("rows")
        if not any(torch.equal(got, self.want[v][i]) for v in variants):
            self.wrong.append((name, i))
            self.done.set()

    def names(self) -> list[str | None]:
        return [None, "swapped", *(f"t{v}" for v in range(6))]

    def ask(self, pick: random.Random) -> None:
        """A thread: one row of one tenant, again and again."""
        while not self.done.is_set():
            name, i = pick.choice(self.names()), pick.randrange(ROWS)
            try:
                with torch.no_grad(), self.tenants.use(name):
                    got = self.tenants.model(self.ids[i])
            except (KeyError, MemoryError) as error:
                assert isinstance(error, MemoryError) or name in ("t4", "t5"), name
                self.count(type(error).__name__)
                continue
            self.check(name, i, got)

    def tasks(self, pick: random.Random) -> None:
        """A thread with an event loop: tasks whose uses overlap."""

        async def one() -> None:
            name, i = pick.choice(self.names()), pick.randrange(ROWS)
            try:
                with self.tenants.use(name):
                    await asyncio.sleep(pick.random() / 500)
                    with torch.no_grad():
                        got = self.tenants.model(self.ids[i])
                    await asyncio.sleep(0)
            except (KeyError, MemoryError) as error:
                self.count(type(error).__name__)
                return
            self.check(name, i, got)
            self.count("tasks")

        async def all_of_them() -> None:
            while not self.done.is_set():
                await asyncio.gather(*(one() for _ in range(6)))

        asyncio.run(all_of_them())

    def change(self, pick: random.Random) -> None:
        """A thread: t4 and t5 come and go, one name is swapped, bad packages are tried."""
        here = {"t4", "t5"}
        while not self.done.is_set():
            try:
                match pick.randrange(3):
                    case 0:
                        name = pick.choice(("t4", "t5"))
                        if name in here:
                            here.remove(name)
                            self.tenants.unload(name)
                            self.count("unloads")
                        else:
                            self.tenants.load(name, self.path(int(name[1:])))
                            here.add(name)
                            self.count("loads")
                    case 1:
                        self.tenants.swap("swapped", self.path(pick.choice((6, 7, 8))))
                        self.count("swaps")
                    case _:
                        self.refuse(pick)
            except MemoryError:
                self.count("MemoryError")
            time.sleep(0.001)

    def refuse(self, pick: random.Random) -> None:
        bad, name = pick.choice(self.bad), pick.choice(("new", "swapped"))
        try:
            (self.tenants.swap if name == "swapped" else self.tenants.load)(name, bad)
        except (ValueError, OSError):
            self.count("refused")
        else:
            self.wrong.append(f"{bad} was taken")
            self.done.set()
        if "new" in self.tenants.names():
            self.wrong.append(f"{bad} was refused and left a tenant")

    def guard(self, job, pick: random.Random) -> None:
        try:
            job(pick)
        except BaseException as error:
            self.wrong.append(repr(error))
            self.done.set()
            raise

    def run(self, seconds: float, seed: int) -> None:
        """All of it for so long."""
        model = make_base()
        probe = xorz.attach(model, mode="exact")
        probe.load("t0", self.path(0))
        size = probe.sizes()["t0"]
        probe.detach()
        # Room for what threads hold at once, and less than there are.
        self.tenants = xorz.attach(model, mode="exact", budget=int(5.5 * size))
        for v in range(6):
            self.tenants.load(f"t{v}", self.path(v))
        self.tenants.load("swapped", self.path(6))
        evict = self.tenants._evict

        def counted(tenant) -> None:
            self.count("evictions")
            evict(tenant)

        self.tenants._evict = counted
        self.done.clear()
        jobs = [self.ask, self.ask, self.tasks, self.change]
        threads = [
            threading.Thread(target=self.guard, args=(job, random.Random(100 * seed + i)))
            for i, job in enumerate(jobs)
        ]
        for thread in threads:
            thread.start()
        self.done.wait(seconds)
        self.done.set()
        for thread in threads:
            thread.join()
        assert self.tenants.memory()["deltas"] <= self.tenants.budget
        for name in self.tenants.names():
            self.tenants.unload(name)
        memory = self.tenants.memory()
        assert memory["deltas"] == memory["copies"] == 0, memory
        self.tenants.detach()

    def loads(self, count: int) -> tuple[int, int]:
        """Load and unload, good ones and bad; what the process held before and after."""
        model, pick = make_base(), random.Random(5)
        tenants = xorz.attach(model, mode="exact")
        before = 0
        for i in range(count):
            if i == count // 5:
                before = resident()  # allocators have what they keep by now
            if i % 10 == 9:
                try:
                    tenants.load("bad", pick.choice(self.bad))
                    self.wrong.append("a bad package was taken")
                except (ValueError, OSError):
                    continue
            v = i % TUNED
            tenants.load("x", self.path(v))
            if i % 50 == 0:
                with torch.no_grad(), tenants.use("x"):
                    if not torch.equal(model(self.ids[0]), self.want[v][0]):
                        self.wrong.append(("load", i))
            tenants.unload("x")
        after = resident()
        tenants.detach()
        return before, after


def main(minutes: float, loads: int = LOADS) -> None:
    """Soak, and say what happened; exit 1 if anything was wrong."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        soak = Soak(Path(folder))
        end, seed, mixed = time.monotonic() + 60 * minutes, 0, collections.Counter()
        while time.monotonic() < end and not soak.wrong:
            soak.run(min(30.0, max(1.0, (end - time.monotonic()) / 2)), seed)
            # Mixed batches, as many forwards as fit into about as long.
            stress = Stress(folder, seed)
            stress.run(2500 if minutes >= 5 else 300)
            mixed += stress.counts
            soak.wrong += stress.wrong
            seed += 1
            if minutes >= 5:
                print(f"{seed}: {dict(soak.counts)}", flush=True)
        before, after = soak.loads(loads)
        grown = after - before
        print(f"one tenant at a time, bit by bit as the plain models: {dict(soak.counts)}")
        kinds = ("forwards", "rows", "mixed", "mismatches", "loads", "unloads", "swaps", "evictions")
        print(f"mixed batches, bit by bit as each tenant alone: { {kind: mixed[kind] for kind in kinds} }")
        print(f"{loads} loads: {before >> 20} MiB before, {grown / 2**20:+.1f} MiB after")
        if grown > 8 << 20:
            soak.wrong.append(f"{grown} bytes more after {loads} loads")
        print("wrong:", soak.wrong[:3] or "nothing")
        sys.exit(bool(soak.wrong))


if __name__ == "__main__":
    main(float(sys.argv[1]) if len(sys.argv) > 1 else 10.0, int(sys.argv[2]) if len(sys.argv) > 2 else LOADS)
