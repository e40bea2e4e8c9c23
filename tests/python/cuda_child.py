"""The process in which test_cuda.py has CUDA tensors: `python cuda_child.py CASE`, with doubles of libcuda
and of torch (cuda_tensors.py). No expectation but in cases.
"""

import math
import sys

import pytest
import torch
from cuda_tensors import (
    aten,
    aten_calls,
    autocast,
    begin,
    launches,
    log,
    ops,
    over,
    to_cpu,
    to_cuda,
    torch_double,
)

# Not before the doubles are there.
import xorz  # isort: skip
from conftest import DTYPES, ENCODINGS, make_delta, random_weight, same_bits  # isort: skip


def integers(shape, most: int, dtype: torch.dtype, seed: int) -> torch.Tensor:
    """Words whose products and sums are exact in f32, whatever their order."""
    g = torch.Generator().manual_seed(seed)
    return torch.randint(-most, most + 1, shape, generator=g).to(dtype)


def tenant(base: torch.Tensor, prefer: str, seed: int) -> torch.Tensor:
    changed = torch.rand(base.shape, generator=torch.Generator().manual_seed(seed)) < 0.1
    tuned = torch.where(changed, integers(base.shape, 8, base.dtype, seed), base)
    return xorz.delta_encode(base, tuned, prefer=prefer)


def restores() -> None:
    stream = begin()
    for dtype in DTYPES:
        base = random_weight(37, 300, dtype)
        for encoding in ENCODINGS:
            tuned, delta = make_delta(base, encoding)
            on_gpu = to_cuda(delta)
            assert same_bits(to_cpu(ops.delta_restore(to_cuda(base), on_gpu)), tuned)
            assert same_bits(to_cpu(xorz.delta_restore(to_cuda(base), on_gpu)), tuned)
            # Parts of it, each in memory of its own. Some columns are copied by a kernel of torch's, which
            # the double lacks.
            for rows, columns in (((5, 30), None), (None, (7, 7)), ((0, 37), (0, 300))):
                part = ops.delta_restore(to_cuda(base), on_gpu, rows=rows, columns=columns)
                want = tuned[slice(*rows or (None,)), slice(*columns or (None,))].contiguous()
                assert part.is_contiguous() and same_bits(to_cpu(part), want)
            # Bits for bits, and a delta that lies where no kernel can read it.
            words = {2: torch.int16, 4: torch.int32}[base.element_size()]
            odd = to_cuda(delta, offset=8)
            aten_calls.clear()
            assert torch.equal(to_cpu(ops.delta_restore(to_cuda(base.view(words)), odd)), tuned.view(words))
            assert [name for name, _ in aten_calls].count("aten::clone") == 1
            weight = to_cuda(base)
            aten_calls.clear()
            ops.delta_apply_(weight, on_gpu)
            assert same_bits(to_cpu(weight), tuned)
            # As torch's in-place ops do: the version goes up, and nothing is set to zero. A digest of one leaf, a verdict for
            # each 16 rows and one for the digest.
            assert aten_calls == [
                ("aten::view", [37, 300]),
                ("aten::zero_", [0, 300]),
                ("aten::new_empty", [32 + 16 + (3 + 1) * 4]),
            ], aten_calls
            # Words that are not its base, as those are not any more, stay, and the next call says so.
            ops.delta_apply_(weight, on_gpu)
            assert same_bits(to_cpu(weight), tuned)
            if same_bits(base, tuned):
                continue
            with pytest.raises(RuntimeError, match=r"an earlier delta_apply_ on cuda:0 .* another base"):
                xorz.cuda_status(0)
            xorz.cuda_status(0)
    assert all(f"stream {stream:#x} device 0" in line for line in launches()) and len(launches()) > 40
    # Rows are cut from the panel that has them, which begins and ends at multiples of 256 rows or at the last.
    base = random_weight(600, 40, torch.bfloat16)
    for encoding in ENCODINGS:
        tuned, delta = make_delta(base, encoding)
        given = to_cuda(base), to_cuda(delta)
        for rows, panel in (
            ((300, 520), 344),
            ((256, 512), 256),
            ((0, 1), 256),
            ((599, 600), 88),
            ((511, 513), 344),
            ((600, 600), 88),
            ((512, 512), 0),
        ):
            aten_calls.clear()
            assert same_bits(to_cpu(ops.delta_restore(*given, rows=rows)), tuned[slice(*rows)]), rows
            assert aten_calls[0] == ("aten::new_empty", [panel, 40]), (rows, aten_calls)
    for dtype in (torch.float64, torch.int64, torch.uint8):
        base = integers((5, 70), 100, torch.float32, 1).to(dtype)
        tuned = torch.where(torch.rand(base.shape) < 0.2, base + 1, base)
        delta = xorz.delta_encode(base, tuned)
        assert torch.equal(to_cpu(ops.delta_restore(to_cuda(base), to_cuda(delta))), tuned)


def products() -> None:
    begin()
    for dtype in DTYPES:
        base, bias = integers((35, 290), 8, dtype, 1), integers((35,), 9, dtype, 2)
        for prefer in ("speed", "memory"):
            delta = tenant(base, prefer, 3)
            for lead in ((1,), (2, 3), (70,), (), (0,)):
                x = integers((*lead, 290), 3, dtype, 4)
                for b in (None, bias):
                    for mode in ("fast", "deterministic"):
                        want = ops.delta_linear(x, base, b, delta, mode=mode)
                        given = [to_cuda(t) for t in (x, base, delta)]
                        got = ops.delta_linear(
                            given[0], given[1], b if b is None else to_cuda(b), given[2], mode=mode
                        )
                        assert same_bits(to_cpu(got), want), (dtype, prefer, lead, mode)
        x = random_weight(9, 290, dtype, 5)
        weight = random_weight(35, 290, dtype, 6)
        tuned, delta = make_delta(weight, "sparse")
        got = ops.delta_linear(to_cuda(x), to_cuda(weight), None, to_cuda(delta), mode="exact")
        assert same_bits(to_cpu(got), torch.nn.functional.linear(x, tuned))
        # A weight as its bits.
        words = {2: torch.int16, 4: torch.int32}[base.element_size()]
        x, delta = integers((3, 290), 3, dtype, 4), tenant(base, "speed", 3)
        want = ops.delta_linear(x, base, bias, delta)
        given = [to_cuda(t) for t in (x, base.view(words), bias)]
        assert same_bits(to_cpu(ops.delta_linear(*given, to_cuda(delta, offset=24))), want)
    kernels = {line.split()[1] for line in launches()}
    assert {"xorz_linear_small_bf16_m16", "xorz_linear_small_f32_m4", "xorz_linear_large_f16"} <= kernels


def panels() -> None:
    begin()
    for dtype in (torch.bfloat16, torch.float16):
        weight, bias = random_weight(300, 130, dtype, 6), random_weight(1, 300, dtype, 7)[0]
        for encoding in ENCODINGS:
            tuned, delta = make_delta(weight, encoding)
            for lead, words in (((33,), False), ((3, 5, 7), True), ((33,), True)):
                x = random_weight(math.prod(lead), 130, dtype, 5).view(*lead, 130)
                base = weight.view(torch.int16) if words else weight
                for b in (None, bias):
                    given = [to_cuda(x), to_cuda(base), b if b is None else to_cuda(b), to_cuda(delta)]
                    before, _ = len(launches()), aten_calls.clear()
                    got = to_cpu(ops.delta_linear(*given))
                    # torch's own product of the fine-tuned words, which are restored once.
                    want = torch.nn.functional.linear(x.view(-1, 130), tuned, b).view(*lead, 300)
                    assert same_bits(got, want), (dtype, encoding, lead)
                    assert [line.split()[1] for line in launches()[before:]] == ["xorz_delta_restore_16"]
                    assert [name for name, _ in aten_calls].count("aten::linear") == 1
            # Few rows, another mode or dtype, several tenants: the kernels multiply.
            aten_calls.clear()
            given = [to_cuda(t) for t in (x[:32], weight)]
            ops.delta_linear(*given, None, to_cuda(delta))
            ops.delta_linear(to_cuda(x), given[1], None, to_cuda(delta), mode="deterministic")
            assert "aten::linear" not in [name for name, _ in aten_calls]
        # Under autocast with another dtype the product is not torch's.
        autocast.append(torch.float32)
        got = to_cpu(ops.delta_linear(to_cuda(x), to_cuda(weight), None, to_cuda(delta)))
        autocast.clear()
        exact = x.double() @ tuned.double().T
        assert got.dtype == dtype and torch.allclose(got.double(), exact, rtol=0.01, atol=0.01)
    x, weight = integers((40, 290), 3, torch.float32, 4), integers((35, 290), 8, torch.float32, 1)
    tuned, delta = make_delta(weight, "sparse")
    aten_calls.clear()
    got = to_cpu(ops.delta_linear(to_cuda(x), to_cuda(weight), None, to_cuda(delta)))
    assert torch.allclose(got, x @ tuned.T, rtol=1e-5, atol=1e-4)
    assert "aten::linear" not in [name for name, _ in aten_calls]
    # A delta that does not fit is the product's matter.
    weight, x = random_weight(300, 130, torch.bfloat16, 6), random_weight(33, 130, torch.bfloat16, 5)
    _, delta = make_delta(weight, "sparse")
    broken = delta.clone()
    broken[:8] = 0
    assert to_cpu(ops.delta_linear(to_cuda(x), to_cuda(weight), None, to_cuda(broken))).isnan().all()
    with pytest.raises(RuntimeError, match="an earlier delta_linear on cuda:0 reported"):
        ops.delta_linear(to_cuda(x), to_cuda(weight), None, to_cuda(delta))
    # More words than a panel has: two of them, one after the other in the same memory.
    base, bias = random_weight(600, 57344, torch.bfloat16, 8), random_weight(1, 600, torch.bfloat16, 9)[0]
    tuned = base.clone()
    tuned[::7, ::100] *= 1.5
    delta, x = xorz.delta_encode(base, tuned), random_weight(33, 57344, torch.bfloat16, 10)
    aten_calls.clear()
    got = to_cpu(ops.delta_linear(*[to_cuda(t) for t in (x, base, bias, delta)]))
    want = [torch.nn.functional.linear(x, tuned[r], bias[r]) for r in (slice(512), slice(512, 600))]
    assert same_bits(got, torch.cat(want, 1))
    memory = [sizes for name, sizes in aten_calls if name == "aten::new_empty"]
    assert memory == [[512, 57344], [33, 600]], memory


def groups() -> None:
    stream = begin()
    for dtype in DTYPES:
        base, biases = integers((35, 290), 8, dtype, 1), integers((4, 35), 9, dtype, 2)
        deltas = [tenant(base, "speed", 3), None, tenant(base, "memory", 5)]
        parts, slots, at = [], [], 0
        for delta in deltas:
            size = 0 if delta is None else delta.numel()
            slots.append([at, size])
            if delta is not None:
                parts.append(torch.nn.functional.pad(delta, (0, -size % 64)))
                at += parts[-1].numel()
        arena, slots = torch.cat(parts), torch.tensor(slots)
        wide = torch.nn.functional.pad(biases, (0, 13))
        for m in (1, 7, 130):
            x = integers((m, 290), 3, dtype, 4)
            rows = torch.arange(m, dtype=torch.int32) * 5 % 4 - 1
            for b, on_gpu in (
                (None, None),
                (biases, over(to_cuda(wide).data_ptr(), (4, 35), dtype, 0, (48, 1))),
            ):
                for mode in ("fast", "deterministic"):
                    want = ops.delta_linear_grouped(x, base, b, arena, slots, rows, mode=mode)
                    given = [to_cuda(t) for t in (x, base, arena, slots, rows)]
                    got = ops.delta_linear_grouped(*given[:2], on_gpu, *given[2:], mode=mode)
                    assert same_bits(to_cpu(got), want), (dtype, m, mode)
        # Exact: torch's product of each tenant's rows, in their order, with its restored weights.
        tuned = [ops.delta_restore(base, d) if d is not None else base for d in deltas] + [base]
        x, rows = (
            random_weight(9, 290, dtype, 7),
            torch.tensor([2, -1, 0, 2, 1, 0, -1, 2, 2], dtype=torch.int32),
        )
        for b, on_gpu in ((None, None), (biases, to_cuda(biases))):
            given = [to_cuda(t) for t in (x, base, arena, slots, rows)]
            got = to_cpu(ops.delta_linear_grouped(*given[:2], on_gpu, *given[2:], mode="exact"))
            for slot in (-1, 0, 1, 2):
                mine = rows == slot
                want = torch.nn.functional.linear(x[mine], tuned[slot], b if b is None else b[slot])
                assert same_bits(got[mine], want), (dtype, slot)
        for bad_rows, bad_slots, sentence in (
            ([0] * 8 + [3], slots, r"tenant_of_row\[8\] is 3, but there are 3 slots, and the base is -1"),
            (
                [0] * 9,
                torch.tensor([[64, arena.numel()]] * 3),
                "slot 0 is .* bytes at offset 64, but must be",
            ),
            ([0] * 9, torch.tensor([[8, 256]] * 3), "slot 0 is 256 bytes at offset 8, but must be"),
        ):
            given = [
                to_cuda(t) for t in (x, base, arena, bad_slots, torch.tensor(bad_rows, dtype=torch.int32))
            ]
            with pytest.raises(RuntimeError, match=f"xorz::delta_linear_grouped: {sentence}"):
                ops.delta_linear_grouped(*given[:2], None, *given[2:], mode="exact")
    assert all(f"stream {stream:#x} device 0" in line for line in launches())


def gradients() -> None:
    stream = begin()
    for dtype in DTYPES:
        base = integers((35, 290), 8, dtype, 1)
        words = base.view({2: torch.int16, 4: torch.int32}[base.element_size()])
        deltas = [tenant(base, "speed", 3), tenant(base, "memory", 5)]
        for delta in deltas:
            for lead in ((1,), (2, 3), (70,), (), (0,)):
                grad = integers((*lead, 35), 3, dtype, 4)
                want = ops.delta_linear_grad_input(grad, base, delta)
                for weight, offset in ((base, 0), (words, 24)):
                    given = [to_cuda(grad), to_cuda(weight), to_cuda(delta, offset=offset)]
                    got = ops.delta_linear_grad_input(*given)
                    assert got.shape == want.shape and same_bits(to_cpu(got), want), (dtype, lead)
        arena = torch.cat([torch.nn.functional.pad(d, (0, -d.numel() % 64)) for d in deltas])
        slots = torch.tensor(
            [[0, deltas[0].numel()], [deltas[0].numel() + -deltas[0].numel() % 64, deltas[1].numel()], [0, 0]]
        )
        for m in (1, 7, 130):
            grad, rows = integers((m, 35), 3, dtype, 4), torch.arange(m, dtype=torch.int32) * 5 % 4 - 1
            want = ops.delta_linear_grouped_grad_input(grad, base, arena, slots, rows)
            got = ops.delta_linear_grouped_grad_input(*[to_cuda(t) for t in (grad, base, arena, slots, rows)])
            assert same_bits(to_cpu(got), want), (dtype, m)
    assert all(f"stream {stream:#x} device 0" in line for line in launches())
    kernels = {line.split()[1] for line in launches()}
    assert kernels == {f"xorz_linear_{k}_{d}" for k in ("segments", "grad") for d in ("bf16", "f16", "f32")}
    # A delta of another dtype is not known before: NaN, and an error of the next call.
    foreign = to_cuda(tenant(integers((35, 290), 8, torch.float16, 1), "speed", 3))
    given = [
        to_cuda(integers((2, 35), 3, torch.bfloat16, 1)),
        to_cuda(integers((35, 290), 8, torch.bfloat16, 1)),
    ]
    assert to_cpu(ops.delta_linear_grad_input(*given, foreign)).isnan().all()
    with pytest.raises(
        RuntimeError, match="an earlier delta_linear_grad_input on cuda:0 reported: the delta is of another"
    ):
        ops.delta_linear_grad_input(*given, foreign)
    with pytest.raises(
        RuntimeError,
        match=r"grad is bfloat16 \[2, 34\], but its last dimension must be weight.shape\[0\] = 35",
    ):
        ops.delta_linear_grad_input(to_cuda(integers((2, 34), 3, torch.bfloat16, 1)), given[1], foreign)


def lookups() -> None:
    stream = begin()
    for dtype in (*DTYPES, torch.float64, torch.int8):
        table = integers((35, 290), 8, torch.float32, 1).to(dtype)
        tuned = torch.where(integers((35, 290), 9, torch.float32, 2) == 3, table + 1, table)
        parts = [
            torch.nn.functional.pad(d, (0, -d.numel() % 64))
            for d in (xorz.delta_encode(table, tuned), xorz.delta_encode(table, tuned, prefer="memory"))
        ]
        slots = torch.tensor([[0, parts[0].numel()], [parts[0].numel(), parts[1].numel()], [0, 0]])
        arena = torch.cat(parts)
        for shape in ((1,), (3, 7), (0,), ()):
            for index in (torch.int64, torch.int32):
                indices = torch.randint(0, 35, shape).to(index)
                rows = torch.randint(-1, 3, (indices.numel(),), dtype=torch.int32)
                want = ops.delta_embedding(indices, table, arena, slots, rows)
                got = ops.delta_embedding(*[to_cuda(t) for t in (indices, table, arena, slots, rows)])
                assert same_bits(to_cpu(got), want) and got.shape == (*shape, 290), (dtype, shape)
        # Bits of a table stand for any dtype of their size.
        if (bits := {2: torch.int16, 4: torch.int32}.get(dtype.itemsize)) is not None:
            indices, rows = torch.arange(34, -1, -1), torch.arange(35, dtype=torch.int32) % 4 - 1
            given = (indices, table.view(bits), arena, slots, rows)
            want = ops.delta_embedding(*given)
            got = ops.delta_embedding(*[to_cuda(t) for t in given])
            assert same_bits(to_cpu(got), want), (dtype, bits)
    assert all(f"stream {stream:#x} device 0" in line for line in launches()) and len(launches()) == 33


def devices() -> None:
    streams = [begin(0), begin(1)]
    base = random_weight(20, 300, torch.bfloat16)
    tuned, delta = make_delta(base, "sparse")
    for device in (0, 1, 0):
        out = ops.delta_restore(to_cuda(base, device), to_cuda(delta, device))
        assert out.get_device() == device and same_bits(to_cpu(out), tuned)
        assert f"stream {streams[device]:#x} device {device} " in launches()[-1]
        assert torch_double.torch_double_device() == 0, "the device guard is still there"
    assert sum(line.startswith("cuModuleLoadData") for line in log()) == 2


def refusals() -> None:
    begin(0)
    base = random_weight(20, 300, torch.bfloat16)
    tuned, delta = make_delta(base, "sparse")
    x = random_weight(3, 300, torch.bfloat16)
    g = [to_cuda(t) for t in (x, base, delta)]

    def said(sentence, op, *args, **kwargs):
        before = len(launches())
        with pytest.raises(RuntimeError) as error:
            op(*args, **kwargs)
        assert sentence in str(error.value), error.value
        assert len(launches()) == before, "launched all the same"

    said(
        "xorz::delta_linear: weight is on cpu, but another argument is on cuda:0",
        ops.delta_linear,
        g[0],
        base,
        None,
        g[2],
    )
    said("delta is on cpu, but another argument is on cuda:0", ops.delta_restore, g[1], delta)
    said("base is on cpu, but another argument is on cuda:0", ops.delta_restore, base, g[2])
    said("delta is on cuda:1, but another argument is on cuda:0", ops.delta_restore, g[1], to_cuda(delta, 1))
    said("mode must be", ops.delta_linear, g[0], g[1], None, g[2], mode="quick")
    said("only float32, bfloat16 and float16 compute", ops.delta_linear, to_cuda(x.long()), g[1], None, g[2])
    said("but weight is bfloat16 [20, 300]", ops.delta_linear, to_cuda(x.float()), g[1], None, g[2])
    said("weight.shape[1] = 300", ops.delta_linear, to_cuda(x[:, :7]), g[1], None, g[2])
    said(
        "bias is bfloat16 [3], but must be bfloat16 [20]",
        ops.delta_linear,
        g[0],
        g[1],
        to_cuda(x[:, 0]),
        g[2],
    )
    said("delta must be a 1-D uint8 tensor", ops.delta_linear, g[0], g[1], None, to_cuda(x))
    said(
        "must be contiguous",
        ops.delta_restore,
        over(g[1].data_ptr(), (300, 20), torch.bfloat16, 0, (1, 300)),
        g[2],
    )
    said(
        "weight and delta share memory",
        ops.delta_apply_,
        over(g[2].data_ptr(), (delta.numel(),), torch.uint8, 0),
        g[2],
    )
    slots, rows = torch.tensor([[0, delta.numel()]]), torch.zeros(3, dtype=torch.int32)
    on_gpu = [to_cuda(t) for t in (slots, rows)]
    said("tenant_of_row is on cpu", ops.delta_linear_grouped, g[0], g[1], None, g[2], on_gpu[0], rows)
    said("tenant_of_row is on cpu", ops.delta_embedding, to_cuda(rows.long()), g[1], g[2], on_gpu[0], rows)
    said("indices must be int64 or int32", ops.delta_embedding, g[0], g[1], g[2], *on_gpu)
    odd = to_cuda(delta, offset=8)
    said(
        "arena is at an address that is no multiple of 16",
        ops.delta_linear_grouped,
        *g[:2],
        None,
        odd,
        *on_gpu,
    )
    grad = to_cuda(x[:, :20])
    said("weight is on cpu, but another argument is on cuda:0", ops.delta_linear_grad_input, grad, base, g[2])
    said("tenant_of_row is on cpu", ops.delta_linear_grouped_grad_input, grad, *g[1:], on_gpu[0], rows)
    said("fine_tuned is on cpu, but another argument is on cuda:0", ops.delta_encode, g[1], base)
    said("base is on cuda:1, but another", ops.delta_slice, g[2], to_cuda(base, 1), 0, 0, 1)
    said("bases[1] is on cpu", ops.delta_concat, [g[2], g[2]], [g[1], base], 0)
    said(
        "base is bfloat16 [2, 3], but the delta is of bfloat16 [20, 300]",
        ops.delta_slice,
        g[2],
        over(g[1].data_ptr(), (2, 3), torch.bfloat16, 0),
        0,
        0,
        1,
    )
    # What kernels report is an error of the next call.
    foreign = to_cuda(xorz.delta_encode(base.half(), tuned.half()))
    assert torch.isnan(to_cpu(ops.delta_restore(g[1], foreign))).all()
    said(
        "xorz::delta_linear: an earlier delta_restore on cuda:0 reported: the delta is of another",
        ops.delta_linear,
        *g[:2],
        None,
        g[2],
    )
    assert same_bits(to_cpu(ops.delta_restore(g[1], g[2])), tuned)
    # Or of whoever asks, once.
    for device in (0, "cuda:0", torch.device("cuda", 0)):
        xorz.cuda_status(device)
        ops.delta_restore(g[1], foreign)
        said("an earlier delta_restore on cuda:0 reported: the delta is of another", xorz.cuda_status, device)
        xorz.cuda_status(device)
    ops.delta_restore(g[1], foreign)
    xorz.cuda_status(1)
    said("an earlier delta_restore on cuda:0 reported", xorz.cuda_status, 0)
    with pytest.raises(ValueError, match="device must be a CUDA device, but is cpu"):
        xorz.cuda_status("cpu")
    # No bytes are no delta, and not the base.
    empty = torch.empty(0, dtype=torch.uint8)
    x = random_weight(2, 300, torch.bfloat16)
    for op, arguments in ((ops.delta_linear, (to_cuda(x), g[0], None)), (ops.delta_restore, (g[0],))):
        said(
            "delta is uint8 [0], but a resident delta has at least 192 bytes", op, *arguments, to_cuda(empty)
        )


def digests() -> None:
    """Digests are computed by the device: of any words, without a wait, in memory of the workspace and sixteen bytes."""
    for shape, dtype in (
        ((20, 300), torch.bfloat16),
        ((131, 7), torch.float32),
        ((5,), torch.float64),
        ((0, 3), torch.int8),
    ):
        count = torch.Size(shape).numel() * dtype.itemsize
        base = torch.randint(0, 256, (count,), dtype=torch.uint8).view(dtype).reshape(shape)
        waits, there = torch_double.torch_double_waits(), to_cuda(base)
        aten_calls.clear()
        found = ops.delta_digest(there)
        assert [name for name, _ in aten_calls] == ["aten::new_empty"] * 2, aten_calls
        assert torch_double.torch_double_waits() == waits and found.is_cuda
        assert torch.equal(to_cpu(found), ops.delta_digest(base)), (shape, dtype)


def checks() -> None:
    begin(0)
    base = random_weight(20, 300, torch.bfloat16)
    tuned, delta = make_delta(base, "sparse")
    ops.delta_check(to_cuda(delta), to_cuda(base))
    with pytest.raises(RuntimeError, match=r"xorz::delta_check: .*base"):
        ops.delta_check(to_cuda(delta), to_cuda(tuned))
    digests()
    # Deltas are made, cut and joined on the host, and come back.
    g = [to_cuda(t) for t in (base, tuned, delta)]
    assert torch.equal(
        to_cpu(ops.delta_encode(g[0], g[1], prefer="memory")), ops.delta_encode(base, tuned, prefer="memory")
    )
    assert torch.equal(to_cpu(ops.delta_slice(g[2], g[0], 1, 7, 99)), ops.delta_slice(delta, base, 1, 7, 99))
    got = ops.delta_concat([g[2], g[2]], [g[0], g[0]], 0)
    assert got.is_cuda and torch.equal(to_cpu(got), ops.delta_concat([delta, delta], [base, base], 0))
    # Each waits once, for all its arguments, whose copies were asked for before; no memory is pageable.
    for op, given, asked, back in (
        (ops.delta_encode, g[:2], 2, 1),
        (ops.delta_slice, (g[2], g[0], 1, 7, 99), 2, 1),
        (ops.delta_concat, ([g[2]] * 3, [g[0]] * 3, 0), 6, 1),
        (ops.delta_check, (g[2], g[0]), 2, 0),
    ):
        aten_calls.clear()
        waits = torch_double.torch_double_waits()
        op(*given)
        names = [name for name, _ in aten_calls]
        assert names == ["copy_to_host"] * asked + ["aten::new_empty", "copy_to_device"] * back, (op, names)
        assert torch_double.torch_double_waits() == waits + 1, op
    assert torch_double.torch_double_pageable() == 0
    # What a graph would do again at each replay is refused before anything is asked.
    torch_double.torch_double_capture(1)
    aten_calls.clear()
    with pytest.raises(
        RuntimeError, match="xorz::delta_check: the current stream is captured in a CUDA graph"
    ):
        ops.delta_check(g[2], g[0])
    torch_double.torch_double_capture(0)
    assert aten_calls == []


def without_device() -> None:
    """On a machine whose driver sees no device: the op's own sentence, before torch is asked for memory."""
    t = over(256, (4, 4), torch.bfloat16, 0)
    delta = over(4096, (512,), torch.uint8, 0)
    torch_double.torch_double_set(aten, 0, None)
    for op, *given in (
        (ops.delta_apply_, t, delta),
        (ops.delta_restore, t, delta),
        (ops.delta_linear, t, t, None, delta),
        (ops.delta_linear_grad_input, t, t, delta),
    ):
        name = op.__name__
        with pytest.raises(
            RuntimeError, match=rf"xorz::{name}: .*CUDA_ERROR_NO_DEVICE.*CUDA_VISIBLE_DEVICES"
        ):
            op(*given)


if __name__ == "__main__":
    case = sys.argv[1]
    with torch.no_grad():
        {
            f.__name__: f
            for f in (
                restores,
                products,
                panels,
                groups,
                gradients,
                lookups,
                devices,
                refusals,
                checks,
                without_device,
            )
        }[case]()
    print(f"{case}: well", flush=True)
