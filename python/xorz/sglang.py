"""SGLang: a running engine's weights become a version's, in place, by its custom weight loaders. Untried with SGLang itself.

    python -m sglang.launch_server --model-path base/ --custom-weight-loader xorz.sglang.load
    engine.begin_weight_update()
    engine.update_weights_from_tensor(xorz.sglang.named_tensors("run/000017-....xorz"), load_format="xorz.sglang.load")
    engine.end_weight_update()

Written against SGLang 0.5.23: `update_weights_from_tensor` of its `WeightUpdater`, in the scheduler's process of each rank,
calls `load(model, named_tensors)` between two batches, with tensors that were moved to the model's device. Its updates from a
process group (`update_weights_from_distributed`) call no custom loader. What `load` raises ends the scheduler, and the engine
with it: of an update that does not fit no word is served, but nor is the version before, until it is started again.

Nothing of SGLang is imported. Where checkpoint tensors lie in fused parameters is told by the model's own `load_weights`.
"""

import tempfile
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from . import _core, _ops
from .checkpoint import PathLike
from .vllm.plan import UNUSED, Plan, parameters, plan
from .vllm.update import digest_of

NAME = "xorz.package"
"""What the tensor of a package's bytes is called."""


def named_tensors(package: PathLike) -> list[tuple[str, Tensor]]:
    """A package as SGLang's engines are sent it: one tensor of its bytes, under `NAME`. OSError."""
    with open(package, "rb") as file:
        return [(NAME, torch.frombuffer(bytearray(file.read()), dtype=torch.uint8))]


def load(model: nn.Module, named_tensors: Iterable[tuple[str, Tensor]]) -> None:
    """Change a model's words by a package, a step from those that it holds; all or none. What SGLang calls.

    Every tensor's words are compared by digest with what the package is a step from before the first one changes, those that
    stay as well. One tensor at a time is copied to the host for it; the deltas are held, there and back.

    Args:
        model: SGLang's, of one process: with `load_weights`, and parameters that hold the checkpoint's words.
        named_tensors: one tensor, uint8 [bytes], under `NAME`.

    Raises:
        ValueError: damaged, incomplete, or a step from other words (the tensor and both digests are named); it changes what
            the model's loader computes with; the model holds but parts of tensors (tensor parallel), or derives weights from
            others. RuntimeError: it failed midway. No word has changed then; if that is not so the message says it.
    """
    if hasattr(model, "post_load_weights"):
        raise ValueError(
            f"xorz: {type(model).__name__} derives weights from others (post_load_weights), which an update in place would "
            "leave as they were"
        )
    given = list(named_tensors)
    if [name for name, _ in given] != [NAME]:
        raise ValueError(
            f"xorz: an update is one tensor called {NAME}, but {[n for n, _ in given][:3]} are given"
        )
    content = given[0][1]
    if content.dtype != torch.uint8 or content.dim() != 1:
        what = f"{content.dtype} {list(content.shape)}"
        raise ValueError(f"xorz: a package's bytes are torch.uint8 [bytes], but {what} is given")
    with tempfile.NamedTemporaryFile(prefix="xorz-update-", suffix=".xorz") as file, torch.no_grad():
        file.write(content.cpu().numpy().data)
        file.flush()
        with _core.Package(file.name) as opened:
            changes = _checked(model, opened)
        _apply(changes)


def _checked(model: nn.Module, opened: _core.Package) -> list[tuple[str, Tensor, Tensor, Tensor]]:
    """What is to be changed: the checkpoint tensor's name, its words in place, the delta, and the one back."""
    kinds = {name: _kind(name, entry) for name, entry in opened.entries.items()}
    followed, params = plan(model, kinds), parameters(model)
    for name in opened.description["removed_names"]:
        raise ValueError(
            f"xorz: the package is not of the whole model: tensor `{name}` is not in the fine-tune"
        )
    for param, words in params.items():
        # Rows after those of checkpoint tensors are padding, or of a tensor that the package lacks.
        end = max((piece.to_rows[1] for piece in followed.pieces.get(param, ())), default=0)
        if end == 0 or words[end:].count_nonzero():
            raise ValueError(
                f"xorz: the package is not of the whole model: nothing of it makes `{param}` from row {end}"
            )
    out = []
    for name, (_, shape) in kinds.items():
        # Several names may stand for one tensor; the file has it once.
        entry = opened.entries[opened.entries[name]["same"] or name]
        if entry["changed"] and followed.refused.get(name, UNUSED) != UNUSED:
            raise ValueError(f"xorz: tensor `{name}` is changed, and cannot be: {followed.refused[name]}")
        for words in _places(followed, params, name, shape):
            old = _core.on_host(name, words)
            _compare(name, entry, old)
            if entry["changed"]:
                delta = opened.resident(entry["name"], old, None)
                back = _ops.delta_encode(opened.restore(entry["name"], old), old)
                out.append((name, words, delta, back))
    return out


def _kind(name: str, entry: dict[str, Any]) -> tuple[torch.dtype, tuple[int, ...]]:
    dtype = _core.DTYPE_OF_NAME.get(entry["dtype"])
    if dtype is None:
        raise ValueError(f"xorz: tensor `{name}` has dtype {entry['dtype']}, which this torch has not")
    if entry["same"] is None and (entry["base"] is None or entry["base_parts"] or entry["base_name"] != name):
        raise ValueError(f"xorz: tensor `{name}` is no step from the tensor of that name")
    return dtype, tuple(entry["shape"])


def _places(followed: Plan, params: dict[str, Tensor], name: str, shape: tuple[int, ...]) -> list[Tensor]:
    """Where the model holds a checkpoint tensor, whole, in rows of a parameter."""
    n, k = (*shape, 1, 1)[:2]
    out = []
    for param in dict.fromkeys(followed.users.get(name, ())):
        pieces = [p for p in followed.pieces[param] if p.name == name]
        if [(p.rows, p.cols) for p in pieces] != [((0, n), (0, k))]:
            raise ValueError(
                f"xorz: parameter `{param}` holds but a part of tensor `{name}`: tensor parallel is not served"
            )
        words = params[param][slice(*pieces[0].to_rows)]
        out.append(words.view(shape))
    return out


def _compare(name: str, entry: dict[str, Any], words: Tensor) -> None:
    found = digest_of(words)
    # Of small tensors packages keep 16 digits.
    if not found.startswith(entry["base"]):
        raise ValueError(
            f"xorz: tensor `{name}`: the package is a step from words with digest {entry['base']}, but the engine's "
            f"have {found}"
        )


def _apply(changes: list[tuple[str, Tensor, Tensor, Tensor]]) -> None:
    done = []
    for name, words, delta, back in changes:
        try:
            _ops.delta_apply_(words, delta.to(words.device))
        except BaseException as error:
            for other, others, _, again in reversed(done):
                try:
                    _ops.delta_apply_(others, again.to(others.device))
                except BaseException as worse:
                    raise RuntimeError(
                        f"xorz: the update failed at tensor `{name}`, and `{other}` could not be taken back: the model holds "
                        f"neither version; load it again ({worse})"
                    ) from error
            raise RuntimeError(f"xorz: tensor `{name}`: {error}; all words are as they were") from error
        done.append((name, words, delta, back))
