"""The ops on the device, beside the CPU's own results, float64 and torch."""

import itertools
import math

import torch
from torch import Tensor

from .. import (
    cuda_status,
    delta_apply_,
    delta_check,
    delta_concat,
    delta_digest,
    delta_embedding,
    delta_encode,
    delta_linear,
    delta_linear_grad_input,
    delta_linear_grouped,
    delta_linear_grouped_grad_input,
    delta_restore,
    delta_slice,
)
from .data import ENCODINGS, arena_of, fine_tune, integers, name_of, random_words, row_maps
from .report import Report, differ, far

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def check_restores(report: Report, device: torch.device, shapes: list[tuple[int, int]]) -> None:
    """delta_restore and delta_apply_, word for word, NaN and infinities among them; another base is left as it was."""
    for dtype, encoding in itertools.product(DTYPES, ENCODINGS):
        wrong = None
        for shape in shapes:
            base = random_words(shape, dtype, 1)
            base.view(-1)[:: max(1, base.numel() // 7)] = torch.tensor([math.nan, math.inf, -0.0]).to(dtype)[
                torch.arange(len(base.view(-1)[:: max(1, base.numel() // 7)])) % 3
            ]
            tuned, delta = fine_tune(base, encoding)
            there, weight = delta.to(device), base.to(device, copy=True)
            delta_apply_(weight, there)
            for way, got in (("restore", delta_restore(base.to(device), there)), ("apply", weight)):
                if (d := differ(got, tuned)) is not None:
                    wrong = wrong or f"{way} of {list(shape)}: {d}"
            if differ(base, tuned) is not None and (d := _taken(device, tuned, there)) is not None:
                wrong = wrong or f"apply to another base of {list(shape)}: {d}"
        report.check(f"restore and apply, {encoding}, {name_of(dtype)}", wrong)


def _taken(device: torch.device, other: Tensor, delta: Tensor) -> str | None:
    """What is wrong where a delta is applied to words that are not its base: on a GPU the device finds out."""
    weight = other.to(device, copy=True)
    try:
        delta_apply_(weight, delta)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
            cuda_status(device)
        return "nothing was said"
    except (RuntimeError, ValueError) as error:
        if "base" not in str(error):
            return str(error)
    return differ(weight, other)


def check_linear(report: Report, device: torch.device, shape: tuple[int, int], rows: list[int]) -> None:
    """One tenant: one-hot rows bit for bit, else within the bound; the same bits twice. On a GPU many rows in mode fast are
    torch's product of the restored words, and have its bits.
    """
    n, k = shape
    for dtype, encoding in itertools.product(DTYPES, ENCODINGS):
        base, bias = random_words(shape, dtype, 1), random_words((n,), dtype, 2)
        tuned, delta = fine_tune(base, encoding)
        weight, there, b, plain = base.to(device), delta.to(device), bias.to(device), tuned.to(device)
        wrong: dict[str, str | None] = dict.fromkeys(("bound", "again", "deterministic"))
        for mode in ("fast", "deterministic"):
            if dtype == torch.float32:
                break  # whose products with 1 are exact, too, but not promised
            got = delta_linear(torch.eye(k, dtype=dtype).to(device), weight, there, mode=mode)
            finite = torch.where(tuned == 0, torch.zeros_like(tuned), tuned)  # -0.0 + 0.0 is 0.0
            same = differ(torch.where(got.cpu() == 0, torch.zeros_like(finite.T), got.cpu()), finite.T)
            wrong["one-hot"] = wrong.get("one-hot") or same
        for m, mode in itertools.product(rows, ("fast", "deterministic")):
            x = random_words((m, k), dtype, 3)
            got, again = (delta_linear(x.to(device), weight, there, b, mode=mode) for _ in range(2))
            if device.type == "cuda" and mode == "fast" and m > 32 and dtype != torch.float32:
                torchs = torch.nn.functional.linear(x.to(device), plain, b)
                wrong["panels"] = wrong.get("panels") or differ(got, torchs)
            else:
                wrong["bound"] = wrong["bound"] or far(got, x, tuned, bias)
            wrong["again"] = wrong["again"] or differ(again, got)
            if mode == "deterministic":
                alone = delta_linear(x[m // 2 : m // 2 + 1].to(device), weight, there, b, mode=mode)
                wrong["deterministic"] = wrong["deterministic"] or differ(got[m // 2 : m // 2 + 1], alone)
        for what, found in wrong.items():
            report.check(f"delta_linear, {what}, {encoding}, {name_of(dtype)}", found)


def check_exact(report: Report, device: torch.device, shape: tuple[int, int], rows: list[int]) -> None:
    """mode="exact" has the bits of torch's own product of the fine-tuned weights on that device."""
    for dtype, encoding in itertools.product(DTYPES, ENCODINGS):
        base, bias = random_words(shape, dtype, 1), random_words(shape[:1], dtype, 2).to(device)
        tuned, delta = fine_tune(base, encoding)
        weight, there, plain = base.to(device), delta.to(device), tuned.to(device)
        wrong = None
        for m in rows:
            x = random_words((m, shape[1]), dtype, 3).to(device)
            got = delta_linear(x, weight, there, bias, mode="exact")
            wrong = wrong or differ(got, torch.nn.functional.linear(x, plain, bias))
        report.check(f"delta_linear, exact, {encoding}, {name_of(dtype)}", wrong)


def check_gradients(report: Report, device: torch.device, shape: tuple[int, int], rows: list[int]) -> None:
    """Gradients for the input, of one tenant and of many: exact sums bit for bit, and random words within the bound."""
    n, k = shape
    for dtype in DTYPES:
        wrong: dict[str, str | None] = {}
        for what, make in (
            ("exact sums", lambda s, seed, dtype=dtype: integers(s, 3, dtype, seed)),
            ("bound", lambda s, seed, dtype=dtype: random_words(s, dtype, seed)),
        ):
            base = make(shape, 1)
            tuned, deltas = [], []
            for slot, prefer in enumerate(("speed", "memory", "speed", "memory")):
                some = torch.rand(shape, generator=torch.Generator().manual_seed(slot)) < 0.02 * 4**slot
                tuned.append(torch.where(some, make(shape, 7 + slot), base))
                deltas.append(delta_encode(base, tuned[-1], prefer=prefer))
            arena, slots = (t.to(device) for t in arena_of(deltas))
            weight = base.to(device)
            for m in rows:
                grad = make((m, n), 3)
                owners = (torch.arange(m) % 5 - 1).to(torch.int32)
                whole = torch.stack([[*tuned, base][i] for i in owners.tolist()])
                given = (grad.to(device), weight, arena, slots, owners.to(device))
                pairs = [
                    (delta_linear_grad_input(grad.to(device), weight, d.to(device)), t.expand(m, n, k))
                    for d, t in zip(deltas, tuned, strict=True)
                ]
                for got, words in (*pairs, (delta_linear_grouped_grad_input(*given), whole)):
                    if what == "bound":
                        found = far(got, grad, words.transpose(1, 2), None)
                    else:
                        want = torch.einsum("mn,mnk->mk", grad.double(), words.double())
                        found = differ(got, want.float().to(dtype))
                    wrong[what] = wrong.get(what) or (found and f"{m} rows: {found}")
        for what, found in wrong.items():
            report.check(f"gradients for the input, {what}, {name_of(dtype)}", found)


def check_exact_grouped(
    report: Report, device: torch.device, shape: tuple[int, int], rows: list[int]
) -> None:
    """mode="exact" of many tenants has the bits of torch's own product of each tenant's rows."""
    for dtype in DTYPES:
        base, wrong = random_words(shape, dtype, 1), None
        tuned, deltas = zip(*(fine_tune(base, e, seed=i) for i, e in enumerate(ENCODINGS)), strict=True)
        arena, slots = (t.to(device) for t in arena_of([*deltas, None]))
        biases = random_words((len(slots) + 1, shape[0]), dtype, 2).to(device)
        plain = [t.to(device) for t in (*tuned, base, base)]
        for m in rows:
            x = random_words((m, shape[1]), dtype, 3).to(device)
            owners = (torch.arange(m) * 7 % (len(slots) + 1) - 1).to(torch.int32)
            got = delta_linear_grouped(x, plain[-1], arena, slots, owners.to(device), biases, mode="exact")
            for slot in set(owners.tolist()):
                mine = (owners == slot).nonzero().flatten().to(device)
                want = torch.nn.functional.linear(x[mine], plain[slot], biases[slot])
                wrong = wrong or differ(got[mine], want)
        report.check(f"delta_linear_grouped, exact, {name_of(dtype)}", wrong)


def check_round_trip(report: Report, device: torch.device, shape: tuple[int, int]) -> None:
    """Deltas made, cut, joined and checked from tensors of the device are those that the CPU makes."""
    k = shape[1]
    for dtype in DTYPES:
        base = random_words(shape, dtype, 1)
        tuned, delta = fine_tune(base, "sparse")
        weight, words, there = (t.to(device) for t in (base, tuned, delta))
        cut, joined = (
            delta_slice(there, weight, 1, k // 3, k),
            delta_concat([there, there], [weight, weight], 0),
        )
        wrong = {
            "encode": differ(delta_encode(weight, words, prefer="speed"), delta),
            "slice": _restored(base[:, k // 3 :], cut, tuned[:, k // 3 :]),
            "concat": _restored(torch.cat([base, base]), joined, torch.cat([tuned, tuned])),
            "digest": _digests(weight, [base, base[:, : k // 2].contiguous(), base[:0], base[-1]]),
        }
        try:
            delta_check(there, weight)
            delta_check(there, words)
            wrong["check"] = "a delta was taken for one of another base"
        except RuntimeError as error:
            wrong["check"] = None if "base" in str(error) else str(error)
        for what, found in wrong.items():
            report.check(f"delta_{what}, {name_of(dtype)}", found)


def _digests(like: Tensor, bases: list[Tensor]) -> str | None:
    """The first digest of the device that is not the CPU's."""
    found = (differ(delta_digest(base.to(like.device)), delta_digest(base)) for base in bases)
    return next((wrong for wrong in found if wrong is not None), None)


def _restored(base: Tensor, delta: Tensor, want: Tensor) -> str | None:
    """What the CPU makes of a delta, if that is not what it should be."""
    try:
        return differ(delta_restore(base.contiguous(), delta.cpu()), want.contiguous())
    except RuntimeError as error:
        return str(error)


def _of_company(x: Tensor, given: list[Tensor], owners: Tensor) -> str | None:
    """A row whose bits depend on what is beside it, in mode="deterministic"; or None."""
    base, arena, slots, biases = given
    got = delta_linear_grouped(x, base, arena, slots, owners, biases, mode="deterministic")
    at = x.size(0) // 2
    alone = delta_linear_grouped(
        x[at : at + 1], base, arena, slots, owners[at : at + 1].clone(), biases, mode="deterministic"
    )
    return differ(got[at : at + 1], alone)


def check_grouped(report: Report, device: torch.device, shape: tuple[int, int], rows: list[int]) -> None:
    """Many tenants of every encoding in one batch: exact sums bit for bit, and random words within the bound."""
    n, k = shape
    for dtype in DTYPES:
        wrong: dict[str, str | None] = {}
        for exact in (True, False):

            def make(
                shape: tuple[int, ...], seed: int, dtype: torch.dtype = dtype, exact: bool = exact
            ) -> Tensor:
                return integers(shape, 8, dtype, seed) if exact else random_words(shape, dtype, seed)

            base, biases = make(shape, 1), make((6, n), 2)
            tuned, deltas = [], []
            for slot, prefer in enumerate(("speed", "memory", "speed", "memory", None)):
                some = torch.rand(shape, generator=torch.Generator().manual_seed(slot)) < 0.02 * 4**slot
                tuned.append(base if prefer is None else torch.where(some, make(shape, 7 + slot), base))
                deltas.append(None if prefer is None else delta_encode(base, tuned[-1], prefer=prefer))
            arena, slots = arena_of(deltas)
            given = [t.to(device) for t in (base, arena, slots, biases)]
            for m in rows:
                x = integers((m, k), 3, dtype, 3) if exact else random_words((m, k), dtype, 3)
                for name, owners in row_maps(m, 5):
                    owners = owners.to(torch.int32)
                    got = delta_linear_grouped(x.to(device), *given[:3], owners.to(device), given[3])
                    mine = torch.stack([[*tuned, base][i] for i in owners.tolist()]), biases[owners.long()]
                    if exact:
                        want = torch.einsum("mk,mnk->mn", x.double(), mine[0].double()) + mine[1].double()
                        found = differ(got, want.float().to(dtype))
                    else:
                        found = far(got, x, *mine)
                    key = f"{name}, {'exact sums' if exact else 'bound'}"
                    wrong[key] = wrong.get(key) or found
                    key = f"{name}, deterministic"
                    wrong[key] = wrong.get(key) or _of_company(x.to(device), given, owners.to(device))
        for key, found in wrong.items():
            report.check(f"delta_linear_grouped, {key}, {name_of(dtype)}", found)


def check_embedding(
    report: Report, device: torch.device, shapes: list[tuple[int, int]], rows: list[int]
) -> None:
    """Rows looked up in the tables of tenants of every encoding, word for word."""
    for dtype in DTYPES:
        wrong: dict[str, str | None] = {}
        for shape in shapes:
            base = random_words(shape, dtype, 1)
            tuned, deltas = zip(*(fine_tune(base, e, seed=i) for i, e in enumerate(ENCODINGS)), strict=True)
            arena, slots = arena_of([*deltas, None])
            tables, given = torch.stack([*tuned, base, base]), [t.to(device) for t in (base, arena, slots)]
            for m in rows:
                indices = torch.randint(shape[0], (m,), generator=torch.Generator().manual_seed(m))
                for name, owners in row_maps(m, 5):
                    owners = owners.to(torch.int32)
                    got = delta_embedding(indices.to(device), *given, owners.to(device))
                    found = differ(got, tables[owners.long(), indices])
                    wrong[name] = wrong.get(name) or (found and f"{m} rows of {list(shape)}: {found}")
        for name, found in wrong.items():
            report.check(f"delta_embedding, {name}, {name_of(dtype)}", found)


def check_reports(report: Report, device: torch.device) -> None:
    """A delta of another matrix gives NaN, and an error of a later call; then all is well again."""
    base = random_words((40, 300), torch.bfloat16, 1)
    tuned, delta = fine_tune(base, "sparse")
    _, foreign = fine_tune(base.half(), "sparse")
    weight, there, wrong = base.to(device), delta.to(device), None
    got = delta_restore(weight, foreign.to(device))
    if not bool(torch.isnan(got).all()):
        wrong = "a delta of float16 was applied to bfloat16"
    try:
        delta_restore(weight, there)
        wrong = wrong or "the next call raised nothing"
    except RuntimeError as error:
        if "an earlier delta_restore" not in str(error):
            wrong = wrong or f"the next call said: {error}"
    delta_restore(weight, foreign.to(device))
    torch.cuda.synchronize(device)
    try:
        cuda_status(device)
        wrong = wrong or "cuda_status raised nothing"
    except RuntimeError:
        cuda_status(device)
    report.check(
        "a foreign delta gives NaN and is reported", wrong or differ(delta_restore(weight, there), tuned)
    )


def check_graph(report: Report, device: torch.device) -> None:
    """A captured call is replayed on new rows and another delta, with nothing launched from the host."""
    base = random_words((512, 1024), torch.bfloat16, 1)
    pairs = [fine_tune(base, "sparse", seed=seed) for seed in (1, 2)]
    arena, slots = arena_of([delta for _, delta in pairs])
    for m in (4, 200):
        x, owners = random_words((m, 1024), base.dtype, 3), torch.zeros(m, dtype=torch.int32)
        given = [t.to(device) for t in (x, base, arena, slots, owners)]
        delta_linear_grouped(*given)
        torch.cuda.synchronize(device)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = delta_linear_grouped(*given)
        wrong = None
        for tenant, (tuned, _) in enumerate(pairs):
            x = random_words((m, 1024), base.dtype, 10 + tenant)
            given[0].copy_(x)
            given[4].fill_(tenant)
            graph.replay()
            torch.cuda.synchronize(device)
            wrong = wrong or far(out, x, tuned, None)
        report.check(f"a CUDA graph of {m} rows, replayed for other rows and tenants", wrong)
