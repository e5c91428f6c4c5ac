"""What sessions over an engine have in common, with torch or without: plugin, profiles, plan."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.artefact import sha256_of_file
from pipeline.engine.manifest import mismatch
from pipeline.engine.profiles import ShapeProfile
from pipeline.errors import InputError
from pipeline.export.contract import ATTENTION_MASK, INPUT_IDS

if TYPE_CHECKING:
    import tensorrt as trt

_PIECE_BYTES = 64 << 20  # of a plan in memory beside what TensorRT has made of it


def load_engine_plugin(
    library: Any, manifest: Mapping[str, Any], plugin: Path | None, folder: Path
) -> None:
    """Load the plugin that the engine was built with; nothing for an engine without one.

    Raises:
        InputError: it is not given, or is not that library.
    """
    record = manifest["block_skip"]["plugin"]
    if record is None:
        return
    path = plugin or folder / record["library"]
    if not path.is_file():
        raise InputError(
            "This engine was built with a plugin library, which is missing.",
            where=folder,
            expected=f"{record['library']}, sha256 {record['sha256']}",
            change="put the library into the engine folder, or name it",
        )
    digest = sha256_of_file(path)
    if digest != record["sha256"]:
        raise mismatch("plugin library", path, digest, record["sha256"])
    if library.get_plugin_registry().load_library(str(path)) is None:
        raise InputError("TensorRT cannot load this plugin library.", where=path)


def require_rows(rows: int, max_batch: int, where: str) -> None:
    """Raise InputError for more rows than the engine was built for."""
    if rows > max_batch:
        raise InputError(
            "More rows than the engine takes.",
            where=where,
            observed=f"{rows} rows",
            expected=f"at most {max_batch}",
            change="build the engine again with a larger --max-batch",
        )


def split_call(count: int, longest: int) -> list[tuple[int, int]]:
    """[start, stop) of the pieces of a call of `count` tokens, each at most `longest`."""
    return [(start, min(start + longest, count)) for start in range(0, count, longest)]


def pick_profile(profiles: Sequence[ShapeProfile], shapes: Mapping[str, tuple[int, ...]]) -> int:
    """Index of the first profile that admits all shapes; decode comes first.

    Raises:
        InputError: none does.
    """
    for index, profile in enumerate(profiles):
        if all(_admits(profile, name, shape) for name, shape in shapes.items()):
            return index
    raise InputError(
        "No profile of the engine admits this call.",
        observed={name: shapes[name] for name in (INPUT_IDS, ATTENTION_MASK) if name in shapes},
        change="build the engine again with larger limits",
    )


def _admits(profile: ShapeProfile, name: str, shape: tuple[int, ...]) -> bool:
    """Whether a profile covers one tensor's shape."""
    ends = profile.shapes[name]
    return len(shape) == len(ends.min) and all(
        low <= size <= high for low, size, high in zip(ends.min, shape, ends.max, strict=True)
    )


def read_plan(
    library: Any, runtime: trt.Runtime, path: Path, *, streams: bool = True
) -> trt.ICudaEngine:
    """Deserialise a plan.

    Args:
        library: the imported module.
        runtime: of it.
        path: of the plan.
        streams: read it piece by piece; otherwise it is in memory twice for a while.

    Raises:
        InputError: TensorRT refuses it.
    """
    with path.open("rb", buffering=0) as file:
        source = _make_reader(library, file.fileno()) if streams else file.read()
        engine = runtime.deserialize_cuda_engine(source)
    if engine is None:
        raise InputError(
            "TensorRT refuses this plan; it said why above.",
            where=path,
            change="build the engine again on this machine",
        )
    return engine


def _make_reader(library: Any, number: int) -> Any:
    """What TensorRT reads an open file through, by the interface that its version has.

    Up to 10.16 there is `IStreamReader`, which only reads on; from 11 on `IStreamReaderV2` alone,
    which also seeks and may give less than it was asked for. What has been read is dropped from the
    page cache, which on a Jetson takes the memory that the engine needs.
    """
    reads_on = getattr(library, "IStreamReader", None)
    base: Any = reads_on or library.IStreamReaderV2

    class PlanReader(base):  # type: ignore[misc]
        def __init__(self) -> None:
            base.__init__(self)

        def read(self, size: int, stream: int = 0) -> bytes:
            start = os.lseek(number, 0, os.SEEK_CUR)
            content = _read_exactly(number, size if reads_on else min(size, _PIECE_BYTES))
            if hasattr(os, "posix_fadvise"):
                os.posix_fadvise(number, start, len(content), os.POSIX_FADV_DONTNEED)
            return content

        def seek(self, offset: int, where: Any) -> bool:
            os.lseek(number, offset, int(where))
            return True

    return PlanReader()


def _read_exactly(number: int, size: int) -> bytes:
    """So many bytes of a file, or those up to its end: one read may give fewer than asked for."""
    content = os.read(number, size)
    if len(content) in (0, size):
        return content
    pieces = [content]
    while (left := size - sum(map(len, pieces))) and (piece := os.read(number, left)):
        pieces.append(piece)
    return b"".join(pieces)
