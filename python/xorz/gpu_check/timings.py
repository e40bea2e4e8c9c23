"""Times, beside cuBLAS and beside a copy of the same bytes."""

import time
from collections.abc import Callable

import torch
from torch import Tensor

from .. import delta_linear, delta_linear_grouped, delta_restore
from .data import arena_of, change, random_words
from .report import Report


def seconds(device: torch.device, call: Callable[[], object], rounds: int) -> float:
    """Median time of one call. On CUDA, of the device, the L2 cache swept before each."""
    times = []
    if device.type != "cuda":
        for _ in range(rounds):
            start = time.perf_counter()
            call()
            times.append(time.perf_counter() - start)
        return sorted(times)[rounds // 2]
    sweep = torch.empty(256 << 20, dtype=torch.uint8, device=device)
    call()
    for _ in range(rounds):
        sweep.zero_()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1e3)
    return sorted(times)[rounds // 2]


def bandwidth(device: torch.device, quick: bool, rounds: int) -> float:
    """Bytes a second that a copy reads and writes, of more than any cache holds."""
    source = torch.empty((8 if quick else 1024) << 20, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * source.numel() / seconds(device, lambda: target.copy_(source), rounds)


COLUMNS = (
    "n x k", "changed", "tenants", "m", "F.linear us", "xorz us", "ratio", "delta/base", "F.lin GB/s", "xorz GB/s",
    "of a copy",
)  # fmt: skip


def time_pair(
    device: torch.device, rounds: int, weight: Tensor, deltas: list[Tensor], m: int | None, copies: float
) -> dict[str, float]:
    """`F.linear` of ONE dense matrix and the product of m rows, one tenant's or in turn each of several's; where m is None, a
    copy of the base and `delta_restore`. `copies`: bytes a second of a copy.
    """
    size = weight.numel() * weight.element_size()
    moved = size + sum(delta.numel() for delta in deltas)
    if m is None:
        plain = seconds(device, weight.clone, rounds)
        ours = seconds(device, lambda: delta_restore(weight, deltas[0]), rounds)
        moved, at_least = moved + size, 2 * size
    else:
        x, at_least = random_words((m, weight.shape[1]), weight.dtype, 3).to(device), size
        plain = seconds(device, lambda: torch.nn.functional.linear(x, weight), rounds)
        if len(deltas) == 1:
            ours = seconds(device, lambda: delta_linear(x, weight, deltas[0]), rounds)
        else:
            arena, slots = (t.to(device) for t in arena_of([delta.cpu() for delta in deltas]))
            rows = (torch.arange(m, dtype=torch.int32) % len(deltas)).to(device)
            ours = seconds(device, lambda: delta_linear_grouped(x, weight, arena, slots, rows), rounds)
    return {
        "plain_seconds": plain,
        "xorz_seconds": ours,
        "ratio": ours / plain,
        "delta_over_base": sum(delta.numel() for delta in deltas) / size,
        "plain_gigabytes_per_second": at_least / plain / 1e9,
        "xorz_gigabytes_per_second": moved / ours / 1e9,
        "share_of_a_copy": moved / ours / copies,
    }


def cases(rows: list[int], many: int) -> list[tuple[int, int | None]]:
    """(tenants, rows of x): one tenant with any number of rows, and restored; several with a row each, and with more."""
    alone = [(1, m) for m in (*rows, None)]
    return [*alone, *((many, m) for m in rows if m >= many)]


def time_all(
    report: Report,
    device: torch.device,
    shapes: list[tuple[int, int]],
    rows: list[int],
    many: int,
    rounds: int,
    until: float,
    quick: bool,
) -> None:
    """Products and restores beside F.linear on one plain matrix. What would begin later than `until` seconds is left out."""
    copies = bandwidth(device, quick, rounds)
    report.facts["copy_gigabytes_per_second"] = copies / 1e9
    print(f"\na copy reads and writes {copies / 1e9:.0f} GB/s\n" + " ".join(f"{c:>12}" for c in COLUMNS))
    for n, k in shapes:
        base = random_words((n, k), torch.bfloat16, 1)
        weight = base.to(device)
        for share in (0.01, 0.05, 0.3, "exponent"):
            if report.seconds() > until:
                report.leave_out(f"timings of {n} x {k}, {share} changed: {until:.0f} s are over")
                continue
            delta = change(base, share).to(device)
            for tenants, m in cases(rows, many):
                found = time_pair(device, rounds, weight, [delta] * tenants, m, copies)
                what = "restore" if m is None else m
                report.timings.append(
                    {"n": n, "k": k, "changed": share, "tenants": tenants, "m": what, **found}
                )
                a, b, ratio, size, plain, ours, of_copy = found.values()
                cells = (
                    f"{n} x {k}",
                    share,
                    tenants,
                    what,
                    f"{a * 1e6:.1f}",
                    f"{b * 1e6:.1f}",
                    f"{ratio:.2f}",
                    f"{size:.3f}",
                )
                cells = (*cells, f"{plain:.0f}", f"{ours:.0f}", f"{of_copy:.0%}")
                print(" ".join(f"{c!s:>12}" for c in cells), flush=True)
