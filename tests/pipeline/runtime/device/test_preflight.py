from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pipeline.errors import InputError, ResourceError
from pipeline.runtime.device.describe import describe
from pipeline.runtime.device.preflight import check_device, needed_bytes
from tests.support.fake_gpu.board import MAX_BATCH, MAX_PREFILL, Board, board_engine
from tests.support.tiny_decoder import LAYERS, MAX_LENGTH, VOCAB_SIZE

ORIN_NANO: dict[str, Any] = {
    "schema": 1,
    "tensorrt": "10.16.1.11",
    "gpu": {"compute_capability": [8, 7], "shares_memory": True},
    "memory": {"available_bytes": 6_500_000_000},
}


@pytest.mark.parametrize(
    ("profile", "copies"), [("opset24", 1), ("compat-static", 1), ("compat", 2)]
)
def test_what_an_engine_needs_is_what_its_runtime_takes(
    profile: str, copies: int, board: Board
) -> None:
    folder = board_engine(profile, board)
    manifest = json.loads((folder / "manifest.json").read_text())
    needed = needed_bytes(manifest, folder)
    head_numbers = 2 * 16  # heads that share a key, and their width
    assert needed["cache"] == copies * 4 * MAX_BATCH * MAX_LENGTH * 2 * LAYERS * head_numbers
    assert needed["logits"] == 4 * MAX_BATCH * MAX_PREFILL * VOCAB_SIZE
    assert needed["plan"] == (folder / "engine.plan").stat().st_size
    assert needed["scratch"] > 0


def test_eight_gigabytes_are_not_eight_gigabytes_for_an_engine(
    board: Board, tmp_path: Path
) -> None:
    """Qwen3-8B in 4 bits: a plan of 5 GB does not fit an Orin Nano of 8 GB."""
    manifest = json.loads((board_engine("opset24", board) / "manifest.json").read_text())
    manifest["plan"]["bytes"] = 5_000_000_000
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ResourceError, match="more memory than the device has free"):
        check_device(tmp_path, ORIN_NANO)


@pytest.mark.parametrize(
    ("release", "total_mib", "plan_bytes", "is_refused"),
    [
        ("36.4.7", 7608, 1_200_000_000, True), ("36.4.7", 7608, 1_000_000_000, False),
        ("36.5", 7608, 1_200_000_000, False), ("36.4.7", 62_800, 1_200_000_000, False),
    ],
)  # fmt: skip
def test_a_release_that_refuses_large_buffers_is_known(
    release: str, total_mib: int, plan_bytes: int, is_refused: bool, board: Board, tmp_path: Path
) -> None:
    manifest = json.loads((board_engine("opset24", board) / "manifest.json").read_text())
    manifest["plan"]["bytes"] = plan_bytes
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    memory = {"available_bytes": 6_500_000_000, "total_bytes": total_mib << 20}
    device = ORIN_NANO | {"jetpack": f"L4T {release}: JetPack 6", "memory": memory}
    if not is_refused:
        check_device(tmp_path, device)
        return
    with pytest.raises(ResourceError, match=r"L4T 36\.5"):
        check_device(tmp_path, device)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"schema": 2}, "no description of a device"),
        ({"schema": None}, "no description of a device"),
        ({"tensorrt": "10.3.0"}, "another TensorRT version"),
        ({"gpu": {"compute_capability": [11, 0]}}, "another GPU"),
        ({"memory": {"available_bytes": -1}}, "no such memory"),
        ({"memory": {"available_bytes": "much"}}, "available_bytes"),
        ({"memory": 7}, "memory"),
        ({"gpu": "fast"}, "gpu"),
        ({"gpu": {"compute_capability": "8.7"}}, "compute_capability"),
        ({"gpu": {"compute_capability": [8]}}, "compute_capability"),
    ],
)
def test_a_device_that_does_not_fit_or_is_none_is_refused(
    changes: dict[str, Any], said: str, board: Board
) -> None:
    with pytest.raises(InputError, match=said):
        check_device(board_engine("opset24", board), {**ORIN_NANO, **changes})


def test_what_a_description_leaves_out_is_said(board: Board) -> None:
    found = check_device(board_engine("opset24", board), {"schema": 1})
    assert found["unknown"] == ["TensorRT version", "GPU", "free memory"]


def test_a_board_is_described_by_what_its_kernel_says(board: Board, tmp_path: Path) -> None:
    files = {
        "proc/device-tree/model": "Seeed reComputer J4012\0",
        "proc/device-tree/compatible": "nvidia,p3767-0000\0nvidia,tegra234\0",
        "etc/nv_tegra_release": "# R36 (release), REVISION: 5.0, GCID: 1\n",
        "proc/meminfo": "MemTotal: 7800000 kB\nMemAvailable: 6500000 kB\nSwapTotal: 3900000 kB\n"
        "CmaFree: 200000 kB\n",
        "proc/swaps": "Filename Type Size Used Priority\n/dev/zram0 partition 650000 0 5\n"
        "/swapfile file 100 0 1\n",
        "var/lib/nvpmodel/status": "pmode:0002 fmode:quiet\n",
        "sys/class/devfreq/17000000.gpu/max_freq": "1020000000\n",
        "sys/class/devfreq/17000000.gpu/cur_freq": "not a number\n",
    }
    for name, text in files.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    found = describe(board.driver(), tmp_path)
    assert found["board"] == "Seeed reComputer J4012"
    assert found["compatible"] == ["nvidia,p3767-0000", "nvidia,tegra234"]
    assert "JetPack 6.2.2" in found["jetpack"]
    assert found["gpu"]["compute_capability"] == [8, 7]  # of a name that says no module
    assert found["memory"]["available_bytes"] == 6_500_000 * 1024
    assert found["memory"]["swap_in_memory_bytes"] == 650_000 * 1024
    assert found["power"] == {"mode": "0002", "clocks": {"17000000.gpu max_freq hz": 1020000000}}
    nothing = describe(None, tmp_path / "absent")
    for name in ("gpu", "board", "compatible", "jetpack"):
        assert nothing[name] is None
    assert set(nothing["memory"].values()) == {None, 0}
