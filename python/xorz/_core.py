"""The C ABI (csrc/xorz.h) through ctypes: packages and headers of deltas. Every call releases the GIL; no torch op here."""

import ctypes
import json
import os
import threading
from collections.abc import Callable
from ctypes import POINTER, byref, c_char, c_char_p, c_int32, c_size_t, c_uint8, c_uint32, c_uint64, c_void_p
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from . import _library
from .progress import bar, seen

_lib = _library.load()
_T = TypeVar("_T")


class _Error(ctypes.Structure):
    _fields_ = [("kind", c_int32), ("message", c_char * 1020)]


class _Buffer(ctypes.Structure):
    _fields_ = [("data", POINTER(c_uint8)), ("length", c_size_t)]


class _Matrix(ctypes.Structure):
    _fields_ = [
        ("words", c_void_p),
        ("bytes", c_size_t),
        ("n", c_size_t),
        ("k", c_size_t),
        ("dtype", c_uint32),
    ]


class _Tensor(ctypes.Structure):
    _fields_ = [
        ("name", c_char_p),
        ("dtype", c_char_p),
        ("dims", POINTER(c_size_t)),
        ("rank", c_size_t),
        ("data", c_void_p),
        ("bytes", c_size_t),
    ]


class _Options(ctypes.Structure):
    _fields_ = [
        ("prefer", c_int32),
        ("codec", c_int32),
        ("level", c_int32),
        ("trust", c_int32),
        ("strip_prefix", c_char_p),
    ]


class _Run(ctypes.Structure):
    _fields_ = [("jobs", c_uint32), ("flags", c_uint32), ("stop", POINTER(c_uint32))]


class _Watch(ctypes.Structure):
    _fields_ = [("stop", c_uint32), ("stages", c_uint32), ("total", c_uint64), ("done", c_uint64)]


class _Info(ctypes.Structure):
    _fields_ = [
        ("encoding", c_uint32),
        ("dtype", c_uint32),
        ("n", c_uint64),
        ("k", c_uint64),
        ("tile_rows", c_uint64),
        ("tile_cols", c_uint64),
        ("changed", c_uint64),
        ("base_digest", c_uint8 * 16),
    ]


_PREFER = {None: -1, "speed": 0, "memory": 1, "auto": 2}
_CODECS = {None: -1, "xor": 0, "resident": 1, "resident-zstd": 2, "planes": 3, "predicted": 6}
_CODEC_FAST = -2
_ENCODINGS = ("unchanged", "sparse", "exponent", "raw")
_IO = 6
_NO_SHA256 = 1
_RUN_TRUST_SHA256 = 2
_RUN_WATCHED = 4
# Seconds between two looks at how far a job is, and those after which it is worth a bar.
_LOOK, _WORTH_A_BAR = 0.1, 0.5
_TRUST = {"digest": 0, "sha256": 1}

# safetensors name, code in csrc/xorz.h.
DTYPES = {
    torch.float32: ("F32", 1),
    torch.bfloat16: ("BF16", 2),
    torch.float16: ("F16", 3),
    torch.float64: ("F64", 4),
    torch.uint8: ("U8", 5),
    torch.int8: ("I8", 6),
    torch.bool: ("BOOL", 7),
    torch.float8_e4m3fn: ("F8_E4M3", 8),
    torch.float8_e5m2: ("F8_E5M2", 9),
    torch.uint16: ("U16", 10),
    torch.int16: ("I16", 11),
    torch.uint32: ("U32", 12),
    torch.int32: ("I32", 13),
    torch.uint64: ("U64", 14),
    torch.int64: ("I64", 15),
}
# Those that have no code of their own: safetensors name (or one in its manner), the words that they are made of, how many words
# a torch element takes, and how many elements of the file.
OTHERS = {
    getattr(torch, name): kind
    for name, kind in {
        "complex64": ("C64", torch.float32, 2, 1),
        "complex128": ("C128", torch.float64, 2, 1),
        "complex32": ("C32", torch.uint32, 1, 1),
        "float8_e4m3fnuz": ("F8_E4M3FNUZ", torch.uint8, 1, 1),
        "float8_e5m2fnuz": ("F8_E5M2FNUZ", torch.uint8, 1, 1),
        "float8_e8m0fnu": ("F8_E8M0", torch.uint8, 1, 1),
        "float4_e2m1fn_x2": ("F4", torch.uint8, 1, 2),
    }.items()
    if hasattr(torch, name)
}
DTYPE_OF_NAME = {name: dtype for dtype, (name, _) in DTYPES.items()} | {
    name: dtype for dtype, (name, *_) in OTHERS.items()
}
DTYPE_OF_CODE = {code: dtype for dtype, (_, code) in DTYPES.items()}


def _declare(name: str, *arguments: Any, result: Any = c_int32) -> None:
    function = getattr(_lib, name)
    function.argtypes, function.restype = arguments, result


_E = POINTER(_Error)
_declare("xorz_version", result=c_char_p)
_declare("xorz_prefer_auto")
_declare("xorz_cuda_open", c_int32, _E)
_declare("xorz_cuda_status", c_int32, _E)
_declare("xorz_buffer_free", POINTER(_Buffer), result=None)
_declare("xorz_panels_restored", result=c_uint64)
_declare("xorz_scratch_peak_bytes", result=c_uint64)
_declare("xorz_reset_counters", result=None)
_declare("xorz_delta_info", c_void_p, c_size_t, POINTER(_Info), _E)
_declare("xorz_delta_matches", c_void_p, c_size_t, POINTER(_Matrix), _E)
_declare("xorz_delta_matches_known", c_void_p, c_size_t, POINTER(_Matrix), c_char_p, _E)
_declare("xorz_exchange_encode", POINTER(_Matrix), POINTER(_Matrix), POINTER(_Buffer), POINTER(c_uint64), _E)
_declare("xorz_exchange_apply", POINTER(_Matrix), c_void_p, c_size_t, c_int32, _E)
_declare("xorz_writer_new", c_char_p, POINTER(_Options), POINTER(c_void_p), _E)
_declare("xorz_writer_add", c_void_p, POINTER(_Tensor), POINTER(_Tensor), _E)
_declare("xorz_writer_removed", c_void_p, c_char_p, _E)
_declare("xorz_writer_finish", c_void_p, POINTER(_Buffer), _E)
_declare("xorz_writer_free", c_void_p, result=None)
_declare("xorz_package_open", c_char_p, POINTER(c_void_p), _E)
_declare("xorz_package_close", c_void_p, result=None)
_declare("xorz_package_trust", c_void_p, c_int32, _E)
_declare("xorz_package_describe", c_void_p, POINTER(_Buffer), _E)
_declare("xorz_package_resident", c_void_p, c_char_p, POINTER(_Matrix), c_int32, POINTER(_Buffer), _E)
_declare(
    "xorz_package_resident_known",
    c_void_p,
    c_char_p,
    POINTER(_Matrix),
    c_char_p,
    c_int32,
    POINTER(_Buffer),
    _E,
)
_SINK = ctypes.CFUNCTYPE(c_int32, c_void_p, c_size_t, c_size_t, c_void_p, c_size_t, c_uint64)
_declare("xorz_package_exchanges", c_void_p, c_char_p, POINTER(_Matrix), _SINK, c_void_p, _E)
_declare("xorz_base_open", c_char_p, POINTER(_Run), POINTER(c_void_p), _E)
_declare("xorz_base_close", c_void_p, result=None)
_declare("xorz_package_resident_from", c_void_p, c_char_p, c_void_p, c_int32, POINTER(_Buffer), _E)
_declare("xorz_package_restore_from", c_void_p, c_char_p, c_void_p, c_void_p, c_size_t, _E)
_declare("xorz_package_restore", c_void_p, c_char_p, POINTER(_Matrix), c_void_p, c_size_t, _E)
_declare(
    "xorz_pack_files", c_char_p, c_char_p, c_char_p, POINTER(_Options), POINTER(_Run), POINTER(_Buffer), _E
)
_declare(
    "xorz_pack_fleet", POINTER(c_char_p), c_size_t, POINTER(c_char_p), POINTER(c_char_p), c_size_t, POINTER(_Options),
    POINTER(_Run), POINTER(_Buffer), _E
)  # fmt: skip
_declare("xorz_unpack_files", c_char_p, c_char_p, c_char_p, POINTER(_Run), POINTER(_Buffer), _E)
_declare("xorz_verify_files", c_char_p, c_char_p, c_char_p, POINTER(_Run), POINTER(_Buffer), _E)


def _call(name: str, *arguments: Any) -> None:
    error = _Error()
    if getattr(_lib, name)(*arguments, byref(error)) != 0:
        text = error.message.decode("utf-8", "replace")
        raise failure(error.kind, text)


def _job(call: Callable[["_Run"], _T], run: "_Run", doing: str) -> _T:
    """What `call` gives for a job over files, which Ctrl-C and other signals end: soon, and nothing is left behind. `doing` is
    what its bar is called.

    Python sees a signal only between two steps of the main thread, and the whole job would be one. So another thread does it
    while the main thread waits.
    """
    if threading.current_thread() is not threading.main_thread():
        return call(run)
    watch, done = _Watch(), []
    stop = ctypes.cast(ctypes.pointer(watch), POINTER(c_uint32))
    watched = _Run(run.jobs, run.flags | _RUN_WATCHED, stop)

    def work() -> None:
        try:
            done.append((call(watched), None))
        except BaseException as error:
            done.append((None, error))

    thread = threading.Thread(target=work, name="xorz job")
    try:
        thread.start()
    except RuntimeError:
        return call(run)  # no more threads are to be had
    try:
        _show(thread, watch, doing)
    except BaseException:
        watch.stop = 1
        thread.join()
        raise
    result, error = done[0]
    if error is not None:
        raise error
    return result


def _show(thread: threading.Thread, watch: _Watch, doing: str) -> None:
    """Wait for the job that `thread` does; show how far it is, if it takes long and somebody looks."""
    thread.join(_WORTH_A_BAR)
    if not thread.is_alive():
        return
    with bar(total=watch.total, unit="B", desc=doing) as shown:
        stages, told = watch.stages, 0
        while thread.is_alive():
            thread.join(_LOOK if seen(shown) else None)
            # The total is written before the stage is counted, and what is done of it last.
            if watch.stages != stages:
                stages, told = watch.stages, 0
                shown.reset(watch.total)
            done = min(watch.done, watch.total)
            shown.update(max(0, done - told))
            told = max(told, done)


def _take(buffer: _Buffer) -> bytes:
    try:
        return ctypes.string_at(buffer.data, buffer.length) if buffer.length else b""
    finally:
        _lib.xorz_buffer_free(byref(buffer))


def _json(name: str, *arguments: Any) -> dict[str, Any]:
    buffer = _Buffer()
    _call(name, *arguments, byref(buffer))
    return json.loads(_take(buffer))


def _path(path: Any) -> bytes:
    encoded = os.fsencode(path)
    if b"\0" in encoded:
        raise ValueError(f"path {path!r} holds a zero byte")
    return encoded


def _name(name: Any) -> bytes:
    if not isinstance(name, str):
        raise TypeError(f"a tensor's name must be a str, but is {type(name).__name__}")
    if "\0" in name:
        raise ValueError(f"tensor name {name!r} holds a zero byte")
    return name.encode()


def _choice(what: str, value: Any, choices: dict[Any, int]) -> int:
    if value not in choices:
        raise ValueError(f"{what} must be one of {', '.join(repr(c) for c in choices)}, but is {value!r}")
    return choices[value]


def version() -> str:
    """The version of the native library, such as `0.1.0`."""
    return _lib.xorz_version().decode()


def panels_restored() -> int:
    """Panels of fine-tuned weights that products have restored into scratch since the last reset, process-wide."""
    return _lib.xorz_panels_restored()


def scratch_peak_bytes() -> int:
    """The most scratch, in bytes, that an op has held since the last reset."""
    return _lib.xorz_scratch_peak_bytes()


def reset_counters() -> None:
    """Set both counters to zero."""
    _lib.xorz_reset_counters()


class DeltaInfo(NamedTuple):
    """What the header of a resident delta says of itself."""

    encoding: str
    dtype: torch.dtype
    shape: tuple[int, int]
    tile: tuple[int, int]
    changed: int
    base_digest: str


def delta_info(delta: Tensor) -> DeltaInfo:
    """Read the header of a resident delta (copied to the CPU if it is elsewhere). ValueError if it is not one."""
    if not isinstance(delta, Tensor):
        raise TypeError(f"delta must be a tensor, but is {type(delta).__name__}")
    if delta.dtype != torch.uint8 or delta.dim() != 1:
        raise ValueError(
            f"delta must be a 1-D uint8 tensor (a resident delta), but is {delta.dtype} {list(delta.shape)}"
        )
    host, info = on_host("delta", delta), _Info()
    _call("xorz_delta_info", host.data_ptr(), host.numel(), byref(info))
    return DeltaInfo(
        _ENCODINGS[info.encoding],
        DTYPE_OF_CODE[info.dtype],
        (info.n, info.k),
        (info.tile_rows, info.tile_cols),
        info.changed,
        bytes(info.base_digest).hex(),
    )


def delta_matches(delta: Tensor, base: Tensor) -> None:
    """ValueError unless the delta's bytes are whole and `base`, contiguous on the CPU, is its base by digest."""
    host, matrix = delta.detach().cpu().contiguous(), _matrix(base)
    _call("xorz_delta_matches", host.data_ptr(), host.numel(), byref(matrix))


def delta_matches_known(delta: Tensor, base: Tensor, digest: bytes) -> None:
    """The same of a base wherever it is, whose digest is known; what its words alone could tell of a forged delta is not."""
    host = delta.detach().cpu().contiguous()
    _call("xorz_delta_matches_known", host.data_ptr(), host.numel(), byref(_matrix(base)), _sixteen(digest))


def _sixteen(digest: bytes) -> bytes:
    if len(digest) != 16:
        raise ValueError(f"a digest has 16 bytes, but this one has {len(digest)}")
    return digest


def exchange(old: Tensor, new: Tensor) -> tuple[bytes, int]:
    """Where two versions of a tensor's words, contiguous on the CPU, differ and by what, for `exchange_apply` in this process;
    and how many differ. ValueError unless dtypes and shapes are the same.
    """
    buffer, changed = _Buffer(), c_uint64()
    pair = [byref(_in_place(name, tensor)) for name, tensor in (("old", old), ("new", new))]
    _call("xorz_exchange_encode", *pair, byref(buffer), byref(changed))
    return _take(buffer), changed.value


def exchange_apply(words: Tensor, content: bytes | memoryview, back: bool = False) -> None:
    """Make the new words of the old ones in place, or with `back` the old ones of the new; no other word is touched.

    ValueError where a word that changes is not what it was when the exchange was made, or the exchange is damaged: all words
    are as they were then.
    """
    # A type for each length would be made for an array, which takes longer than the call.
    start = c_char_p(content) if isinstance(content, bytes) else byref(c_uint8.from_buffer(content))
    at = ctypes.cast(start, c_void_p)
    _call("xorz_exchange_apply", byref(_in_place("words", words)), at, len(content), int(back))


def dense(name: str, tensor: Any) -> Tensor:
    """The tensor without gradients, as words of its own wherever it is. TypeError if it is none, or has no words."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a tensor, but is {type(tensor).__name__}")
    if tensor.layout != torch.strided or tensor.is_meta or tensor.is_quantized:
        what = f"{tensor.dtype} {tensor.layout} on {tensor.device}"
        raise TypeError(f"{name} must be a dense tensor with data, but is {what}")
    return tensor.detach().resolve_conj().resolve_neg()


def on_host(name: str, tensor: Any) -> Tensor:
    """The tensor as contiguous CPU memory; no copy if it is that already."""
    return dense(name, tensor).cpu().contiguous()


def _in_place(name: str, tensor: Tensor) -> _Matrix:
    if not tensor.is_cpu or not tensor.is_contiguous():
        raise ValueError(
            f"{name} must be contiguous on the CPU, but is {list(tensor.stride())} on {tensor.device}"
        )
    return _matrix(tensor)


def _matrix(tensor: Tensor) -> _Matrix:
    n = tensor.shape[0] if tensor.dim() > 1 else 1
    k = torch.Size(tensor.shape[1:]).numel() if tensor.dim() > 1 else tensor.numel()
    dtype = tensor.dtype
    if dtype in OTHERS:
        _, dtype, words, _ = OTHERS[dtype]
        k *= words
    return _Matrix(tensor.data_ptr(), tensor.nbytes, n, k, DTYPES[dtype][1])


def _tensor(name: str, tensor: Tensor) -> _Tensor:
    if tensor.dtype not in DTYPES and tensor.dtype not in OTHERS:
        raise TypeError(f"tensor `{name}` has dtype {tensor.dtype}, which a package cannot hold")
    shape = shape_of(tensor)
    dims = (c_size_t * max(1, len(shape)))(*shape)
    dtype = dtype_name(tensor.dtype).encode()
    return _Tensor(_name(name), dtype, dims, len(shape), tensor.data_ptr(), tensor.nbytes)


def shape_of(tensor: Tensor) -> list[int]:
    """The dimensions that a file gives the tensor: of packed elements there are more than torch counts."""
    shape, packed = list(tensor.shape), OTHERS[tensor.dtype][3] if tensor.dtype in OTHERS else 1
    return [*shape[:-1], shape[-1] * packed] if shape else shape


def resolved(prefer: str) -> str:
    """What "auto" comes to on this machine, "speed" or "memory"; other words as they are."""
    return ("speed", "memory")[_lib.xorz_prefer_auto()] if prefer == "auto" else prefer


def options(
    prefer: str = "memory",
    codec: str | None = None,
    level: int = 0,
    strip_prefix: str | None = None,
    trust: str = "digest",
    fast: bool = False,
) -> _Options:
    """How to pack; ValueError for words that do not exist."""
    code = _choice("prefer", prefer, {k: v for k, v in _PREFER.items() if k})
    if not isinstance(fast, bool):
        raise TypeError(f"fast must be a bool, but is {type(fast).__name__}")
    if fast and codec is not None:
        raise ValueError(
            f"fast leaves codecs out where none is named, but codec is {codec!r}; give one of them, not both"
        )
    prefix = None if strip_prefix is None else strip_prefix.encode()
    codec_code = _CODEC_FAST if fast else _choice("codec", codec, _CODECS)
    return _Options(code, codec_code, level, _choice("trust", trust, _TRUST), prefix)


class Writer:
    """A package being written; it appears at its path when `finish` is called, or not at all."""

    def __init__(self, path: Any, options: _Options) -> None:
        """Begin a package at `path`."""
        self._handle = c_void_p()
        _call("xorz_writer_new", _path(path), byref(options), byref(self._handle))

    def add(self, name: str, fine_tuned: Tensor, base: Tensor | None, base_name: str | None = None) -> None:
        """Add a tensor, as a delta against `base` if dtype and shape agree, else alone."""
        fine_tuned = on_host(name, fine_tuned)
        old = None
        if base is not None:
            base = on_host(name, base)
            known = base.dtype in DTYPES or base.dtype in OTHERS
            old = byref(_tensor(base_name or name, base)) if known else None
        _call("xorz_writer_add", self._handle, byref(_tensor(name, fine_tuned)), old)

    def removed(self, name: str) -> None:
        """Note a base tensor that the fine-tune lacks."""
        _call("xorz_writer_removed", self._handle, _name(name))

    def finish(self) -> dict[str, Any]:
        """Write the package; gives its totals."""
        handle, self._handle = self._handle, c_void_p()
        buffer = _Buffer()
        _call("xorz_writer_finish", handle, byref(buffer))
        return json.loads(_take(buffer))

    def __enter__(self) -> "Writer":
        """Use as a context: left without `finish`, no file is made."""
        return self

    def __exit__(self, *_: object) -> None:
        """Drop a package that was not finished; nothing appears at its path."""
        handle, self._handle = self._handle, c_void_p()
        _lib.xorz_writer_free(handle)


def _tensor_of(buffer: _Buffer) -> Tensor:
    """The buffer's bytes as a tensor of their own; the buffer is freed."""
    try:
        out = torch.empty(buffer.length, dtype=torch.uint8)
        ctypes.memmove(out.data_ptr(), buffer.data, buffer.length)
        return out
    finally:
        _lib.xorz_buffer_free(byref(buffer))


def room(entry: dict[str, Any]) -> Tensor:
    """An empty tensor for a package's entry. ValueError if torch has none of its dtype."""
    dtype, shape = DTYPE_OF_NAME.get(entry["dtype"]), list(entry["shape"])
    packed = OTHERS[dtype][3] if dtype in OTHERS else 1
    if dtype is None or (packed > 1 and (not shape or shape[-1] % packed)):
        raise ValueError(
            f"tensor `{entry['name']}` has dtype {entry['dtype']} {shape}, which this torch package cannot give back"
        )
    return torch.empty([*shape[:-1], shape[-1] // packed] if shape else shape, dtype=dtype)


class Base:
    """An open base on disk: its digests are known, its words are read only where they are needed."""

    def __init__(self, path: Any, run: "_Run") -> None:
        """Open `path`, a safetensors file or a folder."""
        self.handle, encoded = c_void_p(), _path(path)
        _job(lambda run: _call("xorz_base_open", encoded, byref(run), byref(self.handle)), run, "opening")

    def __enter__(self) -> "Base":
        """Use as a context, which closes it."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close the base; the object cannot be used after that."""
        handle, self.handle = self.handle, c_void_p()
        _lib.xorz_base_close(handle)


class Package:
    """An open package, read only."""

    def __init__(self, path: Any, trust: str = "digest") -> None:
        """Open `path`: OSError if it cannot be read, ValueError if it is no package, or has no sha256 to be trusted by."""
        self._handle, code = c_void_p(), _choice("trust", trust, _TRUST)
        _call("xorz_package_open", _path(path), byref(self._handle))
        if code:
            try:
                _call("xorz_package_trust", self._handle, code)
            except BaseException:
                self.__exit__()
                raise
        self.description = _json("xorz_package_describe", self._handle)
        self.entries: dict[str, dict[str, Any]] = {e["name"]: e for e in self.description["entries"]}

    def resident(self, name: str, base: Tensor, prefer: str | None) -> Tensor:
        """The resident delta of one tensor against `base`, whose digest is checked."""
        matrix, buffer = _matrix(base), _Buffer()
        code = _choice("prefer", prefer, _PREFER)
        _call("xorz_package_resident", self._handle, _name(name), byref(matrix), code, byref(buffer))
        return _tensor_of(buffer)

    def resident_known(self, name: str, base: Tensor, digest: bytes, prefer: str | None) -> Tensor | None:
        """The same against a base wherever it is, whose digest is known; None where its words are needed."""
        matrix, buffer = _matrix(base), _Buffer()
        code, known = _choice("prefer", prefer, _PREFER), _sixteen(digest)
        _call(
            "xorz_package_resident_known",
            self._handle,
            _name(name),
            byref(matrix),
            known,
            code,
            byref(buffer),
        )
        made = _tensor_of(buffer)
        return made if made.numel() else None

    def exchanges(self, name: str, base: Tensor, give: Callable[[int, int, bytes, int], None]) -> None:
        """What turns `base`, whose digest is checked first, into the tensor, for `exchange_apply`: `give` gets the first word,
        how many words, the exchange of these, and how many of them differ. Parts that stay are left out; no delta is made.
        """
        failed: list[BaseException] = []

        def sink(_: Any, first: int, words: int, content: int, length: int, changed: int) -> int:
            try:
                give(first, words, ctypes.string_at(content, length), changed)
            except BaseException as error:
                failed.append(error)
            return len(failed)

        try:
            _call(
                "xorz_package_exchanges",
                self._handle,
                _name(name),
                byref(_in_place("base", base)),
                _SINK(sink),
                None,
            )
        except RuntimeError:
            if failed:
                raise failed[0] from None
            raise

    def resident_from(self, name: str, base: "Base", prefer: str | None) -> Tensor:
        """The resident delta of one tensor against a base on disk."""
        buffer, code = _Buffer(), _choice("prefer", prefer, _PREFER)
        _call("xorz_package_resident_from", self._handle, _name(name), base.handle, code, byref(buffer))
        return _tensor_of(buffer)

    def restore(self, name: str, base: Tensor | None) -> Tensor:
        """The fine-tuned tensor, restored bit for bit; `base` is None where it is stored alone."""
        out = room(self.entries[name])
        matrix = None if base is None else byref(_matrix(base))
        _call("xorz_package_restore", self._handle, _name(name), matrix, out.data_ptr(), out.nbytes)
        return out

    def restore_from(self, name: str, base: "Base") -> Tensor:
        """The same, from a base on disk."""
        out = room(self.entries[name])
        _call("xorz_package_restore_from", self._handle, _name(name), base.handle, out.data_ptr(), out.nbytes)
        return out

    def __enter__(self) -> "Package":
        """Use as a context, which closes it."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close the package; the object cannot be used after that."""
        handle, self._handle = self._handle, c_void_p()
        _lib.xorz_package_close(handle)


def run(jobs: int | None = None, sha256: bool = True, trust: str = "digest") -> _Run:
    """How a job over files runs: `jobs` threads (None: one per core), with or without the sha256 of restored files, and what
    must speak for the base."""
    if jobs is not None and (not isinstance(jobs, int) or isinstance(jobs, bool)):
        raise TypeError(f"jobs must be an int or None, but is {type(jobs).__name__}")
    if jobs is not None and not 1 <= jobs <= 1024:
        raise ValueError(f"jobs must be 1 to 1024 or None (one per core), but is {jobs}")
    flags = _RUN_TRUST_SHA256 if _choice("trust", trust, _TRUST) else 0
    return _Run(jobs or 0, flags | (0 if sha256 else _NO_SHA256))


def cuda_status(device: int) -> None:
    """Raise what kernels on a CUDA device have reported: ValueError or RuntimeError by its kind."""
    _call("xorz_cuda_status", device)


def cuda_serves(device: int) -> bool:
    """Whether this installation and driver have kernels for a CUDA device; if not, its tensors are copied to be read."""
    try:
        _call("xorz_cuda_open", device)
    except (RuntimeError, ValueError, OSError):
        return False
    return True


def pack_files(base: Any, fine_tuned: Any, package: Any, options: _Options, run: _Run) -> dict[str, Any]:
    """Pack a checkpoint; gives the totals."""
    paths = (_path(base), _path(fine_tuned), _path(package))
    return _job(lambda run: _json("xorz_pack_files", *paths, byref(options), byref(run)), run, "packing")


def pack_fleet(
    bases: list[Any], fine_tuned: list[Any], packages: list[Any], options: _Options, run: _Run
) -> dict[str, Any]:
    """Pack many checkpoints, each into its package; gives what became of each."""

    def strings(paths: list[Any]) -> Any:
        return (c_char_p * len(paths))(*map(_path, paths))

    old, new, out = strings(bases), strings(fine_tuned), strings(packages)
    return _job(
        lambda run: _json(
            "xorz_pack_fleet", old, len(bases), new, out, len(fine_tuned), byref(options), byref(run)
        ),
        run,
        "packing",
    )


def failure(kind: int, text: str) -> Exception:
    """The exception for an error of that kind."""
    return (OSError if kind == _IO else RuntimeError if kind >= 7 else ValueError)(text)


def unpack_files(base: Any, package: Any, out: Any, run: _Run) -> dict[str, Any]:
    """Give the fine-tuned checkpoint back; gives the totals."""
    paths = (_path(base), _path(package), _path(out))
    return _job(lambda run: _json("xorz_unpack_files", *paths, byref(run)), run, "unpacking")


def verify_files(base: Any, package: Any, fine_tuned: Any, run: _Run) -> dict[str, Any]:
    """Restore everything without writing it, and compare; gives the totals."""
    paths = (_path(base), _path(package), None if fine_tuned is None else _path(fine_tuned))
    return _job(lambda run: _json("xorz_verify_files", *paths, byref(run)), run, "verifying")


def dtype_name(dtype: torch.dtype) -> str:
    """The safetensors name of a dtype; torch's own where there is none."""
    return (DTYPES.get(dtype) or OTHERS.get(dtype) or (str(dtype),))[0]
