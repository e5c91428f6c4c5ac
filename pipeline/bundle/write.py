"""Bundles, from an engine and the ONNX folder it was built from, or from a checkpoint."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.artefact import sha256_of_file, staged_folder, write_json, write_text
from pipeline.bench.devices import DeviceSpec
from pipeline.bench.predict import OURS, predict, require_a_fit
from pipeline.bench.targets import BenchTarget
from pipeline.bundle.jetpack import JetPack
from pipeline.bundle.prepare import copy_plugin_sources, prepare_model
from pipeline.bundle.program import write_program
from pipeline.bundle.wheels import copy_wheels, download_command
from pipeline.engine.manifest import MANIFEST_FILE, check_manifest
from pipeline.engine.plan import EngineRequest
from pipeline.engine.target import Target
from pipeline.engine.worker_protocol import TIMING_CACHE_FILE
from pipeline.errors import InputError
from pipeline.export.contract import DEFAULT_MAX_LENGTH, FLOAT16
from pipeline.export.request import ExportRequest
from pipeline.gpu import capability_name
from pipeline.output import check_output
from pipeline.provenance import provenance, public_name
from pipeline.runtime.device.bundle import (
    BUNDLE_FILE,
    ENGINE_FOLDER,
    MODEL_FOLDER,
    PLUGIN_FOLDER,
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


_TO_BUILD = """# {name}

A model for TensorRT {tensorrt} on {gpu} (JetPack {jetpack}), and what builds and runs its engine
there: Python {python} with numpy, tokenizers, jinja2 and JetPack's TensorRT (python3-libnvinfer).

    python3 -m venv --system-site-packages venv
    venv/bin/pip install {packages}
    venv/bin/python {program} preflight .
    venv/bin/python {program} build .
    venv/bin/python {program} run . -p "What is a whale?"

`sh {plugin}/build.sh` compiles the plugin library there, which needs nvcc; `build` takes it where
it is there.

For a board without a network, `skipcat bundle --wheels` packs what this downloads elsewhere:

    {download}
"""
_WHEELS_FOLDER = "wheels"
# Those of the system are older than any that this was tested with.
_FROM_PYPI = '"numpy>=2" tokenizers "jinja2>=3.1"'
_OFFLINE = f"--no-index --no-deps {_WHEELS_FOLDER}/*.whl"


@dataclass(frozen=True)
class CheckpointBundle:
    """What a bundle that is made from a checkpoint is for.

    Attributes:
        jetpack: of the boards.
        devices: what is predicted of; the first decides the GPU.
        max_length: slots of the cache, prompt and answer together.
        max_batch: most sequences at once.
        max_prefill: most tokens of one call.
        plugin: library that was compiled for those boards; None for none.
        wheels: folder of wheels for the board's Python; None packs none.
        trust_remote_code: let Python code that comes with the checkpoint run.
    """

    jetpack: JetPack
    devices: Sequence[DeviceSpec]
    max_length: int = DEFAULT_MAX_LENGTH
    max_batch: int = 1
    max_prefill: int = 1024
    plugin: Path | None = None
    wheels: Path | None = None
    trust_remote_code: bool = False


def bundle_checkpoint(
    checkpoint: Path, output: Path, request: CheckpointBundle, *, overwrite: bool = False
) -> dict[str, Any]:
    """Pack a checkpoint as what a board builds its engine from, and is held to.

    Args:
        checkpoint: a compressed or a plain Hugging Face folder.
        output: folder to write.
        request: the boards.
        overwrite: replace `output` if it exists.

    Returns:
        The content of bundle.json.

    Raises:
        InputError: the checkpoint cannot be exported, or plugin or wheels are not for such a board.
        ResourceError: our engine of it runs on none of the devices, or the disk is full.
        UsageError: `output` exists, or the JetPack is not for the device.
    """
    inputs = (checkpoint, request.plugin or "", request.wheels or "")
    check_output(output, overwrite=overwrite, inputs=inputs)
    jetpack, capability = request.jetpack, request.jetpack.capability_of(request.devices[0])
    wanted = ExportRequest(
        jetpack.profile, FLOAT16, request.max_length, trust_remote_code=request.trust_remote_code
    )
    target = Target("tensorrt", capability, f"JetPack {jetpack.name}, {request.devices[0].name}")
    engine = EngineRequest(target, request.max_batch, request.max_prefill)
    with staged_folder(output, overwrite=overwrite, inputs=inputs) as staging:
        if request.wheels is not None:
            copy_wheels(request.wheels, staging / _WHEELS_FOLDER, jetpack)
        copy_plugin_sources(staging / PLUGIN_FOLDER, request.plugin)
        model = staging / MODEL_FOLDER
        build = prepare_model(checkpoint, model, wanted, engine, jetpack.tensorrt)
        predicted = _predicted(model, public_name(checkpoint), request.devices)
        write_program(staging / PROGRAM)
        write_json(staging / REFERENCE_FILE, _reference(model, model))
        write_text(staging / "README.md", _readme_to_build(request, target, output))
        record = {
            "schema": _SCHEMA,
            "jetpack": jetpack.name,
            "target": target.to_json(),
            "tensorrt_version": jetpack.tensorrt,
            "build": build,
            "predicted": predicted,
            "files": _hashes(staging),
            "provenance": provenance(),
        }
        write_json(staging / BUNDLE_FILE, record)
    return record


def _predicted(model: Path, name: str, devices: Sequence[DeviceSpec]) -> dict[str, Any]:
    """What is expected of our engine with a full cache, from what, and where that was published.

    Raises:
        ResourceError: it runs on none of the devices.
    """
    target = replace(BenchTarget.of_folder(model), label=name, what={"folder": name})
    longest = target.traffic.max_length
    assert longest is not None, "an export says how long its cache is"
    record = predict([target], devices, longest - 1)
    require_a_fit(record)
    return {
        "measured": False,
        "context": record["context"],
        "rows": [row for row in record["rows"] if row["engine"] == OURS],
        "devices": record["devices"],
        "fits": record["check"]["fits"],
    }


def _readme_to_build(request: CheckpointBundle, target: Target, output: Path) -> str:
    assert target.compute_capability is not None, "it is a Jetson's"
    jetpack = request.jetpack
    packages = _OFFLINE if request.wheels is not None else _FROM_PYPI
    return _TO_BUILD.format(
        name=output.name,
        program=PROGRAM,
        plugin=PLUGIN_FOLDER,
        packages=packages,
        download=download_command(jetpack),
        jetpack=jetpack.name,
        tensorrt=jetpack.tensorrt,
        python="{}.{}".format(*jetpack.python),
        gpu=capability_name(target.compute_capability),
    )


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


def _reference(onnx_folder: Path, tokenizer_folder: Path) -> dict[str, Any]:
    """What ONNX Runtime says of the prompts, greedily, and how likely it found what."""
    tokenizer, session = load_tokenizer(tokenizer_folder), OnnxSession(onnx_folder)
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
    return {
        "schema": _SCHEMA,
        "target": manifest["target"],
        "tensorrt_version": manifest["tensorrt_version"],
        "limits": manifest["limits"],
        "needed_bytes": needed_bytes(manifest, staging / ENGINE_FOLDER / MANIFEST_FILE),
        "files": _hashes(staging),
        "provenance": provenance(),
    }


def _hashes(staging: Path) -> dict[str, str]:
    """SHA-256 of every file of a bundle, by its place in it."""
    files = sorted(
        path for path in staging.rglob("*") if path.is_file() and not path.name.startswith(".")
    )
    return {path.relative_to(staging).as_posix(): sha256_of_file(path) for path in files}
