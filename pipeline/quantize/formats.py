"""Low-bit formats: how many, how many weights share a scale, and which runtimes take them.

A matrix [m, n] is cut along its rows into blocks of neighbouring inputs; each block has a scale,
and what the codes are counted from is one of

    sym     w = (code - 2^(bits - 1)) * scale
    asym    w = (code - zero point) * scale, the zero point itself a code
    offset  w = code * scale + offset, any number: what GGUF's Q4_0, Q4_1 and Q4_K hold
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

_SCALE_BYTES = 2
DEFAULT_RUNTIME = "cpu"
_BITS = (2, 3, 4, 6, 8)
KERNEL_BLOCK_UNIT = 16  # rows that a step of our kernels takes, all of one block

Zero = Literal["sym", "asym", "offset"]
_ZEROS: tuple[Zero, ...] = get_args(Zero)


@dataclass(frozen=True)
class Format:
    """How a quantised matrix is stored.

    Attributes:
        bits: of a code.
        block: weights of a row that share a scale; 0 for the whole row ("per channel").
        zero: what codes are counted from.
    """

    bits: int
    block: int
    zero: Zero

    @classmethod
    def parse(cls, name: str) -> Format:
        """The format that a name such as `int4-b32-asym` or `int8-row-sym` stands for.

        Raises:
            ValueError: no such format; says how they are written.
        """
        try:
            kind, block, word = name.split("-")
            bits = int(kind.removeprefix("int"))
            width = 0 if block == "row" else int(block.removeprefix("b"))
        except ValueError:
            raise ValueError(
                f"{name!r} is no format: write int4-b32-asym or int8-row-sym"
            ) from None
        zero = next((zero for zero in _ZEROS if zero == word), None)
        if bits not in _BITS or width < 0 or zero is None:
            raise ValueError(
                f"{name!r}: bits are one of {_BITS}, the last word of {', '.join(_ZEROS)}"
            )
        return cls(bits, width, zero)

    @property
    def symmetric(self) -> bool:
        """Whether a block has a scale alone."""
        return self.zero == "sym"

    @property
    def name(self) -> str:
        """`int4-b32-asym`, as plans and messages write it."""
        block = f"b{self.block}" if self.block else "row"
        return f"int{self.bits}-{block}-{self.zero}"

    def width(self, columns: int) -> int:
        """Weights in a block of a matrix of so many columns."""
        return self.block or columns

    def blocks(self, columns: int) -> int:
        """Blocks in a row of so many columns."""
        return -(-columns // self.width(columns))

    def stored_bytes(self, rows: int, columns: int, scale_bytes: int = _SCALE_BYTES) -> int:
        """Bytes of codes, scales, and zero points or offsets, with what fills the last block."""
        blocks = self.blocks(columns)
        code_bytes = rows * -(-blocks * self.width(columns) * self.bits // 8)
        return code_bytes + rows * (self.zero_bytes(columns, scale_bytes) + blocks * scale_bytes)

    def zero_bytes(self, columns: int, scale_bytes: int = _SCALE_BYTES) -> int:
        """Bytes of zero points or offsets in a row of so many columns; an offset is as a scale."""
        blocks = self.blocks(columns)
        return {"sym": 0, "asym": -(-blocks * self.bits // 8), "offset": blocks * scale_bytes}[
            self.zero
        ]


@dataclass(frozen=True)
class Runtime:
    """What a runtime takes, and how it stores it.

    Attributes:
        name: as the user writes it.
        formats: the choices of a search for this runtime.
        table: formats of an embedding that is also the head.
        scale_bytes: of a scale in its file.
        float_bytes: of a number that is not quantised.
        takes: for messages.
        multiplies: whether its kernels multiply with matrices of a format.
        whole_blocks: whether they take no block that the matrix does not fill.
        looks_up_apart: whether looking up rows of an embedding wants scales of its own.
        holds_angles: whether its graph holds the cosines and sines of every position.
    """

    name: str
    formats: tuple[Format, ...]
    table: tuple[Format, ...]
    scale_bytes: int
    float_bytes: int
    takes: str
    multiplies: Callable[[Format], bool] = lambda format: True
    whole_blocks: bool = False
    looks_up_apart: bool = False
    holds_angles: bool = False

    def accepts(self, format: Format, columns: int | None = None) -> bool:
        """Whether its kernels multiply with matrices of a format and, if given, so many columns."""
        if self.whole_blocks and columns is not None and columns % format.width(columns):
            return False
        return self.multiplies(format)


def _in_onnx_runtime(format: Format) -> bool:
    """What MatMulNBits of ONNX Runtime takes."""
    return format.bits in (2, 4, 8) and format.block in (16, 32, 64, 128, 256)


def _in_kernels(format: Format) -> bool:
    """What the kernels of `trt_plugins/block_skip` multiply with, in TensorRT and in PyTorch."""
    return format.symmetric and format.bits in (4, 8) and format.block % KERNEL_BLOCK_UNIT == 0


def held_by_kernels(format: Format) -> bool:
    """Whether the kernels can multiply with a matrix's codes, in PyTorch.

    Fewer bits are held in the next width that they read, and what a zero point or an offset adds is
    one number for each block: a small product of its own, of sums over the blocks of the input.
    """
    return format.block % KERNEL_BLOCK_UNIT == 0


def _in_tensorrt(format: Format) -> bool:
    """What the kernels take, and TensorRT without them multiplies out of a DequantizeLinear."""
    alone = (format.bits, format.block) in ((4, 64), (4, 128), (8, 0))
    return _in_kernels(format) and alone


def _formats(names: str) -> tuple[Format, ...]:
    return tuple(map(Format.parse, names.split()))


RUNTIMES = {
    "cpu": Runtime(
        "cpu",
        _formats(
            "int2-b32-asym int2-b64-asym int4-b128-asym int4-b64-asym int4-b32-asym "
            "int4-b32-offset int8-b128-sym int8-b32-sym"
        ),
        _formats("int4-b64-asym int4-b32-asym int8-b64-sym"),
        4,
        4,
        "2, 4 or 8 bits, blocks of 16 to 256",
        _in_onnx_runtime,
        looks_up_apart=True,
        holds_angles=True,
    ),
    "tensorrt": Runtime(
        "tensorrt",
        _formats("int4-b128-sym int4-b64-sym int8-row-sym"),
        _formats("int8-row-sym"),
        2,
        2,
        "4 bits in whole symmetric blocks of 64 or 128, or 8 bits by row",
        _in_tensorrt,
        whole_blocks=True,
    ),
    "any": Runtime(
        "any",
        _formats(
            "int2-b32-asym int2-b64-asym int3-b64-asym int3-b32-asym int4-b128-asym "
            "int4-b64-asym int4-b32-asym int4-b32-offset int6-b64-sym int8-b128-sym"
        ),
        _formats(
            "int2-b32-asym int3-b32-asym int4-b64-asym int4-b32-asym int6-b64-sym int8-b64-sym"
        ),
        2,
        2,
        "2, 3, 4, 6 or 8 bits; no runtime yet, torch alone",
    ),
}
