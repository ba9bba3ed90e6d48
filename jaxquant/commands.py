"""The verbs of the command line; imported only when one runs."""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import Progress

import jaxquant as jq
from jaxquant.errors import ConfigError, FormatError
from jaxquant.evaluate import window_count


def _dtype(name: str | None) -> Any:
    if name not in (None, "bfloat16", "float16", "float32"):
        raise ConfigError("--dtype", repr(name), "bfloat16, float16 or float32")
    return name


def _model(arguments: argparse.Namespace, path: str, **options: Any) -> jq.CausalLM:
    options |= {"names": arguments.names, "config": arguments.config}
    return jq.from_pretrained(path, dtype=_dtype(arguments.dtype), **options)


def _table(title: str, columns: list[str], rows: list[list[str]]) -> None:
    from rich.markup import escape
    from rich.table import Table

    table = Table(title=title, title_justify="left")
    for i, column in enumerate(columns):
        justify = "left" if i == 0 or column in ("format", "sample") else "right"
        table.add_column(column, justify=justify, overflow="fold")
    for row in rows:
        table.add_row(*map(escape, row))
    # Without a terminal there is no width to fit into.
    Console(width=None if sys.stdout.isatty() else 160).print(table)


def inspect(arguments: argparse.Namespace) -> None:
    """List every tensor; with a plan, what would load from where."""
    from jaxquant.convert.inspect import inspect_checkpoint, inspect_plan

    if arguments.plan:
        report = inspect_plan(arguments.path, arguments.plan, arguments.names)
    else:
        report = inspect_checkpoint(arguments.path, arguments.names)
    if arguments.json:
        print(json.dumps(report.as_json(), indent=1))
        return
    _table(str(arguments.path), report.columns, report.rows)
    print(report.summary)


def convert(arguments: argparse.Namespace) -> None:
    """Write a converted checkpoint."""
    destination = Path(arguments.destination)
    if destination.exists():
        raise FormatError(str(destination), "it exists", "nothing is overwritten")
    if arguments.scheme:
        jq.Scheme.parse(arguments.scheme)
    model = _model(arguments, arguments.source, plan=arguments.plan)
    print(model.report)
    made = ""
    if arguments.scheme:
        # Routers stay as they are, and so does the gate of a shared expert, which is a Linear.
        linears = r"model\.layers\.(?!.*\.shared_expert_gate$).*"
        model = jq.quantize_model(model, {linears: arguments.scheme})
        made = f", layers quantized to {arguments.scheme}"
    jq.save_pretrained(model, destination)
    print(f"{destination}: {_mebibytes(destination):.1f} MiB{made}")


def export(arguments: argparse.Namespace) -> None:
    """Write a checkpoint for other tools."""
    destination = Path(arguments.destination)
    jq.export_pretrained(
        arguments.source,
        destination,
        format=arguments.format,
        scheme=arguments.scheme,
        plan=arguments.plan,
        names=arguments.names,
        config=arguments.config,
        kind=arguments.kind,
    )
    print(f"{destination}: {_mebibytes(destination):.1f} MiB")


def _mebibytes(path: Path) -> float:
    files = [path] if path.is_file() else path.rglob("*")
    return sum(file.stat().st_size for file in files if file.is_file()) / 2**20


def _text(name: str) -> str:
    """The content of a text file."""
    try:
        return Path(name).read_text("utf-8")
    except UnicodeDecodeError as error:
        raise FormatError(name, f"not UTF-8 ({error.reason})", "a text in UTF-8") from None


def _prompts(arguments: argparse.Namespace) -> list[str]:
    if arguments.prompt is not None:
        return [arguments.prompt]
    prompts = []
    for number, line in enumerate(_text(arguments.prompts).splitlines(), 1):
        if not line.strip():
            continue
        where = f"{arguments.prompts}:{number}"
        try:
            record = json.loads(line)
        except ValueError as error:
            raise FormatError(where, f"not JSON ({error})", "one object to a line") from None
        if not isinstance(record, dict) or not isinstance(record.get("prompt"), str):
            raise FormatError(where, "no prompt", 'each line is {"prompt": "..."}')
        prompts.append(record["prompt"])
    return prompts


def generate(arguments: argparse.Namespace) -> None:
    """Continue prompts; JSON lines for a file of prompts, plain text for one."""
    prompts = _prompts(arguments)
    model = _model(arguments, arguments.model)
    texts = jq.generate(
        model,
        prompts,
        max_new_tokens=arguments.max_new_tokens,
        temperature=arguments.temperature,
        top_k=arguments.top_k,
        top_p=arguments.top_p,
        seed=arguments.seed,
    )
    for prompt, text in zip(prompts, texts, strict=True):
        if arguments.prompts:
            print(json.dumps({"prompt": prompt, "text": text}, ensure_ascii=False))
        else:
            print(prompt + text)


def _tokens(path: str) -> np.ndarray:
    try:
        tokens = np.load(path, allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise FormatError(path, f"no NumPy array ({error})", ".npy") from None
    if not isinstance(tokens, np.ndarray):
        raise FormatError(path, "an archive of arrays (.npz)", "one array, .npy")
    if tokens.dtype.kind not in "iu":
        raise FormatError(path, f"dtype {tokens.dtype}", "token ids are integers")
    return tokens


def eval(arguments: argparse.Namespace) -> None:
    """Print the perplexity."""
    # What can be wrong without a model is found before one is loaded, which can take minutes.
    text, tokens = None, None
    if arguments.tokens:
        tokens = _tokens(arguments.tokens)
        window_count(tokens.size, arguments.window, arguments.windows)
    else:
        text = _text(arguments.text)
    model = _model(arguments, arguments.model)
    if text is not None:
        if model.tokenizer is None:
            raise ConfigError("--text", "the model has no tokenizer", action="use --tokens")
        tokens = np.asarray(model.tokenizer.encode(text), np.int32)
    with Progress(console=Console(stderr=True), disable=not sys.stderr.isatty()) as progress:
        task = progress.add_task("windows", total=None)

        def show(done: int, total: int) -> None:
            progress.update(task, completed=done, total=total)

        value = jq.perplexity(
            model, tokens, window=arguments.window, windows=arguments.windows, progress=show
        )
    print(f"perplexity {value:.4f}")


def explain(arguments: argparse.Namespace) -> None:
    """Print which kernel runs each weight."""
    options = {"names": arguments.names, "config": arguments.config}
    model = jq.from_pretrained(arguments.model, **options)
    print(jq.explain(model, batch=arguments.batch))


def bench(arguments: argparse.Namespace) -> None:
    """Print prefill and decode rates."""
    model = _model(arguments, arguments.model)
    rng = np.random.default_rng(0)
    shape = (arguments.batch, arguments.prompt_tokens)
    prompts = rng.integers(0, model.config.vocab_size, shape).tolist()
    rows = []
    for name, new, tokens in (
        ("prefill", 1, arguments.batch * arguments.prompt_tokens),
        ("prefill + decode", arguments.new_tokens, arguments.batch * arguments.new_tokens),
    ):
        seconds = seconds_of(lambda n=new: jq.generate(model, prompts, max_new_tokens=n, eos=()))
        rows.append([name, f"{1000 * seconds:.1f}", f"{tokens / seconds:.0f}"])
    _table(f"batch {arguments.batch}", ["phase", "ms", "tokens/s"], rows)


def seconds_of(call: Any, repeats: int = 3) -> float:
    """Median wall time of ``call()`` in seconds, after one call that compiles."""
    call()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return sorted(times)[repeats // 2]


def demo(arguments: argparse.Namespace) -> None:
    """The main job on the bundled model."""
    from jaxquant.demo import run

    columns, rows = run(Path(arguments.out))
    _table("tiny-qwen3-moe, quantized here", columns, rows)
    print(f"table and plot: {arguments.out}/")
