"""`python -m xorz.gpu_check --vllm`: whether one engine of vLLM answers each tenant as vLLM answers that tenant's whole model.

Random models, fine-tunes and packages are made in a folder; every engine is a process of its own, one after another: plain
ones, without xorz, of each whole model, then one with all tenants for each way to start it. `answers` says what is compared,
and by which bounds. What those would notice of a single tensor is computed, too, and said.
"""

import dataclasses
import importlib.metadata
import importlib.util
import json
import math
import os
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .answers import APART, MOST, PLAINLY, SCATTER, Found, Scale, compared, judged
from .engine import Spec
from .family import BASE, TUNES, Family
from .report import Report

_GROWN = 2 << 20
"""Bytes that an engine's memory may grow beyond what a plain engine's does: less than a package of a small model's."""


@dataclass
class Way:
    """How engines are started.

    Attributes:
        name: of the way.
        settings: keyword arguments of `vllm.LLM`, beyond those that all have.
        xorz: settings of xorz.
        environment: of the process.
        timed: whether decoding is timed.
        update: by whose package the base is updated in place at last, and rolled back; nobody's if empty.
    """

    name: str
    settings: dict[str, Any]
    xorz: dict[str, Any]
    environment: dict[str, str] = dataclasses.field(default_factory=dict)
    timed: bool = False
    update: str = ""


class Engines:
    """Engines of one family, each in a process of its own."""

    def __init__(
        self, family: Family, device: torch.device, quick: bool, seconds: float, timed: bool
    ) -> None:
        """On the CPU or on CUDA, each for `seconds` at most."""
        self.family, self.device, self.quick, self.seconds, self.timed = family, device, quick, seconds, timed
        self.lengths = (9, 40, 100) if quick else (9, 40, 150, 600, 900)
        self.prompts = family.prompts(self.lengths)
        self._number = 0

    def settings(self) -> dict[str, Any]:
        """Of all engines. The longest prompts are computed in chunks, of more than 32 rows, or more than 512, of one tenant."""
        out = {
            "dtype": "bfloat16",
            "max_model_len": 256 if self.quick else 1024,
            "max_num_batched_tokens": 64 if self.quick else 768,
            "max_num_seqs": 16,
            "enable_prefix_caching": True,
            "enable_chunked_prefill": True,
        }
        if self.device.type == "cpu":
            return out | {"block_size": 32}
        return out | {"gpu_memory_utilization": 0.5}

    def answer(self, way: Way, words: str, packages: dict[str, Path] | None) -> dict[str, Any]:
        """What an engine says; `packages` None is a plain one over the model of `words`. RuntimeError with why it ended."""
        self._number += 1
        scratch = self.family.folder / f"engine-{self._number}"
        scratch.mkdir()
        settings = self.settings() | way.settings
        if packages is not None:
            settings |= {"quantization": "xorz", "enable_lora": True, "max_lora_rank": 1}
            settings = {"max_loras": 8, "max_cpu_loras": 16} | settings
            memory = "128 MiB" if self.quick else "1 GiB"
            settings["additional_config"] = {"xorz": {"memory": memory} | way.xorz}
            if way.update:
                settings["weight_transfer_config"] = {"backend": "xorz"}
        spec = Spec(
            model=str(self.family.folders[words]),
            words=words,
            settings=settings,
            packages={name: str(path) for name, path in (packages or {}).items()},
            prompts=self.prompts,
            new=8 if self.quick else 16,
            many=8 if self.timed and way.timed else 0,
            timed_tokens=16 if self.quick else 64,
            scratch=str(scratch),
            update=way.update if packages is not None else "",
        )
        return self._run(spec, scratch, way.environment, packages is None)

    def _run(self, spec: Spec, scratch: Path, more: dict[str, str], plain: bool) -> dict[str, Any]:
        asked, answers, log = scratch / "spec.json", scratch / "answers.json", scratch / "log.txt"
        asked.write_text(json.dumps(dataclasses.asdict(spec)))
        command = [sys.executable, "-m", "xorz.gpu_check.engine", str(asked), str(answers)]
        with log.open("w") as out:
            try:
                done = subprocess.run(
                    command,
                    env=environment(self.device, self.family.folder, plain) | more,
                    stdout=out,
                    stderr=subprocess.STDOUT,
                    timeout=self.seconds,
                )
            except subprocess.TimeoutExpired as error:
                raise RuntimeError(
                    f"the engine was not done in {self.seconds:.0f} s: {end_of(log)}"
                ) from error
        if done.returncode or not answers.exists():
            raise RuntimeError(f"the engine ended with exit code {done.returncode}: {end_of(log)}")
        return json.loads(answers.read_text())


def environment(device: torch.device, folder: Path, plain: bool) -> dict[str, str]:
    """Of an engine's process: no network, nothing of another engine's, nothing left behind; a plain one has no plugins."""
    out = {
        **os.environ,
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # its steps are made here, so that loads come between them
        "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
        "VLLM_ALLOW_INSECURE_SERIALIZATION": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_CACHE_ROOT": str(folder / "cache"),
        "HF_HUB_OFFLINE": "1",
        "VLLM_PLUGINS": "" if plain else "xorz",
    }
    if device.type == "cpu":
        return {"VLLM_CPU_KVCACHE_SPACE": "1"} | out
    visible = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
    first = device.index or 0
    every = visible or [str(i) for i in range(torch.cuda.device_count())]
    return out | {"CUDA_VISIBLE_DEVICES": ",".join(every[first:] + every[:first])}


def end_of(log: Path) -> str:
    """The last error that an engine spoke of, and how its log ends; what vLLM only warns of is no error."""
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    errors = [
        line for line in lines if re.search(r"\b\w+(Error|Exception): ", line) and "WARNING" not in line
    ]
    return " | ".join(dict.fromkeys([*errors[-1:], *lines[-3:]]))


_COLUMNS = (
    ("answers", 8), ("same", 5), ("tokens", 7), ("from plain", 11), ("bound", 7), ("from f64", 9), ("bound", 7),
    ("rms/plain", 10), ("bound", 6), ("others", 7), ("at least", 9),
)  # fmt: skip


def _print_header(scale: Scale, kind: str) -> None:
    print(f"\n{kind}: plain engines are at most E = {scale.furthest:.4f} nats from float64")
    print(f"     {'what':<52} {'tenants':<24}" + "".join(f"{name:>{width}}" for name, width in _COLUMNS))


def _row(
    report: Report, what: str, found: Found, scale: Scale, tenants: list[str], wrong: str | None
) -> None:
    e = scale.furthest
    ratio = max((scatter / scale.scatter[words] for words, scatter in found.scatter.items()), default=None)
    numbers = {
        "answers": found.answers,
        "same_as_plain": found.same,
        "tokens": found.tokens,
        "from_plain": found.plainly[0],
        "from_plain_bound": PLAINLY * e,
        "from_float64": found.furthest[0],
        "from_float64_bound": MOST * e,
        "root_mean_square_over_plain": ratio,
        "root_mean_square_bound": SCATTER,
        "from_others": found.others[0],
        "from_others_bound": APART * e,
    }
    shown = [n if isinstance(n, int) else "-" if n is None else f"{n:.3f}" for n in numbers.values()]
    cells = "".join(f"{n:>{width}}" for n, (_, width) in zip(shown, _COLUMNS, strict=True))
    report.check(what, wrong, line=f"{what:<52} {' '.join(tenants):<24}{cells}", tenants=tenants, **numbers)


class Reference:
    """What plain engines say, each of one whole model, and how far that is from float64."""

    def __init__(self, engines: Engines, ways: dict[str, Way]) -> None:
        """Starts one for each model of the family, in the way that `ways` has for its words."""
        family, self.plain = engines.family, {}
        self.scale = Scale(0.0, {})
        self.rates: dict[str, float] = {}
        self.grown: list[int] | None = None
        for words in family.folders:
            said = engines.answer(ways[words], words, None)
            check_device(said["facts"], engines.device)
            [answers] = said["phases"].values()
            self.plain |= {(words, answer["prompt"]): answer for answer in answers}
            found = compared(family, engines.prompts, answers, {})
            self.scale.furthest = max(self.scale.furthest, found.furthest[0])
            self.scale.scatter |= found.scatter
            self.rates |= said["rates"]
            self.grown = self.grown or grown(said["memory"])


def check_device(facts: dict[str, Any], device: torch.device) -> None:
    """RuntimeError for an engine that ran elsewhere, as a vLLM for the CPU does beside a GPU."""
    if facts["device"] != device.type:
        raise RuntimeError(f"this vLLM ran on {facts['device']}, not on {device.type}")


def grown(memory: dict[str, Any]) -> list[int] | None:
    """Bytes by which each worker's memory of a GPU grew after the first answers; None where there is no GPU."""
    pairs = list(zip(memory["before"], memory["after"], strict=True))
    return None if any(None in pair for pair in pairs) else [after - before for before, after in pairs]


def check_served(report: Report, engines: Engines, reference: Reference, way: Way) -> dict[str, Any]:
    """One engine with every tenant, its phases a row of the table each; what vLLM chose for it."""
    family = engines.family
    said = engines.answer(way, BASE, family.packages)
    check_device(said["facts"], engines.device)
    for phase, answers in said["phases"].items():
        found = compared(family, engines.prompts, answers, reference.plain)
        wrong = judged(found, reference.scale)
        block = engines.settings().get("block_size", 16)
        short = [a for a in answers if len(engines.prompts[a["prompt"]]) > 2 * block and not a["cached"]]
        if phase == "from the prefix cache" and short:
            wrong = f"{len(short)} long prompts were not found in the prefix cache; {wrong or ''}"
        tenants = sorted({a["words"] for a in answers}, key=[BASE, *TUNES].index)
        what = f"{family.kind}, {way.name}: {phase}"
        _row(report, what, found, reference.scale, tenants, wrong)
    _check_memory(report, f"{family.kind}, {way.name}", said["memory"], reference.grown)
    if said["rates"]:
        _show_rates(report, f"{family.kind}, {way.name}", said["rates"], reference.rates)
    return said["facts"]


def _check_memory(report: Report, what: str, memory: dict[str, Any], plainly: list[int] | None) -> None:
    left = [bytes_ for bytes_ in memory["deltas"] if bytes_]
    wrong = f"{left} bytes of deltas are left where no tenant is" if left else None
    report.check(f"{what}: tenants that went have left nothing", wrong)
    found = grown(memory)
    if found is None or plainly is None:
        report.leave_out(f"{what}: that a GPU's memory does not grow: there is none")
        return
    allowed = max([0, *plainly]) + _GROWN
    wrong = None if max(found) <= allowed else f"grew by {max(found):,} bytes, of {allowed:,}"
    report.check(f"{what}: the GPU's memory does not grow after the first answers", wrong)


def _show_rates(report: Report, what: str, rates: dict[str, float], plain: dict[str, float]) -> None:
    print(f"     {what}, tokens a second while decoding, by how many requests:")
    for name, count, ours, theirs in (
        ("the base", 1, rates["base"], plain.get("one")),
        ("one tenant", 1, rates["one"], plain.get("one")),
        ("eight tenants", 8, rates["many"], plain.get("many")),
    ):
        beside = "" if theirs is None else f", plain engine {theirs:.1f}, {ours / theirs:.2f} of it"
        print(f"     {name:<16} {count} {ours:>10.1f}{beside}", flush=True)
        report.timings.append(
            {
                "engine": what,
                "who": name,
                "requests": count,
                "xorz_tokens_a_second": ours,
                "plain_tokens_a_second": theirs,
            }
        )


def ways_of(device: torch.device, quick: bool, graphs: bool) -> tuple[list[Way], list[str]]:
    """The ways to start engines in, the default last, and sentences of what is left out."""
    eager = Way(
        "eager, deterministic",
        {"enforce_eager": True, "max_loras": 2},  # so that three tenants take turns in two slots
        {"mode": "deterministic", "prefer": "memory"},
    )
    # Graphs hold nothing of it.
    exact = Way("eager, exact", {"enforce_eager": True}, {"mode": "exact"}, update="all")
    if device.type == "cpu":
        left = ["CUDA graphs: the CPU has none", "that GPUs compute any of this: none ran"]
        fast = Way("fast", {"enforce_eager": True}, {}, timed=True)
        return [eager, exact, fast], left
    if not graphs:
        return [eager, exact, Way("eager, fast", {"enforce_eager": True}, {}, timed=True)], [
            "CUDA graphs: --no-graphs"
        ]
    default = Way("vLLM's default graphs", {}, {}, timed=True)
    if quick:
        return [eager, exact, default], []
    piecewise = Way("piecewise graphs", {"compilation_config": {"cudagraph_mode": "PIECEWISE"}}, {})
    return [eager, exact, piecewise, default], []


def other_runner(report: Report, default: Way, facts: dict[str, Any]) -> Way | None:
    """The default with the model runner that vLLM has not chosen by itself, by `facts`; None, and why, if there is none."""
    second = not facts["second_runner"]
    if second and importlib.util.find_spec("triton") is None:
        report.leave_out("vLLM's second model runner: it needs Triton, which is not installed")
        return None
    name = f"{default.name}, {'second' if second else 'first'} model runner"
    chosen = default.environment | {"VLLM_USE_V2_MODEL_RUNNER": str(int(second))}
    return dataclasses.replace(default, name=name, environment=chosen, timed=False)


def on_two(report: Report, device: torch.device, default: Way) -> Way | None:
    """Tensor parallel, where there are two of what it needs."""
    more, settings = {}, default.settings | {"tensor_parallel_size": 2}
    if device.type == "cuda":
        if torch.cuda.device_count() < 2:
            report.leave_out("tensor parallel: there are not two GPUs")
            return None
    else:
        cores = sorted(os.sched_getaffinity(0))
        if len(cores) < 2:
            report.leave_out("tensor parallel: there are not two processors")
            return None
        more = {"VLLM_CPU_OMP_THREADS_BIND": f"{cores[0]}|{cores[1]}"}
    name = f"{default.name}, tensor parallel"
    return dataclasses.replace(default, name=name, settings=settings, environment=more, timed=False)


def _say_what_is_noticed(report: Report, engines: Engines, scale: Scale) -> None:
    """Whether a tenant of whom one changed tensor alone is served as the base's is further off than may be. In float64."""
    family, prompt, unnoticed, count = (
        engines.family,
        engines.prompts[min(2, len(engines.prompts) - 1)],
        [],
        0,
    )
    for words in TUNES:
        least = scale.scatter[words] * math.sqrt(
            SCATTER**2 - 1
        )  # which comes to SCATTER, beside an error of its own
        for tensor, off in family.left_out(words, prompt):
            count += 1
            scatter = math.sqrt(float((off**2).mean()))
            if float(off.abs().max()) <= (MOST + 1) * scale.furthest and scatter <= least:
                unnoticed.append(f"{words}: {tensor}")
    report.facts[f"{family.kind}, noticed"] = [count - len(unnoticed), count]
    for what in unnoticed:
        report.leave_out(f"{family.kind}, {what}: served as the base's, it alone, it would not be noticed")
    print(
        f"{family.kind}: of {count} tensors that tenants have changed {count - len(unnoticed)} would be noticed, if that one "
        "alone were served as the base's",
        flush=True,
    )


def check_kind(
    report: Report, kind: str, folder: Path, device: torch.device, args: Any, *, all_ways: bool
) -> None:
    """One kind of model: its plain engines, then every way to serve its tenants."""
    # Over long prompts and many layers rounding in routers adds up to more than what tells a mixture's fine-tunes apart.
    quick = args.quick or kind == "mixtral"
    family = Family(kind, folder, quick)
    engines = Engines(family, device, quick, 60 * args.minutes, not args.no_timings)
    ways, left = ways_of(device, args.quick, not args.no_graphs)
    default = ways[-1]
    if all_ways:
        for what in left:
            report.leave_out(what)
    eager = dataclasses.replace(ways[0], settings={"enforce_eager": True})
    plain = {words: eager for words in family.folders} | {BASE: default}
    reference = Reference(engines, plain)
    report.facts[kind] = dataclasses.asdict(reference.scale)
    _say_what_is_noticed(report, engines, reference.scale)
    _print_header(reference.scale, kind)
    facts: dict[str, Any] = {}

    def served(way: Way | None) -> None:
        if way is None:
            return
        if report.seconds() > 60 * args.minutes:
            report.leave_out(f"{kind}, {way.name}: {args.minutes:g} minutes are over")
            return

        def run(report: Report) -> None:
            facts[way.name] = check_served(report, engines, reference, way)
            report.facts[f"{kind}, {way.name}"] = facts[way.name]
            check_graphs(report, f"{kind}, {way.name}", way, facts[way.name], family.is_mixture)

        report.attempt(f"{kind}, {way.name}", run)

    # Of the first kind another engine is updated in place.
    for way in ways if all_ways else [dataclasses.replace(ways[0], update="all"), default]:
        served(way)
    if all_ways and not args.quick:
        if default.name in facts:
            served(other_runner(report, default, facts[default.name]))
        served(on_two(report, device, default))


def check_graphs(
    report: Report, what: str, way: Way, facts: dict[str, Any], is_mixture: bool = False
) -> None:
    """Say so where vLLM has captured other graphs than were asked for: then those were not tried. A mixture, which full ones
    would capture, has piecewise ones.
    """
    if facts["device"] == "cpu" or way.settings.get("enforce_eager"):
        return
    default = "PIECEWISE" if is_mixture else "FULL_AND_PIECEWISE"
    wanted = way.settings.get("compilation_config", {}).get("cudagraph_mode", default)
    if facts["graphs"] != wanted:
        report.leave_out(f"{what}: graphs of {wanted}: vLLM has made {facts['graphs']}")


def cannot_serve() -> str | None:
    """Why no engine can be started in this Python."""
    missing = [name for name in ("vllm", "transformers") if importlib.util.find_spec(name) is None]
    return f"--vllm runs in the Python that has vLLM; this one has no {missing[0]}" if missing else None


def version() -> str:
    """Of vLLM, whichever of its distributions is installed."""
    for name in ("vllm", "vllm-cpu"):
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return "unknown"


def check_vllm(report: Report, device: torch.device, args: Any) -> None:
    """Everything, in `args.folder` or a temporary folder, which is empty afterwards."""
    report.facts["vllm"] = version()
    with tempfile.TemporaryDirectory() as made:
        folder = Path(args.folder or made)
        kinds = ("qwen3", "mixtral") if args.quick else ("qwen3", "mixtral", "llama")
        for kind in kinds:
            place = folder / kind
            place.mkdir(parents=True)
            report.attempt(
                kind, lambda r, k=kind, p=place: check_kind(r, k, p, device, args, all_ways=k == kinds[0])
            )
