"""Weight sync on one machine: an update of a 0.5 B model in a vLLM CPU engine, xorz beside four other ways.

`make bench-rl [ARGS="--shares 0.01,0.1 --rounds 3"]`. The model is Qwen2's architecture with random bf16 words (1 GB). An
update is what a step of training leaves of it: to fp32 masters, of which the words are the rounded ones, goes normal noise, as
small as it must be for the wanted share of words to round otherwise. Every way starts from the same words, ends with the same
(all parameters are compared). The trainer's halves run one after another in one process, the engine's in one engine:

- xorz: `xorz.Publisher`, `xorz.vllm.client.update`; and back by `rollback`.
- reload: the checkpoint is written as safetensors, and vLLM reloads the folder (`reload_weights`).
- safetensors: the same file, read beside the requests, and given to the model's `load_weights`.
- xor+zstd-1: XOR with a full snapshot, zstd level 1 for each tensor; the engine keeps a snapshot, too, and loads it whole, as
  slime and SkyRL do.
- int32+bf16: positions and values; the engine's half is vLLM's own, `load_checkpoint_weight_patches`.

Pause is the time in which the engine's loop can serve nobody; everything else runs beside it. The other ways check nothing and
cannot go back. What xorz holds of an update is in a file of the temporary folder, whose size is given. Peaks are anonymous
memory beyond what was there before the way began (the model, the idle engine), sampled each 2 ms. One thread; seconds of the
processor are given as well, for machines that others use, too. The two dense ways do not depend on the share, and are measured
at the first one.
"""

import argparse
import ctypes
import gc
import hashlib
import json
import os
import shutil
import statistics
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
WAYS = ("xorz", "reload", "safetensors", "xor+zstd-1", "int32+bf16")
CONFIG = {
    "vocab_size": 151936,
    "hidden_size": 896,
    "intermediate_size": 4864,
    "num_hidden_layers": 24,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "tie_word_embeddings": True,
}
SMALL = CONFIG | {"vocab_size": 4096, "num_hidden_layers": 2}
FILE = "model.safetensors"


def anonymous() -> int:
    """Bytes of this process that no file is behind, and that are not merely kept by the allocator."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    return resident()


def resident() -> int:
    """Bytes of this process that no file is behind."""
    with open("/proc/self/status") as file:
        return sum(int(line.split()[1]) << 10 for line in file if line.startswith(("RssAnon", "RssShmem")))


class Peak:
    """The most that is held between `with` and its end."""

    def __enter__(self) -> "Peak":
        """Begin to look."""
        self.bytes, self._over = resident(), threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)
        self._thread.start()
        return self

    def _look(self) -> None:
        while not self._over.wait(0.002):
            self.bytes = max(self.bytes, resident())

    def __exit__(self, *_: object) -> None:
        """The end is looked at, too."""
        self._over.set()
        self._thread.join()
        self.bytes = max(self.bytes, resident())


@contextmanager
def timed(into: dict[str, float], name: str) -> Any:
    """Seconds of the block, on the clock and of this process's processors."""
    began, used = time.perf_counter(), time.process_time()
    yield
    into[name], into[f"{name} cpu"] = time.perf_counter() - began, time.process_time() - used


def said(task: dict[str, Any], found: dict[str, Any]) -> None:
    """A line for whoever waits."""
    print("bench-rl:", task["way"], task["share"], json.dumps(found), file=sys.stderr, flush=True)


# The model, and what training makes of it.


def make_base(folder: Path, config: dict[str, Any]) -> Path:
    """The checkpoint of version 0."""
    import torch
    from safetensors.torch import save_file
    from transformers import Qwen2Config, Qwen2ForCausalLM

    path = folder / "base"
    if not (path / FILE).exists():
        path.mkdir(parents=True, exist_ok=True)
        configured = Qwen2Config(**config, architectures=["Qwen2ForCausalLM"], dtype="bfloat16")
        with torch.device("meta"):
            model = Qwen2ForCausalLM(configured)
        generator = torch.Generator().manual_seed(0)
        words = {}
        for name, word in model.state_dict().items():
            if name != "lm_head.weight":
                drawn = torch.empty(word.shape).normal_(0, 0.02, generator=generator)
                words[name] = (drawn + 1 if "norm" in name else drawn).to(torch.bfloat16)
        configured.save_pretrained(path)
        save_file(words, path / FILE, metadata={"format": "pt"})
    return path


def trained(words: dict[str, Any], share: float, seed: int) -> dict[str, Any]:
    """The words after a step that changes this share of them."""
    import torch

    generator = torch.Generator().manual_seed(seed)

    def stepped(word: Any, size: float) -> Any:
        # A master is anywhere between the halves to both neighbours.
        bits = word.view(torch.int16)
        near = (bits ^ 1).view(torch.bfloat16).float()
        inside = (torch.rand(word.shape, generator=generator) - 0.5) * (near - word.float()).abs()
        noise = torch.randn(word.shape, generator=generator)
        return (word.float() + 0.999 * inside + size * noise).to(torch.bfloat16)

    large = max(words.values(), key=lambda w: w.numel()).flatten()[: 1 << 20]
    low, high = 0.0, 1.0
    for _ in range(30):
        middle = (low + high) / 2
        moved = (stepped(large, middle).view(torch.int16) != large.view(torch.int16)).float().mean()
        low, high = (middle, high) if moved < share else (low, middle)
    return {name: stepped(word, high) for name, word in words.items()}


def make_version(base: Path, share: float) -> Path:
    """The checkpoint after one step, with all that vLLM needs to load it."""
    from safetensors.torch import load_file, save_file

    path = base.parent / f"changed-{share:g}"
    if not (path / FILE).exists():
        path.mkdir(exist_ok=True)
        for file in base.iterdir():
            if file.name != FILE:
                (path / file.name).write_bytes(file.read_bytes())
        save_file(trained(load_file(base / FILE), share, 1), path / FILE, metadata={"format": "pt"})
    return path


def differ(base: Path, path: Path) -> float:
    """The share of words that do."""
    import torch
    from safetensors.torch import load_file

    old, new = load_file(base / FILE), load_file(path / FILE)
    moved = sum(int((old[n].view(torch.int16) != new[n].view(torch.int16)).sum()) for n in old)
    return moved / sum(w.numel() for w in old.values())


# The trainer's half. Each gives bytes on the wire; what it keeps between steps is made before it is measured.


class Trainer:
    """One way to write an update from `old` to `new`, both in memory."""

    def __init__(self, way: str, base: Path, out: Path, new: dict[str, Any]) -> None:
        """With what the way keeps between updates; `base` is the folder of the old words."""
        import torch
        import xorz
        from safetensors.torch import load_file

        self.way, self.out, self.new, self.torch = way, out, new, torch
        self.stall = 0.0
        if way == "xorz":
            self.publisher = xorz.Publisher(base, out)
            # Version 1 is the base under another number: the measured step is from words that the publisher holds.
            self.publisher.publish(load_file(base / FILE)).result()
        elif way in ("xor+zstd-1", "int32+bf16"):
            self.snapshot = {name: word.clone() for name, word in load_file(base / FILE).items()}

    def send(self) -> int:
        """Write it, and give its bytes."""
        return getattr(self, "_" + "".join(c for c in self.way if c.isalnum()))()

    def _xorz(self) -> int:
        began = time.perf_counter()
        future = self.publisher.publish(self.new)
        self.stall = time.perf_counter() - began
        return self.publisher.versions.path(future.result()).stat().st_size

    def _save(self, tensors: dict[str, Any], metadata: dict[str, str]) -> int:
        from safetensors.torch import save_file

        self.out.mkdir(parents=True, exist_ok=True)
        save_file(tensors, self.out / FILE, metadata=metadata)
        return (self.out / FILE).stat().st_size

    def _reload(self) -> int:
        return self._save(self.new, {"format": "pt"})

    _safetensors = _reload

    def _xorzstd1(self) -> int:
        import zstandard

        torch, packed = self.torch, {}
        packer = zstandard.ZstdCompressor(level=1)
        for name, word in self.new.items():
            old = self.snapshot[name]
            xor = word.view(torch.int16) ^ old.view(torch.int16)
            done = packer.compress(xor.numpy().data)
            packed[name] = torch.frombuffer(bytearray(done), dtype=torch.uint8)
            old.copy_(word)
        return self._save(packed, {"manifest": json.dumps({n: list(w.shape) for n, w in self.new.items()})})

    def _int32bf16(self) -> int:
        torch, packed = self.torch, {}
        for name, word in self.new.items():
            old, flat = self.snapshot[name], word.flatten()
            at = (flat.view(torch.int16) != old.flatten().view(torch.int16)).nonzero().flatten()
            packed[f"{name}|at"], packed[f"{name}|to"] = at.int(), flat[at]
            old.copy_(word)
        return self._save(packed, {"manifest": json.dumps({n: list(w.shape) for n, w in self.new.items()})})


def trainer(job: dict[str, Any]) -> list[dict[str, Any]]:
    """One update for each of the tasks."""
    import torch
    from safetensors.torch import load_file

    torch.set_num_threads(1)
    out, new, of = [], {}, None
    for task in job["tasks"]:
        if task["version"] != of:
            of = task["version"]
            new = {name: word.clone() for name, word in load_file(Path(of) / FILE).items()}
        before, found = anonymous(), {}
        with Peak() as peak:
            one = Trainer(task["way"], Path(job["base"]), Path(task["out"]), new)
            with timed(found, "encode"):
                found["bytes"] = one.send()
        found |= {"stall": one.stall or found["encode"], "peak": peak.bytes - before}
        if task["way"] == "xorz":
            one.publisher.close()
        del one
        said(task, found)
        out.append(found)
    return out


# The engine's half.


class Engine:
    """A vLLM engine, and ways to bring it from the base to a version and back."""

    def __init__(self, base: str) -> None:
        """Started."""
        from vllm import LLM, SamplingParams

        self.way, self.base = "", base
        settings = {
            "quantization": "xorz",
            "weight_transfer_config": {"backend": "xorz"},
            "dtype": "bfloat16",
            "enforce_eager": True,
            "max_model_len": 256,
            "max_num_seqs": 8,
            "skip_tokenizer_init": True,
        }
        self.llm = LLM(base, **settings)
        sampling = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True, detokenize=False)
        self.llm.generate([{"prompt_token_ids": list(range(40))}], sampling, use_tqdm=False)
        worker = self.llm.llm_engine.model_executor.driver_worker.worker
        self.model = worker.get_model()
        self.snapshot: dict[str, Any] = {}

    def begin(self, way: str) -> None:
        """With what the way keeps between updates; `idle` is what the engine alone holds."""
        from safetensors.torch import load_file

        self.way, self.snapshot = way, {}
        self.idle = anonymous()
        if way == "xor+zstd-1":
            self.snapshot = {n: w.clone() for n, w in load_file(Path(self.base) / FILE).items()}

    def words(self) -> str:
        """A digest of all parameters."""
        import torch

        out = hashlib.sha256()
        for _name, param in sorted(self.model.named_parameters()):
            out.update(param.data.contiguous().view(torch.uint8).numpy().data)
        return out.hexdigest()

    def update(self, source: str) -> dict[str, float]:
        """Seconds beside the requests, and of the pause."""
        return getattr(self, "_" + "".join(c for c in self.way if c.isalnum()))(source)

    def back(self) -> float:
        """To the base; seconds, where the way has one of its own."""
        import torch
        from safetensors.torch import load_file

        began = time.perf_counter()
        if self.way == "xorz":
            from xorz.vllm import client

            client.rollback(self.llm)
            return time.perf_counter() - began
        with torch.no_grad():
            old = load_file(Path(self.base) / FILE)
            self._load(old)
            if self.way == "xor+zstd-1":
                for name, word in old.items():
                    self.snapshot[name].copy_(word)
        return 0.0

    def _load(self, words: dict[str, Any]) -> None:
        self.model.load_weights(words.items())
        self.llm.reset_prefix_cache()

    def _xorz(self, source: str) -> dict[str, float]:
        from xorz.vllm import client

        out: dict[str, float] = {}
        plain = client._Here.finish

        def finish(here: Any) -> None:
            with timed(out, "pause"):
                plain(here)

        client._Here.finish = finish
        try:
            with timed(out, "beside"):
                [report] = client.update(self.llm, source, 2)
        finally:
            client._Here.finish = plain
        for kind in ("", " cpu"):
            out[f"beside{kind}"] -= out[f"pause{kind}"]
        return out | {"apply": report["apply"], "held": report["held"]}

    def _reload(self, source: str) -> dict[str, float]:
        out = {"beside": 0.0, "beside cpu": 0.0}
        with timed(out, "pause"):
            self.llm.collective_rpc("reload_weights", kwargs={"weights_path": source})
            self.llm.reset_prefix_cache()
        return out

    def _safetensors(self, source: str) -> dict[str, float]:
        from safetensors.torch import load_file

        out: dict[str, float] = {}
        with timed(out, "beside"):
            words = load_file(Path(source) / FILE)
            # Mapped; read now, so that the pause need not.
            with open(Path(source) / FILE, "rb") as file:
                while file.read(4 << 20):
                    pass
        with timed(out, "pause"):
            self._load(words)
        return out

    def _xorzstd1(self, source: str) -> dict[str, float]:
        import torch
        import zstandard
        from safetensors.torch import load_file

        out: dict[str, float] = {}
        with timed(out, "beside"):
            reader = zstandard.ZstdDecompressor()
            for name, packed in load_file(Path(source) / FILE).items():
                done = bytearray(reader.decompress(packed.numpy().data))
                old = self.snapshot[name].view(torch.int16)
                old.bitwise_xor_(torch.frombuffer(done, dtype=torch.int16).view(old.shape))
        with timed(out, "pause"):
            self._load(self.snapshot)
        return out

    def _int32bf16(self, source: str) -> dict[str, float]:
        import torch
        from safetensors import safe_open
        from vllm.model_executor.model_loader import checkpoint_weight_patch as patches

        out: dict[str, float] = {}
        with timed(out, "beside"), safe_open(Path(source) / FILE, framework="pt") as file:
            shapes = json.loads(file.metadata()["manifest"])
            given = [
                patches.CheckpointWeightPatch(
                    name,
                    tuple(shape),
                    torch.bfloat16,
                    file.get_tensor(f"{name}|to"),
                    file.get_tensor(f"{name}|at"),
                )
                for name, shape in shapes.items()
            ]
        with timed(out, "pause"):
            patches.load_checkpoint_weight_patches(self.model, given)
            self.llm.reset_prefix_cache()
        return out


def engine(job: dict[str, Any]) -> list[dict[str, Any]]:
    """One engine; each of the tasks some times."""
    os.environ |= {
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_LOGGING_LEVEL": "ERROR",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
    }
    one = Engine(job["base"])
    first, found = one.words(), []
    for task in job["tasks"]:
        if one.way != task["way"]:
            one.begin(task["way"])
        rounds = []
        for _ in range(job["rounds"]):
            with Peak() as peak:
                got = one.update(task["out"])
            got["peak"], words = peak.bytes - one.idle, one.words()
            got["back"] = one.back()
            if one.words() != first:
                raise AssertionError(f"{one.way}: the way back ends at other words")
            said(task, got)
            rounds.append(got)
        found.append({"words": words, "rounds": rounds})
    return found


# All of it.


def run(kind: str, job: dict[str, Any]) -> dict[str, Any]:
    """A child's answer."""
    command = [sys.executable, __file__, "--child", kind, json.dumps(job)]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=env)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    """Make, measure, print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shares", default="0.03,0.01,0.1", help="of words that an update changes")
    parser.add_argument("--ways", default=",".join(WAYS))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", type=Path, default=ROOT / "build" / "rl_sync", help="5 GB")
    parser.add_argument("--small", action="store_true", help="a model of 23 M parameters, to try the command")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        made = {"trainer": trainer, "engine": engine}[args.child[0]](json.loads(args.child[1]))
        print("\n" + json.dumps(made), flush=True)
        return
    folder = args.folder / ("small" if args.small else "full")
    base = make_base(folder, SMALL if args.small else CONFIG)
    versions = {share: make_version(base, float(share)) for share in args.shares.split(",")}
    shares = {share: differ(base, path) for share, path in versions.items()}
    out: dict[str, Any] = {"changed": shares, "size": (base / FILE).stat().st_size}
    wire, first = folder / "wire", next(iter(versions))
    shutil.rmtree(wire, ignore_errors=True)
    tasks = [
        {"way": way, "share": share, "version": str(path), "out": str(wire / f"{way}-{share}")}
        for share, path in versions.items()
        for way in args.ways.split(",")
        if share == first or way not in ("reload", "safetensors")
    ]
    sent = run("trainer", {"base": str(base), "tasks": tasks})
    for task, each in zip(tasks, sent, strict=True):
        task["sent"] = each
        if task["way"] == "reload":
            for file in base.iterdir():
                if file.name != FILE:
                    shutil.copy(file, task["out"])
    for task, each in zip(
        tasks, run("engine", {"base": str(base), "tasks": tasks, "rounds": args.rounds}), strict=True
    ):
        task |= each
    out["tasks"] = tasks
    if args.json:
        args.json.write_text(json.dumps(out, indent=1))
    show(out)
    shutil.rmtree(wire, ignore_errors=True)
    for share in versions:
        if len({task["words"] for task in tasks if task["share"] == share}) != 1:
            raise AssertionError(f"the ways end at different words at {share}")


COLUMNS = (
    "changed",
    "way",
    "MB",
    "encode",
    "trainer MiB",
    "beside",
    "pause",
    "engine MiB",
    "file MB",
    "back",
)


def show(out: dict[str, Any]) -> None:
    """The table, in Markdown: seconds on the clock, and in brackets of the process's processors."""
    print(f"| {' | '.join(COLUMNS)} |", "|" + "---|" * len(COLUMNS), sep="\n")
    for task in sorted(out["tasks"], key=lambda task: float(task["share"])):
        sent, rounds = [task["sent"]], task["rounds"]

        def seconds(name: str, of: list[dict[str, float]]) -> str:
            clock, cpu = (statistics.median(r[n] for r in of) for n in (name, f"{name} cpu"))
            return f"{clock:.3f} ({cpu:.3f})"

        seen = [
            f"{100 * out['changed'][task['share']]:.1f} %",
            task["way"],
            f"{sent[0]['bytes'] / 1e6:.1f}",
            seconds("encode", sent),
            f"{sent[0]['peak'] >> 20}",
            seconds("beside", rounds),
            seconds("pause", rounds),
            f"{max(r['peak'] for r in rounds) >> 20}",
            f"{rounds[0]['held'] / 1e6:.1f}" if "held" in rounds[0] else "",
            f"{statistics.median(r['back'] for r in rounds):.2f}",
        ]
        print(f"| {' | '.join(seen)} |")
    print(flush=True)


if __name__ == "__main__":
    main()
