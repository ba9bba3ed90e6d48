"""Kernel time and graph time of a list of calls, both from the same bursts of replays."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Sequence

import torch  # pyright: ignore[reportMissingImports]
from torch.profiler import ProfilerActivity, profile  # pyright: ignore[reportMissingImports]

from benchmarks.gpu_peers.peer import Call

BURSTS = 3
BURST_SECONDS = 4e-3


def warm(seconds: float) -> None:
    """Multiply matrices for a while, so that every kernel finds the card at the same clocks."""
    a = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        for _ in range(8):
            torch.mm(a, a)
        torch.cuda.synchronize()


class Replay:
    """Calls captured as a CUDA graph.

    Every result is kept: a call that writes where the last one wrote would find the lines in cache.

    Args:
        calls: called in turn; one for each set of operands.
        least: calls in a graph, at least, so that launching it is not what is timed.
    """

    def __init__(self, calls: Sequence[Call], least: int):
        calls = [*calls] * math.ceil(least / len(calls))
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for call in calls:
                call()
        torch.cuda.current_stream().wait_stream(side)
        torch.cuda.synchronize()
        self.calls = len(calls)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.results = [call() for call in calls]
        self.burst(1)
        self.replays = max(1, math.ceil(BURST_SECONDS / (self.burst(1) * self.calls)))

    def burst(self, replays: int) -> float:
        """Return the seconds of a call when the graph is replayed without waiting."""
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(replays):
            self.graph.replay()
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end) * 1e-3 / replays / self.calls

    def graph_seconds(self) -> float:
        """Return the median over bursts."""
        return statistics.median(self.burst(self.replays) for _ in range(BURSTS))

    def kernel_seconds(self) -> float:
        """Return the time on the device of a call's kernels by CUPTI, the median over bursts.

        Raises:
            ValueError: the profiler lost events, or saw none.
        """
        with profile(activities=[ProfilerActivity.CUDA]) as traced:
            for _ in range(BURSTS):
                self.burst(self.replays)
        events = [
            (event.start_ns(), event.duration_ns())
            for event in traced.profiler.kineto_results.events()
            if event.device_type() == torch.autograd.DeviceType.CUDA
            and not event.name().startswith(("Event ", "Context ", "Stream "))
        ]
        share, left = divmod(len(events), BURSTS * self.replays)
        if left or not share:
            raise ValueError(f"{len(events)} events of {BURSTS} x {self.replays} replays")
        durations = [duration for _, duration in sorted(events)]
        size = share * self.replays
        sums = [sum(durations[i * size : (i + 1) * size]) for i in range(BURSTS)]
        return statistics.median(sums) * 1e-9 / self.replays / self.calls


def fastest(ways: Sequence[Sequence[Call]], least: int) -> Replay:
    """Return the fastest of equivalent lists of calls, captured and warm.

    Args:
        ways: lists of calls, one call for each set of operands.
        least: calls in a graph, at least.
    """
    replays = [Replay(calls, least) for calls in ways]
    best = replays[0]
    if len(replays) > 1:
        best = min(replays, key=lambda replay: replay.burst(replay.replays))
    best.burst(best.replays)
    return best
