"""Names of a fine-tune's tensors that are not the model's own, matched as transformers would on loading it: parts of wrappers
left out, the base model's prefix put on or taken off, old names of norms; and what the model would ignore.
"""

import re
import warnings
from collections.abc import Iterable, Mapping

from torch import Tensor, nn

_WRAPPERS = (
    "_orig_mod",
    "_checkpoint_wrapped_module",
    "_fsdp_wrapped_module",
    "_forward_module",
    "base_layer",
)
_FRONT = ("module.", "base_model.model.")
_OLD = {"gamma": "weight", "beta": "bias"}
_NOT_KEPT = re.compile(r"(^|\.)(inv_freq|position_ids|masked_bias|rope_freqs|relative_position_index)$")
"""What earlier versions of transformers saved, and later ones compute."""


class Names:
    """What a model makes of names in a checkpoint."""

    def __init__(self, model: nn.Module, base: Mapping[str, Tensor]) -> None:
        """`base`: the model's own state_dict."""
        self._model, self._base = model, base
        self._plain: dict[str, str | None] = {}
        for name in base:
            bare = _bare(name)
            # A name that two tensors may mean is none.
            self._plain[bare] = None if bare in self._plain else name

    def match(self, name: str) -> str | None:
        """The model's name of a tensor; None if it has none."""
        if name in self._base:
            return name
        bare, prefix = _bare(name), getattr(self._model, "base_model_prefix", "")
        front, _, last = bare.rpartition(".")
        tried = [bare, f"{front}.{_OLD[last]}"] if last in _OLD and front else [bare]
        if prefix:
            tried += [t.removeprefix(f"{prefix}.") for t in tried if t.startswith(f"{prefix}.")]
            tried += [f"{prefix}.{t}" for t in tried]
        return next((self._plain[t] for t in tried if self._plain.get(t) is not None), None)

    def _holds_end(self, name: str) -> bool:
        """Whether what follows some dot of `name`, two words at least, is a name in the model, with its prefix or without."""
        prefix = f"{self._model.base_model_prefix}."
        while "." in name:
            if name in self._plain or prefix + name in self._plain:
                return True
            name = name.partition(".")[2]
        return False

    def ignores(self, name: str) -> bool:
        """Whether transformers, which knows this class, would load a checkpoint without this tensor."""
        if not hasattr(self._model, "base_model_prefix") or not hasattr(self._model, "config"):
            return False
        patterns = getattr(self._model, "_keys_to_ignore_on_load_unexpected", None) or ()
        if _NOT_KEPT.search(name) or any(re.search(pattern, name) for pattern in patterns):
            return True
        # Of a module that the model does not have (a head for values, from training).
        first, _, rest = _bare(name).partition(".")
        if first == self._model.base_model_prefix or self._holds_end(rest):
            # The model itself, under a wrapper that nobody knows (`language_model.`, `policy.`), is never left out: its base
            # would answer in the fine-tune's name.
            return False
        return bool(first) and not any(n == first or n.startswith(f"{first}.") for n in self._plain)


def matched(
    model: nn.Module, base: Mapping[str, Tensor], wanted: Iterable[str]
) -> tuple[dict[str, str], list[str]]:
    """(name in the fine-tune -> name in the model, what is ignored), of the names that the model does not have so itself."""
    names, found, ignored, held = Names(model, base), {}, [], False
    for name in wanted:
        held |= name in base
        if name in base:
            continue
        own = names.match(name)
        if own is not None:
            found[name] = own
        elif names.ignores(name):
            ignored.append(name)
    # A fine-tune of which nothing is the model's is another model's: whoever loads it hears which names are not known.
    return found, ignored if found or held else []


def report(ignored: list[str]) -> None:
    """Say what is left out, as transformers does."""
    if ignored:
        shown = ", ".join(f"`{name}`" for name in ignored[:4]) + (", ..." if len(ignored) > 4 else "")
        warnings.warn(
            f"xorz: the model has no use for {len(ignored)} tensors of the fine-tune, which are left out: {shown}",
            stacklevel=2,
        )


def _bare(name: str) -> str:
    parts = [part for part in name.split(".") if part not in _WRAPPERS]
    bare = ".".join(parts)
    while bare.startswith(_FRONT):
        bare = bare.removeprefix(_FRONT[0]).removeprefix(_FRONT[1])
    return bare
