"""Write checkpoints for tests, well-formed or not, without the reference library's checks."""

import json
import struct

import ml_dtypes
import numpy as np

from jaxquant.formats.base import DTYPES

NAMES = {
    np.dtype(getattr(ml_dtypes, name, name)): dtype
    for dtype, (name, bits) in DTYPES.items()
    if not dtype.startswith(("F4", "F6_"))
}


def header_of(arrays):
    """Header entries and data of arrays in order."""
    entries, payloads, end = {}, [], 0
    for name, array in arrays.items():
        payloads.append(np.ascontiguousarray(array).tobytes())
        begin, end = end, end + len(payloads[-1])
        entries[name] = {
            "dtype": NAMES[array.dtype],
            "shape": list(array.shape),
            "data_offsets": [begin, end],
        }
    return entries, b"".join(payloads)


def assemble(header, data, length=None):
    """File bytes of a header (text or object) and data."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def write_file(path, arrays, metadata=None):
    """A well-formed safetensors file."""
    header, data = header_of(arrays)
    text = json.dumps({"__metadata__": metadata or {"format": "pt"}} | header).encode()
    path.write_bytes(assemble(text + b" " * (-len(text) % 8), data))


def write_checkpoint(folder, arrays, config=None, shards=1):
    """A checkpoint directory; with several shards also its index."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config or {}))
    if shards == 1:
        write_file(folder / "model.safetensors", arrays)
        return folder
    names = list(arrays)
    weight_map = {}
    for i in range(shards):
        file = f"model-{i + 1:05d}-of-{shards:05d}.safetensors"
        part = names[i::shards]
        write_file(folder / file, {name: arrays[name] for name in part})
        weight_map |= dict.fromkeys(part, file)
    index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder
