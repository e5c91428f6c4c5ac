"""Ways to compute a block-skip layer, and the stopwatch they share."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch

from benchmarks.gpu.block_skip_layer import TACTICS, Call, Kernels, Layer

# Copies of the weights are so many times the cache together.
CACHE_TIMES = 3
GRAPH_SECONDS = 2e-3
MOST_CALLS = 400


@dataclass
class Way:
    """One way to compute a layer: a call for each copy of its weights."""

    name: str
    read_bytes: int
    calls: list[Callable[[], object]]
    us: list[float]


class Stopwatch:
    """Times ways on a device.

    Args:
        where: `cuda` or `cpu`.
        rounds: how often each way is timed.
    """

    def __init__(self, where: str, rounds: int) -> None:
        self.where = where
        self.rounds = rounds
        self.cache_bytes = 1
        if where == "cuda":
            self.cache_bytes = torch.cuda.get_device_properties(0).L2_cache_size

    def copies(self, read_bytes: int) -> int:
        """Copies of the weights that together are beyond the cache."""
        if self.where == "cpu":
            return 1
        return max(2, math.ceil(CACHE_TIMES * self.cache_bytes / read_bytes))

    def time(self, ways: list[Way]) -> None:
        """Fill in `us`: microseconds a call, one number for each round."""
        runs = [self._prepare(way) for way in ways]
        for _ in range(self.rounds):
            for way, run in zip(ways, runs, strict=True):
                way.us.append(run())

    def _prepare(self, way: Way) -> Callable[[], float]:
        for call in way.calls:
            call()
        if self.where == "cpu":
            return lambda: 1e6 * seconds_of(way.calls[0])
        once = self._graph(way, len(way.calls))
        once()
        wanted = GRAPH_SECONDS / max(1e-9, once() * 1e-6)
        count = len(way.calls) * math.ceil(min(MOST_CALLS, max(20, wanted)) / len(way.calls))
        timed = self._graph(way, count)
        timed()
        return timed

    def _graph(self, way: Way, count: int) -> Callable[[], float]:
        """Microseconds a call of a captured run of `count` calls."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for call in way.calls:
                call()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            for place in range(count):
                way.calls[place % len(way.calls)]()

        def replay() -> float:
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            graph.replay()
            end.record()
            torch.cuda.synchronize()
            return 1e3 * start.elapsed_time(end) / count

        return replay


def seconds_of(call: Callable[[], object]) -> float:
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def our_ways(
    kernels: Kernels, layer: Layer, watch: Stopwatch, random: torch.Generator
) -> tuple[list[Way], float]:
    """Our kernels by every tactic, on the same data; and the largest error of them."""
    copies = watch.copies(layer.weight_bytes())
    calls = [Call(layer, kernels.where, random) for _ in range(copies)]
    ways, errors = [], []
    for tactic in range(TACTICS):
        prepared = [kernels.prepare(call, tactic) for call in calls]
        calls[0].y.fill_(float("nan"))
        prepared[0]()
        errors.append(calls[0].error(kernels.where))
        name = f"{layer.bits} bits, tactic {tactic}"
        ways.append(Way(name, layer.weight_bytes(), list(prepared), []))
    # `max` would pass over a NaN.
    return ways, math.nan if any(map(math.isnan, errors)) else max(errors)


def dense_way(layer: Layer, watch: Stopwatch, random: torch.Generator) -> Way:
    """The layer uncompressed, y = x Wᵀ, W [m, n] as torch keeps it: cuBLAS."""
    calls: list[Callable[[], object]] = []
    for _ in range(watch.copies(layer.dense_bytes())):
        w = drawn(random, layer.m, layer.n)
        x = drawn(random, layer.rows, layer.n)
        y = torch.empty(layer.rows, layer.m, dtype=x.dtype, device=x.device)
        calls.append(lambda x=x, w=w, y=y: torch.mm(x, w.T, out=y))  # type: ignore[misc]
    return Way("dense cuBLAS", layer.dense_bytes(), calls, [])


def unfused_way(layer: Layer, watch: Stopwatch, random: torch.Generator) -> Way:
    """What a runtime does without the plugin: gather, product, add, product."""
    calls: list[Callable[[], object]] = []
    for _ in range(watch.copies(layer.weight_bytes())):
        x = drawn(random, layer.rows, layer.n)
        a = drawn(random, layer.n - layer.rank, layer.rank)
        b = drawn(random, layer.rank, layer.m)
        order = torch.randperm(layer.n, generator=random, device=random.device).to(torch.int32)
        calls.append(unfused_call(layer, x, a, b, order if layer.indexed else None))
    name = "gather, product, add, product" if layer.indexed else "two cuBLAS products"
    return Way(name, layer.weight_bytes(), calls, [])


def unfused_call(
    layer: Layer, x: torch.Tensor, a: torch.Tensor, b: torch.Tensor, index: torch.Tensor | None
) -> Callable[[], object]:
    """One call over memory of its own; in order, the add is part of the first product."""
    ordered, z = torch.empty_like(x), x.new_empty(layer.rows, layer.rank)
    y = x.new_empty(layer.rows, layer.m)
    rank = layer.rank

    def gathered(order: torch.Tensor) -> None:
        torch.index_select(x, 1, order, out=ordered)
        torch.mm(ordered[:, rank:], a, out=z)
        z.add_(ordered[:, :rank])
        torch.mm(z, b, out=y)

    def in_order() -> None:
        torch.addmm(x[:, :rank], x[:, rank:], a, out=z)
        torch.mm(z, b, out=y)

    return in_order if index is None else partial(gathered, index)


def drawn(random: torch.Generator, *shape: int) -> torch.Tensor:
    """Random float16: zeros would run faster than real data."""
    made = torch.randn(shape, generator=random, device=random.device)
    return made.to(torch.float16).mul_(0.05)
