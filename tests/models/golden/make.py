"""Make ``families.safetensors``: logits of every small model by transformers, float32, eager.

Run where torch and transformers are installed, with jaxquant's own requirements beside them:
``python tests/models/golden/make.py``.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
import transformers
from safetensors.numpy import save_file

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parents[2]))

from jaxquant.models import ModelConfig  # noqa: E402
from tests.small_models import CONFIGS, random_tensors  # noqa: E402

MIXTRAL = {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}


def checkpoint_name(family: str, name: str) -> str:
    """The name transformers expects; only Mixtral's differ from ours."""
    if family == "mixtral" and ".mlp." in name:
        name = name.replace(".mlp.", ".block_sparse_moe.")
        for ours, theirs in MIXTRAL.items():
            name = name.replace(ours, theirs)
    return name


def main() -> None:
    """Write the file beside this script."""
    rng = np.random.default_rng(1)
    ids = rng.integers(0, 64, (2, 24)).astype(np.int32)
    golden = {"input_ids": ids}
    for name, raw in CONFIGS.items():
        config = ModelConfig.from_hf(raw)
        tensors = random_tensors(config)
        if config.qkv_bias or config.mlp_bias:
            assert any(key.endswith(".bias") for key in tensors)
        with tempfile.TemporaryDirectory() as folder:
            Path(folder, "config.json").write_text(json.dumps(raw))
            renamed = {checkpoint_name(config.family, k): v for k, v in tensors.items()}
            save_file(renamed, Path(folder, "model.safetensors"), {"format": "pt"})
            model, report = transformers.AutoModelForCausalLM.from_pretrained(
                folder,
                dtype=torch.float32,
                attn_implementation="eager",
                output_loading_info=True,
            )
        unused = [*report["missing_keys"], *report["unexpected_keys"], *report["mismatched_keys"]]
        assert not [key for key in unused if not (config.tied and "lm_head" in key)], unused
        with torch.no_grad():
            logits = model(torch.from_numpy(ids).long()).logits
        golden[name] = logits.numpy().astype(np.float32)
        print(name, float(np.abs(golden[name]).max()))
    versions = {"transformers": transformers.__version__, "torch": torch.__version__}
    save_file(golden, HERE / "families.safetensors", versions)


if __name__ == "__main__":
    main()
