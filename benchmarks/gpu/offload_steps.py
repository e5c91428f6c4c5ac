"""A step over a model larger than its share of the GPU: layers copied for a pass, beside the bus.

Weights are random: of one layer that is drawn on the GPU, each layer is another multiple. A pass
ends when its likeliest tokens are at hand, and begins at once behind the one before. The draft is a
decoder of this folder, in 4 bits and with a cache of its own, that stays on the GPU meanwhile.
"""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import nn

from benchmarks.gpu.decoder import Decoder, Way, graph_of, median_ms
from benchmarks.gpu.layer_steps import TINY
from benchmarks.gpu.offload_bits import bits_rows
from benchmarks.gpu.steps import Row, Setting, let_go, not_run, outcome, verdict, within
from pipeline.bench.shapes import Shape, find_shape
from pipeline.errors import PipelineError
from pipeline.model.structure import layer_list
from pipeline.runtime.offload.cuda_device import CudaDevice
from pipeline.runtime.offload.device_ring import StreamDevice
from pipeline.runtime.offload.device_weights import DeviceWeights
from pipeline.runtime.offload.residency import Budget
from pipeline.runtime.offload.side_by_side import ModelCall
from pipeline.runtime.offload.steady_attention import STEADY_ATTENTION, CallCache, Part
from pipeline.runtime.offload.stored_model import set_matrix
from pipeline.runtime.offload.streamed_model import StreamedModel
from pipeline.runtime.offload.tables import look_up_in
from pipeline.runtime.sessions.onnx_cpu_session import STEADY_TOKENS

_CAP_BYTES = 8 << 30
_DTYPE = torch.float16
_WEIGHT = 0.02
_MOST_ROWS = 64
_COPIES, _ROUNDS = 4, 5
# Ranks too: of the dense matrices in 4 bits no layer would stay under the cap beside it.
_INT4 = Way("int4 skip 0.6", 0.6, "skip", 4)
_CONTEXT, _DRAFTED = 1024, 64
# What capturing the draft's step takes beside the draft: a workspace, and its intermediates.
_GRAPH_BYTES = 128 << 20
# Of compiling and capturing the draft's step; with less time left it is not begun.
_DRAFT_S = 40.0
_WANTED_RATIO = 8.0  # of drafted answers over undrafted ones
_LEAST_SHARE, _MOST_OVER_ONE, _MOST_DRAFT_MS = 0.9, 1.1, 6.0


class _PlainDevice:
    """A `StreamDevice` for the dry run: what is put into a stream is done at once."""

    place, library_bytes, waited_s, peak_bytes = torch.device("cpu"), 0, 0.0, 0

    def pinned(self, size_bytes: int) -> torch.Tensor:
        return torch.empty(size_bytes, dtype=torch.uint8)

    def buffer(self, size_bytes: int) -> torch.Tensor:
        return torch.empty(size_bytes, dtype=torch.uint8)

    def copy(self, buffer: torch.Tensor, source: torch.Tensor) -> None:
        buffer.copy_(source)

    def mark_copies(self) -> None: ...

    def mark_compute(self) -> None: ...

    def hold_copies(self, event: None) -> None: ...

    def hold_compute(self, event: None) -> None: ...

    def finish(self) -> None: ...


def offload(setting: Setting) -> Iterator[Row]:
    """Bits and drafts of a small model, the bus, passes of a large one, and a draft beside it."""
    yield from bits_rows(setting, CudaDevice if setting.on_gpu else _PlainDevice)
    let_go()
    shape = find_shape("llama-3.1-8b") if setting.on_gpu else replace(TINY, layers=4)
    device: StreamDevice = CudaDevice() if setting.on_gpu else _PlainDevice()
    bus = _bus_row(device, _layer_bytes(shape))
    yield "bus", bus
    if setting.on_gpu:
        torch.cuda.empty_cache()
    context, multiple = (_CONTEXT, 64) if setting.on_gpu else (_MOST_ROWS, 16)
    draft = Decoder(shape, _INT4, setting.device, context + 80, setting.seed, multiple)
    held = torch.cuda.memory_allocated() if setting.on_gpu else draft.read_bytes(context)
    target = _target(shape, device, 2 * context, held + _GRAPH_BYTES, setting)
    passes: dict[str, dict[str, Any]] = {}
    for name, row in _pass_rows(target, bus["bytes_per_s"], setting):
        passes[name] = row
        yield name, row
    yield "memory", _memory_row(held, setting)  # in case the next has no end in time
    step = _draft_row(draft, context, setting)
    yield "draft", step
    if "ms" in step:
        yield "together", _together_row(passes, step["ms"])
    yield "memory", _memory_row(held, setting)
    target.streamed.close()


# --- the bus ---


def _layer_bytes(shape: Shape) -> int:
    """Of the matrices of a layer."""
    attention = 2 * (shape.heads + shape.kv_heads) * shape.head_dim
    return _DTYPE.itemsize * shape.hidden * (attention + 3 * shape.intermediate)


def _bus_row(device: StreamDevice, size_bytes: int) -> dict[str, Any]:
    """Bytes a second of plain copies out of page-locked memory, of a layer's size."""
    slab, buffer = device.pinned(size_bytes), device.buffer(size_bytes)
    slab.fill_(1)
    rate = max(_copied_per_s(device, buffer, [slab] * _COPIES) for _ in range(_ROUNDS))
    says = f"{rate / 1e9:.1f} GB/s, copies of {size_bytes / 1e6:.0f} MB"
    return {"bytes_per_s": rate, "copy_bytes": size_bytes, "says": says}


def _copied_per_s(device: StreamDevice, buffer: torch.Tensor, slabs: list[torch.Tensor]) -> float:
    device.finish()
    started = time.perf_counter()
    for slab in slabs:
        device.copy(buffer[: len(slab)], slab)
    device.finish()
    return sum(map(len, slabs)) / (time.perf_counter() - started)


# --- the streamed model ---


@dataclass(frozen=True)
class _Target:
    """A model of random weights, and what its passes are made with.

    Attributes:
        streamed: the model.
        weights: of its layers.
        held: keys and values.
        ids: tokens of a pass.
        start: where they stand.
        fill_s: seconds that its memory and its numbers took.
    """

    streamed: StreamedModel
    weights: DeviceWeights
    held: list[tuple[torch.Tensor, torch.Tensor]]
    ids: np.ndarray
    start: int
    fill_s: float

    def logits(self, rows: int) -> torch.Tensor:
        """Of so many rows, by one pass, where they are computed."""
        cache = CallCache(self.held, [Part(0, self.start, self.ids[:rows])], rows)
        return self.streamed.run([ModelCall(cache)])[0][0]

    def pass_ms(self, rows: int) -> list[float]:
        """Milliseconds of passes, one behind the other, the first left out."""
        found = []
        for _ in range(1 + _ROUNDS):
            started = time.perf_counter()
            self.logits(rows).argmax(-1).cpu()
            found.append(1e3 * (time.perf_counter() - started))
        return found[1:]


def _target(
    shape: Shape, device: StreamDevice, places: int, spent_bytes: int, setting: Setting
) -> _Target:
    """The model, under the cap with `spent_bytes` spent already."""
    started = time.perf_counter()
    model = shape.empty_model()
    model.set_attn_implementation(STEADY_ATTENTION)
    path, modules = layer_list(model)
    layers = [_shapes(f"{path}.{number}", layer) for number, layer in enumerate(modules)]
    for name, parameter in list(model.named_parameters()):
        if parameter.dim() == 1:
            set_matrix(model, name, torch.ones(parameter.shape))
    numbers = shape.layers * 2 * places * shape.kv_heads * shape.head_dim
    fixed = (numbers + shape.vocab * shape.hidden) * _DTYPE.itemsize + device.library_bytes
    fixed += DeviceWeights.call_bytes(model.config, _DTYPE, _MOST_ROWS, places) + spent_bytes
    layer_bytes = _layer_bytes(shape)
    # In the dry run, too, some layers stay and others do not.
    cap = _CAP_BYTES if setting.on_gpu else fixed + shape.layers * layer_bytes - 1
    fill = _random_layers(layers[0], setting)
    budget = Budget(cap, "--vram", "the draft, head, cache and what a call takes")
    weights = DeviceWeights(model, layers, _DTYPE, device, budget, fixed, fill)
    like = torch.zeros(0, dtype=_DTYPE, device=device.place)
    table = like.new_empty(shape.vocab, shape.hidden).normal_(0, _WEIGHT)
    look_up_in(model.get_input_embeddings(), table.cpu(), like)
    set_matrix(model, "lm_head.weight", table)
    one = (1, shape.kv_heads, places, shape.head_dim)
    held = [(like.new_zeros(one), like.new_zeros(one)) for _ in layers]
    ids = np.random.default_rng(setting.seed).integers(0, shape.vocab, _MOST_ROWS)
    streamed = StreamedModel(model, weights)
    return _Target(streamed, weights, held, ids, places // 2, time.perf_counter() - started)


def _shapes(path: str, layer: nn.Module) -> dict[str, tuple[int, ...]]:
    """Of a layer's matrices, by their names in the model."""
    named = ((name, tuple(p.shape)) for name, p in layer.named_parameters())
    return {f"{path}.{name}": shape for name, shape in named if len(shape) > 1}


def _random_layers(
    shapes: Mapping[str, tuple[int, ...]], setting: Setting
) -> Callable[[int, Mapping[str, torch.Tensor]], None]:
    """What fills a layer: a multiple of one that is drawn, its own for each."""
    random = torch.Generator(setting.device).manual_seed(setting.seed)
    drawn = [
        torch.empty(shape, dtype=_DTYPE, device=setting.device).normal_(
            0, _WEIGHT, generator=random
        )
        for shape in shapes.values()
    ]

    def fill(number: int, views: Mapping[str, torch.Tensor]) -> None:
        for view, own in zip(views.values(), drawn, strict=True):
            view.copy_(own * (1 + number / 64))

    return fill


def _pass_rows(target: _Target, bus_per_s: float, setting: Setting) -> Iterator[Row]:
    """Passes of one row, of a verification and of many, and that none read what was not there."""
    if setting.on_gpu:
        torch.cuda.empty_cache()  # of what was drawn to fill the layers with
        torch.cuda.reset_peak_memory_stats()
    times: dict[int, list[float]] = {}
    for rows in (1, STEADY_TOKENS, _MOST_ROWS):
        before = target.streamed.traffic
        times[rows] = target.pass_ms(rows)
        row = _pass_row(target, rows, times, bus_per_s, setting)
        row["waited_s"] = target.streamed.traffic.waited_s - before.waited_s
        yield f"pass of {rows}", row
    overlapped = target.logits(_MOST_ROWS).clone()
    with _one_after_another(target.streamed, setting):
        apart = target.logits(_MOST_ROWS).clone()
    claim = "logits are, bit for bit, those of a pass that waits for every copy and layer"
    finite = bool(torch.isfinite(apart).all())
    yield "overlap", {"verdicts": [outcome(claim, finite and torch.equal(overlapped, apart))]}


def _pass_row(
    target: _Target, rows: int, times: dict[int, list[float]], bus_per_s: float, setting: Setting
) -> dict[str, Any]:
    """One count of rows, timed."""
    found, ms = target.streamed.traffic, statistics.median(times[rows])
    rate = 1e3 * found.pass_bytes / ms
    over_one = ms / statistics.median(times[1])
    says = f"{ms:.1f} ms, {rate / 1e9:.1f} GB/s, {found.resident} of {found.layers} layers resident"
    verdicts = []
    if rows == 1:
        claim = "host to device in a pass of one row, of plain copies"
        verdicts.append(verdict(claim, rate / bus_per_s, _LEAST_SHARE, setting.on_gpu))
    elif setting.on_gpu:
        claim = f"a pass of {rows} rows over one of one row"
        verdicts.append(within(claim, over_one, _MOST_OVER_ONE))
    return {
        "ms": ms,
        "spread_ms": [min(times[rows]), max(times[rows])],
        "bytes_per_s": rate,
        "of_bus": rate / bus_per_s,
        "over_one": over_one,
        "pass_bytes": found.pass_bytes,
        "pinned_bytes": found.pinned_bytes,
        "held_bytes": found.held_bytes,
        "resident": found.resident,
        "fill_s": target.fill_s,
        "says": says,
        "verdicts": verdicts,
    }


@contextlib.contextmanager
def _one_after_another(streamed: StreamedModel, setting: Setting) -> Iterator[None]:
    """Let the GPU come to its end before each layer and behind it, so that nothing overlaps."""

    def wait(*given: Any) -> None:
        if setting.on_gpu:
            torch.cuda.synchronize()

    hooks: list[Any] = []
    for layer in layer_list(streamed.model)[1]:
        hooks += [layer.register_forward_pre_hook(wait), layer.register_forward_hook(wait)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


# --- the draft ---


def _draft_row(decoder: Decoder, context: int, setting: Setting) -> dict[str, Any]:
    """A step of the draft, as one CUDA graph, with the target's ring and layers beside it."""
    claim = "a draft step, ms"
    if setting.on_gpu and setting.left_s < _DRAFT_S:
        return {"verdicts": [not_run(claim, f"{setting.left_s:.0f} s left")]}
    tokens = _DRAFTED if setting.on_gpu else 2
    try:
        with torch.inference_mode():
            decoder.compile_("inductor" if setting.on_gpu else "eager")
            decoder.place.fill_(context)
            replay = graph_of(decoder)[0] if setting.on_gpu else decoder.step
            times = median_ms(replay, decoder, context, tokens)
    except PipelineError as error:
        return {"verdicts": [not_run(claim, str(error))]}
    verdicts = [within(claim, times[0], _MOST_DRAFT_MS)] if setting.on_gpu else []
    return {
        "ms": times[0],
        "spread_ms": times[1:],
        "read_bytes": decoder.read_bytes(context),
        "says": f"{times[0]:.2f} ms, {decoder.read_bytes(context) / 1e9:.2f} GB",
        "verdicts": verdicts,
    }


def _together_row(passes: dict[str, dict[str, Any]], draft_ms: float) -> dict[str, Any]:
    """What passes and drafts would be worth; how many draft tokens are right is another matter."""
    most = STEADY_TOKENS
    one_ms, call_ms = passes["pass of 1"]["ms"], passes[f"pass of {most}"]["ms"]
    drafted_ms = call_ms + (most - 1) * draft_ms
    needed = _WANTED_RATIO * drafted_ms / one_ms
    return {
        "most_ratio": most * one_ms / drafted_ms,
        "tokens_needed": needed,
        "says": f"{_WANTED_RATIO:g} x the speed takes {needed:.1f} tokens a call, of {most}",
    }


def _memory_row(draft_bytes: int, setting: Setting) -> dict[str, Any]:
    """The most that was held of the GPU, of draft and target together, against the cap."""
    if not setting.on_gpu:
        return {"draft_bytes": draft_bytes, "verdicts": []}
    held, kept = torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
    return {
        "draft_bytes": draft_bytes,
        "allocated_bytes": held,
        "reserved_bytes": kept,
        "cap_bytes": _CAP_BYTES,
        "says": f"{held / 1e9:.2f} GB held, {kept / 1e9:.2f} GB reserved",
        "verdicts": [within("GPU memory that torch held, of 8 GiB", held / _CAP_BYTES, 1.0)],
    }
