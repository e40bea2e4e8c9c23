"""What of an engine on a GPU cannot be updated in place: said when it starts, by name.

An update changes parameters where they lie (`on_device`). Whatever else an engine has made of them stays what it was: a copy in
the order of another kernel, in another dtype, multiplied into another weight. Parameters that were repacked themselves are
found out by their digests, when the first update is prepared; what was made beside them is not, and is refused here.
"""

from typing import Any

import torch
from torch import nn

from .. import _ops
from . import pieces
from .gpu import LEAST_CAPABILITY, check_model, of_device, of_memory


def unserved(config: Any, device: Any) -> dict[str, bool]:
    """What an engine on this device may ask for that is refused if its base is updated in place: a sentence each, and whether
    it is so.
    """
    if not is_updated(config):
        return {}
    own = {
        "updates in place of a model with MLA are not served: vLLM makes others of some weights when it has loaded "
        "them": config.model_config.use_mla,
        "updates in place of multimodal models are not served: vLLM keeps what their encoders have made of "
        "pictures": config.model_config.is_multimodal_model,
    }
    if torch.device(device).type != "cuda":
        return of_device(device) | own
    is_ours = config.quant_config is not None and config.quant_config.get_name() == "xorz"
    return of_device(device) | of_memory(config) | own | (pieces.unserved(config) if is_ours else {})


def is_updated(config: Any) -> bool:
    """Whether the base is to be updated in place by packages."""
    transfer = getattr(config, "weight_transfer_config", None)
    return transfer is not None and transfer.backend == "xorz"


_AS_LOADED = {
    "UnquantizedLinearMethod",
    "UnquantizedEmbeddingMethod",
    "XorzLinearMethod",
    "XorzEmbeddingMethod",
    "XorzExpertsMethod",
    # Of routers; only on AMD's GPUs it keeps a second form of the weight.
    "_GateLinearMethod",
}
"""Of vLLM's methods and ours, those that compute with a weight as it was loaded, read anew for each product on CUDA."""

_EXPERTS = "UnquantizedFusedMoEMethod"
_EXPERTS_AS_LOADED = ("TRITON", "BATCHED_TRITON")
"""Kernels of experts that read them as they were loaded; others keep them in another order, or a part of them elsewhere."""


def check_layers(model: nn.Module) -> None:
    """ValueError for a model on a GPU of which some layer may compute with more than its parameters, in the order that they
    were loaded in: a copy in another form, made once, would stay what it was after an update in place. The layer is named.
    """
    check_model(model)
    if callable(getattr(model, "process_weights_after_loading", None)):
        raise ValueError(_second_form("the model", type(model).__name__))
    for name, module in model.named_modules():
        method = getattr(module, "quant_method", None)
        if method is not None and not _is_as_loaded(method):
            raise ValueError(_second_form(f"layer `{name}`", _what(method)))
        if getattr(module, "_fse_fuse_gate", False):
            # Two gates in one matrix, made once.
            raise ValueError(_second_form(f"layer `{name}`", f"{type(module).__name__} with joined gates"))
        own = getattr(module, "process_weights_after_loading", None)
        impl = getattr(module, "impl", None)
        if module is model or own is None:
            continue
        if type(module).__name__.startswith("MLA") or impl is None:
            raise ValueError(_second_form(f"layer `{name}`", type(module).__name__))
        if getattr(impl, "sinks", None) is not None:
            # FlashInfer's have them in float32.
            raise ValueError(_second_form(f"layer `{name}`", f"{type(impl).__name__} with sinks"))


def _is_as_loaded(method: Any) -> bool:
    kind = type(method).__name__
    return kind in _AS_LOADED or (kind == _EXPERTS and _backend(method) in _EXPERTS_AS_LOADED)


def _backend(method: Any) -> str | None:
    return getattr(getattr(method, "unquantized_backend", None), "name", None)


def _what(method: Any) -> str:
    backend = _backend(method)
    return type(method).__name__ + (f" ({backend})" if backend else "")


def _second_form(who: str, what: str) -> str:
    return (
        f"xorz: {who} is computed by {what}, which may keep its weights in another form beside the parameters or in their "
        "place: updates in place are not served for it on a GPU"
    )


def check_device(device: Any) -> None:
    """Before an engine on a GPU is updated in place: that words can be changed there. ValueError for one that is too old;
    RuntimeError where this installation or this driver has no kernels, or they are wrong.
    """
    found = torch.cuda.get_device_capability(device)
    if 10 * found[0] + found[1] < LEAST_CAPABILITY:
        raise ValueError(
            f"xorz: {device} has compute capability {found[0]}.{found[1]}; the kernels need "
            f"{LEAST_CAPABILITY // 10}.{LEAST_CAPABILITY % 10}"
        )
    old = torch.arange(256, dtype=torch.int16).view(torch.bfloat16).view(4, 64)
    new = old.flip(0).contiguous()
    words = old.to(device)
    _ops.delta_apply_(words, _ops.delta_encode(old, new).to(device))
    torch.cuda.synchronize(device)
    _ops.cuda_status(device)
    if not torch.equal(words.cpu().view(torch.int16), new.view(torch.int16)):
        raise RuntimeError(
            f"xorz: the kernels on {device} do not restore words; run python -m xorz.gpu_check"
        )
