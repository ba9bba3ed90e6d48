"""Small models of every architecture under both names: the model's, and a GGUF file's.

Weights are transformed here by hand, row by row where order matters, independently of jaxquant.
"""

import numpy as np

from jaxquant.formats import gguf_encode
from jaxquant.formats.gguf_types import TYPES
from tests.convert.gguf_bytes import BOOL, F32, STRING, U32, Tensor, pair, scalar, text

HIDDEN, INNER, VOCAB, HEADS, KV_HEADS, DIM, LAYERS, EXPERTS = 64, 96, 40, 4, 2, 16, 2, 4
NOPE, ROTATED, VALUE, LATENT, QUERY_RANK = 16, 8, 32, 32, 64


def number(key: str, value) -> bytes:
    kind = {bool: BOOL, float: F32}.get(type(value), U32)
    return pair(key, kind, scalar(kind, value))


def metadata(arch: str, **more) -> list[bytes]:
    values = {
        "block_count": LAYERS,
        "context_length": 128,
        "embedding_length": HIDDEN,
        "feed_forward_length": INNER,
        "attention.head_count": HEADS,
        "attention.head_count_kv": KV_HEADS,
        "attention.key_length": DIM,
        "attention.value_length": DIM,
        "attention.layer_norm_rms_epsilon": 1e-5,
        "rope.freq_base": 5000.0,
    } | {key.replace("__", "."): value for key, value in more.items()}
    pairs = [pair("general.architecture", STRING, text(arch))]
    return pairs + [number(f"{arch}.{key}", value) for key, value in values.items()]


class Files:
    """Collects weights under both names: the model's and, transformed, the file's."""

    def __init__(self, permuted: bool = False):
        self.rng = np.random.default_rng(11)
        self.permuted = permuted
        self.model: dict[str, np.ndarray] = {}
        self.file: dict[str, np.ndarray] = {}

    def random(self, *shape: int) -> np.ndarray:
        return self.rng.normal(size=shape).astype(np.float32)

    def add(self, model: str, file: str, *shape: int, heads: int = 0) -> None:
        self.model[model] = value = self.random(*shape)
        self.file[file] = self.interleaved(value, heads) if heads and self.permuted else value

    @staticmethod
    def interleaved(value: np.ndarray, heads: int) -> np.ndarray:
        """Row 2 i + j of a head is row j half + i of the model's head, one row at a time."""
        out, width = np.empty_like(value), value.shape[0] // heads
        for head in range(heads):
            for i in range(width // 2):
                for j in range(2):
                    out[head * width + 2 * i + j] = value[head * width + j * width // 2 + i]
        return out

    def top(self, tied: bool = False) -> None:
        self.add("model.embed_tokens.weight", "token_embd.weight", VOCAB, HIDDEN)
        self.add("model.norm.weight", "output_norm.weight", HIDDEN)
        if not tied:
            self.add("lm_head", "output.weight", VOCAB, HIDDEN)

    def norms(self, n: int) -> None:
        path = f"model.layers.{n}."
        self.add(path + "input_layernorm.weight", f"blk.{n}.attn_norm.weight", HIDDEN)
        self.add(path + "post_attention_layernorm.weight", f"blk.{n}.ffn_norm.weight", HIDDEN)

    def attention(self, n: int, bias: bool = False, norms: bool = False) -> None:
        path, q, kv = f"model.layers.{n}.self_attn.", HEADS * DIM, KV_HEADS * DIM
        for name, short, rows, heads in (
            ("q", "attn_q", q, HEADS),
            ("k", "attn_k", kv, KV_HEADS),
            ("v", "attn_v", kv, 0),
        ):
            stem = f"blk.{n}.{short}"
            self.add(f"{path}{name}_proj", f"{stem}.weight", rows, HIDDEN, heads=heads)
            if bias:
                self.add(f"{path}{name}_proj.bias", f"{stem}.bias", rows, heads=heads)
            if norms and name != "v":
                self.add(f"{path}{name}_norm.weight", f"{stem}_norm.weight", DIM)
        self.add(path + "o_proj", f"blk.{n}.attn_output.weight", HIDDEN, q)

    def mlp(self, path: str, stem: str, inner: int, end: str = "") -> None:
        for name, shape in (
            ("gate", (inner, HIDDEN)),
            ("up", (inner, HIDDEN)),
            ("down", (HIDDEN, inner)),
        ):
            self.add(f"{path}.{name}_proj", f"{stem}_{name}{end}.weight", *shape)

    def experts(self, n: int, inner: int, style: str = "stacked") -> None:
        path, stem = f"model.layers.{n}.mlp", f"blk.{n}.ffn"
        self.add(f"{path}.gate", f"{stem}_gate_inp.weight", EXPERTS, HIDDEN)
        for e in range(EXPERTS):
            self.mlp(f"{path}.experts.{e}", stem, inner, f".{e}")
        if style == "single":
            return
        stacks = {
            name: np.stack([self.file.pop(f"{stem}_{name}.{e}.weight") for e in range(EXPERTS)])
            for name in ("gate", "up", "down")
        }
        if style == "fused":
            both = np.concatenate([stacks.pop("gate"), stacks.pop("up")], axis=1)
            self.file[f"{stem}_gate_up_exps.weight"] = both
        for name, stacked in stacks.items():
            self.file[f"{stem}_{name}_exps.weight"] = stacked

    def latent(self, n: int, split: bool) -> None:
        path, stem = f"model.layers.{n}.self_attn.", f"blk.{n}.attn_"
        self.add(path + "q_a_proj", stem + "q_a.weight", QUERY_RANK, HIDDEN)
        self.add(path + "q_a_layernorm.weight", stem + "q_a_norm.weight", QUERY_RANK)
        self.add(path + "q_b_proj", stem + "q_b.weight", HEADS * (NOPE + ROTATED), QUERY_RANK)
        self.add(path + "kv_a_proj_with_mqa", stem + "kv_a_mqa.weight", LATENT + ROTATED, HIDDEN)
        self.add(path + "kv_a_layernorm.weight", stem + "kv_a_norm.weight", LATENT)
        self.add(path + "kv_b_proj", stem + "kv_b.weight", HEADS * (NOPE + VALUE), LATENT)
        self.add(path + "o_proj", stem + "output.weight", HIDDEN, HEADS * VALUE)
        if split:
            joint = self.file.pop(stem + "kv_b.weight").reshape(HEADS, NOPE + VALUE, LATENT)
            self.file[stem + "k_b.weight"] = joint[:, :NOPE].transpose(0, 2, 1)
            self.file[stem + "v_b.weight"] = joint[:, NOPE:]

    def tensors(self, kind: str) -> list[Tensor]:
        """All tensors; matrices as ``kind`` where their rows allow it."""
        result = []
        for name, value in self.file.items():
            fits = value.ndim > 1 and value.shape[-1] % 32 == 0 and "gate_inp" not in name
            chosen = TYPES[kind if fits else "F32"]
            data = gguf_encode.quantize(value, chosen).tobytes()
            result.append(Tensor(name, tuple(reversed(value.shape)), chosen.id, data))
        return result


def dense_family(permuted=False, bias=False, norms=False, tied=False) -> Files:
    files = Files(permuted)
    files.top(tied)
    for n in range(LAYERS):
        files.norms(n)
        files.attention(n, bias, norms)
        files.mlp(f"model.layers.{n}.mlp", f"blk.{n}.ffn", INNER)
    return files


def expert_family(permuted=False, norms=False, style="stacked") -> Files:
    files = Files(permuted)
    files.top()
    for n in range(LAYERS):
        files.norms(n)
        files.attention(n, norms=norms)
        files.experts(n, INNER, style)
    return files


def deepseek_family(split: bool, sigmoid: bool) -> Files:
    files = Files()
    files.top()
    for n in range(LAYERS):
        files.norms(n)
        files.latent(n, split)
        if n == 0:
            files.mlp(f"model.layers.{n}.mlp", f"blk.{n}.ffn", INNER)
            continue
        files.experts(n, 32)
        files.mlp(f"model.layers.{n}.mlp.shared_experts", f"blk.{n}.ffn", 32, "_shexp")
        if sigmoid:
            name = f"model.layers.{n}.mlp.gate.e_score_correction_bias"
            files.add(name, f"blk.{n}.exp_probs_b.bias", EXPERTS)
    return files


def qwen2moe_family() -> Files:
    files = Files()
    files.top()
    for n in range(LAYERS):
        files.norms(n)
        files.attention(n, bias=True)
        files.experts(n, 32)
        files.mlp(f"model.layers.{n}.mlp.shared_expert", f"blk.{n}.ffn", 32, "_shexp")
        gate = f"model.layers.{n}.mlp.shared_expert_gate"
        files.add(gate, f"blk.{n}.ffn_gate_inp_shexp.weight", 1, HIDDEN)
        stem = f"blk.{n}.ffn_gate_inp_shexp.weight"
        files.file[stem] = files.file[stem].reshape(HIDDEN)
    return files


MOE = {"expert_count": EXPERTS, "expert_used_count": 2}
LATENT_KEYS = {
    "attention__kv_lora_rank": LATENT,
    "attention__q_lora_rank": QUERY_RANK,
    "rope__dimension_count": ROTATED,
    "leading_dense_block_count": 1,
    "expert_feed_forward_length": 32,
    "expert_shared_count": 1,
    "expert_weights_scale": 2.5,
    "expert_weights_norm": True,
}
WHOLE = {"attention__key_length": NOPE + ROTATED, "attention__value_length": VALUE}
SPLIT = {
    "attention__key_length": LATENT + ROTATED,
    "attention__value_length": LATENT,
    "attention__key_length_mla": NOPE + ROTATED,
    "attention__value_length_mla": VALUE,
    "attention__head_count_kv": 1,
}
SHARED = {"expert_feed_forward_length": 32, "expert_shared_feed_forward_length": 32}
# family: (weights, metadata, model family)
CASES = {
    "llama": (dense_family(True), metadata("llama"), "llama"),
    "llama tied": (dense_family(True, tied=True), metadata("llama"), "llama"),
    "qwen2": (dense_family(bias=True), metadata("qwen2"), "qwen2"),
    "qwen3": (dense_family(norms=True), metadata("qwen3"), "qwen3"),
    "mixtral": (expert_family(True), metadata("llama", **MOE), "mixtral"),
    "mixtral single": (expert_family(True, style="single"), metadata("llama", **MOE), "mixtral"),
    "qwen2moe": (qwen2moe_family(), metadata("qwen2moe", **MOE, **SHARED), "qwen2_moe"),
    "qwen3moe": (
        expert_family(norms=True),
        metadata("qwen3moe", **MOE, expert_feed_forward_length=INNER),
        "qwen3_moe",
    ),
    "qwen3moe fused": (
        expert_family(norms=True, style="fused"),
        metadata("qwen3moe", **MOE, expert_feed_forward_length=INNER),
        "qwen3_moe",
    ),
    "deepseek2": (
        deepseek_family(False, False),
        metadata("deepseek2", **MOE, **(LATENT_KEYS | WHOLE | {"expert_weights_norm": False})),
        "deepseek_v2",
    ),
    "deepseek3 split": (
        deepseek_family(True, True),
        metadata("deepseek2", **MOE, **LATENT_KEYS, **SPLIT, expert_gating_func=2),
        "deepseek_v3",
    ),
}
