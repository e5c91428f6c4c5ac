"""Quantised matrices and kernels, and the layers that hold them: linear, embedding, convolution.

This file travels with every compressed checkpoint, beside `modeling_skipcat.py`, which imports it,
and depends on torch alone.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn


class QuantizedWeight(nn.Module):
    """A quantised matrix [m, n]: w = (code - zero point) * scale.

    With offsets the zero point is -offset / scale, so that w = code * scale + offset.

    Args:
        rows: m.
        columns: n.
        format_name: `int4-b32-asym`: bits of a code, weights of a row that share a scale (`row`
            for all of them), and whether zero points are stored (`asym`), offsets are (`offset`),
            or neither and the zero points are 2^(bits - 1) (`sym`).
        device: where the codes are.

    Attributes:
        codes: uint8 [m, bytes]; the codes of a row one behind the other, the first in the lowest
            bits; the last block is filled up.
        scales: int16 [m, blocks], the bits of float16, which no cast of the model changes.
        zero_points: uint8 [m, bytes], packed likewise; only where the format has them.
        offsets: int16 [m, blocks], as scales; only where the format has them.
    """

    codes: torch.Tensor
    scales: torch.Tensor
    zero_points: torch.Tensor
    offsets: torch.Tensor

    def __init__(
        self, rows: int, columns: int, format_name: str, device: torch.device | str | None = None
    ) -> None:
        super().__init__()
        kind, block, self.zero = format_name.split("-")
        self.rows, self.columns, self.format_name = rows, columns, format_name
        self.bits = int(kind.removeprefix("int"))
        self.block = columns if block == "row" else int(block.removeprefix("b"))
        self.blocks = -(-columns // self.block)
        counts = (self.blocks * self.block, self.blocks)
        code_bytes, zero_bytes = (-(-count * self.bits // 8) for count in counts)
        widths = {"codes": (code_bytes, torch.uint8), "scales": (self.blocks, torch.int16)}
        if self.zero == "asym":
            widths["zero_points"] = (zero_bytes, torch.uint8)
        elif self.zero == "offset":
            widths["offsets"] = (self.blocks, torch.int16)
        for name, (width, dtype) in widths.items():
            self.register_buffer(name, torch.zeros(rows, width, dtype=dtype, device=device))
        self._held: torch.Tensor | None = None

    def values(self, dtype: torch.dtype) -> torch.Tensor:
        """The matrix in a type; computed at first use, and kept."""
        held = self._held
        if held is None or held.dtype != dtype or held.device != self.codes.device:
            held = self.picked(slice(None)).to(dtype)
            self._held = held
        return held

    def picked(self, rows: torch.Tensor | slice) -> torch.Tensor:
        """Some rows of the matrix, float32 [k, n]."""
        codes = _unpacked(self.codes[rows], self.bits, self.blocks * self.block)
        scales = self.scales[rows].view(torch.float16).float()
        zeros: torch.Tensor | int = 2 ** (self.bits - 1)
        if self.zero == "asym":
            zeros = _unpacked(self.zero_points[rows], self.bits, self.blocks).float()[..., None]
        elif self.zero == "offset":
            zeros = -(self.offsets[rows].view(torch.float16).float() / scales)[..., None]
        centred = codes.view(len(codes), self.blocks, self.block).float() - zeros
        return (centred * scales[..., None]).flatten(1)[:, : self.columns]


def _unpacked(packed: torch.Tensor, bits: int, count: int) -> torch.Tensor:
    """The first `count` codes of each row, uint8 [m, count]."""
    if 8 % bits == 0:
        shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=packed.device)
        slots = (packed[..., None] >> shifts) & (2**bits - 1)
        return slots.flatten(1)[:, :count]
    places = torch.arange(8, dtype=torch.uint8, device=packed.device)
    every = ((packed[..., None] >> places) & 1).flatten(1)[:, : count * bits]
    weights = 2 ** torch.arange(bits, dtype=torch.uint8, device=packed.device)
    return (every.view(len(packed), count, bits) * weights).sum(-1, dtype=torch.uint8)


class _Typed(nn.Module):
    """A module whose `dtype` follows casts of the model, though its codes do not."""

    dtype: torch.dtype

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> _Typed:
        super()._apply(fn, recurse)
        self.dtype = fn(torch.empty(0, dtype=self.dtype)).dtype
        return self


class QuantizedLinear(_Typed):
    """A linear layer whose matrix is quantised, and multiplied in the type of its input.

    Args:
        in_features: n.
        out_features: m.
        format_name: see `QuantizedWeight`.
        bias: whether it has one.
        table: the embedding whose matrix this is, too; None if it has its own.
        device: where the parameters are made.
        dtype: of the bias, and of `weight`.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        format_name: str,
        *,
        bias: bool = False,
        table: QuantizedEmbedding | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.dtype = dtype or torch.get_default_dtype()
        # A plain list hides the table from nn.Module, which would otherwise register it twice.
        self.table_reference = [] if table is None else [table]
        if table is None:
            self.stored = QuantizedWeight(out_features, in_features, format_name, device)
        empty = torch.empty(out_features, device=device, dtype=dtype) if bias else None
        self.bias = None if empty is None else nn.Parameter(empty)

    @property
    def matrix(self) -> QuantizedWeight:
        """The codes, its own or those of the table."""
        return self.table_reference[0].stored if self.table_reference else self.stored

    @property
    def weight(self) -> torch.Tensor:
        """What the codes stand for, [m, n]."""
        return self.matrix.values(self.dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """y, [..., n] to [..., m]."""
        return F.linear(x, self.matrix.values(x.dtype), self.bias)

    def extra_repr(self) -> str:
        """What print(model) shows."""
        return f"{self.in_features}, {self.out_features}, {self.matrix.format_name}"


class QuantizedEmbedding(_Typed):
    """A quantised embedding; a row is computed when it is looked up.

    Args:
        num_embeddings: rows of the table.
        embedding_dim: columns.
        format_name: see `QuantizedWeight`.
        device: where the codes are.
        dtype: of what it returns.
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        format_name: str,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.num_embeddings, self.embedding_dim = num_embeddings, embedding_dim
        self.dtype = dtype or torch.get_default_dtype()
        self.stored = QuantizedWeight(num_embeddings, embedding_dim, format_name, device)

    @property
    def weight(self) -> torch.Tensor:
        """What the codes stand for, [rows, columns]."""
        return self.stored.values(self.dtype)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Rows of the table, int64 [...] to [..., columns]."""
        rows = self.stored.picked(ids.flatten()).to(self.dtype)
        return rows.view(*ids.shape, self.embedding_dim)

    def extra_repr(self) -> str:
        """What print(model) shows."""
        return f"{self.num_embeddings}, {self.embedding_dim}, {self.stored.format_name}"


@dataclass(frozen=True)
class Codes:
    """The whole numbers that codes may be: x = (code - zero point) * scale.

    Attributes:
        bits: of a code, 2 to 8.
        signed: whether they are counted from below 0.
        narrow: whether the outermost negative one is left out, as in weights.
    """

    bits: int
    signed: bool = True
    narrow: bool = False

    @classmethod
    def parse(cls, name: str) -> Codes:
        """`int8` or `uint4`.

        Raises:
            ValueError: there are no such codes.
        """
        kind = name.rstrip("0123456789")
        bits = name.removeprefix(kind)
        if kind not in ("int", "uint") or bits not in ("2", "3", "4", "5", "6", "7", "8"):
            raise ValueError(f"{name!r} are no codes: write int8 or uint8, of 2 to 8 bits")
        return cls(int(bits), kind == "int")

    @property
    def name(self) -> str:
        """As `parse` reads it."""
        return ("int" if self.signed else "uint") + str(self.bits)

    @property
    def low(self) -> int:
        """The smallest code."""
        return self.narrow - 2 ** (self.bits - 1) if self.signed else 0

    @property
    def high(self) -> int:
        """The largest code."""
        return 2 ** (self.bits - self.signed) - 1

    def of(
        self, x: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor | int = 0
    ) -> torch.Tensor:
        """The nearest codes, float in the shape of x; as ONNX's QuantizeLinear has it."""
        return ((x / scale).round() + zero).clamp(self.low, self.high)

    def rounded(
        self, x: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor | int = 0
    ) -> torch.Tensor:
        """The nearest values of the grid, in the shape of x."""
        return (self.of(x, scale, zero) - zero) * scale


def short_numbers(bits: torch.Tensor) -> torch.Tensor:
    """Float32 numbers of the bits of bfloat16, int16 of any shape: scales have no more of them."""
    return bits.view(torch.bfloat16).float()


class ActivationRounding(nn.Module):
    """Rounds activations to codes with one scale, and gives what the codes stand for, float32.

    Args:
        codes: `int8` or `uint8`, or fewer bits.
        device: where the scale is.

    Attributes:
        grid: int16 [2]: the bits of a bfloat16 scale, which no cast of the model changes, and the
            zero point. A name in a file takes more bytes than the two of them.
    """

    grid: torch.Tensor

    def __init__(self, codes: str, device: torch.device | str | None = None) -> None:
        super().__init__()
        self.codes = Codes.parse(codes)
        self.register_buffer("grid", torch.zeros(2, dtype=torch.int16, device=device))

    @property
    def scale(self) -> torch.Tensor:
        """Float32 []."""
        return short_numbers(self.grid)[0]

    @property
    def zero_point(self) -> torch.Tensor:
        """Int16 []."""
        return self.grid[1]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Values on the grid, of the shape of x."""
        return self.codes.rounded(x.float(), self.scale, self.zero_point)

    def extra_repr(self) -> str:
        """What print(model) shows."""
        return self.codes.name


class RoundedActivation(nn.Module):
    """An activation whose outputs are rounded.

    Args:
        activation: has no parameters, such as nn.ReLU.
        codes: see `ActivationRounding`.
        device: where the scale is.
    """

    def __init__(
        self, activation: nn.Module, codes: str, device: torch.device | str | None = None
    ) -> None:
        super().__init__()
        self.activation, self.output = activation, ActivationRounding(codes, device)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """What the activation gives, on the grid."""
        return self.output(self.activation(x)).to(x.dtype)


class Int8Conv(_Typed):
    """A convolution in two dimensions whose kernels are whole numbers of a byte or less.

    Every output has a scale of its own. What it reads is rounded first, unless it is on its grid
    already, and what it gives is rounded where a grid is named.

    Args:
        like: the convolution that it takes the place of; padded with zeros.
        input_codes: see `ActivationRounding`; None reads numbers as they are.
        output_codes: likewise.
        bits: of a code of a kernel, 2 to 8.
        device: where the parameters are made.
        dtype: of the bias, and of what it returns where it was not told a type.

    Attributes:
        codes: int8 of the shape of the convolution's weight [m, n, height, width]; of fewer bits
            than 8 uint8 [m, bytes], counted from 2^(bits - 1), packed as in `QuantizedWeight`.
        scales: int16 [m], the bits of bfloat16.
        bias: [m].
    """

    codes: torch.Tensor
    scales: torch.Tensor

    def __init__(
        self,
        like: nn.Conv2d,
        input_codes: str | None,
        output_codes: str | None,
        bits: int = 8,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if like.padding_mode != "zeros":
            raise ValueError(f"padding of {like.padding_mode!r} is not known to be on a grid")
        self.stride, self.padding, self.dilation = like.stride, like.padding, like.dilation
        self.groups, self.out_channels = like.groups, like.out_channels
        self.dtype = dtype or torch.get_default_dtype()
        self.bits, self.shape = bits, like.weight.shape
        bytes_of_row = -(-self.shape[1:].numel() * bits // 8)
        stored = (self.shape[0], bytes_of_row) if bits < 8 else self.shape
        for name, shape, kind in (
            ("codes", stored, torch.int8 if bits == 8 else torch.uint8),
            ("scales", (like.out_channels,), torch.int16),
        ):
            self.register_buffer(name, torch.zeros(shape, dtype=kind, device=device))
        bias = torch.empty(like.out_channels, device=device, dtype=dtype)
        self.bias = nn.Parameter(bias, requires_grad=False)
        self.input, self.output = (
            None if codes is None else ActivationRounding(codes, device)
            for codes in (input_codes, output_codes)
        )

    @property
    def kernel(self) -> torch.Tensor:
        """The codes one by one, int8 [m, n, height, width]."""
        if self.bits == 8:
            return self.codes
        codes = _unpacked(self.codes, self.bits, self.shape[1:].numel()).to(torch.int8)
        return (codes - 2 ** (self.bits - 1)).view(self.shape)

    @property
    def weight(self) -> torch.Tensor:
        """What the codes stand for, float32 [m, n, height, width]."""
        return self.kernel.float() * short_numbers(self.scales)[:, None, None, None]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Features [B, m, height, width] of [B, n, height, width], computed in float32."""
        return self.convolved(x, self.weight)

    def convolved(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """The same with a weight that is at hand, float32."""
        read = x.float() if self.input is None else self.input(x)
        y = F.conv2d(
            read, weight, self.bias.float(), self.stride, self.padding, self.dilation, self.groups
        )
        return (y if self.output is None else self.output(y)).to(x.dtype)

    def extra_repr(self) -> str:
        """What print(model) shows."""
        return f"{list(self.shape)}, {self.bits} bits, stride={self.stride}, groups={self.groups}"
