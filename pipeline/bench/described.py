"""A board by what `skipcat-device describe` said of it: the module, its mode, and what is free."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

from pipeline.bench.devices import DEVICES, DeviceSpec, find_devices
from pipeline.errors import InputError
from pipeline.json_file import json_field, read_json_object
from pipeline.runtime.device.preflight import Description

# In the device tree's list of what the board is compatible with; names of boards may be wrong.
_PARTS = (
    (r"p3767-000[345]", "orin-nano"),
    (r"p3767-000[012]", "orin-nx"),
    (r"p3701-", "agx-orin"),
    (r"tegra264", "thor"),
)
_NAMES = (
    ("Orin Nano", "orin-nano"), ("Orin NX", "orin-nx"), ("AGX Orin", "agx-orin"), ("Thor", "thor"),
)  # fmt: skip
_GIBIBYTE = 1 << 30
# Of a module's memory, what the system says is there is less by what firmware keeps.
_LEAST_SEEN = 0.85
_CLOCK = "max_freq"


def find_boards(words: str) -> list[DeviceSpec]:
    """Devices as `find_devices` does, and those of files that end in .json: descriptions.

    Raises:
        pipeline.errors.UsageError: a name is not known, or there is none.
        InputError: as `_described_device`.
    """
    files = [word.strip() for word in words.split(",") if word.strip().lower().endswith(".json")]
    names = [word for word in words.split(",") if word.strip() not in files]
    named = find_devices(",".join(names)) if any(map(str.strip, names)) or not files else []
    return [*named, *(_described_device(Path(file)) for file in files)]


def _described_device(path: Path) -> DeviceSpec:
    """The device of a description, with the clock of its power mode and the memory that is free.

    Raises:
        InputError: it is no description, of no module that is known, or says what no board is.
    """
    fields = read_json_object(path)
    board = Description(fields, path)
    module = _module_of(fields, path)
    clock_ghz = _clock_ghz(fields, path)
    modes = module.in_modes()
    if clock_ghz is not None and modes:
        nearest = min(modes, key=lambda mode: abs(mode.ghz - clock_ghz))
        module = replace(nearest, ghz=clock_ghz)
    return replace(
        module,
        free_bytes=board.free_bytes,
        l4t=board.l4t,
        name=path.stem,
    )


def _module_of(fields: dict[str, Any], path: Path) -> DeviceSpec:
    """The module in the table that the device tree's part, or the board's name, and memory are."""
    board = json_field(fields, "board", str, path, default=None) or ""
    parts = ",".join(map(str, json_field(fields, "compatible", list, path, default=None) or []))
    memory = json_field(fields, "memory", dict, path, default=None) or {}
    seen = json_field(memory, "total_bytes", int, path, default=None)
    by_part = (name for pattern, name in _PARTS if re.search(pattern, parts))
    by_name = (name for word, name in _NAMES if word in board)
    family = next(by_part, None) or next(by_name, None)
    sizes = [
        d for name, d in DEVICES.items() if family and re.fullmatch(rf"{family}(-\d+gb)?", name)
    ]
    fitting = [d for d in sizes if seen and _LEAST_SEEN <= seen / (d.memory_gb * _GIBIBYTE) <= 1]
    if not fitting:
        raise InputError(
            "The module of this board is not known.",
            where=path,
            observed=f"board {board!r} ({parts or 'no parts'}) with {seen} bytes of memory",
            expected=", ".join(name for name, device in DEVICES.items() if device.is_orin),
            change="name one of these instead of the file",
        )
    return fitting[0]


def _clock_ghz(fields: dict[str, Any], path: Path) -> float | None:
    """The highest clock of the GPU in the board's power mode; None where it is not said."""
    power = json_field(fields, "power", dict, path, default=None) or {}
    clocks = json_field(power, "clocks", dict, path, default=None) or {}
    for name, hertz in clocks.items():
        if _CLOCK not in name:
            continue
        if not isinstance(hertz, int) or not 1e8 <= hertz <= 1e10:
            raise InputError(
                "No GPU has such a clock.",
                where=f"{path}: {name}",
                observed=hertz,
                expected="hertz, 100 MHz to 10 GHz",
                change="describe the board again",
            )
        return hertz / 1e9
    return None
