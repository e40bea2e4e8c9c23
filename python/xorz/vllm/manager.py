"""vLLM's adapters, served from xorz's arena: which packages are resident, and which slot each has in the running step.

vLLM decides: what is loaded and dropped (`--max-cpu-loras`), which adapters a step may have (`--max-loras`), and which is of
which row. A resident adapter lies in the arena, whole; giving it a slot writes offsets and small vectors, and copies no delta.

On a GPU all of that has its place before vLLM measures what memory is left, and keeps it: captured graphs read it at each
replay. Whatever is written comes from pinned memory, on the stream that forwards run on, so that those which were asked before
read what was there before, and nothing waits.
"""

import os
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from vllm.logger import init_logger
from vllm.lora.lora_model import LoRAModel
from vllm.lora.model_manager import AdapterLRUCache, LRUCacheLoRAModelManager
from vllm.lora.request import LoRARequest
from vllm.lora.worker_manager import LRUCacheWorkerLoRAManager
from vllm.model_executor.layers.fused_moe import MoERunner
from vllm.model_executor.layers.layernorm import RMSNorm

from ..serve.residency import Piece, Residency, size_of
from ..serve.rows import copy_to, staged
from . import gpu, in_place, pieces, products
from .experts import XorzExpertsMethod
from .layers import XorzConfig, XorzEmbeddingMethod, XorzLinearMethod, XorzRMSNorm
from .packages import Checkpoint, Loader, Prepared, check_trust, split_name, what_is
from .plan import matrices_of, parameters, plan
from .rows import Rows, Site

logger = init_logger("vllm.xorz")

_KEPT_OPEN = 256
"""Packages that stay open when vLLM drops their adapters, so that it can take them back whatever became of the name."""

_FORGOTTEN_SECONDS = 120.0
"""Nobody has asked for so long what became of a package that was to be read: its client has gone."""


_WARM_UP = "warm-up"
"""The name of adapters that change nothing."""


@dataclass
class _Ahead:
    """A package that is read before the engine takes it, under a base of this generation. Who asked is `told` that it was."""

    path: str
    reading: "Future[Prepared]"
    generation: int
    asked: float = field(default_factory=time.monotonic)
    told: bool = False


class Unfit(ValueError):
    """A package that cannot be served: the message names tenant and path, `why` says only what is wrong."""

    def __init__(self, name: str, path: str, why: str) -> None:
        """Of the tenant `name`, as its client calls it."""
        super().__init__(f"xorz: {name!r} ({path}): {why}")
        self.name, self.path, self.why = name, path, why

    def __reduce__(self) -> Any:
        """Workers send their errors to other processes."""
        return type(self), (self.name, self.path, self.why)


@dataclass
class Settings:
    """`--additional-config '{"xorz": {...}}'`.

    Attributes:
        mode: of every product, as in `xorz.attach`.
        prefer: what packages are encoded for on loading, as there.
        memory: bytes that adapters may take in each process, or such as "8 GiB"; None is the machine's. On a GPU they are its
            own, taken at once, and None is refused.
        max_staleness: of a policy whose versions are tenants, so many before the newest can be asked for; see `policies`.
        trust: "sha256" compares the words that a package is a difference from by their sha256, of tenants and of updates, and
            takes no package without; digests find mistakes, but not who makes a tensor with the digest of another.
    """

    mode: str = "fast"
    prefer: str | None = "auto"
    memory: int | str | None = None
    max_staleness: int = 1
    trust: str = "digest"

    @classmethod
    def of(cls, vllm_config: Any) -> "Settings":
        """The settings in vLLM's `additional_config`; ValueError for names and values that do not exist."""
        extra = vllm_config.additional_config
        given = extra.get("xorz", {}) if isinstance(extra, dict) else {}
        unknown = set(given) - {"mode", "prefer", "memory", "max_staleness", "trust"}
        if unknown:
            raise ValueError(
                f"xorz: additional_config has xorz.{min(unknown)}; there are mode, prefer, memory, max_staleness and trust"
            )
        out = cls(**given)
        if out.mode not in ("fast", "deterministic", "exact"):
            raise ValueError(f"xorz: mode must be one of fast, deterministic, exact, but is {out.mode!r}")
        if out.prefer not in (None, "auto", "speed", "memory"):
            raise ValueError(f'xorz: prefer must be "auto", "speed", "memory" or null, but is {out.prefer!r}')
        if type(out.max_staleness) is not int or out.max_staleness < 0:
            raise ValueError(
                f"xorz: max_staleness must be a number of versions, 0 or more, but is {out.max_staleness!r}"
            )
        check_trust(out.trust)
        size_of(out.memory)
        return out


class Adapter(LoRAModel):
    """One package, resident: where its deltas lie in the arena, by site, and its vectors."""

    def __init__(self, number: int, name: str, prepared: Prepared | None) -> None:
        """Not resident before the manager has placed it; `prepared` None is a warm-up's, which changes nothing."""
        super().__init__(number, 1, {})
        self.name, self.prepared = name, prepared
        self.places: Tensor | None = None
        self.pieces: list[Piece] = []
        self.values: dict[str, Tensor] = {}

    def clone(self, lora_model_id: int) -> "Adapter":
        """A copy under another number; vLLM copies only the adapters of its warm-up."""
        return Adapter(lora_model_id, self.name, self.prepared)


class _Resident(AdapterLRUCache):
    """Resident adapters; whichever way one leaves, its memory is given back."""

    def __init__(
        self, capacity: int, deactivate: Callable[[int], object], free: Callable[[Adapter], None]
    ) -> None:
        super().__init__(capacity, deactivate)
        self._free = free

    def _on_remove(self, key: int, value: Adapter | None) -> None:
        super()._on_remove(key, value)
        if value is not None:
            self._free(value)


class XorzManager(LRUCacheLoRAModelManager):
    """Slots, rows and the arena of one model."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """As vLLM's; ValueError for engines that cannot be served."""
        self._vllm_config = kwargs["vllm_config"]
        _check_engine(self._vllm_config, kwargs["device"])
        self.settings = Settings.of(self._vllm_config)
        super().__init__(*args, **kwargs)

    def _create_lora_modules(self) -> None:
        """Instead of wrapping modules: a site for each parameter that can be served by rows."""
        self._registered_adapters = _Resident(self.capacity, self.deactivate_adapter, self._free)
        self._order = gpu.Order(self.device)
        self.residency = Residency(size_of(self.settings.memory), torch.device(self.device), ordered=True)
        self.arena = self.residency.arena
        captured = self._vllm_config.compilation_config.max_cudagraph_capture_size or 0
        rows = max(self.max_num_batched_tokens, self.max_num_seqs, captured)
        self.row_map = Rows(rows, self.lora_slots, self.device)
        self.vectors: dict[str, Site] = {}
        self.params = parameters(self.model)
        self.row_map.batched = is_transformers_backend(self.model)
        found = self._found()
        self.matrices = [m for name, param in found if param.dim() > 1 for m in matrices_of(name, param)]
        self.offsets = torch.zeros(
            len(self.matrices), self.lora_slots, 2, dtype=torch.int64, device=self.device
        )
        # The same as the host knows it.
        self.places = torch.zeros(self.offsets.shape, dtype=torch.int64)
        # Of the adapter that is given a slot, on the way from the host to `offsets`.
        self._arriving = torch.zeros_like(self.offsets[:, 0])
        first = 0
        for (name, param), users in found.items():
            site = Site(self.arena.tensor, self.row_map, self.settings.mode)
            if param.dim() == 1:
                site.table = self.params[name].expand(self.lora_slots + 1, -1).clone()
                self.vectors[name] = site
                # The base's row is the parameter: whoever writes into it later has changed both.
                module, attribute = users[0]
                module._parameters[attribute].data = self.params[name] = site.table[-1]
            else:
                count = len(matrices_of(name, param))
                slots, places = (t[first : first + count] for t in (self.offsets, self.places))
                first += count
                if param.dim() == 3:
                    site.slots = slots
                else:
                    site.slots, site.places = slots[0], places[0]
                    products.register(site)
            for module, attribute in users:
                setattr(module, f"xorz_{attribute}", site)
                if getattr(module, "use_fused_embedding", False):
                    # With tensor parallelism vLLM's kernel for a GPU would read the base's table past the method.
                    module.use_fused_embedding = False
                if _is_norm(module):
                    module.__class__ = XorzRMSNorm
        if self.arena.tensor.device.type != "cpu":
            gpu.check_kernels(self.arena.tensor)
        self.loader = self._make_loader()

    def _found(self) -> dict[tuple[str, nn.Parameter], list[tuple[nn.Module, str]]]:
        """The parameters that are served by rows, by name, and the modules that compute with each."""
        names = {id(param): name for name, param in self.model.named_parameters()}
        # There such norms are given [1, rows, heads, n] or [1, heads, rows, n], as the model's author liked it.
        of_heads = self._vllm_config.model_config.get_head_size() if self.row_map.batched else None
        unread = _read_by_others(self.model)
        if torch.device(self.device).type != "cpu":
            gpu.check_model(self.model)
            pieces.check_model(self.model, self._vllm_config)
            unread |= gpu.read_past(self.model)
        out: dict[tuple[str, nn.Parameter], list[tuple[nn.Module, str]]] = {}
        for _, module in self.model.named_modules():
            for attribute in _served(module, of_heads) if id(module) not in unread else ():
                param = module._parameters[attribute]
                out.setdefault((names[id(param)], param), []).append((module, attribute))
        return out

    def _make_loader(self) -> Loader:
        """Now, before anything is served: the model's own loader is run, on parameters without data."""
        base = Checkpoint(folder_of(self._vllm_config))
        began = time.perf_counter()
        kinds = dict.fromkeys(self.matrices, "delta") | dict.fromkeys(self.vectors, "value")
        followed = plan(self.model, base.tensors)
        logger.info("xorz: %s", _summary(followed.refused, len(base.tensors), time.perf_counter() - began))
        return Loader(base, followed, self.params, kinds, self.settings.prefer, trust=self.settings.trust)

    def base_replaced(self) -> None:
        """After vLLM has replaced the base's words: no adapter is resident, and nothing is known of the new ones."""
        self.remove_all_adapters()
        self._order.settle()
        for name, param in self.model.named_parameters():
            if param.is_meta:
                continue  # vLLM has failed half way, and this model serves nobody any more
            if name in self.vectors and param.data_ptr() != self.vectors[name].table[-1].data_ptr():
                self.vectors[name].table[-1].copy_(param.data)
                param.data = self.vectors[name].table[-1]
        # In place: the loader has the same dictionary.
        self.params |= {name: p for name, p in parameters(self.model).items() if not p.is_meta}
        try:
            base = Checkpoint(folder_of(self._vllm_config))
        except (OSError, ValueError) as error:
            logger.warning("xorz: the base's files cannot be read again: %s", error)
            base = None
        self.loader.replaced(base)

    # What vLLM calls.

    def create_dummy_lora(self, lora_id: int, rank: int, embedding_modules: Any = None) -> Adapter:
        """An adapter that changes nothing, with which vLLM warms up."""
        return Adapter(lora_id, _WARM_UP, None)

    def get_dummy_lora_warmup_rank(self, default_rank: int) -> int:
        """The rank that vLLM suggests: packages have none, so that any will do."""
        return default_rank

    def _build_moe_ep_load_spec(self) -> None:
        return None

    def _add_adapter(self, lora: Adapter) -> None:
        """Make it resident; nothing is left behind if that fails."""
        prepared = lora.prepared or Prepared()
        places = torch.zeros(len(self.matrices), 2, dtype=torch.int64)
        index = {name: i for i, name in enumerate(self.matrices)}
        with self._order.beside():
            lora.pieces = self._place(lora, prepared)
        for name, piece in zip(prepared.deltas, lora.pieces, strict=True):
            places[index[name]] = torch.tensor(piece)
        lora.places, lora.values, lora.prepared = staged(places, self.offsets.device), prepared.values, None
        self._registered_adapters[lora.id] = lora

    def _place(self, lora: Adapter, prepared: Prepared) -> list[Piece]:
        """Memory for its deltas; the least recently used adapters make room, but not for what can never fit."""
        fits = prepared.bytes <= self.residency.capacity
        try:
            return self.residency.place(
                prepared.deltas.values(), lambda: fits and self.remove_oldest_adapter()
            )
        except MemoryError as error:
            name = split_name(lora.name)[0]
            raise ValueError(
                f"xorz: {name!r} takes {prepared.bytes:,} bytes of the {self.residency.capacity:,} that xorz.memory gives all: "
                f"{error}"
            ) from None

    def _free(self, lora: Adapter) -> None:
        self.residency.release(lora.pieces)
        lora.pieces = []

    def _deactivate_adapter(self, lora_id: int) -> None:
        """Take its slot back; nothing points at memory that may be free."""
        if lora_id in self.lora_index_to_id:
            with self._order.beside():
                slot = self.lora_index_to_id.index(lora_id)
                self.offsets[:, slot] = self.places[:, slot] = 0
        super()._deactivate_adapter(lora_id)

    def remove_all_adapters(self) -> None:
        """As vLLM's, and their memory is free; all rows are the base's until a step says whose they are."""
        for lora in self._registered_adapters.cache.values():
            self._free(lora)
        nobody = torch.zeros(0, dtype=torch.int32)
        with self._order.beside():
            self.offsets.zero_()
            self.places.zero_()
            self.row_map.write(nobody, nobody)
        super().remove_all_adapters()

    def activate_adapter(self, lora_id: int) -> bool:
        """Give it a slot: the offsets of its deltas, and its vectors. On a GPU steps that were asked before do not see it."""
        if lora_id in self._active_adapters:
            self._active_adapters.touch(lora_id)
            return False
        if len(self._active_adapters) >= self.lora_slots:
            self._active_adapters.remove_oldest()
        slot = self.lora_index_to_id.index(None)
        lora = self._registered_adapters[lora_id]
        with self._order.beside():
            copy_to(self._arriving, lora.places)
            self.offsets[:, slot].copy_(self._arriving)
            self.places[:, slot] = lora.places
            for name, site in self.vectors.items():
                if name in lora.values:
                    copy_to(site.table[slot], lora.values[name])
                else:
                    site.table[slot].copy_(site.table[-1])
        self._active_adapters[lora_id] = None
        self.lora_index_to_id[slot] = lora_id
        return True

    def set_adapter_mapping(self, mapping: Any) -> None:
        """As vLLM's, which calls the next one where anything has changed since the step before."""
        self._order.step()
        super().set_adapter_mapping(mapping)

    def _set_adapter_mapping(self, mapping: Any) -> None:
        """The rows of the next step."""
        tokens, sampled = (self._slots_of(ids) for ids in (mapping.index_mapping, mapping.prompt_mapping))
        self.row_map.write(tokens, sampled)

    def _slots_of(self, ids: Any) -> Tensor:
        """Slots of adapters' numbers, 0 being the base; RuntimeError for one that has no slot."""
        given = np.asarray(ids, dtype=np.int64)
        out = np.full(given.shape, -1, dtype=np.int32)
        known = given <= 0
        for slot, number in enumerate(self.lora_index_to_id):
            if number is not None:
                mine = given == number
                out[mine] = slot
                known |= mine
        if not known.all():
            raise RuntimeError(f"xorz: a row is of adapter {given[~known][0]}, which has no slot")
        return torch.from_numpy(out)

    def memory(self) -> dict[str, int]:
        """Bytes: "base" (this process's parameters), "deltas" (of resident adapters), "copies" (vectors), and their "total"."""
        # The last row of a table is the base's own vector.
        vectors = sum(site.table[-1].nbytes for site in self.vectors.values())
        tables = sum(site.table.nbytes for site in self.vectors.values()) - vectors
        own = sum(v.nbytes for lora in self._registered_adapters.cache.values() for v in lora.values.values())
        others = [param for name, param in self.params.items() if name not in self.vectors]
        out = self.residency.memory(others, tables + own)
        return out | {"base": out["base"] + vectors, "total": out["total"] + vectors}


def is_transformers_backend(model: nn.Module) -> bool:
    """Whether vLLM runs the model as transformers wrote it, with layers of its own put in."""
    return any(
        cls.__module__.startswith("vllm.model_executor.models.transformers") for cls in type(model).__mro__
    )


def _is_norm(module: nn.Module) -> bool:
    """vLLM's own, or that of its Transformers backend where it has the whole row and does nothing more."""
    if type(module) is RMSNorm:
        return True
    return type(module).__name__ == "TPAwareRMSNorm" and isinstance(module, RMSNorm) and module.tp_size == 1


def _served(module: nn.Module, unserved: int | None = None) -> list[str]:
    """The parameters of a module that are served by rows; norms of `unserved` words are not."""
    method = getattr(module, "quant_method", None)
    if isinstance(method, XorzExpertsMethod):
        names = ["w13_weight", "w2_weight"]
    elif isinstance(method, (XorzLinearMethod, XorzEmbeddingMethod)):
        names = ["weight"]
        # A bias that vLLM adds elsewhere would be the base's for everyone.
        if not getattr(module, "skip_bias_add", False):
            names.append("bias")
    elif _is_norm(module) and module.weight.numel() != unserved:
        names = ["weight"]
    else:
        return []
    return [name for name in names if isinstance(module._parameters.get(name), nn.Parameter)]


def _read_by_others(model: nn.Module) -> set[int]:
    """Ids of linear layers whose weights are read past them: two gates that a runner of experts multiplies at once."""
    runners = (m for m in model.modules() if isinstance(m, MoERunner))
    gates = ((m.gate, m.shared_expert_gate) for m in runners)
    return {id(gate) for both in gates if None not in both for gate in both}


def check_config(config: Any) -> None:
    """Before anything is loaded: ValueError for settings and engines that are refused, and where nothing asks for xorz."""
    Settings.of(config)
    device = config.device_config.device
    if config.lora_config is not None:
        _check_engine(config, device)
    elif in_place.is_updated(config):
        refuse(in_place.unserved(config, device))
    else:
        raise ValueError(
            "xorz: --quantization xorz serves nothing without --enable-lora (tenants are vLLM's adapters), or "
            """--weight-transfer-config '{"backend": "xorz"}' (the base is updated in place)"""
        )


def _check_engine(config: Any, device: Any) -> None:
    """ValueError, by name, for what was never seen to be served right, or would give layers other rows than the step's."""
    parallel, model = config.parallel_config, config.model_config
    unfit = {
        "quantization must be xorz (--quantization xorz)": not isinstance(config.quant_config, XorzConfig),
        "pipeline parallelism is not served": parallel.pipeline_parallel_size > 1,
        "context parallelism is not served": parallel.prefill_context_parallel_size > 1
        or parallel.decode_context_parallel_size > 1,
        "expert parallelism is not served": parallel.enable_expert_parallel,
        "data parallelism of mixtures of experts, which mixes the processes' rows, is not served": model.is_moe
        and parallel.data_parallel_size > 1,
        "dual batch overlap is not served": parallel.enable_dbo,
        "speculative decoding is not served": config.speculative_config is not None,
        "fast prefill of shared keys and values is not served": config.cache_config.kv_sharing_fast_prefill,
        "pooling models are not served": model.runner_type != "generate",
        "MLA, whose weights are multiplied into each other, is not served": model.use_mla,
        "multimodal models are not served": model.is_multimodal_model,
        "models of encoder and decoder are not served": model.is_encoder_decoder,
        "an output layer of another dtype than the model's (head_dtype), whose words vLLM reads past it, is not "
        "served": model.head_dtype != model.dtype,
    }
    refuse(unfit | gpu.unserved(config, device, Settings.of(config)) | in_place.unserved(config, device))


def refuse(unfit: dict[str, bool]) -> None:
    """ValueError with the first sentence that is so."""
    for text, is_so in unfit.items():
        if is_so:
            raise ValueError(f"xorz: {text}")


def folder_of(config: Any) -> str:
    """Where the base lies on disk."""
    model = config.model_config.model
    if os.path.isdir(model):
        return model
    from huggingface_hub import snapshot_download

    return snapshot_download(model, revision=config.model_config.revision, local_files_only=True)


def _summary(refused: dict[str, str], count: int, seconds: float) -> str:
    text = f"followed {count - len(refused)} of {count} tensors of the base into the model in {seconds:.2f} s"
    return text + "".join(
        f"; changes of `{name}` would be refused: {why}" for name, why in list(refused.items())[:4]
    )


class XorzWorkerManager(LRUCacheWorkerLoRAManager):
    """Loads packages where vLLM loads adapters; those that were asked for ahead, in a thread of its own."""

    _manager_cls = XorzManager

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """Take vLLM's own arguments, and start the thread that reads packages ahead."""
        super().__init__(*args, **kwargs)
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="xorz-reader")
        self._ahead: dict[str, _Ahead] = {}
        self._open: OrderedDict[tuple[str, str], int] = OrderedDict()  # by adapter and path
        self._opening = threading.Lock()

    def prefetch(self, adapter: str, path: str) -> None:
        """Begin to read a package, after those that were asked for before; `add_adapter` of that name takes what was read."""
        now = time.monotonic()
        for name, entry in list(self._ahead.items()):
            if now - entry.asked > _FORGOTTEN_SECONDS:
                self._ahead.pop(name).reading.cancel()
        entry = self._ahead.get(adapter)
        if entry is not None and entry.path != path:
            entry.reading.cancel()
        if entry is None or entry.path != path:
            self._read_ahead(adapter, path)

    def _read_ahead(self, adapter: str, path: str) -> None:
        reading = self._reader.submit(self._read, adapter, path)
        self._ahead[adapter] = _Ahead(path, reading, self._adapter_manager.loader.generation)

    def prefetched(self, adapter: str) -> str | None:
        """None while it is read, "" when it has been, or what is wrong; an unfit one is forgotten."""
        entry = self._ahead.get(adapter)
        if entry is None:
            return "it was forgotten, since nobody asked for it in time; load it again"
        entry.asked = time.monotonic()
        if not entry.reading.done():
            return None
        if entry.generation != self._adapter_manager.loader.generation:
            # The base was replaced meanwhile.
            self._read_ahead(adapter, entry.path)
            return None
        error = entry.reading.exception()
        if error is None:
            entry.told = True
            return ""
        del self._ahead[adapter]
        return error.why if isinstance(error, Unfit) else str(error)

    def forget(self, adapter: str) -> None:
        """Nobody can ask for this adapter again: its memory is free, and its package is closed."""
        ahead = self._ahead.pop(adapter, None)
        if ahead is not None:
            ahead.reading.cancel()
        for number, lora in list(self._adapter_manager._registered_adapters.cache.items()):
            if lora.name == adapter:
                self.remove_adapter(number)
        with self._opening:
            for key in [key for key in self._open if key[0] == adapter]:
                os.close(self._open.pop(key))

    def base_replaced(self) -> None:
        """See `XorzManager.base_replaced`. What is being read ahead is read again when it is asked for."""
        self._adapter_manager.base_replaced()

    def add_adapter(self, adapter_request: LoRARequest) -> bool:
        """As vLLM's, which goes by numbers; two names may not have one."""
        found = self._adapter_manager._registered_adapters.cache.get(adapter_request.lora_int_id)
        # vLLM gives those by which it warms up and captures graphs names of its own.
        if found is not None and found.name not in (adapter_request.lora_name, _WARM_UP):
            raise ValueError(
                f"xorz: adapter {adapter_request.lora_name!r} has the number {found.id} of {found.name!r}, which is loaded"
            )
        if found is not None and found.name != _WARM_UP:
            self._taken(adapter_request)  # the same words, from another file; nobody needs them
        return super().add_adapter(adapter_request)

    def _taken(self, lora_request: LoRARequest) -> _Ahead | None:
        """What was read ahead, if it is for this request. An engine ends where it meets a package that is unfit, so a request
        for an adapter that was loaded before takes nothing that somebody else has just asked for under the same name.
        """
        ahead = self._ahead.get(lora_request.lora_name)
        if ahead is None or not ahead.told or ahead.path != lora_request.lora_path:
            return None
        return self._ahead.pop(lora_request.lora_name)

    def _load_adapter(self, lora_request: LoRARequest) -> Adapter:
        """What vLLM calls; ValueError says what is wrong with the package, by name."""
        name, path = lora_request.lora_name, lora_request.lora_path
        ahead = self._taken(lora_request)
        if lora_request.load_inplace:
            raise ValueError(
                f"xorz: {path}: load_inplace would mix two fine-tunes' keys and values in the cache"
            )
        generation = self._adapter_manager.loader.generation
        fresh = ahead is not None and ahead.generation == generation
        prepared = ahead.reading.result() if fresh else self._read(name, path)
        return Adapter(lora_request.lora_int_id, name, prepared)

    def _read(self, adapter: str, path: str) -> Prepared:
        began = time.perf_counter()
        name, content = split_name(adapter)
        if content is None:
            raise Unfit(
                name, path, what_is(path) or "it has no digest in its name; make it with xorz.vllm.request"
            )
        try:
            with torch.inference_mode():
                prepared = self._adapter_manager.loader.load(self._held(adapter, path), content)
        except (
            ArithmeticError,
            LookupError,
            MemoryError,
            OSError,
            RuntimeError,
            TypeError,
            ValueError,
        ) as error:
            raise Unfit(name, path, self._let_go(adapter, path, error)) from error
        seconds = time.perf_counter() - began
        logger.info("xorz: read %s in %.2f s; %d bytes in memory", path, seconds, prepared.bytes)
        return prepared

    def _held(self, adapter: str, path: str) -> str:
        """The package as it was when the adapter was first read from there, though that name be another file's by now. Another
        place is another file: one that says the same of itself may be damaged.
        """
        key = adapter, path
        with self._opening:
            if key not in self._open:
                self._open[key] = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
                while len(self._open) > _KEPT_OPEN:
                    os.close(self._open.popitem(last=False)[1])
            self._open.move_to_end(key)
            return f"/proc/self/fd/{self._open[key]}"

    def _let_go(self, adapter: str, path: str, error: BaseException) -> str:
        """What is wrong, in the caller's words; a file that was unfit may be mended."""
        text = str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)
        with self._opening:
            descriptor = self._open.pop((adapter, path), None)
        if descriptor is not None:
            os.close(descriptor)
            text = text.replace(f"/proc/self/fd/{descriptor}", path)
        return text
