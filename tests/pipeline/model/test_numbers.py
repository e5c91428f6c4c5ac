"""What is no number is found wherever it stands, in little memory."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from pipeline.errors import InputError
from pipeline.model import numbers
from pipeline.model.numbers import require_finite

LARGE = """
import sys, torch
from pipeline.memory import peak_bytes
from pipeline.model.numbers import require_finite
weights = torch.ones(9000, 3000, dtype=torch.bfloat16)
require_finite("weights", weights[:1])  # what torch loads with its first sum
before = peak_bytes()
require_finite("weights", weights)
print(peak_bytes() - before)
"""


@pytest.mark.parametrize("shape", [(), (7,), (9, 3), (3, 9), (2, 3, 4), (0, 3)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_number_that_is_none_is_found_anywhere(
    shape: tuple[int, ...], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(numbers, "_AT_ONCE", 5)
    for place in range(torch.zeros(shape).numel()):
        for number in (torch.nan, torch.inf, -torch.inf):
            tensor = torch.full(shape, torch.finfo(dtype).max, dtype=dtype)
            require_finite("w", tensor, "file")
            tensor.view(-1)[place] = number
            with pytest.raises(InputError, match="not finite"):
                require_finite("w", tensor, "file")


@pytest.mark.skipif(sys.platform != "linux", reason="the peak is asked of /proc")
def test_looking_through_a_large_tensor_copies_a_part_of_it_at_most() -> None:
    answer = subprocess.run(
        [sys.executable, "-c", LARGE], capture_output=True, text=True, timeout=120, check=True
    )
    # As float64 all of it would take 216 MB, and a part of 4 million numbers takes 32.
    assert int(answer.stdout) < 80e6
