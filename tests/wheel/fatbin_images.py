"""Promise: a library that is given away holds the CUDA kernels for every architecture that cuda/README.md names.

    fatbin_images.py FILE...      wheels or libraries; prints what each holds, exits with 1 where a kernel image is missing

The images are looked for in the bytes themselves, with no tool of CUDA's: a fatbin is a header (magic, version, size of the
header, size of what follows) and images, each with a header of its own (kind, sizes, version, compute capability).
"""

import struct
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests" / "cuda_gate"))
from gate import ARCHS  # noqa: E402

MAGIC = struct.pack("<IHH", 0xBA55ED50, 1, 16)
KINDS = {1: "ptx", 2: "sm"}
WANTED = {"ptx80", *(f"sm{arch}" for arch in ARCHS)}


def images(library: bytes) -> dict[str, int]:
    """Bytes of each image, by kind and compute capability: {"sm90": 256720, "ptx80": ...}."""
    found: dict[str, int] = {}
    at = library.find(MAGIC)
    while at >= 0:
        end = at + 16 + struct.unpack_from("<Q", library, at + 8)[0]
        image = at + 16
        while image + 32 <= end <= len(library):
            kind, _, head, size = struct.unpack_from("<HHIQ", library, image)
            arch = struct.unpack_from("<I", library, image + 28)[0]
            if kind not in KINDS or head < 32 or image + head + size > end:
                break
            found[f"{KINDS[kind]}{arch}"] = head + size
            image += head + size
        at = library.find(MAGIC, at + 1)
    return found


def library_of(path: Path) -> bytes:
    """The library's bytes, of a wheel or as it is."""
    if path.suffix != ".whl":
        return path.read_bytes()
    with zipfile.ZipFile(path) as wheel:
        return wheel.read("xorz/libxorz_torch.so")


def main(paths: list[str]) -> int:
    missing = False
    for path in map(Path, paths):
        library = library_of(path)
        found = images(library)
        total = sum(found.values())
        print(
            f"{path.name}: {path.stat().st_size:,} bytes, its library {len(library):,}, of which {total:,} are kernels: "
            + (", ".join(f"{name} {size:,}" for name, size in sorted(found.items())) or "none")
        )
        if WANTED - found.keys():
            print(f"{path.name} lacks {', '.join(sorted(WANTED - found.keys()))}", file=sys.stderr)
            missing = True
    return int(missing)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
