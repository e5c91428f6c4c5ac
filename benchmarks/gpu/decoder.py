"""One token of a decoder of any shape, its linears by any product, as one CUDA graph.

What every way has in common (norms, rotation, attention over a cache of fixed size) is one layer,
compiled once by torch.compile and captured with the rest of the step, so that ways differ in their
products alone. Llama and Qwen3, batch 1.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from pipeline.bench.shapes import Shape
from pipeline.kernels.op import block_skip_linear
from pipeline.kernels.quantized_op import block_skip_linear_quantized

_EPSILON, _THETA = 1e-6, 10000.0
_WEIGHT = 0.02
# Deviation of uniform codes of mean zero; weights get that of numbers.
_SPREAD = {4: 4.32, 8: 73.3}
_BLOCK = 64
_HEAD_BITS = 8
_WARM_UP_STEPS = 3


@dataclass(frozen=True)
class Way:
    """How the linears of a decoder are stored.

    Attributes:
        name: in rows.
        kept: fraction of their parameters, by the uniform plan.
        form: `dense`, `low_rank` or `skip`.
        bits: 16; or 4, in blocks of 64, the head in 8 by row.
        compiler: options of torch.compile.
    """

    name: str
    kept: float = 1.0
    form: str = "dense"
    bits: int = 16
    compiler: tuple[tuple[str, Any], ...] = ()


class _Random:
    """Draws weights on a device."""

    def __init__(self, device: str, dtype: torch.dtype, seed: int) -> None:
        self.device, self.dtype = device, dtype
        self._generator = torch.Generator(device).manual_seed(seed)

    def numbers(self, *shape: int, deviation: float = _WEIGHT) -> nn.Parameter:
        """Normal numbers."""
        drawn = torch.empty(shape, dtype=self.dtype, device=self.device)
        return _frozen(drawn.normal_(0, deviation, generator=self._generator))

    def codes(self, rows: int, columns: int, bits: int, block: int) -> dict[str, nn.Parameter]:
        """Codes of [rows, columns] as the kernels read them, and their scales."""
        width = -(-columns * bits // 8)
        drawn = self._signed(rows, width, bits)
        if bits == 4:
            drawn = drawn & 15 | self._signed(rows, width, bits) << 4
        shape = (-(-rows // block), columns)
        scale = torch.full(shape, _WEIGHT / _SPREAD[bits], dtype=self.dtype, device=self.device)
        return {"stored": _frozen(drawn), "scale": _frozen(scale)}

    def _signed(self, rows: int, columns: int, bits: int) -> torch.Tensor:
        """Integers of mean zero: a mean of a half would grow from layer to layer, and overflow."""
        most = 2 ** (bits - 1) - 1
        drawn = torch.empty(rows, columns, dtype=torch.int8, device=self.device)
        return drawn.random_(-most, most + 1, generator=self._generator)

    def order(self, n: int) -> torch.Tensor:
        """A permutation, int32 [n]."""
        drawn = torch.randperm(n, generator=self._generator, device=self.device)
        return drawn.to(torch.int32)


def _frozen(values: torch.Tensor) -> nn.Parameter:
    return nn.Parameter(values, requires_grad=False)


class _Dense(nn.Module):
    """y = x Wᵀ."""

    def __init__(self, m: int, n: int, random: _Random) -> None:
        super().__init__()
        self.weight = random.numbers(m, n)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.weight)


class _LowRank(nn.Module):
    """y = (x Aᵀ) Bᵀ."""

    def __init__(self, m: int, n: int, rank: int, random: _Random) -> None:
        super().__init__()
        self.down, self.up = random.numbers(rank, n), random.numbers(m, rank)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(F.linear(x, self.down), self.up)


class _Skip(nn.Module):
    """y = (x1 + x2 a) b, by our operator."""

    def __init__(self, m: int, n: int, rank: int, random: _Random) -> None:
        super().__init__()
        self.a, self.b = random.numbers(n - rank, rank), random.numbers(rank, m)
        self.register_buffer("index", random.order(n))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        index: Any = self.index
        return block_skip_linear(x, self.a, self.b, index)


class _Codes(nn.Module):
    """The same of codes; of full rank y = x b."""

    def __init__(self, m: int, n: int, rank: int, bits: int, block: int, random: _Random) -> None:
        super().__init__()
        self.a: nn.Parameter | None = None
        self.a_scale: nn.Parameter | None = None
        index = None
        self.bits, self.blocks = [0, bits], [0, block]
        if rank < n:
            a = random.codes(n - rank, rank, bits, block)
            self.a, self.a_scale, index = a["stored"], a["scale"], random.order(n)
            self.bits[0], self.blocks[0] = bits, block
        b = random.codes(rank, m, bits, block)
        self.b, self.b_scale = b["stored"], b["scale"]
        self.register_buffer("index", index)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        index: Any = self.index
        return block_skip_linear_quantized(
            x, self.a, self.a_scale, self.b, self.b_scale, index, self.bits, self.blocks
        )


def _product(way: Way, m: int, n: int, rank: int, form: str, random: _Random) -> nn.Module:
    """A linear [m, n] as a way stores it; `rank` and `form` are the plan's."""
    if way.bits < 16:
        return _Codes(m, n, rank if form == "skip" else n, way.bits, _BLOCK, random)
    if form == "skip":
        return _Skip(m, n, rank, random)
    return _LowRank(m, n, rank, random) if form == "low_rank" else _Dense(m, n, random)


class _Layer(nn.Module):
    """One layer of the decoder for one token.

    Args:
        shape: of the decoder.
        products: of queries, keys and values; of the attention's output; of gate and up; of down.
    """

    def __init__(self, shape: Shape, products: list[nn.Module], random: _Random) -> None:
        super().__init__()
        self.qkv, self.o, self.gate_up, self.down = products
        self.heads, self.kv_heads, self.width = shape.heads, shape.kv_heads, shape.head_dim
        ones = torch.ones(shape.hidden, dtype=random.dtype, device=random.device)
        self.before, self.between = _frozen(ones), _frozen(ones.clone())
        self.of_heads = shape.model_type == "qwen3"

    def forward(
        self,
        x: torch.Tensor,
        turn: torch.Tensor,
        place: torch.Tensor,
        hidden: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
    ) -> torch.Tensor:
        """X [1, hidden] to the same; the token's key and value are written into the cache.

        Args:
            x: the residual stream.
            turn: cosines and sines of the position, [2, width of a head].
            place: int64 [1], where the token stands.
            hidden: 0 where a key may be seen and -inf elsewhere, [places].
            keys: [key-value heads, places, width of a head], written at `place`.
            values: likewise.
        """
        normed = F.rms_norm(x, (x.shape[-1],), self.before, _EPSILON)
        q, k, v = self._split(self.qkv(normed))
        keys[:, place] = self._turned(k, turn)
        values[:, place] = v
        grouped = self._turned(q, turn).view(self.kv_heads, -1, self.width)
        scores = grouped @ keys.transpose(1, 2) * self.width**-0.5 + hidden
        seen = scores.float().softmax(-1).to(x.dtype) @ values
        x = x + self.o(seen.view(1, -1))
        normed = F.rms_norm(x, (x.shape[-1],), self.between, _EPSILON)
        gate, up = self.gate_up(normed).chunk(2, dim=-1)
        y: torch.Tensor = x + self.down(F.silu(gate) * up)
        return y

    def _split(self, joined: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Queries, keys and values, [heads, 1, width]."""
        parts = joined.view(-1, 1, self.width).split([self.heads, self.kv_heads, self.kv_heads])
        q, k = (self._normed(part) for part in parts[:2])
        return q, k, parts[2]

    def _normed(self, x: torch.Tensor) -> torch.Tensor:
        """Qwen3's norm of each head, its gains being ones."""
        return F.rms_norm(x, (self.width,), None, _EPSILON) if self.of_heads else x

    def _turned(self, x: torch.Tensor, turn: torch.Tensor) -> torch.Tensor:
        """[heads, 1, width], turned by the position."""
        low, high = x.chunk(2, dim=-1)
        return x * turn[0] + torch.cat([-high, low], dim=-1) * turn[1]


class Decoder:
    """A decoder of random weights and a cache of random content, for decode steps.

    Args:
        shape: its sizes.
        way: how its linears are stored.
        device: `cuda` or `cpu`.
        places: of the cache.
        seed: of all numbers.
        rank_multiple: ranks are multiples of it.
    """

    def __init__(
        self, shape: Shape, way: Way, device: str, places: int, seed: int, rank_multiple: int
    ) -> None:
        dtype = torch.float16 if device == "cuda" else torch.float32
        random = _Random(device, dtype, seed)
        self.shape, self.way, self.device = shape, way, device
        self.layers = _layers(shape, way, random, rank_multiple)
        self.embedding = random.numbers(shape.vocab, shape.hidden)
        self.gain = torch.ones(shape.hidden, dtype=dtype, device=device)
        self.head = _head(shape, way, self.embedding, random)
        cache = (shape.kv_heads, places, shape.head_dim)
        self.cache = [(random.numbers(*cache), random.numbers(*cache)) for _ in self.layers]
        self.turns = _turns(places, shape.head_dim, device, dtype)
        self.numbers = torch.arange(places, device=device)
        self.place = torch.zeros(1, dtype=torch.int64, device=device)
        self.token = torch.zeros(1, dtype=torch.int64, device=device)

    def read_bytes(self, places: int) -> int:
        """Of weights, and of so many places of the cache, that a step reads."""
        held = [*self.layers, *([] if self.head is None else [self.head])]
        total = sum(_bytes(module) for module in held)
        total += 0 if self.head is not None else _tensor_bytes(self.embedding)
        keys = self.cache[0][0]
        return total + 2 * len(self.cache) * places * keys[:, 0].numel() * keys.element_size()

    def step(self) -> torch.Tensor:
        """Logits [1, vocabulary] of the token at its place; the next step is for the next place."""
        x = self.embedding.index_select(0, self.token)
        turn = self.turns.index_select(1, self.place)[:, 0]
        hidden = torch.where(self.numbers <= self.place, 0.0, -torch.inf).to(x.dtype)
        for layer, (keys, values) in zip(self.layers, self.cache, strict=True):
            x = layer(x, turn, self.place, hidden, keys, values)
        x = F.rms_norm(x, (x.shape[-1],), self.gain, _EPSILON)
        logits: torch.Tensor = F.linear(x, self.embedding) if self.head is None else self.head(x)
        self.place.add_(1)
        return logits

    def compile_(self, backend: str) -> None:
        """Compile the layer, of which all layers are instances, once."""
        for layer in self.layers:
            options: Any = dict(self.way.compiler) or None
            layer.compile(
                fullgraph=True, dynamic=False, backend=backend,
                options=options if backend == "inductor" else None,
            )  # fmt: skip


def _layers(shape: Shape, way: Way, random: _Random, multiple: int) -> list[_Layer]:
    """Every layer; where the uniform plan keeps a matrix dense, it is."""
    groups = shape.plan(way.kept, multiple).groups
    made: list[_Layer] = []
    for place in range(shape.layers):
        mine = groups[4 * place : 4 * place + 4]
        forms = [way.form if group.form != "dense" else "dense" for group in mine]
        products = [
            _product(way, group.rows, group.columns, group.rank, form, random)
            for group, form in zip(mine, forms, strict=True)
        ]
        made.append(_Layer(shape, products, random))
    return made


def _head(shape: Shape, way: Way, table: nn.Parameter, random: _Random) -> nn.Module | None:
    """The head, unless it is the embedding; of codes it is one of its own: rows are looked up."""
    if way.bits < 16:
        block = -(-shape.hidden // 16) * 16
        return _Codes(shape.vocab, shape.hidden, shape.hidden, _HEAD_BITS, block, random)
    return None if shape.tied else _Dense(shape.vocab, shape.hidden, random)


def _turns(places: int, width: int, device: str, dtype: torch.dtype) -> torch.Tensor:
    """Cosines and sines of every position, [2, places, width]."""
    frequencies = _THETA ** (-torch.arange(0, width, 2, dtype=torch.float64) / width)
    angles = torch.arange(places, dtype=torch.float64)[:, None] * frequencies
    angles = torch.cat([angles, angles], dim=-1)
    return torch.stack([angles.cos(), angles.sin()]).to(device, dtype)


def _bytes(module: nn.Module) -> int:
    """Of all weights of a module."""
    return sum(map(_tensor_bytes, [*module.parameters(), *module.buffers()]))


def _tensor_bytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def graph_of(decoder: Decoder) -> tuple[Callable[[], None], torch.Tensor]:
    """What replays a captured step, and where its logits are."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(_WARM_UP_STEPS):
            decoder.step()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            logits = decoder.step()
    torch.cuda.current_stream().wait_stream(stream)
    return graph.replay, logits


def _token_ms(step: Callable[[], object], decoder: Decoder, first: int, tokens: int) -> float:
    """Milliseconds a token over steps from place `first` on."""
    decoder.place.fill_(first)
    if decoder.device == "cpu":
        started = time.perf_counter()
        for _ in range(tokens):
            step()
        return 1e3 * (time.perf_counter() - started) / tokens
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(tokens):
        step()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / tokens


def median_ms(step: Callable[[], object], decoder: Decoder, first: int, tokens: int) -> list[float]:
    """Median, least and largest of the rounds, the first of which is not counted."""
    times = [_token_ms(step, decoder, first, tokens) for _ in range(6)][1:]
    return [statistics.median(times), min(times), max(times)]
