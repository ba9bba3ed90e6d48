"""Time other libraries' kernels: `python -m benchmarks.gpu_peers --json FILE [--libraries DIR]`.

Writes {kernel: {"MxNxK": {"graph": us, "kernel": us}}}, which `python -m pallas_kernels.bench
--against FILE` reads: the time of a call in a replayed CUDA graph and that of its kernels by CUPTI,
over operands that rotate through more bytes than the cache holds.  Kernels that are compiled at
their first call are compiled by several processes before anything is timed.  What fails is named
under "failures", and the rest goes on.
"""

from __future__ import annotations

import argparse
import gc
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch  # pyright: ignore[reportMissingImports]

from benchmarks.gpu_peers import dense, experts, libraries, quantization
from benchmarks.gpu_peers.measure import BURST_SECONDS, BURSTS, fastest, warm
from benchmarks.gpu_peers.peer import Peer, Size

PEERS: tuple[Peer, ...] = (*dense.PEERS, *experts.PEERS, *quantization.PEERS)
GROUPS = ("dense8", "w4", "w8", "moe", "quant", "fp4", "gguf")


def to_compile(peers: list[Peer]) -> list[tuple[Peer, Size]]:
    """Return problems that compile all kernels, large and small layers mixed."""
    found = [(peer, peer.sizes[0]) for peer in peers if peer.compiles == "once"]
    sized = [(p, size) for p in peers if p.compiles == "sizes" for size in p.sizes]
    return found + sorted(sized, key=lambda problem: (problem[1][0], problem[0].name))


def compile_share(problems: list[tuple[Peer, Size]]) -> None:
    """Call each problem once; failures show again when it is timed."""
    for peer, size in problems:
        try:
            peer.build(*size)[0][0]()
            torch.cuda.synchronize()
        except Exception as error:
            print(f"compiling {peer.name} {peer.key(size)}: {error}"[:300], flush=True)
        release()


def release() -> None:
    """Return memory that is not in use to the device, which other processes share."""
    experts.forget()
    gc.collect()
    torch.cuda.empty_cache()


def copy_rate() -> float:
    """Return TB/s, read and written, of a large copy."""
    a = torch.zeros(2**30, device="cuda", dtype=torch.bfloat16)
    b = torch.empty_like(a)
    return round(2 * a.nbytes / fastest([[lambda: b.copy_(a)]], 1).graph_seconds() * 1e-12, 3)


def time_peer(peer: Peer, failures: list[str]) -> dict[str, dict[str, float]]:
    """Time all problems of a peer."""
    times: dict[str, dict[str, float]] = {}
    for size in peer.sizes:
        try:
            replay = fastest(peer.build(*size), 8 if size[0] <= 512 else 2)
            clocks = times.setdefault(peer.key(size), {})
            clocks["graph"] = round(replay.graph_seconds() * 1e6, 2)
            clocks["kernel"] = round(replay.kernel_seconds() * 1e6, 2)
            del replay  # before the next is built
        except Exception as error:
            failures.append(f"{peer.name} {peer.key(size)}: {type(error).__name__} {error}"[:300])
            print("failed:", failures[-1], flush=True)
            gc.collect()
    return times


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", type=Path, required=True, help="file to write")
    parser.add_argument(
        "--libraries", type=Path, help="folder of vLLM's libraries and deep_gemm; else vLLM itself"
    )
    parser.add_argument("--only", help=f"groups, by commas: {', '.join(GROUPS)}")
    parser.add_argument("--compilers", type=int, default=13, help="processes that compile")
    parser.add_argument("--warm", type=float, default=1.0, help="seconds of load before a kernel")
    parser.add_argument("--compile-share", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    only = arguments.only.split(",") if arguments.only else GROUPS
    if unknown := set(only) - set(GROUPS):
        parser.error(f"no group {', '.join(sorted(unknown))}; there are {', '.join(GROUPS)}")

    start = time.perf_counter()
    peers = [peer for group in GROUPS if group in only for peer in PEERS if peer.group == group]
    failures = libraries.load(arguments.libraries)
    problems = to_compile(peers)
    if arguments.compile_share is not None:
        compile_share(problems[arguments.compile_share :: arguments.compilers])
        return
    again = [sys.executable, "-m", "benchmarks.gpu_peers", *sys.argv[1:], "--compile-share"]
    shares = range(min(arguments.compilers, len(problems)))
    for process in [subprocess.Popen([*again, str(share)]) for share in shares]:
        process.wait()
    print(f"{len(problems)} problems compiled: {time.perf_counter() - start:.0f} s", flush=True)

    report: dict[str, Any] = {
        "torch copy": {"TB/s": copy_rate()},
        "device": torch.cuda.get_device_name(),
        "method": f"torch {torch.__version__}, {BURSTS} bursts of {BURST_SECONDS * 1e3:.0f} ms "
        f"of graph replay after {arguments.warm:.1f} s of load, median; kernel: CUPTI",
    }
    for peer in peers:
        warm(arguments.warm)
        report[peer.name] = time_peer(peer, failures)
        release()
        print(
            f"{time.perf_counter() - start:6.1f} s {peer.name}: "
            f"{len(report[peer.name])} of {len(peer.sizes)}",
            flush=True,
        )
        # After each, so that a crash of one library does not lose the others' times.
        arguments.json.write_text(json.dumps({**report, "failures": failures}, indent=1) + "\n")


if __name__ == "__main__":
    main()
