"""xorz as transformers takes a quantization: `from_pretrained(base, quantization_config=XorzConfig(tenants={...}))`.

Nothing is quantized. The base is loaded as it is, attached, and its tenants are loaded; what is saved is the plain base.
Importing this module (or naming `xorz.XorzConfig`) registers "xorz" with transformers, which is version 5 or newer.
"""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import TrainerCallback
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from . import sources
from .attach import attach
from .progress import bar
from .serve.residency import size_of
from .versions import Versions

if int(transformers.__version__.partition(".")[0]) < 5:
    raise ImportError(
        "xorz.XorzConfig, from_pretrained and PublishVersions need transformers 5 or newer, but this is "
        f"{transformers.__version__}; pip install -U transformers, or load the model yourself and call xorz.attach"
    )

METHOD = "xorz"
ADAPTER = "adapter_config.json"
_OPTIONS = ("mode", "prefer", "budget", "max_copies", "example", "trust")


@register_quantization_config(METHOD)
class XorzConfig(QuantizationConfigMixin):
    """What `from_pretrained` is to attach: tenants by name, and the options of `xorz.attach`.

    model = AutoModelForCausalLM.from_pretrained(base, quantization_config=XorzConfig(tenants={"alice": "alice.xorz"}))
    model.generate(**prompts, tenants=["alice", None])   # a name for each prompt; None is the base
    model.xorz.load("bob", "org/bob")                    # its `Tenants`
    """

    def __init__(
        self,
        tenants: Mapping[str, Any] | None = None,
        default: str | None = "base",
        mode: str = "fast",
        prefer: str | None = "auto",
        budget: int | str | None = None,
        max_copies: int | str | None = None,
        example: Any = None,
        trust: str = "digest",
        **unknown: Any,
    ) -> None:
        """Describe what is to be attached.

        Args:
            tenants: name -> what `Tenants.load` takes: a package, a folder or Hub repository with one, ...
            default, mode, prefer, budget, max_copies, example, trust: see `xorz.attach`. A tenant's name as `default` makes the
                model that tenant wherever no other is asked for.
            unknown: `quant_method`, as in a saved config; anything else is refused.

        Raises:
            TypeError: `tenants` is no mapping, or an option is unknown; ValueError: another word of `trust`.
        """
        method = unknown.pop("quant_method", METHOD)
        if method != METHOD:
            raise ValueError(f"quant_method is {method!r}, but this is XorzConfig")
        if unknown:
            raise TypeError(f"XorzConfig has no option {next(iter(unknown))!r}")
        if tenants is not None and not isinstance(tenants, Mapping):
            raise TypeError(f"tenants must be a dict, name -> package, but is {type(tenants).__name__}")
        if trust not in ("digest", "sha256"):
            raise ValueError(f'trust must be "digest" or "sha256", but is {trust!r}')
        self.quant_method = METHOD
        self.tenants = dict(tenants or {})
        self.default, self.mode, self.prefer = default, mode, prefer
        self.budget, self.max_copies, self.example, self.trust = budget, max_copies, example, trust

    def to_dict(self) -> dict[str, Any]:
        """What can be written as JSON: tenants that are no paths are named by their type, an example is left out."""
        paths = (str, os.PathLike)
        tenants = {
            n: os.fspath(s) if isinstance(s, paths) else type(s).__name__ for n, s in self.tenants.items()
        }
        return {**{k: v for k, v in vars(self).items() if k != "example"}, "tenants": tenants}


@register_quantizer(METHOD)
class XorzQuantizer(HfQuantizer):
    """transformers' hook: attaches the model once its weights are there."""

    def validate_environment(self, *args: Any, device_map: Any = None, **kwargs: Any) -> None:
        """ValueError for a `device_map` that puts something elsewhere than on the CPU or on CUDA devices, on both, or on CUDA
        devices of which nothing is to be left for tenants.
        """
        places = list(device_map.values()) if isinstance(device_map, Mapping) else [device_map]
        kinds = {place: _kind_of(place) for place in places}
        for place, kind in kinds.items():
            if kind is None or (kind == "cuda" and "cpu" in kinds.values()):
                raise ValueError(
                    f"device_map places something on '{place}', but xorz serves models whole on the CPU, or on CUDA "
                    'devices, in memory: leave device_map out, pass device_map="cpu", or name CUDA devices alone, as many as '
                    "hold the model and the budget"
                )
            if kind == "cuda" and self.quantization_config.budget is None:
                raise ValueError(
                    f"device_map places something on '{place}', whose memory is taken for tenants at once: say how much with "
                    'budget, such as XorzConfig(..., budget="4 GiB")'
                )

    def update_device_map(self, device_map: Any) -> Any:
        """The CPU, whatever the words for it were, or CUDA devices as they were given."""
        places = device_map.values() if isinstance(device_map, Mapping) else [device_map]
        is_cuda = any(_kind_of(place) == "cuda" for place in places)
        return device_map if device_map is None or is_cuda else {"": "cpu"}

    def adjust_max_memory(self, max_memory: dict[Any, Any]) -> dict[Any, Any]:
        """What `device_map="auto"` may fill of each GPU: the budget is taken of them as their shares of the model are, which
        are about even.
        """
        budget = size_of(self.quantization_config.budget) or 0
        cards = [place for place in max_memory if _kind_of(place) == "cuda"]
        part = budget // max(1, len(cards))
        return {
            place: max(0, int(size) - part) if place in cards else size for place, size in max_memory.items()
        }

    def postprocess_model(self, model: Any, **kwargs: Any) -> Any:
        """Attach the model, load the tenants, and leave nothing in its config: what is saved is the plain base."""
        config = self.quantization_config
        self.remove_quantization_config(model)
        options = {name: getattr(config, name) for name in _OPTIONS}
        tenants = attach(model, default=config.default, **options)
        try:
            with bar(total=len(config.tenants), unit="tenant", desc="loading tenants") as shown:
                for name, source in config.tenants.items():
                    tenants.load(name, source)
                    shown.update()
            if tenants.serves_by_default and config.default not in tenants.names():
                loaded = ", ".join(map(repr, tenants.names())) or "none"
                raise ValueError(
                    f"default is {config.default!r}, but no tenant is called so; loaded: {loaded}"
                )
        except BaseException:
            tenants.detach()
            raise
        model.xorz = tenants
        return model

    def is_serializable(self) -> bool:
        """The base is saved as if nothing were attached."""
        return True

    @property
    def is_trainable(self) -> bool:
        """The base's weights cannot be written to while it is attached."""
        return False


_WORDS = ("auto", "balanced", "balanced_low_0", "sequential")


def _kind_of(place: Any) -> str | None:
    """ "cpu" or "cuda", what a place of a `device_map` is of; None for anything else, such as "disk"."""
    if place is None:
        return "cpu"
    if place in _WORDS:
        here = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        place = here or "cpu"
    try:
        kind = torch.device(place).type
    except (RuntimeError, TypeError):
        return None
    return kind if kind in ("cpu", "cuda") else None


def from_pretrained(
    source: str | os.PathLike[str], base: str | None = None, *, cls: Any = None, **options: Any
) -> Any:
    """The model that a tenant's folder or package describes, as transformers' `from_pretrained` gives it.

        model = xorz.from_pretrained("alice/")       # computes as alice
        with model.xorz.use(None): ...               # as the base

    Args:
        source: a folder with one package, a repository of the Hub, a package (`sources.located`).
        base: the base's folder or Hub name; None: `base_model_name_or_path` of the folder's adapter_config.json.
        cls: a class of transformers with `from_pretrained`; None: the architecture that the base's config names.
        options: `mode`, `prefer`, `budget`, `max_copies`, `example`, `trust` go to `xorz.attach`; the others to
            `cls.from_pretrained`. `dtype` is the base's own, unless it is given; another one than the package's is refused by
            its digests.

    Returns:
        The base model, attached, with the tenant loaded under the package's name (without `.xorz`), which is what the model's
        own calls and `generate` compute with; `model.xorz` is its `Tenants`.

    Raises:
        ValueError: no base is known, or it is another one than the package's (tensor and digests are named); OSError; and what
        transformers raises.
    """
    package = sources.located(source)
    folder = sources.folder_of(source)
    if base is None:
        base = _base(folder, source)
    mine = {k: options.pop(k) for k in _OPTIONS if k in options}
    name = package.name.removesuffix(sources.SUFFIX)
    if package.parent.name == "fetched":
        name = name.partition("-")[2]
    quantization = XorzConfig(tenants={name: package}, default=name, **mine)
    if cls is None:
        cls = _class(base, options)
    options.setdefault("dtype", "auto")
    return cls.from_pretrained(base, quantization_config=quantization, **options)


def _base(folder: Path | None, source: Any) -> str:
    described = None if folder is None else folder / ADAPTER
    if described is None or not described.exists():
        raise ValueError(
            f"{source} does not say what its base is (no {ADAPTER} beside the package); pass base="
        )
    try:
        named = json.loads(described.read_text())["base_model_name_or_path"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{described} names no base_model_name_or_path; pass base=") from error
    if not isinstance(named, str) or not named:
        raise ValueError(f"{described}: base_model_name_or_path is {named!r}, not a name; pass base=")
    beside = folder / named
    return str(beside) if named.startswith(".") and beside.is_dir() else named


def _class(base: str, options: dict[str, Any]) -> Any:
    known = {
        k: options[k]
        for k in ("revision", "token", "cache_dir", "local_files_only", "trust_remote_code")
        if k in options
    }
    config = transformers.AutoConfig.from_pretrained(base, **known)
    for architecture in config.architectures or ():
        found = getattr(transformers, architecture, None)
        if found is not None:
            return found
    return transformers.AutoModel


class PublishVersions(TrainerCallback):
    """For `Trainer(callbacks=[...])` of transformers and TRL: publishes versions of the model while it is trained.

    run = xorz.Versions(base, "run/")
    Trainer(model, args, ..., callbacks=[xorz.PublishVersions(run, every=50)])
    """

    def __init__(self, versions: Versions, every: int | None = None) -> None:
        """Publish to `versions` after each `every` steps, or, with None, where the trainer saves; and once at the end, if the
        model has been trained since. ValueError: `every` is below 1.
        """
        if every is not None and (isinstance(every, bool) or not isinstance(every, int) or every < 1):
            raise ValueError(f"every must be an int of 1 or more, or None, but is {every!r}")
        self.versions, self.every = versions, every
        self._last: int | None = None

    def _publish(self, state: Any, model: Any) -> None:
        if not state.is_world_process_zero or self._last == state.global_step:
            return
        wrappers = (nn.DataParallel, nn.parallel.DistributedDataParallel)
        while isinstance(model, wrappers) or "_orig_mod" in model._modules:
            model = model.module if isinstance(model, wrappers) else model._orig_mod
        self.versions.publish(model)
        self._last = state.global_step

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """After a step of the optimizer."""
        if self.every is not None and state.global_step % self.every == 0:
            self._publish(state, model)

    def on_save(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Where a checkpoint is saved."""
        if self.every is None:
            self._publish(state, model)

    def on_train_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """The last one, too."""
        if state.global_step:
            self._publish(state, model)
