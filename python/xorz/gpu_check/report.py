"""What was found, and the comparisons that find it."""

import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32}
# No kernel, on CPU or GPU, has a chain of sums longer than k; tensor cores are allowed an error of 2^-22 per
# step.
STEP = {torch.bfloat16: 2.0**-22, torch.float16: 2.0**-22, torch.float32: 2.0**-23}


@dataclass
class Report:
    """What was found: a line for each check, a row for each timing, and what was left out."""

    device: str
    checks: list[dict] = field(default_factory=list)
    timings: list[dict] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)
    began: float = field(default_factory=time.monotonic)

    def check(self, name: str, wrong: str | None, line: str | None = None, **numbers: Any) -> None:
        """Note a check; `wrong` says what differs. `line` is printed in the name's place, `numbers` are kept beside it."""
        self.checks.append({"check": name, "passed": wrong is None, "wrong": wrong, **numbers})
        said = "" if wrong is None else ": " + wrong
        print(f"{'ok  ' if wrong is None else 'FAIL'} {line or name}{said}", flush=True)

    def leave_out(self, what: str) -> None:
        """Note what was not done, and why."""
        self.left_out.append(what)
        print(f"left out: {what}", flush=True)

    def attempt(self, name: str, run: Callable[..., None], *args: Any) -> None:
        """Run some checks; an error in them is one of the things that are found, and what comes after runs all the same."""
        try:
            run(self, *args)
        except Exception as error:
            self.check(f"{name} runs", f"{type(error).__name__}: {error}")

    def seconds(self) -> float:
        """Seconds since the report began."""
        return time.monotonic() - self.began

    @property
    def passed(self) -> bool:
        """Whether anything was checked, and nothing differed."""
        return bool(self.checks) and all(c["passed"] for c in self.checks)

    def json(self, **more: Any) -> str:
        """The whole report, as JSON."""
        found = {k: v for k, v in asdict(self).items() if k != "began"}
        return (
            json.dumps({**more, "passed": self.passed, "seconds": self.seconds(), **found}, indent=1) + "\n"
        )


def bits(t: Tensor) -> Tensor:
    """The words of a tensor, on the CPU."""
    return t.detach().cpu().contiguous().view(BITS[t.element_size()])


def differ(got: Tensor, want: Tensor) -> str | None:
    """The first word that differs, or None."""
    if got.shape != want.shape or got.dtype != want.dtype:
        return f"{got.dtype} {list(got.shape)} for {want.dtype} {list(want.shape)}"
    wrong = (bits(got) != bits(want)).flatten().nonzero().flatten()
    if not len(wrong):
        return None
    at = int(wrong[0])
    found, wanted = (t.detach().cpu().flatten()[at].item() for t in (got, want))
    return f"{len(wrong)} of {want.numel()} words, the first at {at}: {found} for {wanted}"


def far(got: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None) -> str | None:
    """The first output that is further from the exact product than promised, or None. `weight`: one matrix, or one a row."""
    x, w = x.cpu().double(), weight.cpu().double()
    one = "mk,nk->mn" if w.dim() == 2 else "mk,mnk->mn"
    want, size = torch.einsum(one, x, w), torch.einsum(one, x.abs(), w.abs())
    if bias is not None:
        want, size = want + bias.cpu().double(), size + bias.cpu().double().abs()
    if got.shape != want.shape:
        return f"{list(got.shape)} for {list(want.shape)}"
    allowed = size * (x.shape[-1] + 8) * STEP[got.dtype] + want.abs() * torch.finfo(got.dtype).eps + 1e-30
    error = (got.detach().cpu().double() - want).abs()
    wrong = (~(error <= allowed)).flatten().nonzero().flatten()
    if not len(wrong):
        return None
    at = int(wrong[0])
    off, most = (float(t.flatten()[at]) for t in (error, allowed))
    return f"{len(wrong)} of {want.numel()} outputs, the first at {at}: off by {off:.3g} of {most:.3g}"
