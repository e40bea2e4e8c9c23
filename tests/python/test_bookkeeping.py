"""Promise: the books of arena and tenants are right after any order of what is done with them: compared, step by step, with
models that are too simple to be wrong; and under any order in which threads come to turn."""

import collections
import copy
import mmap
import random
import sys
import threading

import pytest
import torch
import xorz
from small import LENGTH, VOCAB, fine_tuned, make_base
from xorz.serve.arena import ALIGN, Arena
from xorz.serve.rows import HOST
from xorz.serve.site import Site

pytestmark = pytest.mark.usefixtures("one_thread")


def check_arena(arena: Arena, lent: dict[int, tuple[int, int]]) -> None:
    """What is lent and what is free share all bytes among them; no piece touches another's words."""
    taken = sorted((offset, -(-length // ALIGN) * ALIGN) for offset, length in lent.values())
    ends = [0] + [offset + length for offset, length in taken]
    gaps = [(end, offset - end) for end, (offset, _) in zip(ends, [*taken, (arena.capacity, 0)], strict=True)]
    assert all(length >= 0 for _, length in gaps), "two pieces overlap"
    # Gaps that touch are one, so the list is the one that there is.
    assert arena._free == [gap for gap in gaps if gap[1]]
    assert arena.used == sum(length for _, length in taken)


@pytest.mark.parametrize("seed", range(6))
def test_the_arena_is_what_its_model_says(seed):
    pick, lent, fill = random.Random(seed), {}, {}
    arena = Arena(96 * mmap.PAGESIZE)
    for step in range(1500):
        if lent and pick.random() < (0.35 if arena.used < arena.capacity // 2 else 0.6):
            key = pick.choice(list(lent))
            offset, length = lent.pop(key)
            assert bool((arena.tensor[offset : offset + length] == fill.pop(key)).all()), (
                "another piece wrote here"
            )
            arena.free(offset, length)
            # Whole pages of it are given back: they read as zeros.
            first, last = (
                -(-offset // mmap.PAGESIZE) * mmap.PAGESIZE,
                (offset + length) // mmap.PAGESIZE * mmap.PAGESIZE,
            )
            assert last <= first or not bool(arena.tensor[first:last].any())
        else:
            length = pick.choice(
                (1, 63, 64, 65, 700, mmap.PAGESIZE, 3 * mmap.PAGESIZE + 1, 20 * mmap.PAGESIZE)
            )
            need = -(-length // ALIGN) * ALIGN
            largest = max((gap for _, gap in arena._free), default=0)
            try:
                offset = arena.allocate(length)
            except MemoryError:
                assert largest < need, "a gap was there"
                continue
            assert need <= largest and offset % ALIGN == 0
            lent[step], fill[step] = (offset, length), step % 255 + 1
            arena.write(offset, torch.full((length,), fill[step], dtype=torch.uint8))
        check_arena(arena, lent)
    for offset, length in lent.values():
        arena.free(offset, length)
    check_arena(arena, {})


class Model:
    """Tenants as they should be: names and what each may answer, no more."""

    def __init__(self) -> None:
        self.loaded: dict[str, int] = {}


@pytest.mark.parametrize("seed", range(4))
def test_tenants_are_what_a_simple_model_says(seed, tmp_path):
    pick, base = random.Random(seed), make_base()
    ids = torch.randint(0, VOCAB, (2, LENGTH), generator=torch.Generator().manual_seed(1))
    paths, want = [], {}
    for v in range(5):
        tuned = fine_tuned(base, v)
        paths.append(tmp_path / f"{v}.xorz")
        xorz.pack(base.state_dict(), tuned.state_dict(), paths[-1])
        with torch.no_grad():
            want[v] = tuned(ids)
    broken = tmp_path / "broken.xorz"
    broken.write_bytes(paths[0].read_bytes()[:-50])
    probe = xorz.attach(base, mode="exact")
    probe.load("x", paths[0])
    size = probe.sizes()["x"]
    probe.detach()
    tenants, model = xorz.attach(base, mode="exact", budget=int(2.6 * size)), Model()
    met: collections.Counter = collections.Counter()
    for _ in range(150):
        name, v = pick.choice("abcdef"), pick.randrange(5)
        here = name in model.loaded
        what = pick.choice(("load", "unload", "swap", "use", "use", "broken", "nested"))
        met[what, here] += 1
        match what:
            case "load" | "swap" if here == (what == "swap"):
                getattr(tenants, what)(name, paths[v])
                model.loaded[name] = v
            case "load" | "swap" | "broken":
                call = (
                    tenants.load
                    if what == "load"
                    else tenants.swap
                    if here or what == "swap"
                    else tenants.load
                )
                with pytest.raises((ValueError, KeyError)):
                    call(name, broken if what == "broken" else paths[v])
            case "unload" if here:
                tenants.unload(name)
                del model.loaded[name]
            case "unload":
                with pytest.raises(KeyError):
                    tenants.unload(name)
            case _ if here:
                with torch.no_grad(), tenants.use(name):
                    if what == "nested" and len(model.loaded) > 1:
                        other = pick.choice(sorted(model.loaded))
                        with tenants.use(other):
                            assert torch.equal(base(ids), want[model.loaded[other]])
                            # Who is in use does not go.
                            assert tenants.resident(name) and tenants.resident(other)
                    assert torch.equal(base(ids), want[model.loaded[name]])
            case _:
                with pytest.raises(KeyError):
                    tenants.use(name).__enter__()
        assert sorted(tenants.names()) == sorted(model.loaded)
        memory, sizes = tenants.memory(), tenants.sizes()
        assert memory["deltas"] + memory["copies"] == sum(sizes.values()) <= tenants.budget
        assert set(sizes) == {n for n in model.loaded if tenants.resident(n)}
        assert all(t.pins == 0 for t in tenants._slots.values())
    assert all(
        met[what, here] for what in ("load", "unload", "swap", "use", "broken") for here in (True, False)
    ), met
    for name in list(model.loaded):
        tenants.unload(name)
    assert tenants.memory()["deltas"] == tenants.memory()["copies"] == 0
    tenants.detach()


@pytest.mark.parametrize("seed", range(3))
def test_whichever_thread_comes_to_turn_the_books_are_right(seed, tmp_path):
    """As a scheduler that prefers nobody would have it: threads are changed every few steps of the interpreter."""
    base, pick = make_base(), random.Random(seed)
    path = tmp_path / "a.xorz"
    xorz.pack(base.state_dict(), fine_tuned(base, 1).state_dict(), path)
    ids = torch.zeros(1, LENGTH, dtype=torch.int64)
    tenants = xorz.attach(base)
    tenants.load("size", path)
    size = tenants.sizes()["size"]
    tenants.detach()
    tenants = xorz.attach(base, budget=2 * size + size // 2)
    failures: list[str] = []

    def work(orders: list[tuple[str, str]]) -> None:
        for what, name in orders:
            try:
                if what == "use":
                    with torch.no_grad(), tenants.use(name):
                        tenants.model(ids)
                else:
                    getattr(tenants, what)(name, *([path] if what != "unload" else []))
            except (KeyError, ValueError, MemoryError):
                pass
            except BaseException as error:
                failures.append(repr(error))

    orders = [
        [(pick.choice(("load", "unload", "swap", "use", "use")), pick.choice("abcd")) for _ in range(40)]
        for _ in range(4)
    ]
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        threads = [threading.Thread(target=work, args=(mine,)) for mine in orders]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(before)
    assert not failures, failures[:3]
    sizes, memory = tenants.sizes(), tenants.memory()
    assert memory["deltas"] + memory["copies"] == sum(sizes.values()) == size * len(sizes) <= tenants.budget
    pieces = [piece for t in tenants._slots.values() for piece in t.pieces[HOST]]
    check_arena(tenants.arenas[HOST], dict(enumerate(pieces)))
    assert all(t.pins == 0 for t in tenants._slots.values())
    for name in tenants.names():
        tenants.unload(name)
    assert tenants.memory()["deltas"] == 0 and not tenants._slots


@pytest.mark.parametrize("error", [MemoryError, RuntimeError])
def test_a_tenant_goes_whole_though_there_is_no_memory_for_new_tables(error, monkeypatch):
    base = make_base()
    tuned = {name: fine_tuned(base, seed) for seed, name in enumerate("abc", 1)}
    # What takes the place of "a" changes one layer; of the others its rows are the base's.
    with torch.no_grad():
        for param, own in zip(tuned["b"].parameters(), base.parameters(), strict=True):
            if param is not tuned["b"].head.weight:
                param.copy_(own)
    tenants = xorz.attach(copy.deepcopy(base))
    for name in "ac":
        tenants.load(name, xorz.diff(base, tuned[name]))
    size = tenants.sizes()["c"]

    def fill(self, param):
        raise error("no memory")

    with monkeypatch.context() as patch:
        patch.setattr(Site, "_fill", fill)
        tenants.unload("a")
    assert tenants.names() == ["c"] and tenants.memory()["deltas"] + tenants.memory()["copies"] == size
    pieces = [piece for t in tenants._slots.values() for piece in t.pieces[HOST]]
    check_arena(tenants.arenas[HOST], dict(enumerate(pieces)))
    tenants.load("b", xorz.diff(base, tuned["b"]))
    ids = torch.randint(0, VOCAB, (3, LENGTH), generator=torch.Generator().manual_seed(2))
    with torch.no_grad(), tenants.use(["b", "c", None]):
        got = tenants.model(ids)
    with torch.no_grad():
        for row, model in enumerate((tuned["b"], tuned["c"], base)):
            torch.testing.assert_close(got[row], model(ids)[row], rtol=1e-4, atol=1e-5)
    assert tenants.apart is None  # nothing of "a" was met, which would have run the model once for each
    for name in "bc":
        tenants.unload(name)
    assert not tenants._slots
    check_arena(tenants.arenas[HOST], {})
