"""What each runtime takes of a network in 8 bits: one row says which codes, and where they stand.

One file does not serve both. TensorRT knows no zero point, and reads uint8 as int8 without a word,
so that codes above 127 saturate; ONNX Runtime has integer kernels on a CPU for uint8 activations
whose outputs are rounded, too, and computes in float where they are not.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from pipeline.checkpoint.modeling_quantized import Codes
from pipeline.errors import InputError, UsageError


@dataclass(frozen=True)
class Int8Runtime:
    """What a runtime takes.

    Attributes:
        name: as the user writes it, and as `Profile.formats_of` has it.
        signed: whether codes of activations are signed.
        symmetric: whether they are counted from 0 alone.
        outputs: whether what convolutions and activations give is rounded where it arises, rather
            than only where a convolution reads it.
        takes: for messages.
    """

    name: str
    signed: bool
    symmetric: bool
    outputs: bool
    takes: str

    def codes(self, bits: int = 8) -> Codes:
        """The codes of activations."""
        return Codes.parse(("int" if self.signed else "uint") + str(bits))

    def require(self, grids: Iterable[tuple[str, Codes, int]], where: object) -> None:
        """Refuse activations that were rounded for another runtime, or that no runtime takes.

        Args:
            grids: names, codes and zero points.
            where: for the message.

        Raises:
            InputError: names the first that does not fit.
        """
        own = self.codes()
        for name, codes, zero in grids:
            if codes == own and not (self.symmetric and zero):
                continue
            raise InputError(
                f"The convolutions were not rounded for {self.name}.",
                where=f"{where}, {name}",
                observed=f"{codes.name} with zero point {zero}",
                expected=self.takes,
                change=f"compress again with --runtime {self.name}"
                if codes.bits == own.bits
                else "compress to 8 bits: fewer bits of activations are for PyTorch alone",
            )


_INT8_RUNTIMES = {
    row.name: row
    for row in (
        Int8Runtime("tensorrt", True, True, False, "int8 activations with zero point 0"),
        Int8Runtime("cpu", False, False, True, "uint8 activations with any zero point"),
    )
}


def int8_runtime(name: str) -> Int8Runtime:
    """The row of a runtime.

    Raises:
        UsageError: there is none.
    """
    if name not in _INT8_RUNTIMES:
        raise UsageError(
            "No convolutions in 8 bits for this runtime.",
            where="--runtime",
            observed=name,
            expected=" or ".join(_INT8_RUNTIMES),
        )
    return _INT8_RUNTIMES[name]
