"""The tiny random Llama of the benchmarks, its shared ONNX exports, and a record for them."""

from __future__ import annotations

import fcntl
import functools
import json
import os
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

__all__ = [
    "LAYERS",
    "MAX_LENGTH",
    "VOCAB_SIZE",
    "byte_tokenizer",
    "export_tiny",
    "save_tiny_folder",
    "shared_export",
    "tiny_llama",
    "write_record",
]


@functools.cache
def shared_export(profile: str) -> Path:
    """The export of `tiny_llama()` and, beside it, `model`: made once for all tests and workers.

    Neither is to be written to.
    """
    root = Path(os.environ["SKIPCAT_TESTS_SHARED"], profile)
    root.mkdir(exist_ok=True)
    with (root / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # of several workers one makes it
        if not (root / profile / "export.json").exists():
            export_tiny(save_tiny_folder(root / "model"), root / profile, profile)
    return root / profile


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
