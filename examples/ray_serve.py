"""One base model and a folder of its fine-tunes behind HTTP, on replicas that Ray Serve starts, spreads and replaces.

    pip install "ray[serve]"
    python examples/ray_serve.py --model MODEL --tenants FOLDER [--replicas 1] [--most 4] [--port 8000]
    curl localhost:8000/generate -H 'content-type: application/json' -d '{"tenant": "alice", "ids": [5, 7, 9], "tokens": 8}'

FOLDER holds packages (`alice.xorz`) and folders with one (`alice/`), and lies where every machine finds it. Each replica
holds the base once, and loads a tenant when the first request for it arrives there; which replica a request comes to does not
matter. What arrives at a replica together, whosever tenants, shares a forward. Ray Serve adds replicas under load and takes
them away when they have answered what they had begun, and starts another one for one that dies: what that one was answering
fails (500), and nothing else does.

Prompts and answers are token ids, as in `server.py`.
"""

import argparse
import asyncio
import os
import re
import signal
import threading
from pathlib import Path
from typing import Any

import ray
import torch
import xorz
from fastapi import FastAPI, HTTPException
from pydantic import BaseModel, Field
from ray import serve
from transformers import AutoModelForCausalLM

app = FastAPI()
BATCH = 16
NAME = re.compile(r"[\w-][\w.-]{0,99}", re.ASCII)


class Prompt(BaseModel):
    """Continue `ids` by `tokens` tokens, the likeliest ones, as the tenant does (None is the base)."""

    tenant: str | None = None
    ids: list[int] = Field(min_length=1, max_length=1024)
    tokens: int = Field(default=8, ge=1, le=256)


@serve.deployment(max_ongoing_requests=2 * BATCH, health_check_period_s=2)
@serve.ingress(app)
class Served:
    """A replica: one base, and the tenants that it was asked for."""

    def __init__(self, model: str, folder: str, mode: str, budget: str | None) -> None:
        """Load the base; tenants are loaded when they are asked for."""
        self.model = AutoModelForCausalLM.from_pretrained(model, dtype="auto").eval()
        self.tenants = xorz.attach(self.model, default="base", mode=mode, budget=budget)
        self.folder = Path(folder)
        self.loading: dict[str, asyncio.Task] = {}

    @app.post("/generate")
    async def generate(self, prompt: Prompt) -> dict[str, Any]:
        """The answer, and the process that gave it. Errors are JSON: {"detail": what is wrong}."""
        if not all(0 <= i < self.model.config.vocab_size for i in prompt.ids):
            raise HTTPException(400, f"ids must be 0 to {self.model.config.vocab_size - 1}")
        try:
            if prompt.tenant is not None:
                await self.loaded(prompt.tenant)
            return {"ids": await self.answer(prompt), "process": os.getpid()}
        except FileNotFoundError as error:
            raise HTTPException(404, str(error)) from None
        except (ValueError, KeyError) as error:
            raise HTTPException(422, str(error.args[0])) from None
        except (MemoryError, OSError) as error:
            raise HTTPException(503, str(error)) from None

    async def loaded(self, name: str) -> None:
        """Load a tenant, unless it is there; whoever asks meanwhile waits for the same."""
        if name in self.tenants.names():
            return
        if name not in self.loading:
            self.loading[name] = asyncio.create_task(asyncio.to_thread(self.load, name))
            self.loading[name].add_done_callback(lambda _: self.loading.pop(name))
        await asyncio.shield(self.loading[name])

    def load(self, name: str) -> None:
        """From the folder; FileNotFoundError for a name that leads to nothing there."""
        if NAME.fullmatch(name):
            file, folder = self.folder / f"{name}.xorz", self.folder / name
            if file.is_file() or folder.is_dir():
                return self.tenants.load(name, file if file.is_file() else folder)
        raise FileNotFoundError(f"there is no tenant {name!r}")

    @serve.batch(max_batch_size=BATCH, batch_wait_timeout_s=0.01)
    async def answer(self, prompts: list[Prompt]) -> list[list[int]]:
        """Of all that have arrived; the event loop goes on meanwhile."""
        return await asyncio.to_thread(self.forward, prompts)

    def forward(self, prompts: list[Prompt]) -> list[list[int]]:
        """Prompts are padded on the left, so that all answers begin in one column."""
        longest, most = max(len(p.ids) for p in prompts), max(p.tokens for p in prompts)
        ids = torch.zeros(len(prompts), longest, dtype=torch.int64)
        mask = torch.zeros_like(ids)
        for i, p in enumerate(prompts):
            ids[i, longest - len(p.ids) :], mask[i, longest - len(p.ids) :] = torch.tensor(p.ids), 1
        options = {"max_new_tokens": most, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
        with torch.inference_mode(), self.tenants.use([p.tenant for p in prompts]):
            out = self.model.generate(input_ids=ids, attention_mask=mask, **options)
        return [out[i, longest : longest + p.tokens].tolist() for i, p in enumerate(prompts)]


def main() -> None:
    """Serve until interrupted."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--model", type=Path, required=True, help="a Hugging Face folder of a causal language model"
    )
    parser.add_argument("--tenants", type=Path, required=True, help="folder of their packages")
    parser.add_argument("--address", help="a cluster that runs, such as auto [start one here]")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--replicas", type=int, default=1, help="at least [1]")
    parser.add_argument("--most", type=int, default=4, help="replicas under load [4]")
    parser.add_argument(
        "--after", type=float, default=30, help="seconds of load before a replica is added [30]"
    )
    parser.add_argument("--idle", type=float, default=600, help="and without it before one goes [600]")
    parser.add_argument("--cpus", type=float, default=1, help="of a replica, which computes with as many [1]")
    parser.add_argument("--mode", default="fast", choices=["fast", "deterministic", "exact"])
    parser.add_argument("--budget", help='most memory for all tenants of a replica, such as "8 GiB"')
    args = parser.parse_args()
    ray.init(address=args.address) if args.address else ray.init(include_dashboard=False)
    serve.start(http_options={"host": args.host, "port": args.port})
    scaling = {
        "min_replicas": args.replicas,
        "max_replicas": max(args.replicas, args.most),
        "target_ongoing_requests": BATCH / 2,
        "upscale_delay_s": args.after,
        "downscale_delay_s": args.idle,
        "look_back_period_s": min(30, args.after),
        "metrics_interval_s": min(10, args.after / 2),
    }
    deployment = Served.options(
        autoscaling_config=scaling, ray_actor_options={"num_cpus": args.cpus}, name="xorz"
    )
    places = [str(path.resolve()) for path in (args.model, args.tenants)]
    serve.run(deployment.bind(*places, args.mode, args.budget), name="xorz")
    print(f"serving {args.model} at http://{args.host}:{args.port}", flush=True)
    stopped = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stopped.set())
    stopped.wait()
    serve.shutdown()
    ray.shutdown()


if __name__ == "__main__":
    main()
