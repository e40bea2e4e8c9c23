"""vLLM on one machine: tokens a second and memory of 1, 4 and 8 full fine-tunes in one engine with xorz, beside as many engines
with a model each, and beside vLLM's own LoRA at rank 16.

`make bench-vllm [ARGS="--tenants 1,4 --new 32"]`. The model is SmolLM2-135M (`make test-smollm` makes it and its fine-tunes);
every engine is a process of its own, greedy, with the same prompts; a tenant gets `--requests` of them at once. LoRA adapters
are random: what they say does not matter here. Memory is what the engine's process holds beyond what it held before the model
was loaded (Pss of its smaps), without the KV cache's space, which is the same in all.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
KEPT = ROOT / "build" / "smollm2-135m-2"
LENGTHS = (3, 6, 9, 12, 15)
RANK = 16
KV_CACHE = 1 << 30


def resident() -> int:
    """Bytes of this process that are its own, and its share of what is shared."""
    for line in Path("/proc/self/smaps_rollup").read_text().splitlines():
        if line.startswith("Pss:"):
            return int(line.split()[1]) << 10
    raise OSError("no Pss in smaps_rollup")


def lora_adapter(folder: Path, number: int) -> Path:
    """A PEFT adapter of rank 16 for every projection, random."""
    import torch
    from safetensors.torch import save_file
    from transformers import AutoConfig

    path = folder / f"lora-{number}"
    if path.is_dir():
        return path
    config = AutoConfig.from_pretrained(KEPT / "base")
    h, kv = config.hidden_size, config.num_key_value_heads * config.hidden_size // config.num_attention_heads
    shapes = {
        "self_attn.q_proj": (h, h),
        "self_attn.k_proj": (kv, h),
        "self_attn.v_proj": (kv, h),
        "self_attn.o_proj": (h, h),
    }
    shapes |= {"mlp.gate_proj": (config.intermediate_size, h), "mlp.up_proj": (config.intermediate_size, h)}
    shapes |= {"mlp.down_proj": (h, config.intermediate_size)}
    torch.manual_seed(number)
    tensors = {}
    for layer in range(config.num_hidden_layers):
        for name, (n, k) in shapes.items():
            at = f"base_model.model.model.layers.{layer}.{name}"
            tensors[f"{at}.lora_A.weight"] = 0.02 * torch.randn(RANK, k, dtype=torch.bfloat16)
            tensors[f"{at}.lora_B.weight"] = 0.02 * torch.randn(n, RANK, dtype=torch.bfloat16)
    path.mkdir(parents=True)
    save_file(tensors, path / "adapter_model.safetensors")
    modules = [name.partition(".")[2] for name in shapes]
    settings = {"peft_type": "LORA", "r": RANK, "lora_alpha": RANK, "target_modules": modules, "bias": "none"}
    (path / "adapter_config.json").write_text(json.dumps(settings | {"task_type": "CAUSAL_LM"}))
    return path


def child(job: dict) -> dict:
    """One engine: how fast it answers, and what it holds."""
    os.environ |= {
        "VLLM_CPU_KVCACHE_SPACE": str(KV_CACHE >> 30),
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "HF_HUB_OFFLINE": "1",
    }
    os.environ |= {"VLLM_LOGGING_LEVEL": "ERROR", "VLLM_NO_USAGE_STATS": "1"}
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest

    settings = {
        "dtype": "bfloat16",
        "max_model_len": 256,
        "max_num_seqs": 64,
        "block_size": 32,
        "enable_prefix_caching": False,
        "skip_tokenizer_init": True,
    }
    settings["enforce_eager"] = True
    count = job["tenants"]
    if job["way"] != "separate":
        settings |= {"enable_lora": True, "max_loras": max(1, count), "max_cpu_loras": max(1, count)}
        settings["max_lora_rank"] = RANK if job["way"] == "lora" else 1
    if job["way"].startswith("xorz"):
        prefer = "memory" if job["way"] == "xorz, memory" else "speed"
        settings |= {
            "quantization": "xorz",
            "additional_config": {"xorz": {"mode": job["mode"], "prefer": prefer}},
        }
    before = resident()
    llm = LLM(job["model"], **settings)
    adapters = [None]
    if job["way"].startswith("xorz"):
        import xorz.vllm

        adapters = [xorz.vllm.load(llm, f"t{i}", path) for i, path in enumerate(job["packages"])] or [None]
    elif job["way"] == "lora":
        adapters = [LoRARequest(f"l{i}", i + 1, path) for i, path in enumerate(job["adapters"])] or [None]
    sampling = SamplingParams(temperature=0, max_tokens=job["new"], ignore_eos=True, detokenize=False)
    # Any tokens: the kept model has no tokenizer, and what is said does not matter here.
    lengths = [LENGTHS[i % len(LENGTHS)] for i in range(job["requests"])]
    prompts = [{"prompt_token_ids": list(range(1000 * i, 1000 * i + n))} for i, n in enumerate(lengths, 1)]
    asked, loras = [p for _ in adapters for p in prompts], [a for a in adapters for _ in prompts]
    seconds = []
    for _ in range(job["rounds"] + 1):
        start = time.perf_counter()
        out = llm.generate(asked, sampling, lora_request=loras if loras[0] else None, use_tqdm=False)
        seconds.append(time.perf_counter() - start)
    tokens = sum(len(o.outputs[0].token_ids) for o in out)
    found = {
        "tokens_per_second": tokens / statistics.median(seconds[1:]),
        "pss": resident() - before - KV_CACHE,
    }
    if job["way"].startswith("xorz"):
        [found["memory"]] = llm.collective_rpc("xorz_memory")
    return found


def run(job: dict) -> dict:
    """`child`, in a process of its own."""
    done = subprocess.run(
        [sys.executable, __file__, "--child", json.dumps(job)], capture_output=True, text=True
    )
    if done.returncode:
        raise SystemExit(done.stderr[-3000:])
    return json.loads(done.stdout.splitlines()[-1])


def unpacked(package: Path, folder: Path) -> Path:
    """The full fine-tune of a package, as a model folder."""
    import xorz
    from safetensors.torch import load_file, save_file

    path = folder / package.stem
    if not path.is_dir():
        base = KEPT / "base"
        words = load_file(base / "model.safetensors")
        path.mkdir(parents=True)
        tuned = {n: t for n, t in xorz.restore(_with_ties(words), package).items() if n in words}
        save_file(tuned, path / "model.safetensors", metadata={"format": "pt"})
        (path / "config.json").write_bytes((base / "config.json").read_bytes())
    return path


def _with_ties(words: dict) -> dict:
    return words | {"lm_head.weight": words.get("lm_head.weight", words["model.embed_tokens.weight"])}


def main() -> None:
    """Every way with every number of tenants, and a table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--tenants", default="1,4,8")
    parser.add_argument("--requests", type=int, default=2, help="of each tenant, at once")
    parser.add_argument("--new", type=int, default=32, help="tokens of each answer")
    parser.add_argument("--rounds", type=int, default=3, help="measured, after one that is not")
    parser.add_argument("--mode", default="fast")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    if args.child:
        print("\n" + json.dumps(child(json.loads(args.child))))
        return
    sys.path.insert(0, str(ROOT / "tests" / "smollm"))
    packages = sorted(KEPT.glob("*.xorz"))
    if not packages:
        raise SystemExit("bench-vllm: no fine-tunes are kept; run `make test-smollm` once")
    folder = ROOT / "build" / "vllm" / "bench"
    common = {"requests": args.requests, "new": args.new, "rounds": args.rounds, "mode": args.mode}
    rows = []
    for count in map(int, args.tenants.split(",")):
        chosen = [packages[i % len(packages)] for i in range(count)]
        base = {**common, "tenants": count, "model": str(KEPT / "base"), "packages": list(map(str, chosen))}
        for way in ("xorz, speed", "xorz, memory"):
            rows.append({"way": way, "tenants": count, **run({**base, "way": way})})
        adapters = [str(lora_adapter(folder, i)) for i in range(count)]
        rows.append({"way": "lora", "tenants": count, **run({**base, "way": "lora", "adapters": adapters})})
        full = unpacked(chosen[0], folder)
        one = run({**base, "way": "separate", "model": str(full)})
        # One after the other on the same cores: each answers its own in its own time.
        rows.append({"way": "separate", "tenants": count, **one, "pss": one["pss"] * count})
        for row in rows[-4:]:
            print(
                f"{row['way']:14} {count:3} tenants {row['tokens_per_second']:8.1f} tokens/s {row['pss'] / 2**20:8.0f} MiB",
                flush=True,
            )
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
