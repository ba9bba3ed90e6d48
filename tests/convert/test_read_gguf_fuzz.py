"""GGUF files changed at random: nothing but an error of jaxquant's own may come out.

``JAXQUANT_FUZZ_EXAMPLES`` sets how many are tried (and lets every run try others).
"""

import contextlib
import functools
import os
import warnings
from pathlib import Path

import numpy as np
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from jaxquant.convert.gguf_model import open_gguf_model
from jaxquant.convert.gguf_tokenizer import read_tokenizer
from jaxquant.convert.read_gguf import open_gguf, read_gguf_quantized
from jaxquant.convert.write_gguf import Part, write_gguf
from jaxquant.errors import JaxquantError
from jaxquant.formats.base import FormatWarning
from jaxquant.formats.gguf_types import BY_ID, TYPES
from jaxquant.models import ModelConfig
from tests.convert.gguf_bytes import build
from tests.convert.gguf_models import CASES
from tests.convert.test_read_gguf_tokenizer import GOOD, sentence_piece_metadata

EXAMPLES = int(os.environ.get("JAXQUANT_FUZZ_EXAMPLES", "60"))
SETTINGS = settings(
    max_examples=EXAMPLES,
    deadline=None,
    derandomize="JAXQUANT_FUZZ_EXAMPLES" not in os.environ,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
    database=None,
)
MODELS = ("llama", "qwen3moe fused", "deepseek3 split", "qwen2moe")
MORE_KEYS = (
    "general.alignment",
    "general.quantization_version",
    "llama.rope.scaling.type",
    "llama.rope.scaling.factor",
    "deepseek2.nextn_predict_layers",
    "deepseek2.expert_group_count",
    "split.count",
    "split.no",
    "tokenizer.ggml.add_space_prefix",
    "tokenizer.chat_template",
)
VALUES = st.one_of(
    st.integers(-(1 << 63), (1 << 64) - 1),
    st.sampled_from([0, 1, 2, 1 << 20, (1 << 31) - 1, (1 << 32) - 1]),
    st.floats(width=32),
    st.booleans(),
    st.text(max_size=8).filter(lambda s: s.isprintable()),
    st.sampled_from(["gpt2", "llama", "qwen2", "yarn", "deepseek2"]),
    st.lists(st.integers(-9, 9), max_size=3).map(np.int32),
    st.lists(st.sampled_from(["a", "b", "a b"]), min_size=1, max_size=3),
)


@functools.cache
def example(model: str, pieces: bool):
    """Metadata and tensors of a small model with a tokenizer."""
    files, pairs, _ = CASES[model]
    folder = Path(os.environ.get("TMPDIR", "/tmp"))
    path = folder / f"jaxquant-fuzz-{os.getpid()}.gguf"
    path.write_bytes(build(pairs, files.tensors("Q8_0")))
    metadata = dict(open_gguf(path).metadata)
    path.unlink()
    tokenizer = sentence_piece_metadata() if pieces else GOOD
    parts = [
        Part(t.name, BY_ID[t.kind], tuple(reversed(t.dims)), data_of(t.data))
        for t in files.tensors("Q8_0")
    ]
    return metadata | tokenizer, parts


def data_of(data: bytes):
    return lambda: np.frombuffer(data, np.uint8)


def read_everything(path: Path) -> int:
    """Use a file in every way; returns how many of them it withstood."""
    done = 0
    with contextlib.suppress(JaxquantError):
        file = open_gguf(path)
        for key in file.metadata:
            with contextlib.suppress(JaxquantError):
                _ = file.metadata[key]
        for use in (read_gguf_quantized, open_and_load, lambda _: read_tokenizer(file)):
            with contextlib.suppress(JaxquantError), warnings.catch_warnings():
                warnings.simplefilter("ignore", FormatWarning)
                use(path)
                done += 1
    return done


def open_and_load(path: Path) -> None:
    model = open_gguf_model(path)
    ModelConfig.from_hf(model.config)
    for name in model.pieces:
        model.load(name)


def test_unchanged_files_are_read(tmp_path):
    """What the fuzzers change is good to begin with."""
    for model in MODELS:
        for pieces in (False, True):
            metadata, parts = example(model, pieces)
            write_gguf(tmp_path / "m.gguf", metadata, parts)
            assert read_everything(tmp_path / "m.gguf") == 3


@SETTINGS
@given(data=st.data())
def test_metadata_of_any_value(data, tmp_path):
    metadata, parts = example(data.draw(st.sampled_from(MODELS)), data.draw(st.booleans()))
    keys = st.sampled_from([*metadata, *MORE_KEYS])
    changed = metadata | data.draw(st.dictionaries(keys, VALUES, min_size=1, max_size=3))
    path = tmp_path / "m.gguf"
    path.unlink(missing_ok=True)
    with contextlib.suppress(JaxquantError):
        write_gguf(path, changed, parts)
        read_everything(path)


@SETTINGS
@given(data=st.data())
def test_tensors_of_any_shape(data, tmp_path):
    metadata, parts = example(data.draw(st.sampled_from(MODELS)), False)
    chosen = data.draw(st.integers(0, len(parts) - 1))
    shape = tuple(data.draw(st.lists(st.sampled_from([1, 2, 3, 32, 64]), min_size=1, max_size=4)))
    kind = data.draw(st.sampled_from([TYPES[k] for k in ("F32", "F16", "Q8_0", "I32", "F64")]))
    names = [part.name for part in parts]
    name = data.draw(st.sampled_from([names[chosen], "rope_freqs.weight", "blk.0.attn_k_b.weight"]))
    size = Part(name, kind, shape, bytes).nbytes
    new = Part(name, kind, shape, data_of(bytes(size)))
    path = tmp_path / "m.gguf"
    path.unlink(missing_ok=True)
    with contextlib.suppress(JaxquantError):
        write_gguf(path, metadata, [*parts[:chosen], new, *parts[chosen + 1 :]])
        read_everything(path)


@SETTINGS
@given(data=st.data())
def test_bytes_of_any_value(data, tmp_path):
    path = tmp_path / "m.gguf"
    path.unlink(missing_ok=True)
    metadata, parts = example(data.draw(st.sampled_from(MODELS)), False)
    write_gguf(path, {k: v for k, v in metadata.items() if "tokenizer" not in k}, parts)
    content = bytearray(path.read_bytes())
    path.unlink()
    edit = st.tuples(st.integers(0, 3000), st.integers(0, 8), st.binary(max_size=8))
    for at, removed, added in data.draw(st.lists(edit, min_size=1, max_size=4)):
        content[at : at + removed] = added
    path.write_bytes(content)
    read_everything(path)
