"""CUDA tensors where there is no GPU, for cuda_child.py: the Python side of the doubles of libcuda and of torch.

Device memory is the double's: its words come and go by copies, and a host that reads them dies. Tensors are
made over it by DLPack, since torch can allocate none. aten ops on them are few, and made here.
"""

import ctypes
import sys

import torch

torch.cuda._lazy_init = lambda: None  # there is no runtime to begin
ctypes.CDLL(f"{torch.__path__[0]}/lib/libtorch_cpu.so", mode=ctypes.RTLD_GLOBAL)
torch_double = ctypes.CDLL(None)
cuda = ctypes.CDLL("libcuda.so.1")

import xorz  # noqa: E402, F401  registers the ops

ops = torch.ops.xorz
U64, SIZE = ctypes.c_uint64, ctypes.c_size_t
CODES = {  # of DLPack, and bits
    torch.float32: (2, 32),
    torch.bfloat16: (4, 16),
    torch.float16: (2, 16),
    torch.float64: (2, 64),
    torch.uint8: (1, 8),
    torch.int8: (0, 8),
    torch.int16: (0, 16),
    torch.int32: (0, 32),
    torch.int64: (0, 64),
}


class _Managed(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p),
        ("device_type", ctypes.c_int),
        ("device", ctypes.c_int),
        ("ndim", ctypes.c_int),
        ("code", ctypes.c_uint8),
        ("bits", ctypes.c_uint8),
        ("lanes", ctypes.c_uint16),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", U64),
        ("context", ctypes.c_void_p),
        ("deleter", ctypes.c_void_p),
    )


_capsule = ctypes.pythonapi.PyCapsule_New
_capsule.restype, _capsule.argtypes = ctypes.py_object, [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]
_pointer = ctypes.pythonapi.PyCapsule_GetPointer
_pointer.restype, _pointer.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]
kept = []
contexts = {}


def must(code: int) -> None:
    assert code == 0, f"the double of libcuda says {code}"


def enter(device: int) -> None:
    """Make the device's primary context current, as torch would have."""
    if device not in contexts:
        contexts[device] = ctypes.c_void_p()
        must(cuda.cuInit(0))
        must(cuda.cuDevicePrimaryCtxRetain(ctypes.byref(contexts[device]), device))
    must(cuda.cuCtxSetCurrent(contexts[device]))


def over(address: int, shape, dtype: torch.dtype, device: int, strides=None) -> torch.Tensor:
    code, bits = CODES[dtype]
    sizes = (ctypes.c_int64 * max(len(shape), 1))(*shape)
    steps = (ctypes.c_int64 * max(len(shape), 1))(*strides) if strides else None
    managed = _Managed(address, 2, device, len(shape), code, bits, 1, sizes, steps, 0, None, None)
    kept.append((managed, sizes, steps))
    return torch._C._from_dlpack(_capsule(ctypes.addressof(managed), b"dltensor", None))


def allocate(size: int, device: int) -> int:
    enter(device)
    at = U64()
    must(cuda.cuMemAlloc_v2(ctypes.byref(at), SIZE(max(size, 1))))
    return at.value


def to_cuda(t: torch.Tensor, device: int = 0, offset: int = 0) -> torch.Tensor:
    t = t.contiguous()
    size = t.numel() * t.element_size()
    at = allocate(size + offset, device) + offset
    must(cuda.cuMemcpyHtoD_v2(U64(at), ctypes.c_void_p(t.data_ptr()), SIZE(size)))
    return over(at, t.shape, t.dtype, device)


def put(words: torch.Tensor, t: torch.Tensor) -> None:
    """Words of the host over those of a CUDA tensor."""
    enter(t.get_device())
    size = SIZE(words.numel() * words.element_size())
    must(cuda.cuMemcpyHtoD_v2(U64(t.data_ptr()), ctypes.c_void_p(words.data_ptr()), size))


def to_cpu(t: torch.Tensor) -> torch.Tensor:
    enter(t.get_device())
    out = torch.empty(t.shape, dtype=t.dtype)
    if out.numel() == 0:
        return out
    must(
        cuda.cuMemcpyDtoH_v2(
            ctypes.c_void_p(out.data_ptr()), U64(t.data_ptr()), SIZE(out.numel() * out.element_size())
        )
    )
    return out


aten_calls = []
autocast: list[torch.dtype] = []  # what it would make of a product
DTYPE_OF = {getattr(torch_double, "aoti_torch_dtype_" + str(d).removeprefix("torch."))(): d for d in CODES}


@ctypes.CFUNCTYPE(
    ctypes.c_void_p,
    ctypes.c_char_p,
    ctypes.c_void_p,
    ctypes.c_int64,
    ctypes.POINTER(ctypes.c_int64),
    ctypes.c_int32,
)
def aten(name, handle, dims, sizes, dtype):
    """An aten op on a CUDA tensor, for torch_double.cpp."""
    try:
        name, sizes, device = (
            name.decode(),
            [sizes[i] for i in range(dims)],
            torch_double.torch_double_device(),
        )
        aten_calls.append((name, sizes))
        at = ctypes.c_void_p()
        torch_double.aoti_torch_get_data_ptr(ctypes.c_void_p(handle), ctypes.byref(at))
        self = (
            over(at.value or 0, sizes, DTYPE_OF[dtype], device)
            if name not in ("aten::new_empty", "aten::linear") and "index" not in name and name[:5] != "copy_"
            else None
        )
        if name == "copy_on_device":
            rows, columns, apart, source = sizes
            words = to_cpu(over(source, (rows, columns), DTYPE_OF[dtype], device))
            for i in range(rows):
                row = (at.value or 0) + i * apart * words.element_size()
                put(words[i], over(row, (columns,), words.dtype, device))
            result = over(at.value or 0, (rows, columns), DTYPE_OF[dtype], device, (apart, 1))
        elif name in ("copy_to_host", "copy_to_device"):
            *sizes, host = sizes
            result = over(at.value or 0, sizes, DTYPE_OF[dtype], device)
            size = result.numel() * result.element_size()
            if name == "copy_to_host":
                words = to_cpu(result)
                ctypes.memmove(host, words.data_ptr(), size)
            elif size:
                words = torch.frombuffer(bytearray(ctypes.string_at(host, size)), dtype=torch.uint8)
                put(words, result)
        elif name == "aten::new_empty":
            size = torch.Size(sizes).numel() * DTYPE_OF[dtype].itemsize
            result = over(allocate(size, device), sizes, DTYPE_OF[dtype], device)
        elif name in ("aten::clone", "aten::contiguous"):
            result = to_cuda(to_cpu(self), device)
        elif name == "aten::to_int64":
            result = to_cuda(to_cpu(self).long(), device)
        elif name == "aten::linear":
            weight, n, k, m, bias = sizes
            weight = to_cpu(over(weight, (n, k), DTYPE_OF[dtype], device))
            x = to_cpu(over(at.value or 0, (m, k), DTYPE_OF[dtype], device))
            bias = to_cpu(over(bias, (n,), DTYPE_OF[dtype], device)) if bias else None
            result = to_cuda(
                torch.nn.functional.linear(x, weight, bias).to(autocast[0] if autocast else x.dtype), device
            )
        elif name in ("aten::index_select", "aten::index_copy_"):
            n, k, place, count, *rows = sizes
            matrix, index = (
                over(at.value or 0, (n, k), DTYPE_OF[dtype], device),
                over(place, (count,), torch.int64, device),
            )
            words, index = to_cpu(matrix), to_cpu(index)
            if rows:
                words[index] = to_cpu(over(rows[0], (count, k), DTYPE_OF[dtype], device))
                put(words, matrix)
                result = matrix
            else:
                result = to_cuda(words[index], device)
        elif name in ("aten::zero_", "aten::view"):
            result = self
        else:
            raise NotImplementedError(name)
        return _pointer(torch._C._aoti.unsafe_alloc_void_ptr_from_tensor(result), None)
    except BaseException as error:
        print(f"aten of the test: {error!r}", file=sys.stderr)
        return None


def begin(device: int = 0) -> int:
    """A stream of the device, torch's current one from now on."""
    enter(device)
    stream = ctypes.c_void_p()
    must(cuda.cuStreamCreate(ctypes.byref(stream), 1))
    torch_double.torch_double_set(aten, device, stream)
    return stream.value


def log() -> list[str]:
    cuda.xorz_double_log.restype = ctypes.c_char_p
    return cuda.xorz_double_log().decode().splitlines()


def launches() -> list[str]:
    return [line for line in log() if line.startswith("cuLaunchKernel")]
