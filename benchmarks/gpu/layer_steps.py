"""Steps over single layers: errors, decode, prefill, and 4 bits beside other programs' kernels.

Ways take turns; a time is the median of rounds, each one replay of a CUDA graph of many calls over
several copies of the weights, three times the cache together. Ours is the fastest of four tactics,
as TensorRT would choose; the rows have all of them.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from dataclasses import replace
from functools import cache, partial
from typing import Any

import torch

from benchmarks.gpu.block_skip_layer import Kernels, Layer, measure_errors
from benchmarks.gpu.block_skip_ways import (
    Stopwatch,
    Way,
    dense_way,
    our_ways,
    unfused_way,
)
from benchmarks.gpu.int4_rivals import RIVALS, Absent
from benchmarks.gpu.random_errors import BOUNDS, error_rows
from benchmarks.gpu.steps import Row, Setting, not_run, outcome, verdict, within
from pipeline.bench.bandwidth import DeviceMemory, HostMemory
from pipeline.bench.measure import describe_machine
from pipeline.bench.shapes import Shape, find_shape
from pipeline.compress.plan.plan import rank_for_kept

# The 8B shape first: its layers are what most of the targets are about.
_DECODED = ("llama-3.1-8b", "llama-3.2-1b", "llama-3.1-70b")
_PREFILLED = ("llama-3.1-8b", "llama-3.2-1b")
TINY = Shape("llama", 64, 64, 2, 4, 2, 16, 64, True, 512)
_KEPT = 0.6
# int4 rows are read 8 bytes at a time where r and m are multiples of this.
_RANK_MULTIPLE = 16
_PREFILL_ROWS = 2048
# Below this a call is over before the memory is busy: shown, not judged.
_JUDGED_BYTES = 32_000_000
_ERROR_BATCHES, _ERROR_CASES = 20, 20
_LEAST = {
    "share of the copy bandwidth": 0.85,
    "over dense cuBLAS, of the bytes' ratio": 0.9,
    "over unfused": 1.3,
    "int4 over 16 bits": 2.8,
    "prefill over two cuBLAS products": 0.95,
}
_ENOUGH_S = 4.0  # a row that is begun later than this before the end would be lost


@cache
def _kernels(device: str) -> Kernels:
    """The kernel library, loaded once."""
    return Kernels(device)


def card(setting: Setting) -> Iterator[Row]:
    """What machine this is, its copy bandwidth, its products' rate, and that the kernels load."""
    machine = describe_machine()
    name = torch.cuda.get_device_name() if setting.on_gpu else machine["cpu"]
    yield "machine", {"says": name, "gpu": name, "torch": torch.__version__, "machine": machine}
    memory = DeviceMemory() if setting.on_gpu else HostMemory(1)
    bytes_per_s = max(memory.read() for _ in range(3))
    says = f"{memory.name}: {bytes_per_s / 1e9:.0f} GB/s"
    yield "memory", {"says": says, "of": memory.name, "bytes_per_s": bytes_per_s}
    watch, size = _watch(setting), 8192 if setting.on_gpu else 64
    random = torch.Generator(setting.device).manual_seed(setting.seed)
    products = dense_way(Layer(size, size, size, size), watch, random)
    watch.time([products])
    tflops = 2 * size**3 / statistics.median(products.us) / 1e6
    yield "products", {"says": f"{size}^3 in float16: {tflops:.0f} TFLOP/s", "tflops": tflops}
    device = _kernels(setting.device).device
    loaded = outcome("the kernels are compiled and load", True)
    yield "kernels", {"capability": device.capability, "verdicts": [loaded]}


def _watch(setting: Setting) -> Stopwatch:
    return Stopwatch(setting.device, 15 if setting.on_gpu else 1)


def errors(setting: Setting) -> Iterator[Row]:
    """Random layers of every type, width and tactic against float64, batch by batch."""
    batches, cases = (_ERROR_BATCHES, _ERROR_CASES) if setting.on_gpu else (2, 3)
    measure = partial(measure_errors, _kernels(setting.device))
    yield from error_rows("layers", measure, batches, cases, setting, _ENOUGH_S)


def _layers_of(name: str, setting: Setting, kept: float = _KEPT) -> dict[str, Layer]:
    """The layers of a decoder that share an input, stacked, at a kept fraction."""
    shape = find_shape(name) if setting.on_gpu else TINY
    inner = shape.heads * shape.head_dim
    sizes = {
        "qkv": (inner + 2 * shape.kv_heads * shape.head_dim, shape.hidden),
        "o": (shape.hidden, inner),
        "gate, up": (2 * shape.intermediate, shape.hidden),
        "down": (shape.hidden, shape.intermediate),
    }
    return {
        f"{name}, {part}": Layer(
            1, n, m, rank_for_kept("skip", m, n, kept, _RANK_MULTIPLE) if kept < 1 else n
        )
        for part, (m, n) in sizes.items()
    }


def _chosen(names: tuple[str, ...], setting: Setting) -> Iterator[tuple[str, Layer]]:
    """Layers whose rows are missing, while there is time; of the tiny shape those of one model."""
    for name in names if setting.on_gpu else names[:1]:
        for title, layer in _layers_of(name, setting).items():
            if title not in setting.done and setting.left_s >= _ENOUGH_S:
                yield title, layer


def decode_layers(setting: Setting) -> Iterator[Row]:
    """One row of each layer in 16, 8 and 4 bits, judged."""
    kernels, watch = _kernels(setting.device), _watch(setting)
    random = torch.Generator(setting.device).manual_seed(setting.seed)
    for name, layer in _chosen(_DECODED, setting):
        yield name, _decode_row(kernels, layer, watch, random, setting)


def prefill_layers(setting: Setting) -> Iterator[Row]:
    """Many rows of each layer, in order, against two products."""
    kernels, watch = _kernels(setting.device), _watch(setting)
    random = torch.Generator(setting.device).manual_seed(setting.seed)
    for name, layer in _chosen(_PREFILLED, setting):
        rows = _PREFILL_ROWS if setting.on_gpu else 16
        many = replace(layer, rows=rows, indexed=False)
        yield name, _prefill_row(kernels, many, watch, random)


def int4_rivals(setting: Setting) -> Iterator[Row]:
    """Dense layers of 4 bits in blocks of 128, one row: our kernel beside other programs'."""
    watch = _watch(setting)
    random = torch.Generator(setting.device).manual_seed(setting.seed)
    for name, layer in _chosen(_DECODED[:1], setting):
        group = 128 if setting.on_gpu else 32
        dense = replace(layer, rank=layer.n, bits=4, group=group, indexed=False)
        yield name, _rival_row(dense, watch, random, setting)


def _best(ways: list[Way], start: str) -> Way:
    """The way of least median time among those whose name starts so."""
    chosen = [way for way in ways if way.name.startswith(start)]
    return min(chosen, key=lambda way: statistics.median(way.us))


def _ratio(slow: Way, fast: Way) -> float:
    return statistics.median(slow.us) / statistics.median(fast.us)


def _way_record(way: Way) -> dict[str, Any]:
    median = statistics.median(way.us)
    return {
        "way": way.name,
        "read_bytes": way.read_bytes,
        "us": median,
        "spread_us": [min(way.us), max(way.us)],
        "gb_per_s": way.read_bytes / median / 1e3,
    }


def _decode_row(
    kernels: Kernels, layer: Layer, watch: Stopwatch, random: torch.Generator, setting: Setting
) -> dict[str, Any]:
    """One row of one layer by every way."""
    ways, worst = [], {}
    for bits in (16, 8, 4):
        ours, worst[f"{bits} bits"] = our_ways(kernels, replace(layer, bits=bits), watch, random)
        ways += ours
    ways += [dense_way(layer, watch, random), unfused_way(layer, watch, random)]
    watch.time(ways)
    fp16 = _best(ways, "16 bits")
    bytes_ratio = layer.dense_bytes() / layer.weight_bytes()
    observed = {
        "share of the copy bandwidth": _share(fp16, setting),
        "over dense cuBLAS, of the bytes' ratio": _ratio(_best(ways, "dense"), fp16) / bytes_ratio,
        "over unfused": _ratio(_best(ways, "gather"), fp16),
        "int4 over 16 bits": _ratio(fp16, _best(ways, "4 bits")),
    }
    judged = setting.on_gpu and layer.weight_bytes() >= _JUDGED_BYTES
    verdicts = [verdict(claim, found, _LEAST[claim], judged) for claim, found in observed.items()]
    return _row_record(layer, ways, worst, verdicts)


def _share(way: Way, setting: Setting) -> float:
    """Bytes read a second, of those of a copy."""
    return way.read_bytes / statistics.median(way.us) * 1e6 / setting.bytes_per_s


def _prefill_row(
    kernels: Kernels, layer: Layer, watch: Stopwatch, random: torch.Generator
) -> dict[str, Any]:
    """Many rows of one layer in 16 and 4 bits; only the first is judged."""
    ways, worst = [unfused_way(layer, watch, random)], {}
    for bits in (16, 4):
        # Tactics cut the decode step alone.
        ours, worst[f"{bits} bits"] = our_ways(kernels, replace(layer, bits=bits), watch, random)
        ways.append(ours[0])
    watch.time(ways)
    claim = "prefill over two cuBLAS products"
    found = _ratio(ways[0], ways[1])
    record = _row_record(
        layer, ways, worst, [verdict(claim, found, _LEAST[claim], watch.where == "cuda")]
    )
    flop = 2 * layer.rows * layer.rank * (layer.m + layer.n - layer.rank)
    record["tflops"] = flop / statistics.median(ways[1].us) / 1e6
    return record


def _rival_row(
    layer: Layer, watch: Stopwatch, random: torch.Generator, setting: Setting
) -> dict[str, Any]:
    """One dense layer of 4 bits; others are compared with, and asked nothing."""
    ways, error = our_ways(_kernels(setting.device), layer, watch, random)
    verdicts, rivals, worst = [], [], {"4 bits": error}
    for name, make in RIVALS.items():
        try:
            way, worst[name] = make(layer, watch, random)
            rivals.append(way)
        except Absent as why:
            verdicts.append(not_run(f"over {name}", str(why)))
    watch.time([*ways, *rivals])
    ours = _best(ways, "4 bits")
    verdicts += [verdict(f"over {way.name}", _ratio(way, ours), 1, False) for way in rivals]
    verdicts.append(verdict("share of the copy bandwidth", _share(ours, setting), 0, False))
    return _row_record(layer, [*ways, *rivals], worst, verdicts)


def _row_record(
    layer: Layer, ways: list[Way], worst: dict[str, float], verdicts: list[dict[str, Any]]
) -> dict[str, Any]:
    """Sizes, errors, times and verdicts of a layer; others' errors are shown, and not judged."""
    sizes = {"rows": layer.rows, "n": layer.n, "m": layer.m, "rank": layer.rank}
    ours = [error for name, error in worst.items() if name.endswith("bits")]
    # `max` would pass over a NaN.
    largest = sum(ours) if any(error != error for error in ours) else max(ours)
    return {
        **sizes,
        "kept_bytes": layer.weight_bytes(),
        "dense_bytes": layer.dense_bytes(),
        "errors": worst,
        "ways": [_way_record(way) for way in ways],
        "verdicts": [within("error against float64", largest, BOUNDS[layer.dtype]), *verdicts],
    }
