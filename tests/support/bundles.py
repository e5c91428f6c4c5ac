"""Bundles on the fake board: their program in a process of its own, what they hold, and damage."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import numpy_helper

from pipeline.artefact import sha256_of_file
from tests.support.fake_gpu.board import Board


def program(
    board: Board, folder: Path, *arguments: object, python: str = sys.executable, version: str = ""
) -> subprocess.CompletedProcess[str]:
    """The bundle's own program, elsewhere than in this checkout.

    Args:
        board: the fake.
        folder: of the bundle.
        arguments: of the program.
        python: that runs it.
        version: of the fake TensorRT; as it is without one.
    """
    chosen = {"FAKE_TENSORRT": version} if version else {}
    return subprocess.run(
        [python, str(folder / "skipcat-device"), *map(str, arguments)],
        capture_output=True,
        text=True,
        env=board.environment() | chosen,
        cwd=folder.parent,
    )


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of a folder, by its place in it."""
    files = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def record_of(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "bundle.json").read_text())
    return found


def flip_a_weight(folder: Path) -> str:
    path = folder / "model/model.onnx.data"
    content = bytearray(path.read_bytes())
    content[100] ^= 1
    path.write_bytes(content)
    return "not the one that was packed"


def swap_query_and_key(folder: Path) -> str:
    """In graph and record, so that only the answers can tell."""
    path = folder / "model/model.onnx"
    model = onnx.load(path)
    matrices = [one for one in model.graph.initializer if len(one.dims) == 2]
    first, second = next(
        (a, b) for a in matrices for b in matrices if a.name < b.name and a.dims == b.dims
    )
    values = [numpy_helper.to_array(one).copy() for one in (first, second)]
    first.CopyFrom(numpy_helper.from_array(values[1], first.name))
    second.CopyFrom(numpy_helper.from_array(values[0], second.name))
    save_signed(folder, model)
    return "does not say what the model said"


def overflow_in_a_norm(folder: Path) -> str:
    path = folder / "model/model.onnx"
    model = onnx.load(path)
    norm = next(
        one for one in model.graph.initializer if len(one.dims) == 1 and one.data_type == 10
    )
    values = numpy_helper.to_array(norm).copy()
    values[:] = np.float16(65504)
    norm.CopyFrom(numpy_helper.from_array(values, norm.name))
    save_signed(folder, model)
    return ""


def save_signed(folder: Path, model: onnx.ModelProto) -> None:
    """Write other weights into every graph, and records that say they are as they should be."""
    changed = {one.name: one for one in model.graph.initializer}
    graphs = {path: onnx.load(path) for path in sorted((folder / "model").glob("*.onnx"))}
    (folder / "model/model.onnx.data").unlink()
    for path, graph in graphs.items():
        for one in graph.graph.initializer:
            one.CopyFrom(changed.get(one.name, one))
        onnx.save(graph, path, save_as_external_data=True, location="model.onnx.data")
        (folder / "model/model.onnx.data").rename(path.with_suffix(".data"))
    data = [path.with_suffix(".data") for path in graphs]
    assert len({sha256_of_file(path) for path in data}) == 1, "the graphs share their weights"
    data[0].rename(folder / "model/model.onnx.data")
    for path in data[1:]:
        path.unlink()
    sign(folder)


def sign(folder: Path) -> None:
    """Make the records say that graph and weights are as they should be."""
    export = folder / "model/export.json"
    made, data = json.loads(export.read_text()), folder / "model/model.onnx.data"
    made["onnx_sha256"] = sha256_of_file(folder / "model/model.onnx")
    made |= {"data_sha256": sha256_of_file(data), "data_bytes": data.stat().st_size}
    export.write_text(json.dumps(made))
    record = record_of(folder)
    record["files"] = {name: sha256_of_file(folder / name) for name in record["files"]}
    (folder / "bundle.json").write_text(json.dumps(record))
