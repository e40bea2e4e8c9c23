"""One base model and any number of its fine-tunes behind HTTP: concurrent requests of different tenants share a forward.

    python examples/server.py [--model FOLDER] [--packages FOLDER] [--port 8000] [--budget "8 GiB"]
    curl -X PUT localhost:8000/tenants/alice -H 'content-type: application/json' -d '{"package": "alice.xorz"}'
    curl localhost:8000/generate -H 'content-type: application/json' -d '{"tenant": "alice", "ids": [5, 7, 9], "tokens": 8}'
    curl -X DELETE localhost:8000/tenants/alice

Without --model, a small Llama of random weights and packages of two fine-tunes of it are made under build/server. Prompts and
answers are token ids: what makes them from text is the model's own tokenizer, and no business of this example.
"""

import argparse
import asyncio
import queue
import threading
import time
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import torch
import uvicorn
import xorz
from fastapi import FastAPI, HTTPException
from pydantic import BaseModel, Field
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM


class Prompt(BaseModel):
    """Continue `ids` by `tokens` tokens, the likeliest ones, as the tenant does (None is the base)."""

    tenant: str | None = None
    ids: list[int] = Field(min_length=1, max_length=1024)
    tokens: int = Field(default=8, ge=1, le=256)


class Source(BaseModel):
    """A package's path in the folder that the server was started with."""

    package: str


class Batcher:
    """Takes what arrives within `window` seconds of a first prompt, `largest` at most, through the model in one thread."""

    def __init__(self, model: Any, tenants: xorz.Tenants, window: float, largest: int) -> None:
        """Start the thread."""
        self.model, self.tenants, self.window, self.largest = model, tenants, window, largest
        self.waiting: queue.Queue[tuple[Prompt, Future]] = queue.Queue()
        self.counts = {"prompts": 0, "batches": 0, "mixed": 0}
        threading.Thread(target=self.work, daemon=True).start()

    def submit(self, prompt: Prompt) -> Future:
        """The answer to come: a list of token ids, or an exception."""
        future: Future = Future()
        self.waiting.put((prompt, future))
        return future

    def work(self) -> None:
        """Collect batches and run them, for ever."""
        while True:
            batch, end = [self.waiting.get()], time.monotonic() + self.window
            while len(batch) < self.largest:
                try:
                    batch.append(self.waiting.get(timeout=max(0.0, end - time.monotonic())))
                except queue.Empty:
                    break
            self.run([(p, f) for p, f in batch if f.set_running_or_notify_cancel()])

    def run(self, batch: list[tuple[Prompt, Future]]) -> None:
        """One forward for all. If it fails, again without those whose tenant is gone, or else (a tenant that must be served
        alone, or whose file is gone) one for each."""
        if not batch:
            return
        try:
            with torch.inference_mode(), self.tenants.use([p.tenant for p, _ in batch]):
                answers = self.generate([p for p, _ in batch])
        except Exception as error:
            if len(batch) == 1:
                return batch[0][1].set_exception(error)
            loaded = {None, *self.tenants.names()}
            gone = [[one] for one in batch if one[0].tenant not in loaded]
            rest = [one for one in batch if one[0].tenant in loaded]
            for part in [rest, *gone] if gone else [[one] for one in batch]:
                self.run(part)
            return None
        self.counts["prompts"] += len(batch)
        self.counts["batches"] += 1
        self.counts["mixed"] += len({p.tenant for p, _ in batch}) > 1
        for (_, future), answer in zip(batch, answers, strict=True):
            future.set_result(answer)

    def generate(self, prompts: list[Prompt]) -> list[list[int]]:
        """Prompts are padded on the left, so that all answers begin in one column."""
        longest = max(len(p.ids) for p in prompts)
        ids = torch.zeros(len(prompts), longest, dtype=torch.int64)
        mask = torch.zeros_like(ids)
        for i, p in enumerate(prompts):
            ids[i, longest - len(p.ids) :], mask[i, longest - len(p.ids) :] = torch.tensor(p.ids), 1
        most = max(p.tokens for p in prompts)
        options = {"max_new_tokens": most, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
        out = self.model.generate(input_ids=ids, attention_mask=mask, **options)
        return [out[i, longest : longest + p.tokens].tolist() for i, p in enumerate(prompts)]


def make_app(model: Any, tenants: xorz.Tenants, folder: Path, window: float, largest: int) -> FastAPI:
    """The endpoints. Errors are JSON: {"detail": what is wrong}."""
    app, batcher, folder = FastAPI(), Batcher(model, tenants, window, largest), folder.resolve()

    @app.get("/health")
    def health() -> dict[str, Any]:
        return {"status": "ok", "tenants": tenants.names(), "memory": tenants.memory(), **batcher.counts}

    @app.post("/generate")
    async def generate(prompt: Prompt) -> dict[str, list[int]]:
        if not all(0 <= i < model.config.vocab_size for i in prompt.ids):
            raise HTTPException(400, f"ids must be 0 to {model.config.vocab_size - 1}")
        try:
            return {"ids": await asyncio.wrap_future(batcher.submit(prompt))}
        except KeyError as error:
            raise HTTPException(404, error.args[0]) from None
        except (MemoryError, OSError, ValueError) as error:
            raise HTTPException(503, str(error)) from None

    @app.put("/tenants/{name}", status_code=201)
    def load(name: str, source: Source) -> dict[str, str]:
        try:
            path = (folder / source.package).resolve()
            if not path.is_relative_to(folder) or not path.is_file():
                raise HTTPException(400, f"there is no package {source.package!r} in the packages' folder")
            tenants.load(name, path)
        except MemoryError as error:
            raise HTTPException(507, str(error)) from None
        except (ValueError, KeyError, OSError) as error:
            raise HTTPException(409 if name in tenants.names() else 400, str(error.args[0])) from None
        return {"loaded": name}

    @app.delete("/tenants/{name}")
    def unload(name: str) -> dict[str, str]:
        try:
            tenants.unload(name)
        except KeyError as error:
            raise HTTPException(404, error.args[0]) from None
        return {"unloaded": name}

    return app


def make_model(folder: Path) -> Path:
    """A small Llama of random weights, and packages of two fine-tunes beside it."""
    if not (folder / "bob.xorz").exists():
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=512, hidden_size=256, intermediate_size=512, num_hidden_layers=4, num_attention_heads=4
        )
        base = LlamaForCausalLM(config)
        base.save_pretrained(folder / "model")
        old = base.state_dict()
        for name in ("alice", "bob"):
            new = {k: v + 0.02 * torch.randn_like(v) * (torch.rand_like(v) < 0.05) for k, v in old.items()}
            xorz.pack(old, new, folder / f"{name}.xorz")
    return folder / "model"


def main() -> None:
    """Serve until interrupted."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, help="a Hugging Face folder of a causal language model")
    parser.add_argument("--packages", type=Path, help="folder of the packages that may be loaded")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000, help="0 takes a free one")
    parser.add_argument("--mode", default="fast", choices=["fast", "deterministic", "exact"])
    parser.add_argument("--budget", help='most memory for all tenants, such as "8 GiB"')
    parser.add_argument("--window", type=float, default=0.01, help="seconds that a prompt waits for others")
    parser.add_argument("--batch", type=int, default=16, help="most prompts of one forward")
    args = parser.parse_args()
    made = Path("build/server")
    folder = args.model or make_model(made)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()
    tenants = xorz.attach(model, default="base", mode=args.mode, budget=args.budget)
    app = make_app(model, tenants, args.packages or made, args.window, args.batch)
    config = uvicorn.Config(app, host=args.host, port=args.port, log_level="warning")
    socket = config.bind_socket()
    print(f"serving {folder} at http://{args.host}:{socket.getsockname()[1]}", flush=True)
    uvicorn.Server(config).run(sockets=[socket])


if __name__ == "__main__":
    main()
