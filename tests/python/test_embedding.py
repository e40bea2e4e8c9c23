"""Promise: `delta_embedding` gives each row of a batch what `F.embedding` gives it on its tenant's own table,
bit for bit; it is fit for compilation, reads nothing but what it needs, and refuses misuse in words."""

import ctypes
import mmap
import random

import pytest
import torch
import xorz
from conftest import BITS, ENCODINGS, bits, make_delta, random_weight, same_bits
from torch.library import opcheck

ops = torch.ops.xorz
F = torch.nn.functional
V, K = 70, 45


class Fleet:
    """One tenant of each encoding and an empty slot, in an arena whose gaps are full of rubbish."""

    def __init__(self, dtype=torch.bfloat16, v=V, k=K, encodings=(*ENCODINGS, "empty", "sparse")):
        self.base = random_weight(v, k, dtype)
        self.tables, slots, parts, at = [], [], [], 0
        for i, encoding in enumerate(encodings):
            if encoding == "empty":
                self.tables.append(self.base)
                slots.append((77, 0))
                continue
            tuned, delta = make_delta(self.base, encoding, seed=10 + i)
            slots.append((at, delta.numel()))
            fill = torch.full((64 + -delta.numel() % 64,), 0xEE, dtype=torch.uint8)
            parts += [delta, fill]
            at += delta.numel() + fill.numel()
            self.tables.append(tuned)
        self.arena = torch.cat(parts) if parts else torch.empty(0, dtype=torch.uint8)
        self.slots = torch.tensor(slots, dtype=torch.int64).reshape(-1, 2)

    def __call__(self, indices, tenants, weight=None):
        weight = self.base if weight is None else weight
        return ops.delta_embedding(
            indices, weight, self.arena, self.slots, torch.as_tensor(tenants, dtype=torch.int32)
        )

    def want(self, indices, tenants):
        """Row by row what a table of the tenant's own gives."""
        tenants = torch.as_tensor(tenants).tolist()
        rows = [
            F.embedding(i, self.base if t < 0 else self.tables[t])
            for i, t in zip(indices.reshape(-1), tenants, strict=True)
        ]
        rows = torch.stack(rows) if rows else self.base[:0]
        return rows.reshape(*indices.shape, self.base.shape[1])

    def batch(self, *shape, seed=0):
        r = random.Random(seed)
        count = torch.Size(shape).numel()
        indices = [r.randrange(r.choice((3, self.base.shape[0]))) for _ in range(count)]
        tenants = [r.randrange(-1, len(self.tables)) for _ in range(count)]
        return torch.tensor(indices, dtype=torch.int64).reshape(shape), tenants


@pytest.mark.parametrize("shape", [(), (1,), (9,), (200,), (3, 17), (2, 3, 4), (0,), (2, 0, 3)])
def test_each_row_is_that_of_its_tenants_table(dtype, shape):
    fleet = Fleet(dtype)
    indices, tenants = fleet.batch(*shape)
    want = fleet.want(indices, tenants)
    for index_dtype in (torch.int64, torch.int32):
        out = fleet(indices.to(index_dtype), tenants)
        assert out.is_contiguous() and same_bits(out, want)
    # The weight's bits give bits.
    assert torch.equal(fleet(indices, tenants, fleet.base.view(BITS[dtype])), bits(want))


def test_arguments_of_any_stride_but_weight_and_arena():
    fleet = Fleet()
    indices, tenants = fleet.batch(6, 8)
    want = fleet.want(indices, tenants)
    assert same_bits(fleet(indices.T.contiguous().T, tenants), want)
    spread = torch.tensor(tenants, dtype=torch.int32).repeat_interleave(2)[::2]
    columns = fleet.slots.T.contiguous().T
    assert not spread.is_contiguous() and not columns.is_contiguous()
    assert same_bits(ops.delta_embedding(indices, fleet.base, fleet.arena, columns, spread), want)


@pytest.mark.parametrize(
    "other", [torch.float64, torch.int8, torch.int32, torch.int16, torch.uint16, torch.bool]
)
def test_tables_of_any_dtype(other):
    base = (torch.rand(40, 300) * 100).to(other)
    tuned = (torch.rand(40, 300) * 100).to(other)
    for prefer in ("speed", "memory"):
        delta = xorz.delta_encode(base, tuned, prefer=prefer)
        slots = torch.tensor([[0, delta.numel()]])
        indices = torch.tensor([39, 0, 7, 7])
        out = xorz.delta_embedding(
            indices, base, delta, slots, torch.tensor([0, 0, -1, 0], dtype=torch.int32)
        )
        assert out.dtype == other
        assert torch.equal(out, torch.stack([tuned[39], tuned[0], base[7], tuned[7]]))


def test_empty_everything():
    nothing, no_slots = torch.empty(0, dtype=torch.uint8), torch.empty(0, 2, dtype=torch.int64)
    no_rows = torch.empty(0, dtype=torch.int32)
    for v, k in ((0, 5), (5, 0), (0, 0), (5, 4)):
        base = random_weight(v, k, torch.float16)
        out = xorz.delta_embedding(torch.empty(0, 3, dtype=torch.int64), base, nothing, no_slots, no_rows)
        assert out.shape == (0, 3, k) and out.dtype == torch.float16
        if v:
            rows = torch.tensor([-1, -1], dtype=torch.int32)
            out = xorz.delta_embedding(torch.tensor([4, 1]), base, nothing, no_slots, rows)
            assert same_bits(out, base[[4, 1]])
    delta = xorz.delta_encode(torch.empty(5, 0), torch.empty(5, 0))
    out = xorz.delta_embedding(
        torch.tensor([3]),
        torch.empty(5, 0),
        delta,
        torch.tensor([[0, delta.numel()]]),
        torch.tensor([0]).int(),
    )
    assert out.shape == (1, 0)


def test_threads_change_no_bit():
    fleet = Fleet(torch.bfloat16, v=600, k=500)
    indices, tenants = fleet.batch(1000)
    want = fleet.want(indices, tenants)
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 4):
            torch.set_num_threads(threads)
            assert same_bits(fleet(indices, tenants), want)
    finally:
        torch.set_num_threads(before)


def test_an_arena_of_reserved_memory_is_read_in_used_slots_only():
    # 1 TiB that nobody may touch, but for the pages of the slots in use.
    size, page = 1 << 40, mmap.PAGESIZE
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t] + 3 * [ctypes.c_int] + [ctypes.c_long]
    libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
    at = libc.mmap(None, size, 0, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x4000, -1, 0)  # MAP_NORESERVE
    if at == ctypes.c_void_p(-1).value:
        pytest.skip("this machine reserves no 1 TiB")
    fleet = Fleet()
    start = (size // 2) // page * page
    length = -(-fleet.arena.numel() // page) * page
    assert libc.mprotect(at + start, length, mmap.PROT_READ | mmap.PROT_WRITE) == 0
    arena = torch.frombuffer((ctypes.c_uint8 * size).from_address(at), dtype=torch.uint8)
    arena[start : start + fleet.arena.numel()] = fleet.arena
    used = torch.where(fleet.slots[:, 1:] > 0, fleet.slots + torch.tensor([start, 0]), fleet.slots)
    slots = torch.cat([used, torch.tensor([[0, 4096], [size - 64, 64]])])
    indices, tenants = fleet.batch(50)
    rows = torch.tensor(tenants, dtype=torch.int32)
    out = ops.delta_embedding(indices, fleet.base, arena, slots, rows)
    assert same_bits(out, fleet.want(indices, tenants))
    del arena
    libc.munmap(at, size)


def test_opcheck(dtype):
    fleet = Fleet(dtype)
    for shape in ((2, 9), (7,), (0,)):
        indices, tenants = fleet.batch(*shape)
        rows = torch.tensor(tenants, dtype=torch.int32)
        opcheck(ops.delta_embedding.default, (indices, fleet.base, fleet.arena, fleet.slots, rows))


class Counter:
    """A backend that counts what dynamo gives it."""

    def __init__(self):
        self.graphs = 0

    def __call__(self, graph, inputs):
        from torch._dynamo.backends.debugging import aot_eager

        self.graphs += 1
        return aot_eager(graph, inputs)


def test_compiled_whole_and_once_for_any_number_of_tenants_and_rows():
    torch._dynamo.reset()
    counter = Counter()

    @torch.compile(fullgraph=True, dynamic=True, backend=counter)
    def double(indices, weight, arena, slots, rows):
        return xorz.delta_embedding(indices, weight, arena, slots, rows) * 2

    tenants = ("sparse", "exponent", "raw", "empty", "unchanged", "sparse")
    # Not two slots first: torch takes sizes that are equal in the first call (slots is [s, 2]) to be equal
    # for ever.
    for count, shape in ((3, (4, 6)), (6, (9, 7)), (5, (8, 31)), (2, (3, 5))):
        fleet = Fleet(torch.float32, encodings=tenants[:count])
        indices, whose = fleet.batch(*shape, seed=count)
        rows = torch.tensor(whose, dtype=torch.int32)
        out = double(indices, fleet.base, fleet.arena, fleet.slots, rows)
        assert same_bits(out, fleet.want(indices, whose) * 2)
    assert counter.graphs == 1


def test_a_weight_that_wants_a_gradient_is_refused():
    fleet = Fleet()
    indices, tenants = fleet.batch(5)
    weight = torch.nn.Parameter(fleet.base.clone())
    sentence = r"^xorz::delta_embedding: weight requires grad, but it is frozen; pass weight\.detach\(\)$"
    with pytest.raises(RuntimeError, match=sentence):
        fleet(indices, tenants, weight)
    want = fleet.want(indices, tenants)
    assert same_bits(fleet(indices, tenants, weight.detach()), want)
    with torch.no_grad():
        out = fleet(indices, tenants, weight)
    assert same_bits(out, want) and not out.requires_grad


def misuses():
    fleet = Fleet(encodings=("sparse", "exponent", "empty"))
    base, arena, slots = fleet.base, fleet.arena, fleet.slots
    i, rows = torch.tensor([3, 4]), torch.tensor([0, 1], dtype=torch.int32)
    n = arena.numel()

    def call(indices=i, weight=base, arena=arena, slots=slots, rows=rows):
        return lambda: xorz.delta_embedding(indices, weight, arena, slots, rows)

    def slot(offset, length):
        moved = slots.clone()
        moved[1] = torch.tensor([offset, length])
        return call(slots=moved)

    f16 = xorz.delta_encode(base.half(), base.half() + 1)
    damaged = arena.clone()
    damaged[int(slots[1, 0]) + 11] = 99
    mixed = torch.cat([arena, f16])
    mixed_slots = slots.clone()
    mixed_slots[1] = torch.tensor([n, f16.numel()])
    yield "index", call(torch.tensor([3, V])), rf"indices\[1\] is {V}, but weight has {V} rows"
    yield "negative index", call(torch.tensor([-1, 3]).int()), rf"indices\[0\] is -1, but weight has {V} rows"
    yield "index dtype", call(i.float()), r"indices must be int64 or int32, but is float32 \[2\]"
    yield "weight dims", call(weight=base[0]), rf"weight must be 2-D \[V, k\], but is bfloat16 \[{K}\]"
    yield "weight strides", call(weight=base.T), r"weight bfloat16 \[45, 70\] must be contiguous"
    yield (
        "weight complex",
        call(weight=base.to(torch.complex64)),
        r"weight (has|is .*,) a dtype that xorz does not know",
    )
    yield (
        "weight shape",
        call(weight=base[:60]),
        r"slots\[0\]: the delta is of a \[70, 45\] matrix of BF16, but the base is a \[60, 45\] matrix of BF16",
    )
    yield "weight dtype", call(weight=base.float()), r"slots\[0\]: .* matrix of BF16, but .* matrix of F32"
    yield "weight bits", call(weight=base.float().view(torch.int32)), r"slots\[0\]: .* BF16, but .* of I32"
    yield (
        "deltas of two dtypes",
        call(weight=base.view(torch.int16), arena=mixed, slots=mixed_slots),
        r"slots\[1\]: the delta is of a .* matrix of F16, but the base is a .* matrix of BF16",
    )
    yield "arena dtype", call(arena=arena.int()), r"arena must be a 1-D uint8 tensor, but is int32"
    yield "arena dims", call(arena=arena[None]), r"arena must be a 1-D uint8 tensor, but is uint8 \[1, "
    yield "arena strides", call(arena=torch.cat([arena, arena])[::2]), r"arena .* must be contiguous"
    yield "slots dtype", call(slots=slots.int()), r"slots must be int64 \[s, 2\].* but is int32 \[3, 2\]"
    yield "slots shape", call(slots=slots.reshape(-1)), r"slots must be int64 \[s, 2\].* but is int64 \[6\]"
    yield "slots columns", call(slots=slots.reshape(2, 3)), r"slots must be int64 \[s, 2\].*int64 \[2, 3\]"
    yield (
        "rows count",
        call(rows=rows[:1]),
        r"tenant_of_row is int32 \[1\], but must be int32 \[2\].*indices, which is int64 \[2\]",
    )
    yield "rows dtype", call(rows=rows.long()), r"tenant_of_row is int64 \[2\], but must be int32 \[2\]"
    yield "rows dims", call(rows=rows[None]), r"tenant_of_row is int32 \[1, 2\], but must be int32 \[2\]"
    yield "tenant", call(rows=torch.tensor([0, 3]).int()), r"tenant_of_row\[1\] is 3, but .* 3 slots"
    yield "negative tenant", call(rows=torch.tensor([-2, 0]).int()), r"tenant_of_row\[0\] is -2, but"
    yield "slot unaligned", slot(1, 192), r"slots\[1\] has offset 1 and length 192, but .* multiple of 64"
    yield "slot beyond", slot(64, n), rf"slots\[1\] has offset 64 and length {n}, but the arena has {n} bytes"
    yield "slot negative", slot(-64, 192), r"slots\[1\] has offset -64 and length 192, but"
    yield "slot negative length", slot(0, -1), r"slots\[1\] has offset 0 and length -1, but"
    yield "slot wrong length", slot(int(slots[1, 0]), int(slots[1, 1]) - 64), r"slots\[1\]: resident delta: "
    yield "slot of rubbish", slot(int(slots[0, 1]) // 64 * 64, 192), r"slots\[1\]: resident delta: "
    yield "delta damaged", call(arena=damaged), r"slots\[1\]: resident delta: unknown dtype 99"


@pytest.mark.parametrize(("call", "sentence"), [pytest.param(c, s, id=i) for i, c, s in misuses()])
def test_each_misuse_has_its_sentence(call, sentence, capfd):
    with pytest.raises(RuntimeError, match=sentence) as caught:
        call()
    text = str(caught.value)
    assert text.startswith("xorz::delta_embedding: ") and ".cpp" not in text and "/" not in text
    assert capfd.readouterr().err == ""


def test_what_no_row_uses_is_not_looked_at():
    fleet = Fleet(encodings=("sparse", "exponent"))
    broken = torch.cat([fleet.slots, torch.tensor([[1, 1], [-5, 3], [0, 1 << 60]])])
    rows = torch.tensor([1, 0, -1], dtype=torch.int32)
    indices = torch.tensor([5, 6, 7])
    out = ops.delta_embedding(indices, fleet.base, fleet.arena, broken, rows)
    assert same_bits(out, fleet.want(indices, rows))
