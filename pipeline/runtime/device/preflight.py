"""Whether an engine can run on a board, before its plan is read: versions, GPU, memory."""

from __future__ import annotations

import re
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from pipeline.engine.manifest import MANIFEST_FILE, mismatch, read_manifest
from pipeline.engine.profiles import ShapeProfile
from pipeline.errors import InputError, ResourceError
from pipeline.export.contract import CACHE_PREFIX, PROFILES
from pipeline.gpu import capability_name
from pipeline.json_file import json_field
from pipeline.runtime.device.describe import SCHEMA
from pipeline.runtime.device.session import block_tokens

# CUDA's context, the libraries' code and what they keep. Not measured on a Jetson with our engines:
# it is by how much the GPU memory that NVIDIA publishes for Edge-LLM 0.10 on Orin is above plan and
# cache at most (4,619 against 2,976 MB, Qwen3-4B int4).
LIBRARIES_BYTES = 1_650_000_000
# Above this, that release of the system refuses a buffer on a board of 8 GB, whatever is free:
# "NvMapMemAllocInternalTagged: error 12". The next one does not.
LARGEST_BUFFER_BYTES, REFUSING_L4T, SMALL_BOARD_BYTES = 1_100_000_000, "36.4.7", 8 << 30
UPDATE_L4T = "update the board to L4T 36.5 (JetPack 6.2.2)"
_WHERE = "device description"
_ITEM_BYTES = {"float16": 2, "float32": 4}


@dataclass(frozen=True)
class Description:
    """What `describe` said of a board.

    Attributes:
        fields: of it.
        where: they are from, for messages.

    Raises:
        InputError: it is no description, or, when it is asked for it, a field is wrong.
    """

    fields: dict[str, Any]
    where: object = _WHERE

    def __post_init__(self) -> None:
        schema = self.fields.get("schema")
        if schema != SCHEMA:
            raise InputError(
                "This is no description of a device.",
                where=self.where,
                observed=f"schema {schema!r}",
                expected=f"what `skipcat-device describe` prints, schema {SCHEMA}",
            )

    @property
    def gpu(self) -> dict[str, Any]:
        """What it says of the GPU."""
        return self._field("gpu", dict) or {}

    @property
    def memory(self) -> dict[str, Any]:
        """What it says of the CPU's memory."""
        return self._field("memory", dict) or {}

    @property
    def l4t(self) -> str | None:
        """Release of the board's system, such as 36.4.7, out of the line on JetPack."""
        said = re.search(r"L4T ([0-9.]+)", self._field("jetpack", str) or "")
        return said[1] if said else None

    @property
    def free_bytes(self) -> int | None:
        """Memory that an engine may take: on a board the CPU's and the GPU's are the same."""
        gpu, memory = self.gpu, self.memory
        own = json_field(gpu, "free_bytes", int, self.where, default=None)
        shared = json_field(memory, "available_bytes", int, self.where, default=None)
        for number in (own, shared):
            if number is not None and number < 0:
                raise InputError(
                    "A device has no such memory.",
                    where=self.where,
                    observed=number,
                    expected="0 and up",
                )
        return own if gpu.get("shares_memory") is False else shared if shared is not None else own

    def _field(self, name: str, kind: type) -> Any:
        return json_field(self.fields, name, kind, self.where, default=None)


def check_device(folder: Path, device: dict[str, Any]) -> dict[str, Any]:
    """Hold an engine folder against a description of a board.

    Args:
        folder: what `skipcat engine` wrote.
        device: what `describe` gave, here or on the board.

    Returns:
        `needed_bytes` by what they are for, `available_bytes`, and `unknown`: what could not be
        looked at, since the description does not say.

    Raises:
        InputError: the engine is for another TensorRT or GPU, or the description is none.
        ResourceError: it needs more memory than there is, or more in one piece than there can be.
    """
    manifest = read_manifest(folder)
    board = Description(device)
    unknown = _require_same(manifest, board, folder)
    needed = needed_bytes(manifest, folder / MANIFEST_FILE)
    require_buffer(needed["plan"], board, folder)
    available = board.free_bytes
    if available is None:
        unknown.append("free memory")
    elif sum(needed.values()) > available:
        raise _too_large(needed, available, board, folder)
    return {"needed_bytes": needed, "available_bytes": available, "unknown": unknown}


def needed_bytes(manifest: dict[str, Any], path: Path) -> dict[str, int]:
    """Bytes of memory that running an engine takes, by what they are for.

    Args:
        manifest: of its folder.
        path: of the manifest, for messages.

    Raises:
        InputError: a field that says so is missing.
    """
    made_of = json_field(manifest, "onnx", dict, path)
    limits = json_field(manifest, "limits", dict, path)
    if not manifest["profiles"]:
        raise mismatch("list of profiles", path, "none", "at least one")
    profile = ShapeProfile.from_json(manifest["profiles"][0])
    item = _ITEM_BYTES.get(made_of.get("dtype", ""), max(_ITEM_BYTES.values()))
    length = json_field(made_of, "max_length", int, path)
    rows = json_field(limits, "max_batch", int, path)
    heads = [
        shape.max[1] * shape.max[3]
        for name, shape in profile.shapes.items()
        if name.startswith(CACHE_PREFIX)
    ]
    form = PROFILES.get(made_of.get("profile", ""))
    copies = 1 if form and form.static_cache else 2
    row = json_field(made_of, "vocab_size", int, path) * item
    tokens = block_tokens(json_field(limits, "max_prefill", int, path), max(row, 1))
    layers = manifest.get("engine_layers") or {}
    return {
        "plan": manifest["plan"]["bytes"],
        "cache": copies * prod((sum(heads), rows, length, item)),
        "logits": rows * tokens * row,
        "scratch": int(layers.get("device_memory_bytes") or 0),
        "libraries": LIBRARIES_BYTES,
    }


def _require_same(manifest: dict[str, Any], board: Description, folder: Path) -> list[str]:
    """What cannot be compared; raise InputError for an engine of another TensorRT or GPU."""
    found = json_field(board.gpu, "compute_capability", list, _WHERE, default=None)
    if found is not None and [type(part) for part in found] != [int, int]:
        raise InputError(
            "The field 'compute_capability' is wrong.",
            where=_WHERE,
            observed=found,
            expected="two whole numbers, as [8, 7]",
        )
    here = {
        "TensorRT version": (board.fields.get("tensorrt"), manifest["tensorrt_version"]),
        "GPU": (
            found and capability_name(tuple(found)),
            capability_name(tuple(manifest["target"]["compute_capability"])),
        ),
    }
    for what, (observed, expected) in here.items():
        if observed is not None and observed != expected:
            raise mismatch(what, folder, observed, expected)
    return [what for what, (observed, _) in here.items() if observed is None]


def require_buffer(plan_bytes: int, board: Description, folder: Path) -> None:
    """See that the system can give an engine's weights in one piece.

    Args:
        plan_bytes: of the engine's plan.
        board: that it is to run on.
        folder: of the engine, for the message.

    Raises:
        ResourceError: it cannot.
    """
    total = json_field(board.memory, "total_bytes", int, _WHERE, default=None)
    is_small = total is not None and total <= SMALL_BOARD_BYTES
    if board.l4t == REFUSING_L4T and is_small and plan_bytes > LARGEST_BUFFER_BYTES:
        raise ResourceError(
            f"L4T {REFUSING_L4T} gives no piece of memory as large as this engine's weights.",
            where=folder,
            observed=f"a plan of {plan_bytes / 1e9:.2f} GB",
            expected=f"at most {LARGEST_BUFFER_BYTES / 1e9:.1f} GB",
            change=UPDATE_L4T,
        )


def _too_large(
    needed: dict[str, int], available: int, board: Description, folder: Path
) -> ResourceError:
    total = sum(needed.values())
    parts = ", ".join(f"{name} {size / 1e9:.2f}" for name, size in needed.items() if size)
    shared = board.gpu.get("shares_memory", True)
    cure = (
        "stop the desktop (sudo systemctl isolate multi-user.target) and what else runs, drop the "
        "page cache (sync; echo 3 | sudo tee /proc/sys/vm/drop_caches), "
        if shared
        else "close other programs on the GPU, "
    )
    return ResourceError(
        "This engine needs more memory than the device has free.",
        where=folder,
        observed=f"{total / 1e9:.2f} GB: {parts}",
        expected=f"at most {available / 1e9:.2f} GB",
        change=cure + "or build from a smaller checkpoint, or export with a shorter --max-length",
    )
