"""Collect the libraries from a vLLM wheel: `python -m benchmarks.gpu_peers.pack WHEEL DIR`.

DIR is then what `--libraries` takes, made small enough to be sent to a machine: only DeepGEMM's
extension for one Python stays, and the code of GPUs other than Hopper is replaced by zeros, which
compress to nothing.  Where there is no code for Hopper, the newest PTX that it runs stays.
"""

from __future__ import annotations

import argparse
import struct
import zipfile
from collections.abc import Iterator
from pathlib import Path

from benchmarks.gpu_peers import COMPILED

HOPPER = 90
# Of a CUDA fat binary: its first word, then version, size of this header, size of the rest.
MAGIC, HEADER = 0xBA55ED50, struct.Struct("<IHHQ")
# Of an entry: kind, version, size of this header, size of the code.
ENTRY, ARCHITECTURE = struct.Struct("<HHIQ"), struct.Struct("<28xI")
PTX, ELF = 1, 2

Entry = tuple[int, int, int, int]  # kind, architecture, first byte of the code, end


def fat_binaries(library: bytes) -> Iterator[list[Entry]]:
    """Yield the entries of each fat binary in a shared library."""
    at = 0
    while (at := library.find(struct.pack("<I", MAGIC), at)) >= 0:
        _, version, header, size = HEADER.unpack_from(library, at)
        if (version, header) != (1, HEADER.size):
            at += 4
            continue
        at += header
        end, entries = at + size, []
        while at < end:
            kind, _, header, size = ENTRY.unpack_from(library, at)
            (architecture,) = ARCHITECTURE.unpack_from(library, at)
            entries.append((kind, architecture, at + header, at + header + size))
            at += header + size
        yield entries


def for_hopper(library: bytes) -> bytes:
    """Return the library with zeros in place of GPU code that a Hopper card does not run."""
    result = bytearray(library)
    for entries in fat_binaries(library):
        used = [entry for entry in entries if entry[:2] == (ELF, HOPPER)]
        if not used:
            ptx = [entry for entry in entries if entry[0] == PTX and entry[1] <= HOPPER]
            used = [max(ptx, key=lambda entry: entry[1])] if ptx else []
        for entry in entries:
            if entry not in used:
                _, _, start, end = entry
                result[start:end] = bytes(end - start)
    return bytes(result)


def pack(wheel: Path, folder: Path, python: str) -> None:
    """Extract what `--libraries` reads."""
    package = "vllm/third_party/"
    with zipfile.ZipFile(wheel) as archive:
        for name in archive.namelist():
            other = "/_C.cpython-" in name and f"/_C.cpython-{python}-" not in name
            if name.startswith(f"{package}deep_gemm/") and not other:
                file = folder / name.removeprefix(package)
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_bytes(archive.read(name))
        (folder / "scalar_type.py").write_bytes(archive.read("vllm/scalar_type.py"))
        for name in COMPILED:
            library = for_hopper(archive.read(f"vllm/{name}.abi3.so"))
            (folder / f"{name}.abi3.so").write_bytes(library)


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("wheel", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--python", default="312", help="version that DeepGEMM is for")
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    pack(arguments.wheel, arguments.folder, arguments.python)


if __name__ == "__main__":
    main()
