"""`write_bundle`: an engine folder and the ONNX folder it was built from in, a bundle out."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.artefact import sha256_of_file, staged_folder, write_json, write_text
from pipeline.bundle.program import write_program
from pipeline.engine.manifest import MANIFEST_FILE, check_manifest
from pipeline.engine.worker_protocol import TIMING_CACHE_FILE
from pipeline.errors import InputError
from pipeline.gpu import capability_name
from pipeline.output import check_output
from pipeline.provenance import provenance
from pipeline.runtime.device.bundle import (
    BUNDLE_FILE,
    ENGINE_FOLDER,
    PROGRAM,
    REFERENCE_FILE,
    answer_logits,
)
from pipeline.runtime.device.preflight import check_device, needed_bytes
from pipeline.runtime.generate import generate
from pipeline.runtime.sequence import Decoding
from pipeline.runtime.sessions.onnx_session import OnnxSession
from pipeline.runtime.tokenizer import load_tokenizer

_SCHEMA = 1
_PROMPTS = (
    "The capital of France is",
    "def add(a, b):\n    return",
    "One, two, three, four, five, six, seven, eight, nine,",
)
_ANSWER_TOKENS = 24
_LIKELIEST = 32  # logits of so many tokens are kept at each place
_README = """# {name}

An engine for TensorRT {tensorrt} on {gpu}, and what runs it there: Python 3.10 or newer with numpy,
tokenizers, jinja2 and JetPack's TensorRT.

    python3 {program} preflight .
    python3 {program} selftest .
    python3 {program} run . -p "What is a whale?"
"""


def write_bundle(
    engine: Path,
    onnx_folder: Path,
    output: Path,
    device: dict[str, Any] | None = None,
    *,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Pack an engine with the program that runs it and with what ONNX Runtime says in its place.

    Args:
        engine: engine folder of standard TensorRT.
        onnx_folder: the export that it was built from.
        output: folder to write.
        device: description of the board that it is for, from `skipcat-device describe`.
        overwrite: replace `output` if it exists.

    Returns:
        The content of bundle.json.

    Raises:
        InputError: the two folders do not belong together, the engine is for another library, or
            not for the device.
        ResourceError: the device has too little memory for it, or the disk is full.
        UsageError: `output` exists.
    """
    check_output(output, overwrite=overwrite, inputs=(engine, onnx_folder))
    manifest = check_manifest(engine, onnx_folder)
    if manifest["target"]["flavour"] != "tensorrt":
        raise InputError(
            "Only engines of standard TensorRT run without torch.",
            where=engine,
            observed=manifest["target"]["flavour"],
            change="build it on the board with `skipcat engine`",
        )
    if device is not None:
        check_device(engine, device)
    required = manifest["plan"]["bytes"]
    inputs = (engine, onnx_folder)
    with staged_folder(
        output, overwrite=overwrite, inputs=inputs, required_bytes=required
    ) as staging:
        _copy_engine(engine, staging / ENGINE_FOLDER)
        write_program(staging / PROGRAM)
        write_json(staging / REFERENCE_FILE, _reference(onnx_folder, staging / ENGINE_FOLDER))
        write_text(staging / "README.md", _readme(manifest, output))
        record = _record(staging, manifest)
        write_json(staging / BUNDLE_FILE, record)
    return record


def _copy_engine(engine: Path, target: Path) -> None:
    """What running needs: all files but the log of the build and its timings."""
    target.mkdir()
    for path in sorted(engine.iterdir()):
        is_of_build = path.suffix == ".log" or path.name == TIMING_CACHE_FILE
        if path.is_file() and not is_of_build and not path.name.startswith("."):
            shutil.copyfile(path, target / path.name)


def _reference(onnx_folder: Path, engine: Path) -> dict[str, Any]:
    """What ONNX Runtime says of the prompts, greedily, and how likely it found what."""
    tokenizer, session = load_tokenizer(engine), OnnxSession(onnx_folder)
    count = min(_ANSWER_TOKENS, session.max_length // 2)
    entries = []
    for prompt in _PROMPTS:
        ids = tokenizer.encode(prompt)[: session.max_length - count]
        answer = list(generate(session, ids, Decoding(max_new_tokens=count)))
        session.reset()
        logits = answer_logits(session, ids, answer)
        likeliest = np.argsort(-logits, axis=1, kind="stable")[:, :_LIKELIEST]
        values = np.take_along_axis(logits, likeliest, 1)
        entries.append(
            {
                "prompt": prompt,
                "prompt_ids": ids,
                "answer_ids": answer,
                "likeliest": likeliest.tolist(),
                "logits": [[round(float(value), 4) for value in row] for row in values],
            }
        )
    return {"schema": _SCHEMA, "by": session.name, "prompts": entries}


def _readme(manifest: dict[str, Any], output: Path) -> str:
    return _README.format(
        name=output.name,
        program=PROGRAM,
        tensorrt=manifest["tensorrt_version"],
        gpu=capability_name(tuple(manifest["target"]["compute_capability"])),
    )


def _record(staging: Path, manifest: dict[str, Any]) -> dict[str, Any]:
    """bundle.json: what the engine is and needs, and the hash of every file."""
    files = sorted(
        path for path in staging.rglob("*") if path.is_file() and not path.name.startswith(".")
    )
    return {
        "schema": _SCHEMA,
        "target": manifest["target"],
        "tensorrt_version": manifest["tensorrt_version"],
        "limits": manifest["limits"],
        "needed_bytes": needed_bytes(manifest, staging / ENGINE_FOLDER / MANIFEST_FILE),
        "files": {path.relative_to(staging).as_posix(): sha256_of_file(path) for path in files},
        "provenance": provenance(),
    }
