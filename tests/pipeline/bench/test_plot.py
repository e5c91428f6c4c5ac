from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pipeline.bench.plot import _plain, write_plot


def measured(name: str, read_bytes: float, rates: list[float]) -> dict[str, Any]:
    rate = {"median": rates[1], "min": rates[0], "max": rates[2]}
    return {
        "model": name,
        "session": "torch float32",
        "bytes_per_token": read_bytes,
        "decode_tokens_per_s": rate,
    }


def test_each_model_and_the_bandwidth_are_in_the_measured_roofline(tmp_path: Path) -> None:
    rows = [measured("dense", 5e8, [30, 31, 33]), measured("kept", 3e8, [40, 44, 45])]
    record = {
        "kind": "measurement",
        "rows": rows,
        "bandwidth": {"bytes_per_s": {"median": 3.35e10}},
    }
    drawn = []
    for name in ("a.svg", "b.svg"):
        write_plot(record, tmp_path / name)
        drawn.append((tmp_path / name).read_text())
    assert drawn[0] == drawn[1]
    for text in ("dense, torch float32", "kept, torch float32", "33.5 GB/s", "decode, measured"):
        assert text in drawn[0]


def test_each_device_has_a_line_in_the_predicted_roofline(tmp_path: Path) -> None:
    rows = [
        {
            "model": "dense",
            "device": device,
            "gb_per_s": speed,
            "bytes_per_token": 5e8,
            "engine": "ours",
            "expected_tokens_per_s": speed,
            "tokens_per_s": {"expected": speed, "low": speed / 2, "high": 2 * speed},
        }
        for device, speed in (("thor", 273.0), ("orin-nano-8gb", 68.3))
    ]
    write_plot({"kind": "prediction", "rows": rows}, tmp_path / "p.svg")
    text = (tmp_path / "p.svg").read_text()
    for part in ("thor, 273 GB/s", "orin-nano-8gb, 68 GB/s", "PREDICTED, not measured"):
        assert part in text
    assert text.count(">dense, ours<") == 1


@pytest.mark.parametrize(
    ("value", "text"), [(100, "100"), (2000, "2,000"), (0.5, "0.5"), (300, ""), (70, "")]
)
def test_ticks_stand_at_one_two_and_five(value: float, text: str) -> None:
    assert _plain(value) == text
