from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pipeline.bench.described import find_boards
from pipeline.errors import InputError

BOARD: dict[str, Any] = {
    "schema": 1,
    "board": "NVIDIA Jetson Orin Nano Engineering Reference Developer Kit Super",
    "jetpack": "L4T 36.4.7: JetPack 6.1 or 6.2, TensorRT 10.3",
    "gpu": {"shares_memory": True},
    "memory": {"total_bytes": 7608 << 20, "available_bytes": 6_000_000_000},
    "power": {"mode": "0001", "clocks": {"17000000.gpu max_freq hz": 816_000_000}},
}


def write(folder: Path, **changes: Any) -> Path:
    path = folder / "board.json"
    path.write_text(json.dumps(BOARD | changes), encoding="utf-8")
    return path


def test_a_described_board_has_its_module_mode_clock_memory_and_release(tmp_path: Path) -> None:
    (device,) = find_boards(str(write(tmp_path)))
    assert (device.name, device.mode, device.ghz) == ("board", "25w", 0.816)
    assert device.gb_per_s == pytest.approx(102.4)
    assert (device.available_bytes, device.l4t) == (6_000_000_000, "36.4.7")


def test_what_a_description_does_not_say_is_as_usual(tmp_path: Path) -> None:
    memory = {"total_bytes": 15_656 << 20}
    path = write(tmp_path, board="NVIDIA Jetson Orin NX", memory=memory, power={}, jetpack=None)
    device = find_boards(str(path))[0]
    (usual,) = find_boards("orin-nx-16gb")
    assert (device.ghz, device.available_bytes) == (usual.ghz, usual.available_bytes)
    assert device.l4t is None


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"schema": 9}, "schema 9"),
        ({"board": "ADLINK RQX-59"}, "ADLINK"),
        ({"board": None}, "not known"),
        ({"memory": {"total_bytes": 1 << 40}}, "not known"),
        ({"memory": {"total_bytes": 7608 << 20, "available_bytes": -1}}, "no such memory"),
        ({"memory": 7}, "memory"),
        ({"power": {"clocks": {"gpu max_freq hz": 0}}}, "clock"),
        ({"power": {"clocks": {"gpu max_freq hz": "fast"}}}, "clock"),
        ({"power": -1}, "power"),
    ],
)
def test_what_no_board_is_is_refused(changes: dict[str, Any], word: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=word):
        find_boards(str(write(tmp_path, **changes)))


@pytest.mark.parametrize(
    ("part", "mib", "module"),
    [
        ("nvidia,p3767-0000", 15_656, "orin-nx-16gb"),
        ("nvidia,p3767-0001", 7608, "orin-nx-8gb"),
        ("nvidia,p3767-0005-super", 7608, "orin-nano-8gb"),
        ("nvidia,p3767-0004", 3800, "orin-nano-4gb"),
        ("nvidia,p3701-0005", 62_800, "agx-orin-64gb"),
        ("nvidia,tegra264", 125_800, "thor"),
    ],
)
def test_a_module_is_known_by_its_part_whatever_the_board_is_called(
    part: str, mib: int, module: str, tmp_path: Path
) -> None:
    board = "NVIDIA Jetson Orin NX Engineering Reference Developer Kit Super"
    memory = {"total_bytes": mib << 20}
    path = write(tmp_path, board=board, compatible=[part, "x"], memory=memory, power={})
    assert find_boards(str(path))[0].gb_per_s == find_boards(module)[0].gb_per_s
    assert find_boards(str(path))[0].memory_gb == find_boards(module)[0].memory_gb


def test_boards_and_names_are_found_together(tmp_path: Path) -> None:
    found = find_boards(f"thor, {write(tmp_path)},orin-nano-8gb@7w")
    assert [device.name for device in found] == ["thor", "orin-nano-8gb@7w", "board"]


def test_a_file_that_is_missing_is_refused() -> None:
    with pytest.raises(InputError):
        find_boards("none.json")
