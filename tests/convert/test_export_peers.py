"""Exported checkpoints read back by the packages that own the formats, in their own environment.

``make .venvpeers/.installed`` builds it.  Where it is missing the tests are skipped, in CI never.
"""

import fcntl
import os
import shutil
import subprocess

import ml_dtypes
import numpy as np
import pytest

import jaxquant as jq
from jaxquant.convert.read import open_checkpoint
from tests.convert.export_cases import CASES, LAST_BIT, ROOT, Case, export, values

PYTHON = ROOT / ".venvpeers" / "bin" / "python"
READ = [case for case in CASES if case.peer]
DAMAGED = [Case("gptq-4b-dynamic-llama", name) for name in ("gptq", "compressed-tensors")]
pytestmark = [
    pytest.mark.peers,
    pytest.mark.skipif(
        not PYTHON.exists() and not os.environ.get("CI"), reason="make .venvpeers/.installed"
    ),
]


def damage(folder):
    """A copy with one bit of the last byte of every quantized weight changed."""
    copy = folder.with_name(folder.name + "-damaged")
    shutil.copytree(folder, copy)
    file = copy / "model.safetensors"
    data = bytearray(file.read_bytes())
    tensors = open_checkpoint(folder).tensors
    sizes = np.cumsum([tensor.nbytes for tensor in tensors.values()])
    for end, name in zip(len(data) - sizes[-1] + sizes, tensors, strict=True):
        if name.endswith(("qweight", "weight_packed")):
            data[end - 1] ^= 1
    file.write_bytes(data)
    return copy


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Every case exported, and read by its peer; made once for all workers of pytest-xdist."""
    base = tmp_path_factory.getbasetemp()
    root = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "peers"
    root.mkdir(exist_ok=True)
    made = {case.label: root / case.label for case in READ}
    made |= {f"{case.label}-damaged": root / f"{case.label}-damaged" for case in DAMAGED}
    with (root / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (root / "done").exists():
            make(root)
            script = str(ROOT / "tests" / "peers" / "read_back.py")
            command = [str(PYTHON), script, *map(str, made.values())]
            done = subprocess.run(command, capture_output=True, text=True, timeout=500, check=False)
            assert done.returncode == 0, done.stderr[-3000:]
            (root / "done").touch()
    return made


def make(root):
    """Export every case, and damage some."""
    for case in READ:
        out = export(case, root)
        if case.whole:
            (out / "whole_model").touch()
        if case in DAMAGED:
            damage(out)


def peer_tensors(folder, file="peer.safetensors"):
    from safetensors.numpy import load_file

    return load_file(folder / file)


def close(ours, theirs, label):
    if any(word in label for word in LAST_BIT):
        return np.allclose(ours, theirs, rtol=1e-6, atol=1e-6 * np.abs(ours).max())
    return np.array_equal(ours, theirs)


@pytest.mark.parametrize("case", READ, ids=lambda case: case.label)
def test_the_peer_dequantizes_an_export_to_the_same_weights(folders, case):
    ours, theirs = jq.read_quantized(folders[case.label]), peer_tensors(folders[case.label])
    assert sum(not q.layout.dense for q in ours.values()) >= 10
    wrong = [n for n, q in ours.items() if not close(values(q), theirs[f"{n}.weight"], case.label)]
    assert not wrong


@pytest.mark.parametrize("case", [c for c in READ if c.whole], ids=lambda case: case.label)
def test_transformers_loads_an_export_whole(folders, case):
    """It stacks the experts of a layer, gate over up."""
    ours = jq.read_quantized(folders[case.label])
    theirs = peer_tensors(folders[case.label], "whole_model.safetensors")
    checked = 0
    for name, value in theirs.items():
        if name.endswith("experts.gate_up_proj"):
            stem = name.removesuffix(".gate_up_proj")
            expected = np.stack(
                [
                    np.concatenate([values(ours[f"{stem}.{e}.{p}_proj"]) for p in ("gate", "up")])
                    for e in range(len(value))
                ]
            )
        elif name.removesuffix(".weight") in ours:
            expected = values(ours[name.removesuffix(".weight")])
        else:
            continue
        if case.format == "compressed-tensors":
            # Its products are rounded to the scales' 16 bits.
            expected = expected.astype(ml_dtypes.bfloat16)
        # Products in float16 with unit vectors; the last bit of the largest codes is 60 times more.
        slack = 2**-10 * np.abs(expected).max() if case.format in ("awq", "gptq") else 0
        assert np.abs(value.astype(np.float32) - expected.astype(np.float32)).max() <= slack, name
        checked += 1
    assert checked >= 14


@pytest.mark.parametrize("case", DAMAGED, ids=lambda case: case.label)
def test_a_damaged_export_reads_back_otherwise(folders, case):
    ours = jq.read_quantized(folders[case.label])
    theirs = peer_tensors(folders[case.label + "-damaged"])
    for name, q in ours.items():
        assert np.array_equal(values(q), theirs[f"{name}.weight"]) == q.layout.dense, name
