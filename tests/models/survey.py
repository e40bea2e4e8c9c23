"""Every architecture of transformers that can be built tiny from its config: is it served right, right alone,
or refused?

`make test-models` runs them all, each in a process of its own, and writes docs/models.md. Each model is truly
fine-tuned twice (AdamW, two steps on random inputs). Then, for each tenant alone, mode="fast" must be close
to the plain fine-tuned model, and mode="exact" in bfloat16 its very bits; in a batch of several,
mode="deterministic" must be close to the plain model, and give, bit for bit, what each tenant gives alone.
`generate`, where the plain model has it, must follow the plain fine-tuned model's, token by token, for one
tenant and in such a batch. Whatever is neither right nor refused is silently wrong.
"""

import argparse
import copy
import gc
import hashlib
import inspect
import json
import multiprocessing
import os
import resource
import sys
import textwrap
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterable
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("XORZ_CACHE_DIR", "")

import torch
import transformers
import xorz
from tiny import IMAGE, OWN, VOCABULARY, bins, shrink
from transformers.models.auto import modeling_auto as auto

KINDS = {
    "causal": auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    "seq2seq": auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
    "encoder": auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    "vision": auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES,
    "speech": {**auto.MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES, **auto.MODEL_FOR_CTC_MAPPING_NAMES},
}
LENGTH = 10
MOST, LONGEST = 6 << 30, 600


def build(kind: str, name: str) -> Any:
    """A tiny model of random weights, or an exception of transformers'."""
    cls_name = KINDS[kind][name]
    cls = getattr(transformers, cls_name if isinstance(cls_name, str) else cls_name[0])
    own = OWN.get(name, {})
    config = shrink(cls.config_class(**own), own)
    config._experts_implementation = "eager"
    config.torch_dtype = None
    torch.manual_seed(0)
    model = cls(config).eval().float()
    if getattr(model, "generation_config", None) is not None:
        model.generation_config.eos_token_id, model.generation_config.pad_token_id = None, 0
        if model.config.is_encoder_decoder:
            model.generation_config.decoder_start_token_id = 1
    return model


def kind_of(model: Any) -> str:
    """As transformers calls it."""
    return str(getattr(model.config, "model_type", ""))


def inputs_of(kind: str, model: Any, rows: int, seed: int = 0) -> dict[str, torch.Tensor]:
    """Random inputs, the batch first."""
    g = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, VOCABULARY - 8, (rows, LENGTH), generator=g)
    name = getattr(model, "main_input_name", "input_ids")
    if name == "pixel_values" and kind_of(model) == "siglip2":
        patches = torch.rand(rows, 4, 3 * model.config.vision_config.patch_size**2, generator=g)
        shapes = torch.full((rows, 2), 2)
        return {
            name: patches,
            "pixel_attention_mask": torch.ones(rows, 4, dtype=torch.long),
            "spatial_shapes": shapes,
        }
    if name == "pixel_values":
        size = getattr(model.config, "image_size", IMAGE) or IMAGE
        size = size if isinstance(size, int) else size[0]
        channels = getattr(model.config, "num_channels", 3) or 3
        return {name: torch.rand(rows, channels, size, size, generator=g)}
    if name == "input_values":
        out = {name: torch.randn(rows, 4000 if "moonshine" in kind_of(model) else 800, generator=g)}
        return {**out, "decoder_input_ids": ids[:, :4]} if model.config.is_encoder_decoder else out
    if name == "input_features":
        length = (
            2 * getattr(model.config, "max_source_positions", 32) if "Whisper" in type(model).__name__ else 64
        )
        each = bins(model.config)
        shape = (rows, each, length) if "Whisper" in type(model).__name__ else (rows, length, each)
        out = {name: torch.randn(shape, generator=g)}
        return {**out, "decoder_input_ids": ids[:, :4]} if model.config.is_encoder_decoder else out
    out = {"input_ids": ids}
    return {**out, "decoder_input_ids": ids.flip(1)[:, :5]} if model.config.is_encoder_decoder else out


def answer(model: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """Its main output."""
    with torch.no_grad():
        out = model(**inputs)
    return out.logits if hasattr(out, "logits") else out[0]


def tune(kind: str, base: Any, seed: int) -> Any:
    """AdamW on random inputs of its own."""
    model = copy.deepcopy(base)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for step in range(2):
        out = model(**inputs_of(kind, model, 3, seed=10 * seed + step))
        logits = out.logits if hasattr(out, "logits") else out[0]
        g = torch.Generator().manual_seed(seed)
        (logits.float() * torch.randn(logits.shape[-1:], generator=g)).mean().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return model


def rows_of(inputs: dict[str, torch.Tensor], row: int) -> dict[str, torch.Tensor]:
    return {n: t[row : row + 1] for n, t in inputs.items()}


def near(a: torch.Tensor, b: torch.Tensor) -> bool:
    scale = float(b.abs().max()) + 1e-6
    return a.shape == b.shape and bool(((a - b).abs() <= 2e-3 * scale).all())


class Wrong(Exception):
    """Neither right nor refused."""


def attached(base: Any, tuned: dict[str, Any], mode: str) -> Any:
    tenants = xorz.attach(copy.deepcopy(base), mode=mode, budget="1 GiB")
    for name, model in tuned.items():
        tenants.load(name, xorz.diff(base, model))
    return tenants


def survey(kind: str, name: str) -> dict[str, str]:
    """What holds of one architecture."""
    try:
        base = build(kind, name)
        inputs = inputs_of(kind, base, 5)
        first = answer(base, inputs)
        tuned = {n: tune(kind, base, i + 1) for i, n in enumerate("ab")}
        repeatable = torch.equal(first, answer(base, inputs))
    except Exception as error:
        return {
            "verdict": "not built",
            "why": f"{type(error).__name__}: {str(error).splitlines()[0][:160] if str(error) else ''}",
        }
    if not repeatable or not torch.isfinite(first).all():
        return {"verdict": "not built", "why": "its own answers differ from run to run"}
    plain = {None: base, **tuned}
    try:
        tenants = attached(base, tuned, "fast")
    except Exception as error:
        return {"verdict": "refused", "why": said(error)}
    out = {"verdict": "right", "why": ""}
    want = {n: answer(m, inputs) for n, m in plain.items()}
    if any(near(want[n], want[None]) for n in "ab"):
        return {"verdict": "not built", "why": "its fine-tunes cannot be told apart"}
    try:
        for n in (None, "a", "b"):
            with tenants.use(n):
                got = answer(tenants.model, inputs)
            if not near(got, want[n]):
                raise Wrong(
                    f"alone, {n}: off by {float((got - want[n]).abs().max()):.3g} of {float(want[n].abs().max()):.3g}"
                )
        if not exact(base, tuned, inputs):
            out["why"] = "its bits were not compared: the plain model does not run in bfloat16"
    except Wrong as error:
        return {"verdict": "WRONG", "why": str(error)}
    except Exception as error:
        return {"verdict": "fails late", "why": said(error)}
    gc.collect()  # what is attached refers to itself; addresses are counted
    try:
        mixing = attached(base, tuned, "deterministic")
        bits = mixed(mixing, inputs, want)
        if bits:
            out = {"verdict": "right, not bits", "why": bits}
    except Wrong as error:
        return {"verdict": "WRONG", "why": str(error)}
    except (RuntimeError, ValueError) as error:
        out = {"verdict": "right alone", "why": said(error)}
    except Exception as error:
        return {"verdict": "WRONG", "why": said(error)}
    try:
        makes, why = generates({None: base, **tuned}, tenants, mixing, inputs)
        if why and out["verdict"] != "right alone":
            out["why"] += f"{'; ' if out['why'] else ''}generate, mixed: {why}"
        return {**out, "generate": makes}
    except Wrong as error:
        return {"verdict": "WRONG", "why": str(error)}
    except Exception as error:
        return {"verdict": "fails late", "why": f"generate: {said(error)}"}


def generates(
    plain: dict[Any, Any], tenants: Any, mixing: Any, inputs: dict[str, torch.Tensor]
) -> tuple[str, str]:
    """Whether `generate` is right: "mixed", too, or "alone", and why; "" where the plain model has none."""
    given = {n: t for n, t in inputs.items() if n != "decoder_input_ids"}
    try:
        if not plain[None].can_generate():
            return "", ""
        want = {n: steps(m, given) for n, m in plain.items()}
    except Exception:
        return "", ""
    for n in (None, "a", "b"):
        with tenants.use(n):
            follows(f"alone, {n}", steps(tenants.model, given), want[n], range(len(want[n][0])))
    names = ["a", None, "b", "b", "a"]
    try:
        with mixing.use(names):
            got = steps(mixing.model, given)
    except (RuntimeError, ValueError) as error:
        return "alone", said(error)
    for row, n in enumerate(names):
        follows(f"mixed, row {row}, {n}", got, want[n], [row])
    return "mixed", ""


def steps(model: Any, inputs: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens, [rows, steps], and the logits that they were taken from, [rows, steps, words]."""
    torch.manual_seed(0)
    out = model.generate(
        **inputs,
        max_new_tokens=4,
        do_sample=False,
        num_beams=1,
        output_logits=True,
        return_dict_in_generate=True,
    )
    logits = torch.stack(out.logits, 1)
    return out.sequences[:, -logits.size(1) :], logits


def follows(who: str, got: Any, want: Any, rows: Iterable[int]) -> None:
    """`Wrong` if these rows part from the plain model's before two words are as good as each other."""
    for row in rows:
        for step in range(want[0].size(1)):
            if step >= got[0].size(1) or not near(got[1][row, step], want[1][row, step]):
                raise Wrong(f"generate, {who}: step {step} of row {row} is not the plain model's")
            if got[0][row, step] != want[0][row, step]:
                break  # nearly the same logits, so that both words are the largest


def exact(base: Any, tuned: dict[str, Any], inputs: dict[str, torch.Tensor]) -> bool:
    halves = {n: half(m) for n, m in {None: base, **tuned}.items()}
    given = {n: t.bfloat16() if t.is_floating_point() else t for n, t in inputs.items()}
    try:
        want = {n: answer(m, given) for n, m in halves.items()}
    except Exception:
        return False  # the plain model does not run in bfloat16
    tenants = attached(halves[None], {n: halves[n] for n in tuned}, "exact")
    for n, value in want.items():
        with tenants.use(n):
            got = answer(tenants.model, given)
        if not torch.equal(got, value):
            raise Wrong(
                f"exact, {n}: off by {float((got - value).abs().max()):.3g} of {float(value.abs().max()):.3g}"
            )
    return True


def half(model: Any) -> Any:
    out = copy.deepcopy(model)
    for param in out.parameters():
        param.data = param.data.bfloat16()
    return out


def mixed(tenants: Any, inputs: dict[str, torch.Tensor], want: dict[Any, torch.Tensor]) -> str:
    names = ["a", None, "b", "b", "a"]
    with tenants.use(names):
        together = answer(tenants.model, inputs)
    bits = ""
    for row, n in enumerate(names):
        with tenants.use(n):
            alone = answer(tenants.model, rows_of(inputs, row))
        one = together[row : row + 1]
        if not near(one, want[n][row : row + 1]):
            off = float((one - want[n][row : row + 1]).abs().max())
            raise Wrong(f"mixed, row {row}, {n}: off by {off:.3g} of {float(want[n].abs().max()):.3g}")
        if not torch.equal(one, alone):
            off = float((one - alone).abs().max())
            bits = f"the last bits of a row depend on the batch (row {row}, {n}: {off:.3g})"
    return bits


def said(error: Exception) -> str:
    text = str(error).splitlines()[0] if str(error) else ""
    ours = "" if "xorz" in text or isinstance(error, (ValueError, KeyError)) else f"{type(error).__name__}: "
    return (ours + text)[:300]


class Child:
    """One architecture in a process of its own, forked so that torch and transformers are imported once."""

    def __init__(self, key: str) -> None:
        """Start it."""
        context = multiprocessing.get_context("fork")
        self.key, self.until = key, time.monotonic() + LONGEST
        self.pipe, theirs = context.Pipe(duplex=False)

        def run() -> None:
            # A config that none of the names here makes small is to be an error, not the end of the machine's
            # memory.
            resource.setrlimit(resource.RLIMIT_DATA, (MOST, MOST))
            os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
            theirs.send(survey(*key.split("/")))

        self._process = context.Process(target=run)
        self._process.start()
        theirs.close()

    def result(self) -> dict[str, str] | None:
        """What it found, or None if it has time left."""
        try:
            if self.pipe.poll():
                return self._ended(self.pipe.recv())
        except EOFError:
            return self._ended({"verdict": "not built", "why": "its process ended"})
        late = time.monotonic() > self.until
        return self._ended({"verdict": "not built", "why": "takes too long"}) if late else None

    def _ended(self, result: dict[str, str]) -> dict[str, str]:
        self._process.kill()
        self._process.join()
        self.pipe.close()
        return result


def run_all(keys: list[str], jobs: int, done: Callable[[str, dict[str, str]], None]) -> None:
    """Run these architectures, so many at once; `done` is told of each as it ends."""
    waiting, running = list(reversed(keys)), []
    while waiting or running:
        while waiting and len(running) < jobs:
            running.append(Child(waiting.pop()))
        wait([child.pipe for child in running], max(0.1, min(c.until for c in running) - time.monotonic()))
        for child in list(running):
            result = child.result()
            if result is not None:
                running.remove(child)
                done(child.key, result)


def state() -> str:
    """A name for the code that a result is of: what serves models, and what is asked of them here."""
    told = hashlib.sha256()
    for asked in (survey, tune, attached, exact, mixed, generates, steps, follows, near):
        told.update(inspect.getsource(asked).encode())
    for path in sorted(Path(xorz.__file__).parent.glob("serve/*.py")):
        told.update(path.read_bytes())
    return told.hexdigest()[:8]


def table(results: dict[str, dict[str, str]]) -> str:
    """docs/models.md."""
    built = {n: r for n, r in results.items() if r["verdict"] != "not built"}
    count = Counter(r["verdict"] for r in built.values())
    both = count["right"] + count["right, not bits"]
    alone = both + count["right alone"]
    share = {n: f"{n} ({n / max(1, len(built)):.1%})" for n in (both, alone)}
    makes = Counter(r.get("generate", "") for r in built.values())
    made = (
        f"Made by `make test-models` (`tests/models/survey.py`, which says what each word means), with transformers "
        f"{transformers.__version__} and torch {torch.__version__.split('+')[0]}: every causal, seq2seq, encoder, vision and "
        "speech architecture that can be built tiny from its config alone, truly fine-tuned twice."
    )
    found = (
        f"Of {len(built)}: {share[both]} are right, alone and in mixed batches, {count['right']} of them bit for bit in "
        f"deterministic mode; {share[alone]} are right alone; {count['refused']} are refused on load; {count['fails late']} "
        f"raise with one tenant; {count['WRONG']} are silently wrong. {makes['mixed'] + makes['alone']} have a `generate`, "
        f"which is right for one tenant in all of them, and in mixed batches in {makes['mixed']}. "
        f"{len(results) - len(built)} were not built, as is said at the end."
    )
    lines = ["# Architectures", "", *_lines(made), "", *_lines(found), "", *_states(results), ""]
    lines += ["| architecture | verdict | generate | state | why not |", "|---|---|---|---|---|"]
    for name, result in sorted(built.items()):
        why = result["why"].replace("|", "\\|").replace("xorz: ", "")
        how = result.get("generate", "")
        lines.append(f"| {name} | {result['verdict']} | {how} | {result.get('code', '?')} | {why} |")
    if len(built) < len(results):
        lines += ["", "## Not built from a shrunken config", "", "| architecture | why |", "|---|---|"]
    for name, result in sorted(results.items()):
        if result["verdict"] == "not built":
            why = result["why"].replace("|", "\\|")
            lines.append(f"| {name} | {why} |")
    others = [f"{kind}/{name}" for kind, found in KINDS.items() for name in found]
    others = [name for name in others if name not in results]
    if others:
        lines += ["", *_lines(f"Not run: {', '.join(others)}.")]
    return "\n".join([*lines, ""])


def _lines(text: str) -> list[str]:
    return textwrap.wrap(text, 110, break_long_words=False, break_on_hyphens=False)


def _states(results: dict[str, dict[str, str]]) -> list[str]:
    """Of which code the rows are; the command itself says so."""
    states = Counter(r.get("code", "?") for r in results.values()).most_common()
    if len(states) == 1:
        return [f"All rows are of one run of one state of the code ({states[0][0]})."]
    counts = ", ".join(f"{number} of {code}" for code, number in states)
    return _lines(
        f"The run went on over {len(states)} states of the code, with fixes in between, which the column `state` names "
        f"({counts}); that of now is {state()}."
    )


def main() -> None:
    """See the module's docs."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--one")
    parser.add_argument("--only", help="architectures, with commas")
    parser.add_argument("--write", help="where the table goes")
    parser.add_argument("--json", help="where results are kept; those that are there are not run again")
    parser.add_argument("--again", action="store_true", help="run those of --only again")
    parser.add_argument("--jobs", type=int, default=1, help="processes at once, of one thread each")
    given = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    if given.one:
        print(json.dumps(survey(*given.one.split("/"))))
        return
    names = [f"{kind}/{name}" for kind, found in KINDS.items() for name in found]
    only = set(given.only.split(",")) if given.only else None
    if only is not None:
        names = [key for key in names if only & {key, key.split("/")[1]}]
    kept = Path(given.json) if given.json else None
    results = json.loads(kept.read_text()) if kept and kept.exists() else {}
    code = state()

    def done(key: str, result: dict[str, str]) -> None:
        results[key] = {**result, "code": code}
        print(f"{key:40} {result['verdict']:12} {result['why'][:140]}", flush=True)
        if kept:
            part = kept.with_suffix(".part")
            part.write_text(json.dumps(results, indent=1))
            part.replace(kept)

    run_all([key for key in names if key not in results or given.again], given.jobs, done)
    if given.write:
        Path(given.write).write_text(table(results))
    sys.exit(any(r["verdict"] in ("WRONG", "fails late") for r in results.values()))


if __name__ == "__main__":
    main()
