"""The table of runtimes refuses what one of them would misread."""

from __future__ import annotations

import pytest

from pipeline.checkpoint.modeling_quantized import Codes
from pipeline.errors import InputError, UsageError
from pipeline.int8.runtimes import _INT8_RUNTIMES, int8_runtime
from pipeline.quantize.formats import RUNTIMES


def test_runtimes_are_those_of_the_formats() -> None:
    assert _INT8_RUNTIMES.keys() <= RUNTIMES.keys()


@pytest.mark.parametrize(
    ("runtime", "codes", "zero"),
    [("tensorrt", "uint8", 0), ("tensorrt", "int8", 3), ("cpu", "int8", 0), ("cpu", "uint4", 0)],
)
def test_activations_for_another_runtime_are_refused(runtime: str, codes: str, zero: int) -> None:
    with pytest.raises(InputError, match=f"not rounded for {runtime}") as caught:
        int8_runtime(runtime).require([("stem", Codes.parse(codes), zero)], "folder")
    assert codes in str(caught.value)


def test_its_own_activations_are_taken() -> None:
    for name, row in _INT8_RUNTIMES.items():
        row.require([("stem", row.codes(), 0)], name)


def test_an_unknown_runtime_is_refused() -> None:
    with pytest.raises(UsageError, match="No convolutions"):
        int8_runtime("any")
