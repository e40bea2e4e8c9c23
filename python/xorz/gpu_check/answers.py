"""What engines answered, beside float64 and beside plain engines. For every token of every prompt and answer are compared:

- its log-probability with that of the same model in float64;
- where both said the same so far, with what vLLM says that serves the whole model without xorz;
- what was chosen with what is likeliest in float64.

**The bounds** follow from what the plain engines do. Let E be the furthest that any of their log-probabilities is from float64:
what bf16 costs in vLLM, on this device, for these models. An engine with xorz rounds at the same places, after other orders of
sums, so its errors are drawn as theirs are. Of as many draws the furthest may be 2 E from float64, so what is chosen may be 4 E
less likely than the best one. Two such errors, were they independent, would differ by the root of 2 times E; 2 E are allowed
between xorz and a plain engine. Root mean squares vary little: a tenant's may be 1.5 times what its plain engine's is.

And each answer must be **8 E from what every other model says** of the same tokens, at one of them at least: whoever is served
with another's words, or the base's, fails.
"""

import dataclasses
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .family import Family

MOST, PLAINLY, APART, SCATTER = 2.0, 2.0, 8.0, 1.5
"""As the module says: from float64, from the plain engine, from everybody else's at least, in E; of root mean squares."""

_ENOUGH = 100
"""Tokens of a tenant of which a root mean square is taken; of fewer it varies."""


@dataclass
class Scale:
    """How far plain engines are from float64: the furthest of all, and the root mean square by whose words."""

    furthest: float
    scatter: dict[str, float]


@dataclass
class Found:
    """What a phase's answers are like.

    Attributes:
        furthest: of a log-probability from float64, and where.
        scatter: the root mean square of that, by whose words, where there are enough of them.
        unlike: how far the likeliest token is above the one that was chosen, at most.
        plainly: furthest from the plain engine.
        same: answers whose tokens are the plain engine's.
        others: the least distance from another model's, of any answer, and whose.
    """

    answers: int = 0
    tokens: int = 0
    furthest: tuple[float, str] = (0.0, "")
    scatter: dict[str, float] = dataclasses.field(default_factory=dict)
    unlike: tuple[float, str] = (0.0, "")
    plainly: tuple[float, str] = (0.0, "")
    same: int = 0
    others: tuple[float, str] = (math.inf, "")


def _further(before: tuple[float, str], off: Tensor, where: str) -> tuple[float, str]:
    """The further one of two; what is no number is furthest of all."""
    off = off.nan_to_num(math.inf)
    at = int(off.argmax()) if len(off) else 0
    return max(before, (float(off[at]), f"{where}, token {at}"), key=lambda f: f[0]) if len(off) else before


def compared(
    family: Family, prompts: list[list[int]], answers: list[dict], plain: dict[tuple[str, int], dict]
) -> Found:
    """The answers, beside float64 and beside those of plain engines by words and prompt."""
    out, squares = Found(), {}
    for answer in answers:
        words, prompt = answer["words"], prompts[answer["prompt"]]
        where = f"{words}, prompt of {len(prompt)}"
        text = prompt + answer["tokens"]
        exact, best = family.exact(words, text)
        new = slice(len(prompt) - 1, None)
        own = torch.tensor([*(answer["prompt_logprobs"] or []), *answer["logprobs"]], dtype=torch.float64)
        seen = slice(len(exact) - len(own), None)
        off = (own - exact[seen]).abs()
        squares.setdefault(words, []).append(off**2)
        out.answers += 1
        out.tokens += len(own)
        out.furthest = _further(out.furthest, off, where)
        out.unlike = _further(out.unlike, best[new] - exact[new], where)
        for other in family.folders:
            if other != words:
                far = float((own - family.exact(other, text)[0][seen]).abs().max())
                out.others = min(out.others, (far, f"{where}, by {other}'s"), key=lambda f: f[0])
        if (words, answer["prompt"]) in plain:
            out.plainly, same = _beside(out.plainly, answer, plain[words, answer["prompt"]], where)
            out.same += same
    each = {words: torch.cat(parts) for words, parts in squares.items()}
    out.scatter = {
        words: math.sqrt(float(all_.mean())) for words, all_ in each.items() if len(all_) >= _ENOUGH
    }
    return out


def _beside(
    before: tuple[float, str], answer: dict, plain: dict, where: str
) -> tuple[tuple[float, str], bool]:
    """How far an answer is from a plain engine's, up to the first token that is another one; whether there is none."""
    pairs = list(zip(answer["tokens"], plain["tokens"], strict=False))
    same = next((i for i, (a, b) in enumerate(pairs) if a != b), len(pairs))
    mine, its = answer["logprobs"][:same], plain["logprobs"][:same]
    if answer["prompt_logprobs"] is not None:
        mine, its = [*answer["prompt_logprobs"], *mine], [*plain["prompt_logprobs"], *its]
    off = (torch.tensor(mine, dtype=torch.float64) - torch.tensor(its, dtype=torch.float64)).abs()
    return _further(before, off, f"{where}, beside the plain engine"), same == len(pairs)


def judged(found: Found, scale: Scale) -> str | None:
    """What is further than it may be, by the module's text, or None."""
    e, wrong = scale.furthest, []
    for (off, where), most, what in (
        (found.furthest, MOST * e, "from float64"),
        (found.plainly, PLAINLY * e, "from the plain engine"),
        (found.unlike, 2 * MOST * e, "less likely than the best one"),
    ):
        if not off <= most:
            wrong.append(f"{off:.3g} {what} of {most:.3g} ({where})")
    for words, scatter in found.scatter.items():
        if not scatter <= SCATTER * scale.scatter[words]:
            wrong.append(f"{words}: root mean square {scatter:.3g} of {SCATTER * scale.scatter[words]:.3g}")
    if not found.others[0] >= APART * e:
        wrong.append(
            f"{found.others[0]:.3g} from another model's answer, less than {APART * e:.3g} ({found.others[1]})"
        )
    if not found.answers:
        wrong.append("nothing was answered")
    return "; ".join(wrong) or None
