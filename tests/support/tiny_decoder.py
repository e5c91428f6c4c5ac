"""The tiny random Llama of the benchmarks, its shared ONNX exports, and a record for them."""

from __future__ import annotations

import fcntl
import functools
import json
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.models import (
    LAYERS,
    MAX_LENGTH,
    VOCAB_SIZE,
    byte_tokenizer,
    export_tiny,
    save_tiny_folder,
    tiny_llama,
)
from pipeline.artefact import sha256_of_file
from pipeline.export.contract import CPU, INT4
from pipeline.export.export import ExportRequest, export_folder

__all__ = [
    "LAYERS",
    "MAX_LENGTH",
    "VOCAB_SIZE",
    "byte_tokenizer",
    "export_tiny",
    "save_tiny_folder",
    "shared_draft",
    "shared_export",
    "shared_folder",
    "shared_rounded_export",
    "tiny_llama",
    "write_record",
]


@functools.cache
def shared_export(profile: str) -> Path:
    """The export of `tiny_llama()` and, beside it, `model`: made once for all tests and workers.

    Neither is to be written to.
    """

    def make(root: Path) -> None:
        export_tiny(save_tiny_folder(root / "model"), root / profile, profile)

    return shared_folder(profile, make)


@functools.cache
def shared_draft() -> Path:
    """A draft for `shared_export("cpu")`, in 4 bits; of another seed, so that it is often wrong."""

    def make(root: Path) -> None:
        model = save_tiny_folder(root / "model", seed=1)
        export_folder(model, root / "draft", ExportRequest(CPU, "float32", MAX_LENGTH, INT4))

    return shared_folder("draft", make)


@functools.cache
def shared_rounded_export() -> Path:
    """The same in the profile `cpu` with weights of floats and a cache of codes; `text` beside."""

    def make(root: Path) -> None:
        model, text = save_tiny_folder(root / "model"), root / "text"
        # All bytes, in any order, as the tests' tokens are: what was never seen would be cut off.
        text.write_text("".join(random.Random(0).choices([chr(n) for n in range(1, 512)], k=3000)))
        wanted = ExportRequest(
            "cpu", max_length=MAX_LENGTH, weights="float", cache="int8", calibration=str(text)
        )
        export_folder(model, root / "cpu8", wanted)

    return shared_folder("cpu8", make)


def shared_folder(name: str, make: Callable[[Path], None], record: str = "export.json") -> Path:
    """The export `name` in a folder of all workers, of which one makes it, its record last."""
    root = Path(os.environ["SKIPCAT_TESTS_SHARED"], name)
    root.mkdir(exist_ok=True)
    with (root / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (root / name / record).exists():
            make(root)
    return root / name


def write_record(folder: Path, profile: str, **changes: Any) -> None:
    """Write a short `export.json` for the `model.onnx` of the folder."""
    record = {
        "schema": 1,
        "profile": profile,
        "dtype": "float32",
        "max_length": MAX_LENGTH,
        "vocab_size": VOCAB_SIZE,
        "num_layers": LAYERS,
        "onnx_sha256": sha256_of_file(folder / "model.onnx"),
    }
    (folder / "export.json").write_text(json.dumps(record | changes), encoding="utf-8")
