"""One engine of vLLM, in a process of its own: what it answers, as JSON.

    python -m xorz.gpu_check.engine SPEC ANSWERS     both JSON files; `Spec` says what the first one holds

A plain engine is asked for one model's answers. One with xorz has tenants, who are asked together with the base, again from the
prefix cache, and while others are loaded, unloaded and published anew; at last its base may be updated in place, and rolled
back.
"""

import json
import os
import shutil
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vllm.lora.request import LoRARequest


@dataclass
class Spec:
    """What an engine is started with, and asked.

    Attributes:
        model: a folder.
        words: whose words it has, by a name of `family`.
        settings: keyword arguments of `vllm.LLM`.
        packages: of each tenant, by the name of the words that it should serve; none for a plain engine.
        prompts: token ids.
        new: how many tokens each answer has.
        many: how many tenants have a request each while decoding is timed; 0 times nothing.
        timed_tokens: how many tokens each of those has.
        scratch: a folder for packages that are published while it runs.
        update: by whose package its base is updated in place, when all tenants have gone; none if empty.
    """

    model: str
    words: str
    settings: dict[str, Any]
    packages: dict[str, str]
    prompts: list[list[int]]
    new: int
    many: int
    timed_tokens: int
    scratch: str
    update: str = ""


@dataclass
class Asked:
    """A request: by which tenant (None is the base), with whose words it should be answered, and of which prompt."""

    lora: "LoRARequest | None"
    words: str
    prompt: int
    scored: bool = True


def allocated(worker: Any) -> int | None:
    """Bytes of torch's in a worker's GPU, or None where there is none."""
    import torch

    del worker
    if not torch.cuda.is_available():
        return None
    torch.cuda.synchronize()
    return torch.cuda.memory_allocated()


class Engine:
    """An engine, and all that it was asked."""

    def __init__(self, spec: Spec) -> None:
        """Starts it, in this very process."""
        from vllm import LLM

        self.spec = spec
        self.llm = LLM(spec.model, skip_tokenizer_init=True, **spec.settings)
        self._number = 0
        self._waiting: dict[str, Asked] = {}
        self._first: dict[str, float] = {}
        self.answers: list[dict[str, Any]] = []

    def add(self, asked: Asked, new: int | None = None) -> str:
        """Put a request in; its number."""
        from vllm import SamplingParams

        params = SamplingParams(
            temperature=0,
            max_tokens=new or self.spec.new,
            ignore_eos=True,
            logprobs=0,
            prompt_logprobs=0 if asked.scored else None,
            detokenize=False,
        )
        self._number += 1
        number = str(self._number)
        prompt = {"prompt_token_ids": self.spec.prompts[asked.prompt]}
        # vLLM may give it a longer name of its own inside; what comes out has this one.
        self.llm.llm_engine.add_request(number, prompt, params, lora_request=asked.lora)
        self._waiting[number] = asked
        return number

    def step(self) -> None:
        """One step; whoever is answered is noted."""
        for out in self.llm.llm_engine.step():
            self._first.setdefault(out.request_id, time.perf_counter())
            if out.finished:
                self.answers.append(self._answer(self._waiting.pop(out.request_id), out))

    def _answer(self, asked: Asked, out: Any) -> dict[str, Any]:
        said = out.outputs[0]
        tokens = list(said.token_ids)
        own = [step[token].logprob for step, token in zip(said.logprobs, tokens, strict=True)]
        prompt = self.spec.prompts[asked.prompt]
        scored = None
        if asked.scored:
            scored = [
                step[token].logprob for step, token in zip(out.prompt_logprobs[1:], prompt[1:], strict=True)
            ]
        return {
            "words": asked.words,
            "prompt": asked.prompt,
            "tokens": tokens,
            "logprobs": own,
            "prompt_logprobs": scored,
            "cached": out.num_cached_tokens or 0,
        }

    def finish(self) -> None:
        """Step until everybody is answered."""
        while self._waiting:
            self.step()

    def begun(self, numbers: list[str]) -> None:
        """Step until all of these decode, or are answered."""
        while not all(n in self._first for n in numbers):
            self.step()

    def taken(self) -> list[dict[str, Any]]:
        """What was answered since the last call."""
        out, self.answers = self.answers, []
        return out

    def everybody(self, who: "dict[str, LoRARequest | None]", scored: bool) -> list[dict[str, Any]]:
        """Every prompt for everybody of `who`, all at once: long prompts are computed beside others' tokens."""
        for prompt in range(len(self.spec.prompts)):
            for words, lora in who.items():
                self.add(Asked(lora, words, prompt, scored))
        self.finish()
        return self.taken()

    def rate(self, loras: "list[LoRARequest | None]") -> float:
        """Tokens a second of one request for each of these, from when all have their first token; the median of three."""
        out = []
        for _ in range(3):
            self.llm.reset_prefix_cache()
            numbers = [self.add(Asked(lora, "", 0, scored=False), self.spec.timed_tokens) for lora in loras]
            self.begun(numbers)
            start = time.perf_counter()
            self.finish()
            seconds = time.perf_counter() - start
            self.taken()
            out.append(len(loras) * (self.spec.timed_tokens - 1) / seconds)
        return sorted(out)[1]

    def facts(self) -> dict[str, Any]:
        """What vLLM has chosen by itself."""
        from vllm.platforms import current_platform

        config = self.llm.llm_engine.vllm_config
        mode = config.compilation_config.cudagraph_mode
        return {
            "device": current_platform.device_type,
            "graphs": getattr(mode, "name", str(mode)),
            "second_runner": bool(getattr(config, "use_v2_model_runner", False)),
            "compilation": str(config.compilation_config.mode),
        }


def _published(package: str, path: Path) -> None:
    """As `xorz pack` does: by renaming."""
    new = path.with_suffix(".new")
    shutil.copy(package, new)
    os.replace(new, path)


def _come_and_go(engine: Engine, loras: "dict[str, LoRARequest]") -> "dict[str, LoRARequest]":
    """Tenants are unloaded, published anew and loaded while requests run; who is there afterwards, by their words."""
    from ..vllm import load, unload

    llm, packages = engine.llm, engine.spec.packages
    first, second, third = packages
    path = Path(engine.spec.scratch) / "published.xorz"
    _published(packages[third], path)
    before = load(llm, "published", path)
    long = len(engine.spec.prompts) - 1
    running = [
        engine.add(Asked(before, third, 1)),
        engine.add(Asked(loras[first], first, 0)),
        engine.add(Asked(None, engine.spec.words, 2)),
    ]
    engine.begun(running)
    unload(llm, loras[second])
    _published(packages[second], path)
    after = load(llm, "published", path)
    for prompt in (
        1,
        long,
        0,
    ):  # the prefix that the package of before has computed, and a long prompt beside
        engine.add(Asked(after, second, prompt, scored=prompt != 1))
    late = load(llm, "late", packages[first])
    engine.add(Asked(late, first, 2))
    engine.finish()
    unload(llm, before)
    # Each time into the memory that another one had.
    for _ in range(2):
        for words in packages:
            engine.add(Asked(loras[third], third, 0))
            again = load(llm, f"again-{words}", packages[words])
            engine.add(Asked(again, words, 1))
            engine.finish()
            unload(llm, again)
    unload(llm, loras[third])
    unload(llm, loras[first])
    return {first: late, second: after}


def _served(engine: Engine) -> dict[str, Any]:
    """All that is asked of an engine with tenants."""
    from ..vllm import load, unload

    llm, spec = engine.llm, engine.spec
    loras = {words: load(llm, words, package) for words, package in spec.packages.items()}
    who = {spec.words: None, **loras}
    phases = {"together": engine.everybody(who, scored=True)}
    held = llm.collective_rpc(allocated)
    phases["from the prefix cache"] = engine.everybody(dict(reversed(who.items())), scored=False)
    left = _come_and_go(engine, loras)
    phases["while tenants come and go"] = engine.taken()
    phases["afterwards"] = engine.everybody({spec.words: None, **left}, scored=True)
    for lora in left.values():
        unload(llm, lora)
    memory = {"before": held, "after": llm.collective_rpc(allocated)}
    memory["deltas"] = [found["deltas"] for found in llm.collective_rpc("xorz_memory")]
    rates = {}
    if spec.many:
        paths = list(spec.packages.values())
        many = [load(llm, f"tenant-{i}", paths[i % len(paths)]) for i in range(spec.many)]
        rates = {"one": engine.rate(many[:1]), "many": engine.rate(many), "base": engine.rate([None])}
        for lora in many:
            unload(llm, lora)
    if spec.update:
        phases |= _updated(engine)
    return {"phases": phases, "memory": memory, "rates": rates}


def _updated(engine: Engine) -> dict[str, list[dict[str, Any]]]:
    """What it answers when its base has become another one where it lies, and when it is itself again.

    Prompts that are not scored would be answered from the prefix cache, if that were not empty by then.
    """
    from ..vllm import client

    llm, spec = engine.llm, engine.spec

    def everybody(words: str) -> list[dict[str, Any]]:
        return engine.everybody({words: None}, scored=False) + engine.everybody({words: None}, scored=True)

    client.init(llm)
    client.update(llm, spec.packages[spec.update])
    phases = {"after an update in place": everybody(spec.update)}
    client.rollback(llm)
    return phases | {"after it was rolled back": everybody(spec.words)}


def _plain(engine: Engine) -> dict[str, Any]:
    """The same of an engine without xorz."""
    llm, spec = engine.llm, engine.spec
    phases = {"together": engine.everybody({spec.words: None}, scored=True)}
    held = llm.collective_rpc(allocated)
    for _ in range(3):
        engine.everybody({spec.words: None}, scored=False)
    engine.everybody({spec.words: None}, scored=True)
    memory = {"before": held, "after": llm.collective_rpc(allocated)}
    rates = {"one": engine.rate([None]), "many": engine.rate([None] * spec.many)} if spec.many else {}
    return {"phases": phases, "memory": memory, "rates": rates}


def main(arguments: list[str]) -> None:
    """Start it, ask, write what was answered, and stop it."""
    spec = Spec(**json.loads(Path(arguments[0]).read_text()))
    start = time.perf_counter()
    engine = Engine(spec)
    started = time.perf_counter() - start
    found = _served(engine) if spec.packages else _plain(engine)
    found |= {"facts": engine.facts() | {"seconds_to_start": started}}
    Path(arguments[1]).write_text(json.dumps(found))
    engine.llm.llm_engine.engine_core.shutdown()


if __name__ == "__main__":
    main(sys.argv[1:])
