"""The problem sizes that bench and tune run."""

# Output channels x contracted extent of one linear layer, with the models that have it.
LAYERS = {
    (6144, 4096): "Llama 3 8B: q, k and v in one",
    (28672, 4096): "Llama 3 8B: gate and up in one",
    (4096, 14336): "Llama 3 8B: down",
    (8192, 8192): "Llama 3 70B: output projection",
}
TOKENS = (1, 16, 64, 128, 512, 2048, 8192)
MATMUL = tuple((m, n, k) for n, k in LAYERS for m in TOKENS)
# Tokens x hidden extent of quantized activations (n is not used and kept at 1).
QUANTIZE = tuple((m, 1, k) for k in (4096, 8192, 14336) for m in (1, 16, 128, 1024, 8192))

# Output channels x contracted extent of an expert's matmuls -> number of experts of the layer:
# gate and up in one, then down, of Qwen3-235B, Qwen3-30B and DeepSeek-V3.
EXPERTS = {
    (3072, 4096): 128,
    (4096, 1536): 128,
    (1536, 2048): 128,
    (2048, 768): 128,
    (4096, 7168): 256,
    (7168, 2048): 256,
}
TOP_K = 8  # experts of a token; every token makes as many rows
GROUPED = tuple((t * TOP_K, n, k) for n, k in EXPERTS for t in (1, 16, 128, 1024, 4096))
