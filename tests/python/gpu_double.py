"""A double of GPUs for whole models: tensors that say they lie on cuda:0 or cuda:1, whose words lie apart, and a ledger of what
a driver would have to do. No expectation but in tests.

torch decides what runs (shapes, autograd, dispatch); each op that arrives computes on the words by torch's and xorz's CPU
kernels. It is stricter than a GPU where a GPU would be slow or wrong: an op that meets tensors of two devices is refused as
torch does it, an op of xorz without a CUDA kernel is refused, and whatever waits for the device (a number that is read, a
mask turned to places, a copy to the host or from memory that is not pinned) is written into `waits`. What only a kernel could
know of a delta that it applies is told by nobody before the device was waited for, and then by the next op or `cuda_status`.

`Graph` captures as a CUDA graph does: ops are noted with the buffers that they were given, and a replay computes them on what
lies there by then. Nothing may wait in between, and a replay that reads what nobody holds any more raises. What is not
modelled: work that runs beside the host's next steps, but for a replay that is `late`; streams, which are names, one of them
the current one of every device; memory lent again.
"""

import functools
import weakref
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch._library.custom_ops import OPDEFS
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from xorz import _core

CUDA, OTHER = torch.device("cuda:0"), torch.device("cuda:1")
# Of csrc/ops.cpp: what has a CUDA kernel, and what goes by the host.
KERNELS = {
    "delta_linear", "delta_linear_grad_input", "delta_linear_grouped", "delta_linear_grouped_grad_input", "delta_embedding",
    "delta_restore", "delta_apply_", "delta_digest",
}  # fmt: skip
BY_THE_HOST = {"delta_encode", "delta_slice", "delta_concat", "delta_check"}
# What must know a number on the device before it can go on.
ASKING = {
    "_local_scalar_dense", "is_nonzero", "equal", "nonzero", "masked_select", "_unique2", "unique_dim", "unique_consecutive",
    "repeat_interleave", "nonzero_numpy", "allclose", "bincount",
}  # fmt: skip


# What gives a tensor another shape in its place.
TURNING = {"transpose_", "t_", "squeeze_", "unsqueeze_"}


class Stream:
    """A name for what is asked in order; what runs on one does not run beside another here."""

    def synchronize(self) -> None:
        """As of a driver's, which nothing may wait for in the midst of a capture."""
        if ledger.capturing is not None:
            raise RuntimeError("operation not permitted when stream is capturing: Stream.synchronize")

    def wait_stream(self, other: "Stream") -> None:
        """Notes it."""
        ledger.ordered.append((self, other))

    def record_event(self) -> str:
        """What was asked of it so far."""
        return "an event"

    def wait_event(self, event: str) -> None:
        """Counts it."""
        assert ledger.capturing is None, "a capture would wait for what it has not captured"
        ledger.events += 1


class Ledger:
    """What was asked of the device, in order."""

    def __init__(self) -> None:
        self.waits: list[str] = []
        self.ops: list[str] = []
        self.synchronized = 0
        self.settled: list[torch.device] = []
        self.events = 0
        # Copies to the host: how many bytes.
        self.fetched: list[int] = []
        # Copies from the host: where to.
        self.sent: list[torch.device] = []
        # Copies from one device to another: from, to, dtype.
        self.between: list[tuple[torch.device, torch.device, torch.dtype]] = []
        self.capturing: Graph | None = None
        self.stream: Stream = Stream()
        # Of each op the stream that it was asked of, and who waits for whom.
        self.streams: list[Stream] = []
        self.ordered: list[tuple[Stream, Stream]] = []
        self.late: list[Graph] = []
        # Pinned memory that copies which nobody waits for read, and what it held.
        self.lent: list[tuple[Tensor, Tensor]] = []
        # What kernels have reported, and what of that can be heard.
        self.reported: list[str] = []
        self.heard: list[str] = []
        # What was made on its devices, by the number that Python gives it while it is there.
        self.alive: dict[int, weakref.ref] = {}

    def wait(self, what: str) -> None:
        """The host would wait for the device here, which is an error in the midst of a capture."""
        if self.capturing is not None:
            raise RuntimeError(f"operation not permitted when stream is capturing: {what}")
        self.waits.append(what)

    def hear(self) -> None:
        """Raises what was reported, once."""
        if self.heard:
            raise ValueError(f"an earlier delta_apply_ on cuda:0 reported: {self.heard.pop(0)}")

    def overwritten(self) -> list[Tensor]:
        """Pinned memory that was written to while a copy may still have read it."""
        return [
            source
            for source, was in self.lent
            if not torch.equal(source.view(torch.uint8), was.view(torch.uint8))
        ]

    def catch_up(self) -> None:
        """The device has done all that it was asked."""
        self.heard, self.reported = self.heard + self.reported, []
        late, self.late = self.late, []
        for graph in late:
            graph.run()


ledger = Ledger()


def held() -> int:
    """Bytes of the machine's devices that some tensor holds; those of a machine before it are gone with that one."""
    found = [t.untyped_storage() for ref in list(ledger.alive.values()) if (t := ref()) is not None]
    return sum({storage._cdata: storage.nbytes() for storage in found}.values())


class OnGpu(torch.Tensor):
    """A tensor of a GPU. To C++ it is on the meta device, where torch asks no driver for anything."""

    words: Tensor
    place: torch.device
    device = property(lambda self: self.place)
    is_cuda = property(lambda self: True)
    is_meta = property(lambda self: False)

    @staticmethod
    def __new__(cls, words: Tensor, place: torch.device = CUDA, requires_grad: bool | None = None) -> "OnGpu":
        if requires_grad is not None:  # accelerate makes a parameter anew, by the class of the old one
            return nn.Parameter(words.detach(), requires_grad)
        # A view made in inference mode is none of inference, as of any tensor that was not made there.
        with torch.inference_mode(False):
            out = torch.Tensor._make_wrapper_subclass(
                cls,
                words.size(),
                strides=words.stride(),
                storage_offset=words.storage_offset(),
                dtype=words.dtype,
                device="meta",
            )
        out.words, out.place = words, place
        ledger.alive[id(out)] = weakref.ref(out)
        return out

    def _moved(self, other: "OnGpu") -> None:
        self.words, self.place = other.words, other.place

    # What it shows; `param.data = other` gives a parameter other memory.
    data = property(lambda self: OnGpu(self.words, self.place), _moved)

    __torch_function__ = torch._C._disabled_torch_function_impl

    def data_ptr(self) -> int:
        return self.words.data_ptr()

    def __deepcopy__(self, memo) -> "OnGpu":
        return memo.setdefault(id(self), OnGpu(self.words.clone(), self.place))

    def untyped_storage(self) -> torch.UntypedStorage:
        return self.words.untyped_storage()

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return _run(func, args, kwargs or {})


class _Machine(TorchDispatchMode):
    """Makes what is made on a GPU without any tensor to tell it."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return _run(func, args, kwargs or {})


def _name(func) -> str:
    return func._schema.name.split("::")[-1]


def _is_gpu(leaf) -> bool:
    return isinstance(leaf, OnGpu)


def _run(func, args, kwargs):
    name, leaves = _name(func), tree_leaves((args, kwargs))
    here = [leaf for leaf in leaves if _is_gpu(leaf)]
    to = kwargs.get("device")
    to = None if to is None else torch.device(to)
    # What C++ makes like one of these tensors, it makes on the meta device.
    if to is not None and to.type == "meta":
        to = here[0].place if here else CUDA
    if to is not None and to.type == "cuda" and to.index is None:
        to = CUDA
    if not here and (to is None or to.type != "cuda"):
        return func(*args, **kwargs)
    if name == "to":  # in inference mode it comes as it was called
        if here:
            return func.decompose(*args, **kwargs)
        asked = {key: kwargs[key] for key in ("dtype", "non_blocking") if key in kwargs} | {"device": to}
        return _run(torch.ops.aten._to_copy.default, args[:1], asked)
    if func._schema.name in OPDEFS:
        between = getattr(ledger.capturing, "pieces", None)
        run = functools.partial(_asked, OPDEFS[func._schema.name]._init_fn, args, kwargs)
        return between.without(func._schema.name, run) if between is not None else run()
    ledger.ops.append(name)
    ledger.streams.append(ledger.stream)
    if func.namespace == "xorz":
        _check_op(name, leaves)
        if name != "delta_digest":
            ledger.hear()
    places = list(dict.fromkeys(leaf.place for leaf in here))
    if len(places) > 1 and name not in ("_to_copy", "copy_"):
        raise RuntimeError(
            f"{name}: expected all tensors to be on the same device, but found {places[0]} and {places[1]}"
        )
    if (
        here
        and to is not None
        and to.type == "cuda"
        and to != places[0]
        and name not in ("_to_copy", "copy_")
    ):
        places = [to]
    if name in ASKING:
        ledger.wait(name)
    if name in ("_to_copy", "copy_"):
        return _copied(func, name, args, kwargs, to)
    strays = [leaf for leaf in leaves if isinstance(leaf, Tensor) and not _is_gpu(leaf) and leaf.dim() > 0]
    if here and strays:
        if name not in ("index", "index_put_", "index_put", "_index_put_impl_"):
            raise RuntimeError(
                f"{name}: expected all tensors to be on the same device, but found {places[0]} and cpu"
            )
        ledger.wait(f"{name} by numbers of the host")
    if name == "delta_apply_":
        return _applied(func, args, kwargs, places[0])
    out = _apply(func, args, kwargs, places[0] if places else to)
    if name in TURNING:
        with torch._C._DisableTorchDispatch():
            func(*args, **kwargs)  # what says of itself how it is shaped
    return _noted(func, args, kwargs, out)


def _asked(written, args, kwargs):
    """Of an op that is written in Python, what it asks is what counts."""
    with _Machine():
        return written(*args, **kwargs)


def _applied(func, args, kwargs, place):
    """What the host cannot know of a delta is reported, and heard of later."""
    try:
        return _noted(func, args, kwargs, _apply(func, args, kwargs, place))
    except RuntimeError as refusal:
        if "digest" not in str(refusal):
            raise
        ledger.reported.append(str(refusal))
        return None


def _noted(func, args, kwargs, out):
    """What an op gave, which a graph notes if one is being captured."""
    if ledger.capturing is not None:
        ledger.capturing.note(func, args, kwargs, out)
    return out


def _check_op(name: str, leaves) -> None:
    given = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
    places = list(dict.fromkeys(t.device for t in given))
    if len(places) > 1:
        raise RuntimeError(
            f"xorz::{name}: an argument is on {places[1]}, but another argument is on {places[0]}"
        )
    if name in BY_THE_HOST:
        ledger.wait(name)
    elif name not in KERNELS:
        raise RuntimeError(f"xorz::{name}: this op has no CUDA kernel; move its tensors to the CPU")
    if name == "delta_linear_grouped" and "exact" in leaves:
        ledger.wait(f"{name} in mode exact")


def _apply(func, args, kwargs, place: torch.device | None):
    """The op on the words; what it gives is new on this GPU, or the argument that it has written to."""
    args_, kwargs_ = tree_map(lambda leaf: leaf.words if _is_gpu(leaf) else leaf, (args, kwargs))
    if "device" in kwargs_:
        kwargs_ = {**kwargs_, "device": torch.device("cpu")}
    if kwargs_.get("pin_memory"):
        kwargs_ = {**kwargs_, "pin_memory": False}
    out = func(*args_, **kwargs_)
    owners = {id(leaf.words): leaf for leaf in tree_leaves((args, kwargs)) if _is_gpu(leaf)}

    def given(leaf):
        if not isinstance(leaf, Tensor) or place is None:
            return leaf
        return owners[id(leaf)] if id(leaf) in owners else OnGpu(leaf, place)

    return tree_map(given, out)


def _copied(func, name, args, kwargs, to):
    """Between the devices, or on one."""
    if name == "copy_":
        target, source = args[:2]
        if _is_gpu(target) != _is_gpu(source) and source.dim() > 0:
            never_waits = kwargs.get("non_blocking") or (len(args) > 2 and args[2])
            if not (_is_gpu(target) and never_waits and getattr(source, "pinned", False)):
                ledger.wait("copy_ to the device" if _is_gpu(target) else "copy_ to the host")
            elif ledger.capturing is not None:
                raise RuntimeError("a graph would copy from the same memory of the host at each replay")
            else:
                ledger.lent.append((source, source.clone()))
            if _is_gpu(source):
                ledger.fetched.append(source.nbytes)
        elif target.device != source.device:
            ledger.between.append((source.device, target.device, source.dtype))
        plain = source.words if _is_gpu(source) else source
        (target.words if _is_gpu(target) else target).copy_(plain)
        return _noted(func, args, kwargs, target)
    source = args[0]
    goes = to if to is not None else source.device
    if _is_gpu(source) != (goes.type == "cuda"):
        if goes.type == "cuda":
            ledger.sent.append(goes)
        else:
            ledger.fetched.append(source.nbytes)
        if goes.type == "cuda" and kwargs.get("non_blocking") and getattr(source, "pinned", False):
            if ledger.capturing is not None:
                raise RuntimeError("a graph would copy from the same memory of the host at each replay")
            ledger.lent.append((source, source.clone()))
        else:
            ledger.wait(f"a copy to the {'device' if goes.type == 'cuda' else 'host'}")
    elif goes != source.device:
        ledger.between.append((source.device, goes, source.dtype))
    elif (
        goes == source.device
        and kwargs.get("dtype") in (None, source.dtype)
        and kwargs.get("memory_format") is None
    ):
        return source  # which `.to` of the same device would have given
    return _noted(func, args, kwargs, _apply(func, args, kwargs, goes if goes.type == "cuda" else None))


class Graph:
    """As `torch.cuda.CUDAGraph` and `torch.cuda.graph(...)` in one: `with Graph() as graph`, then `graph.replay()`."""

    def __init__(self, pieces: "Pieces | None" = None) -> None:
        self.pieces = pieces
        self._ops: list = []
        # Memory that was there before, which nobody keeps for a graph's sake; what it made itself it keeps.
        self._given: dict[int, StorageWeakRef] = {}
        self._own: dict[int, torch.UntypedStorage] = {}

    def __enter__(self) -> "Graph":
        assert ledger.capturing is None
        ledger.capturing = self
        return self

    def __exit__(self, *error) -> None:
        ledger.capturing = None

    def note(self, func, args, kwargs, out) -> None:
        given = tree_map(lambda leaf: self._seen(leaf, False), (args, kwargs))
        self._ops.append((func, given, tree_map(lambda leaf: self._seen(leaf, True), out)))

    def _seen(self, leaf, is_new: bool):
        """Where the words of a tensor lie, in place of it."""
        if not isinstance(leaf, Tensor):
            return leaf
        if not _is_gpu(leaf):
            return leaf.clone()  # a number, which goes to the kernel by value
        words = leaf.words
        storage = words.untyped_storage()
        key = storage._cdata
        if key not in self._own and key not in self._given:
            if is_new:
                self._own[key] = storage
            else:
                self._given[key] = StorageWeakRef(storage)
        return _Place(key, words.dtype, words.storage_offset(), words.size(), words.stride())

    def _words(self, leaf):
        if not isinstance(leaf, _Place):
            return leaf
        storage = self._own.get(leaf.key)
        if storage is None:
            found = torch.UntypedStorage._new_with_weak_ptr(self._given[leaf.key].cdata)
            if found is None:
                raise RuntimeError(f"a replay reads freed memory: {list(leaf.size)} of {leaf.dtype}")
            storage = found
        return torch.empty(0, dtype=leaf.dtype).set_(storage, leaf.offset, leaf.size, leaf.stride)

    def replay(self, late: bool = False) -> None:
        """`late`: on a stream that nobody waits for before the device is told to finish."""
        if late:
            ledger.late.append(self)
        else:
            self.run()

    def run(self) -> None:
        with torch.no_grad():
            for func, given, out in self._ops:
                args, kwargs = tree_map(self._words, given)
                if "device" in kwargs:
                    kwargs = {**kwargs, "device": torch.device("cpu")}
                found = tree_leaves(func(*args, **kwargs))
                for there, words in zip(tree_leaves(out), found, strict=True):
                    if isinstance(there, _Place):
                        mine = self._words(there)
                        if mine.data_ptr() != words.data_ptr():
                            mine.copy_(words)


class Pieces:
    """As vLLM's piecewise graphs: ops of these names are in none. Each ends the piece that is captured, runs at once, and
    begins another piece; a replay does the same, and hands them the tensors of the capture. What they give anew nobody keeps.
    """

    def __init__(self, left_out) -> None:
        self._names, self._parts = set(left_out), []

    def __enter__(self) -> "Pieces":
        self._parts.append(Graph(self).__enter__())
        return self

    def __exit__(self, *error) -> None:
        ledger.capturing = None

    def without(self, name: str, run):
        """What an op that is written in Python gives, in a piece or between two."""
        if name not in self._names:
            return run()
        ledger.capturing = None
        out = run()
        self._parts += [run, Graph(self).__enter__()]
        return out

    @property
    def count(self) -> tuple[int, int]:
        """Pieces, and ops between them."""
        graphs = sum(isinstance(part, Graph) for part in self._parts)
        return graphs, len(self._parts) - graphs

    def replay(self) -> None:
        """Piece by piece."""
        for part in self._parts:
            part.replay() if isinstance(part, Graph) else part()


class _Place:
    """A tensor's place in memory."""

    def __init__(self, key: int, dtype: torch.dtype, offset: int, size, stride) -> None:
        self.key, self.dtype, self.offset, self.size, self.stride = key, dtype, offset, size, stride


def to_gpu(model: nn.Module, device_map: dict[str, torch.device] | None = None) -> nn.Module:
    """Put every parameter and buffer there, ties kept; of a tensor that is tied between devices each has a copy, as accelerate
    makes them. `device_map`: prefix of modules' names -> where they are; the longest one counts.
    """
    device_map, made, originals = device_map or {"": CUDA}, {}, []
    for where, module in model.named_modules():
        fits = [p for p in device_map if p in ("", where) or where.startswith(f"{p}.")]
        place = device_map[max(fits, key=len)] if fits else CUDA
        for name, tensor in module._parameters.items():
            if tensor is not None:
                key = (id(tensor), place)
                if key not in made:
                    words = tensor.detach()
                    copies = any(other == id(tensor) for other, _ in made)
                    found = OnGpu(words.clone() if copies else words, place)
                    made[key] = nn.Parameter(found, requires_grad=tensor.requires_grad)
                    originals.append(tensor)  # so that no other takes its id
                module._parameters[name] = made[key]
        if isinstance(module, nn.RNNBase):
            module._flat_weights = [module._parameters.get(name) for name in module._flat_weights_names]
        for name, tensor in module._buffers.items():
            if tensor is not None:
                module._buffers[name] = made.setdefault((id(tensor), place), OnGpu(tensor, place))
    return model


@contextmanager
def machine(monkeypatch) -> Iterator[Ledger]:
    """Inside, `cuda:0` is this double."""
    global ledger
    ledger = Ledger()

    def synchronize(device=None) -> None:
        if ledger.capturing is not None:
            raise RuntimeError("operation not permitted when stream is capturing: synchronize")
        ledger.synchronized += 1
        ledger.settled.append(CUDA if device is None else torch.device(device))
        ledger.catch_up()

    @contextmanager
    def on(stream: Stream) -> Iterator[None]:
        before, ledger.stream = ledger.stream, stream
        try:
            yield
        finally:
            ledger.stream = before

    def pin_memory(tensor, device=None):
        out = tensor.clone()
        out.pinned = True
        return out

    # There is no cuDNN, whose recurrent layers torch would take, and no runtime to begin.
    monkeypatch.setattr(torch.backends.cudnn, "is_acceptable", lambda tensor: False)
    monkeypatch.setattr(torch.cuda, "_lazy_init", lambda: None)
    monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: ledger.stream)
    monkeypatch.setattr(torch.cuda, "stream", on)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: ledger.capturing is not None)
    monkeypatch.setattr(_core, "cuda_serves", lambda device: True)
    monkeypatch.setattr(torch.Tensor, "pin_memory", pin_memory)
    monkeypatch.setattr(torch.Tensor, "is_pinned", lambda self, device=None: getattr(self, "pinned", False))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    monkeypatch.setattr(_core, "cuda_status", lambda device: ledger.hear())
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda device: ledger.wait("rng"))
    monkeypatch.setattr(torch.cuda, "set_rng_state", lambda state, device: ledger.wait("rng"))
    with _Machine():
        yield ledger
