"""`xorz.attach`: make a model serve the fine-tunes of its own weights, in place."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from . import experts, roots, swap
from .rows import HOST
from .site import FLOATS, Site
from .tenants import Tenants

# Modules that flatten [batch, length, k] to [batch * length, k], batch first, for the modules inside of them.
FLATTENING = frozenset(
    {
        "MixtralSparseMoeBlock",
        "OPTDecoderLayer",
        "OlmoeSparseMoeBlock",
        "Qwen2MoeSparseMoeBlock",
        "Qwen3MoeSparseMoeBlock",
    }
)

# Modules that cut rows or mix their positions, but give each row of [batch, length, k] an output of its own.
BLOCKS = frozenset({"JetMoeMoE", "DbrxFFN"})

Filter = Callable[[nn.Module, str], bool]


def attach(
    model: nn.Module,
    filter_fn: Filter | None = None,
    default: str | None = None,
    *,
    mode: str = "fast",
    prefer: str | None = "auto",
    budget: int | str | None = None,
    flattening: Iterable[str] = (),
    max_copies: int | str | None = None,
    example: Any = None,
    trust: str = "digest",
) -> Tenants:
    """Attach tenants to `model`: the same object serves its base and any number of loaded fine-tunes, row by row.

    Parameters stay where they are, shared by all tenants, and no copy is made; names, `state_dict` and ties are as before.
    Every module with parameters is attached: linear layers, embeddings, transformers' `Conv1D`, `nn.MultiheadAttention`
    and expert stacks compute on base + delta; all others (norms, biases, convolutions) take small copies per tenant, or are
    made dense for each call. Whoever reads a weight by another way than its module meets an object that holds no words of the
    base; see `xorz.serve.weight`.

    Args:
        model: on the CPU, on one CUDA device, or spread over several with each module whole on one (accelerate's `device_map`),
            in float32, bfloat16 or float16 where it is to compute on deltas.
        filter_fn: `filter_fn(module, name)`; modules for which it is false are left alone. A fine-tune that changes them
            is refused when it is loaded.
        default: where no tenant is active, "base" computes with the base and None raises; a tenant's name makes calls of the
            model and its `generate` that tenant's, while calls of modules inside of it raise.
        mode: of every product; see `delta_linear`. "deterministic": a row's bits never depend on the others.
        prefer: what deltas are encoded for when loaded: "auto" ("memory" where this machine decodes it about as fast as it
            reads memory, else "speed"), "speed", "memory", or None for what the package holds.
        budget: most bytes for all tenants, as a number or such as "8 GiB"; the least recently used that came from a
            file make room. None: no limit. On CUDA it must be given, and is taken of the device's memory at once; of several
            devices' as their shares of the model are.
        max_copies: most bytes of small dense copies for each tenant, as `budget`; None: 1 % of the base's, or 64 KiB. What
            does not fit is kept as a delta, and made dense for each call that needs it.
        example: inputs of the model, two rows or more: a tuple, or a dict of named ones. Each tenant is verified with them when
            it is loaded (`Tenants.verify`), and refused if it cannot be served, alone and in a mixed batch.
        trust: "sha256" compares the model's weights by sha256 whenever a package is loaded, beside the digests, which find
            mistakes but not forgeries. Needs packages that were packed so; deltas without a package are refused.
        flattening: names of further classes that flatten [batch, length, k] to [batch * length, k] for modules inside.

    Returns:
        The model's tenants; `detach()` gives the plain model back.

    Raises:
        TypeError: `model` is no module; ValueError: it is attached already, parts of it are on the CPU and others on CUDA, or
            offloaded, or an option is unknown or not to be had on its device.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, but is {type(model).__name__}")
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if is_traceable_wrapper_subclass(tensor):
            raise ValueError(
                f"`{name}` is a {type(tensor).__name__}, which holds no plain words that a delta could be of (a quantized "
                "weight); attach the model before it is quantized"
            )
        if is_lazy(tensor):
            raise ValueError(f"`{name}` has no shape yet; run the model once before it is attached")
    shares = _shares(model)
    device = next(iter(shares))
    if device.type != "cpu" and mode == "exact":
        raise ValueError(
            f'mode="exact" is for models on the CPU, but this one is on {device}, where a batch of several tenants has no such '
            'product; use "fast" or "deterministic"'
        )
    if device.type != "cpu" and budget is None:
        raise ValueError(
            f"the model is on {device}, whose memory is taken for tenants when it is attached: say how much with budget, such "
            'as budget="4 GiB"'
        )
    if any("_xorz" in module.__dict__ for module in model.modules()):
        raise ValueError("model is attached already; call detach() on its tenants first")
    if example is not None and not isinstance(example, (tuple, dict)):
        example = (example,)
    chosen = [(n, m) for n, m in model.named_modules() if filter_fn is None or filter_fn(m, n)]
    for name, module in chosen:
        if isinstance(module, torch.jit.ScriptModule):
            raise ValueError(
                f"`{name}` is TorchScript, whose code reads its weights past Python and would compute with the base's for "
                "every tenant; attach the model before it is scripted or traced, or leave this part out with filter_fn"
            )
        _place_of(name, module)
    owner = Tenants(model, default, mode, prefer, budget, max_copies, trust, shares)
    flat = FLATTENING | set(flattening)
    for name, module in chosen:
        _attach(owner, name, module)
    for name, module in model.named_modules():
        if any(cls.__name__ in flat for cls in type(module).__mro__):
            for inside, child in module.named_modules(prefix=name):
                if child is not module and inside in owner.sites:
                    owner.sites[inside].flattens = True
    for name, module in list(model.named_modules()):
        if name and name in owner.sites and experts.stacked(module):
            parent = model.get_submodule(name.rpartition(".")[0])
            if parent is not model:
                _around(owner, name.rpartition(".")[0], parent, owner.sites[name].kind == "experts")
        if type(module).__name__ in BLOCKS and module is not model:
            _block(owner, name, module)
    # Compiled code is that of the module inside.
    root = model
    while "_orig_mod" in root._modules:
        root = root._orig_mod
    roots.swap_root(root, owner)
    owner.methods.append(root)
    encoder = _encoder(root)
    if encoder is not None:
        name = next(n for n, m in model.named_modules() if m is encoder)
        roots.swap_whole(encoder, owner, name, alone=True)
        owner.methods.append(encoder)
    try:
        owner.begin()
    except BaseException:
        owner.detach()
        raise
    if example is not None:
        owner.example = ((), dict(example)) if isinstance(example, dict) else (tuple(example), {})
    return owner


def _encoder(model: nn.Module) -> nn.Module | None:
    """What `generate` of transformers calls before the model, if there is such a thing and it is no layer of its own."""
    if not getattr(getattr(model, "config", None), "is_encoder_decoder", False) or not hasattr(
        model, "generate"
    ):
        return None
    try:
        found = model.get_encoder()
    except (AttributeError, NotImplementedError, TypeError):
        return None
    fits = isinstance(found, nn.Module) and found is not model and found in set(model.modules())
    return found if fits and not any(name.startswith("_xorz") for name in found.__dict__) else None


def _shares(model: nn.Module) -> dict[torch.device, float]:
    """Where its tensors are, and what share of their bytes; ValueError, by name, if that is not served."""
    first: tuple[str, torch.device] | None = None
    found: dict[torch.device, int] = {}
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.is_meta:
            raise ValueError(
                f"`{name}` is on the meta device, where it has no words: load the model whole, on the CPU or on CUDA devices, "
                "without offload to CPU or disk (accelerate), before it is attached"
            )
        if tensor.device.type not in ("cpu", "cuda"):
            raise ValueError(
                f"`{name}` is on {tensor.device}; models are served on the CPU or on a CUDA device"
            )
        first = first or (name, tensor.device)
        if tensor.device.type != first[1].type:
            raise ValueError(
                f"`{first[0]}` is on {first[1]}, but `{name}` is on {tensor.device}; a model may be spread over CUDA devices, "
                "but not over them and the CPU: put it whole on one kind"
            )
        found[tensor.device] = found.get(tensor.device, 0) + tensor.nbytes
    whole = sum(found.values())
    return {device: size / whole if whole else 1 / len(found) for device, size in found.items()} or {
        HOST: 1.0
    }


def _attach(owner: Tenants, name: str, module: nn.Module) -> None:
    own: list[Any] = [*module._parameters.values(), *module._buffers.values()]
    if not any(t is not None for t in own):
        if type(module) in (nn.TransformerEncoder, nn.TransformerEncoderLayer):
            owner.methods.append(module)
            roots.swap_encoder(module, owner)
        elif hasattr(module, "compute_bias"):
            owner.methods.append(module)
            swap.swap_method(module, owner)
        return
    site = Site(owner, name or type(module).__name__, module, _kind(module), _place_of(name, module))
    owner.sites[name] = site
    owner.modules[name] = module
    swap.swap(module, site)


def _place_of(name: str, module: nn.Module) -> torch.device:
    """The device of all its own tensors, of none the host; ValueError if there are several."""
    first: tuple[str, torch.device] | None = None
    for own, tensor in (*module._parameters.items(), *module._buffers.items()):
        if tensor is not None:
            first = first or (own, tensor.device)
            if tensor.device != first[1]:
                raise ValueError(
                    f"`{first[0]}` of `{name}` is on {first[1]}, but its `{own}` is on {tensor.device}; "
                    "a model may be spread over CUDA devices, but each module's own tensors must be on one"
                )
    return HOST if first is None else first[1]


def _around(owner: Tenants, name: str, parent: nn.Module, known: bool) -> None:
    """Around a stack of experts, tokens are flattened; where its own code computes, tenants are served one after the other."""
    if not known or (owner.mode == "deterministic" and type(parent).__name__ not in FLATTENING):
        # With more tokens a router (topk, unsorted) may list its choices in another order.
        _block(owner, name, parent)
    if not known:
        return
    for inside, child in parent.named_modules(prefix=name):
        if child is not parent and inside in owner.sites:
            owner.sites[inside].flattens = True


def _block(owner: Tenants, name: str, module: nn.Module) -> None:
    if "_xorz_block" not in module.__dict__:
        owner.methods.append(module)
        roots.swap_block(module, owner, name)


def _kind(module: nn.Module) -> str:
    """How the module is served; see `Site`."""
    weight = module._parameters.get("weight")
    computes = weight is not None and weight.dim() == 2 and weight.dtype in FLOATS and weight.is_contiguous()
    if isinstance(module, nn.Linear) and computes:
        return "linear"
    if (
        isinstance(module, nn.Embedding)
        and weight is not None
        and weight.is_contiguous()
        and module.max_norm is None
    ):
        return "embedding"
    if type(module).__name__ == "Conv1D" and hasattr(module, "nf") and computes:
        return "conv1d"
    if isinstance(module, nn.MultiheadAttention):
        return "attention"
    if experts.serves(module):
        return "experts"
    return "rows" if _is_row_norm(module) else "split"


def _is_row_norm(module: nn.Module) -> bool:
    """A norm of transformers that ends in `weight * x`, so that a weight for each row does."""
    cls = type(module)
    named = cls.__name__.endswith(("RMSNorm", "T5LayerNorm")) and cls.__module__.startswith("transformers.")
    params = [n for n, p in module._parameters.items() if p is not None]
    return (
        named
        and params == ["weight"]
        and not module._buffers
        and not module._modules
        and torch.is_tensor(module.weight)
    )
