"""The command line: ``jaxquant VERB`` or ``python -m jaxquant VERB``.

Nothing heavy is imported before a verb runs, so ``--help`` answers at once.  Bad input ends with
one line on standard error and exit code 2.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from jaxquant.errors import JaxquantError

EXPORTS = ("compressed-tensors", "gptq", "awq", "fp8", "gguf")


def _names(verb: argparse.ArgumentParser, config: bool = True) -> None:
    verb.add_argument(
        "--names", help="YAML name map: what the checkpoint's tensors are called here"
    )
    if config:
        verb.add_argument("--config", help="config.json for a .gguf file of unknown architecture")


def _dtype(verb: argparse.ArgumentParser) -> None:
    verb.add_argument(
        "--dtype",
        help="what to compute in: bfloat16, float16 or float32; by default bfloat16, or what a "
        "converted model was saved with",
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="jaxquant",
        description="Quantized inference in JAX: inspect, convert, run checkpoints.",
    )
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")

    verb = verbs.add_parser(
        "inspect", help="list every tensor of a checkpoint: format, shape, bytes"
    )
    verb.add_argument("path", help="checkpoint directory or .gguf file")
    _names(verb, config=False)
    verb.add_argument("--json", action="store_true", help="machine-readable output")
    verb.add_argument("--plan", help="YAML plan: show what would be loaded from where")

    verb = verbs.add_parser("convert", help="write a checkpoint that loads without conversion")
    verb.add_argument("source", help="checkpoint directory or .gguf file")
    verb.add_argument("destination", help="directory to create; it must not exist")
    verb.add_argument("--plan", help="YAML plan: the precision and source of each weight")
    _names(verb)
    verb.add_argument("--scheme", help="quantize every linear of the layers, e.g. fp8 or w4a16_g32")
    _dtype(verb)

    verb = verbs.add_parser("export", help="write a checkpoint that other tools read")
    verb.add_argument("source", help="checkpoint directory or .gguf file")
    verb.add_argument("destination", help="directory (gguf: file) to create; it must not exist")
    verb.add_argument("--format", choices=EXPORTS, required=True)
    verb.add_argument("--scheme", help="quantize every linear of the layers first, e.g. w4a16_g128")
    verb.add_argument("--plan", help="YAML plan: the precision and source of each weight")
    _names(verb)
    verb.add_argument("--kind", help="gguf: Q8_0, Q4_0, F32, F16 or BF16 for all weights")

    verb = verbs.add_parser("generate", help="generate text")
    verb.add_argument("model", help="checkpoint directory or .gguf file")
    _names(verb)
    source = verb.add_mutually_exclusive_group(required=True)
    source.add_argument("--prompt", help="one prompt")
    source.add_argument("--prompts", help='JSON lines, each {"prompt": "..."}')
    verb.add_argument("--max-new-tokens", type=int, default=64)
    verb.add_argument("--temperature", type=float, default=0.0)
    verb.add_argument("--top-k", type=int)
    verb.add_argument("--top-p", type=float)
    verb.add_argument("--seed", type=int, default=0)
    _dtype(verb)

    verb = verbs.add_parser("eval", help="perplexity of a model on text or tokens")
    verb.add_argument("model", help="checkpoint directory or .gguf file")
    _names(verb)
    source = verb.add_mutually_exclusive_group(required=True)
    source.add_argument("--text", help="text file, tokenized with the model's tokenizer")
    source.add_argument("--tokens", help="NumPy file of token ids")
    verb.add_argument("--window", type=int, default=256, help="tokens to a window")
    verb.add_argument("--windows", type=int, help="how many windows at most")
    _dtype(verb)

    verb = verbs.add_parser(
        "explain", help="which kernel runs each weight, and why not a faster one"
    )
    verb.add_argument("model", help="checkpoint directory or .gguf file")
    _names(verb)
    verb.add_argument("--batch", type=int, default=1, help="rows of activations")

    verb = verbs.add_parser("bench", help="tokens per second of a model, prefill and decode")
    verb.add_argument("model", help="checkpoint directory or .gguf file")
    _names(verb)
    verb.add_argument("--batch", type=int, default=8)
    verb.add_argument("--prompt-tokens", type=int, default=128)
    verb.add_argument("--new-tokens", type=int, default=64)
    _dtype(verb)

    verb = verbs.add_parser("demo", help="the main job on the bundled model")
    verb.add_argument("--out", default="demo_output", help="directory for the table and the plot")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    arguments = _parser().parse_args(argv)
    try:
        from jaxquant import commands

        getattr(commands, arguments.verb)(arguments)
    except JaxquantError as error:
        print(f"jaxquant: error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"jaxquant: error: {error.filename}: {error.strerror}", file=sys.stderr)
        return 2
    return 0
