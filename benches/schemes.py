"""Other people's ways of storing a fine-tune, each in one thread. Run by ``sizes.py``, one job a process.

A scheme says what becomes of one tensor beside its base; this file does the rest for all of them alike: it reads the
checkpoint, hands over tensor after tensor, writes what comes back behind the file's own header, and gives the file
back byte for byte. What is done to the words is numpy's and the zstd library's work, at the levels that the projects
themselves use. They were written from what the projects document and do, not from their code:

* ``planes-3``: the XOR, each byte of its words in a stream of its own, zstd-3 (BitX of ZipLLM).
* ``planes-1``: the same in chunks of 2 MiB, zstd-1 (TensorDex).
* ``xor-1``: the XOR of each tensor, zstd-1 (slime, SkyRL).
* ``gaps-1``: which words changed, as gaps, and their XOR, all tensors in one stream, zstd-1 (NeMo-RL; PULSE's is close).
* ``positions``: which words changed, as int32, and their new values, uncompressed (vLLM's ``sparse_nccl``, verl).
* ``zipnn-alone``: ZipNN of the fine-tune, which needs no base.

A tensor that the base lacks, or has in another dtype or shape, takes zstd at the scheme's level.
"""

from __future__ import annotations

import abc
import json
import os
import pathlib
import struct
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import zstandard

Bytes = np.ndarray[Any, np.dtype[np.uint8]]
Blobs = list[bytes]
WIDTHS = {"F64": 8, "I64": 8, "U64": 8, "F32": 4, "I32": 4, "U32": 4, "F16": 2, "BF16": 2, "I16": 2, "U16": 2}
CHUNK = 2 << 20


class Checkpoint:
    """A safetensors file: its header as it stands, and its tensors' bytes, mapped."""

    def __init__(self, path: str) -> None:
        """Map the file at `path`."""
        self.all = np.memmap(path, dtype=np.uint8, mode="r")
        self.start = 8 + struct.unpack("<Q", self.all[:8].tobytes())[0]
        self.header = self.all[8 : self.start].tobytes()
        self.infos = tensors_of(self.header)

    def bytes(self, name: str) -> Bytes:
        """The bytes of one tensor."""
        a, b = self.infos[name]["data_offsets"]
        return self.all[self.start + a : self.start + b]

    def beside(self, name: str, info: dict[str, Any]) -> Bytes | None:
        """The bytes of the tensor of this name, if it is of this dtype and shape."""
        mine = self.infos.get(name)
        same = mine is not None and all(mine[k] == info[k] for k in ("dtype", "shape"))
        return self.bytes(name) if same else None


def tensors_of(header: bytes) -> dict[str, dict[str, Any]]:
    """What a header says of its tensors, in the order of their bytes."""
    found = {name: info for name, info in json.loads(header).items() if name != "__metadata__"}
    return dict(sorted(found.items(), key=lambda item: item[1]["data_offsets"]))


def words(raw: Bytes, width: int) -> np.ndarray[Any, Any]:
    """Bytes as unsigned words."""
    return np.ascontiguousarray(raw).view(f"<u{width}")


class Scheme(abc.ABC):
    """What a scheme does; one object for each job."""

    level = 3

    def __init__(self) -> None:
        """One compressor for all its tensors."""
        self.deflate = zstandard.ZstdCompressor(level=self.level).compress
        self.inflate = zstandard.ZstdDecompressor().decompress

    @abc.abstractmethod
    def encode(self, base: Bytes, tuned: Bytes, width: int) -> Blobs:
        """What is stored of a tensor."""

    @abc.abstractmethod
    def decode(self, base: Bytes, blobs: Blobs, width: int) -> Bytes:
        """The tensor back."""

    def alone(self, tuned: Bytes, width: int) -> Blobs:
        """What is stored of a tensor that has no base."""
        return [self.deflate(tuned.tobytes())]

    def back(self, blobs: Blobs, width: int) -> Bytes:
        """That tensor back."""
        return np.frombuffer(self.inflate(blobs[0]), np.uint8)


class Planes(Scheme):
    """XOR, byte planes, zstd; in chunks, if there is a length of them."""

    def __init__(self, level: int, chunk: int | None) -> None:
        """zstd's level; bytes of a chunk, or None for whole tensors."""
        self.level, self.chunk = level, chunk
        super().__init__()

    def encode(self, base: Bytes, tuned: Bytes, width: int) -> Blobs:
        """Chunk after chunk, plane after plane."""
        out = []
        step = self.chunk or max(1, tuned.size)
        for at in range(0, tuned.size, step):
            difference = np.bitwise_xor(base[at : at + step], tuned[at : at + step]).reshape(-1, width)
            out += [self.deflate(np.ascontiguousarray(difference[:, i])) for i in range(width)]
        return out

    def decode(self, base: Bytes, blobs: Blobs, width: int) -> Bytes:
        """The way back."""
        out, step = np.empty(base.size, np.uint8), self.chunk or max(1, base.size)
        for i, at in enumerate(range(0, base.size, step)):
            part = out[at : at + step]
            for plane in range(width):
                found = self.inflate(blobs[i * width + plane])
                part.reshape(-1, width)[:, plane] = np.frombuffer(found, np.uint8)
            np.bitwise_xor(part, base[at : at + step], out=part)
        return out


class Xor(Scheme):
    """XOR, zstd-1, tensor by tensor."""

    level = 1

    def encode(self, base: Bytes, tuned: Bytes, width: int) -> Blobs:
        """One frame."""
        return [self.deflate(np.bitwise_xor(base, tuned))]

    def decode(self, base: Bytes, blobs: Blobs, width: int) -> Bytes:
        """The way back."""
        return np.bitwise_xor(base, np.frombuffer(self.inflate(blobs[0]), np.uint8))


class Sparse(Scheme):
    """Where words changed, and what they are: gaps and XOR, compressed as one stream, or positions and values as they are."""

    level = 1

    def __init__(self, gaps: bool) -> None:
        """Gaps in the place of positions, or not."""
        self.gaps = self.joint = gaps
        super().__init__()

    def encode(self, base: Bytes, tuned: Bytes, width: int) -> Blobs:
        """Positions (or gaps in the narrowest of u16 and u32), then words."""
        old, new = words(base, width), words(tuned, width)
        places = np.flatnonzero(old != new)
        if not self.gaps:
            return [places.astype("<u4").tobytes(), new[places].tobytes()]
        steps = np.diff(places, prepend=0)
        kind = "<u2" if steps.size == 0 or int(steps.max()) < 1 << 16 else "<u4"
        return [steps.astype(kind).tobytes(), (old[places] ^ new[places]).tobytes()]

    def decode(self, base: Bytes, blobs: Blobs, width: int) -> Bytes:
        """The way back."""
        out, values = words(base, width).copy(), np.frombuffer(blobs[1], f"<u{width}")
        if not self.gaps:
            out[np.frombuffer(blobs[0], "<u4")] = values
            return out.view(np.uint8)
        wide = len(blobs[0]) // max(1, values.size)
        out[np.cumsum(np.frombuffer(blobs[0], f"<u{wide or 2}"), dtype=np.int64)] ^= values
        return out.view(np.uint8)

    def alone(self, tuned: Bytes, width: int) -> Blobs:
        """Its words as they are: what is to become of them is said for the whole stream."""
        return [tuned.tobytes()]

    def back(self, blobs: Blobs, width: int) -> Bytes:
        """That tensor back."""
        return np.frombuffer(blobs[0], np.uint8)


SCHEMES: dict[str, Callable[[], Scheme]] = {
    "planes-3": lambda: Planes(3, None),
    "planes-1": lambda: Planes(1, CHUNK),
    "xor-1": Xor,
    "gaps-1": lambda: Sparse(True),
    "positions": lambda: Sparse(False),
}


def pack(scheme: Scheme, base: Checkpoint, tuned: Checkpoint) -> Iterator[bytes]:
    """The bytes of a package: the lengths of its blobs and the file's header, compressed, then the blobs."""
    blobs, counts = [], []
    for name, info in tuned.infos.items():
        old, width = base.beside(name, info), WIDTHS.get(info["dtype"], 1)
        new = tuned.bytes(name)
        made = scheme.encode(old, new, width) if old is not None else scheme.alone(new, width)
        counts.append(len(made))
        blobs += made
    table = np.array([len(counts), *counts, *map(len, blobs)], "<u4").tobytes()
    head = zstandard.ZstdCompressor(level=3).compress(struct.pack("<I", len(table)) + table + tuned.header)
    yield struct.pack("<Q", len(head)) + head
    if getattr(scheme, "joint", False):
        yield scheme.deflate(b"".join(blobs))
    else:
        yield from blobs


def unpack(scheme: Scheme, base: Checkpoint, package: bytes) -> Iterator[bytes | Bytes]:
    """The bytes of the file."""
    (length,) = struct.unpack("<Q", package[:8])
    head = scheme.inflate(package[8 : 8 + length])
    (size,) = struct.unpack("<I", head[:4])
    table, header = np.frombuffer(head[4 : 4 + size], "<u4"), head[4 + size :]
    counts, lengths = table[1 : 1 + int(table[0])], table[1 + int(table[0]) :]
    body = memoryview(package)[8 + length :]
    if getattr(scheme, "joint", False):
        body = memoryview(scheme.inflate(bytes(body)))
    ends = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
    yield struct.pack("<Q", len(header)) + header
    at = 0
    for (name, info), count in zip(tensors_of(header).items(), counts, strict=True):
        blobs = [bytes(body[ends[i] : ends[i + 1]]) for i in range(at, at + int(count))]
        at += int(count)
        old, width = base.beside(name, info), WIDTHS.get(info["dtype"], 1)
        yield scheme.decode(old, blobs, width) if old is not None else scheme.back(blobs, width)


def write(path: str, parts: Iterator[bytes | Bytes]) -> None:
    """Write and sync, as xorz does."""
    with open(path, "wb") as file:
        for part in parts:
            file.write(part)
        file.flush()
        os.fsync(file.fileno())


def zipnn(path: str, delta: bool) -> Any:
    """ZipNN, told what the words of the file at `path` are; one thread."""
    import zipnn as module

    dtypes = [info["dtype"] for info in Checkpoint(path).infos.values()]
    kind = "float32" if max(set(dtypes), key=dtypes.count) == "F32" else "bfloat16"
    more = {"delta_compressed_type": "byte"} if delta else {}
    return module.ZipNN(input_format="byte", bytearray_dtype=kind, threads=1, **more)


def zipnn_job(verb: str, base: str, given: str, delta: bool) -> bytes:
    """Whole files, as ZipNN takes them; against the base if it is to be a delta."""
    tool, data = zipnn(base, delta), pathlib.Path(given).read_bytes()
    second = {"delta_second_data": pathlib.Path(base).read_bytes()} if delta else {}
    return bytes((tool.compress if verb == "pack" else tool.decompress)(data, **second))


def main() -> None:
    """`schemes.py SCHEME VERB BASE INPUT OUT`."""
    name, verb, base, given, out = sys.argv[1:]
    if name.startswith("zipnn"):
        import zipnn  # noqa: F401  # imports are not the job's
    wall, cpu = time.perf_counter(), time.process_time()
    if name.startswith("zipnn"):
        write(out, iter([zipnn_job(verb, base, given, name == "zipnn-delta")]))
    elif verb == "pack":
        write(out, pack(SCHEMES[name](), Checkpoint(base), Checkpoint(given)))
    else:
        write(out, unpack(SCHEMES[name](), Checkpoint(base), pathlib.Path(given).read_bytes()))
    print(json.dumps({"seconds": time.perf_counter() - wall, "cpu": time.process_time() - cpu}))


if __name__ == "__main__":
    main()
