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
