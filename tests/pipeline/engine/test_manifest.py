from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipeline.artefact import sha256_of_file
from pipeline.engine.manifest import EngineRuntime, check_manifest
from pipeline.errors import InputError

HERE = EngineRuntime("rtx", "1.7.1.116", (8, 6))


@pytest.fixture
def engine(tmp_path: Path, tiny_export: Path) -> Path:
    """An engine folder whose plan is never loaded: only the pairing is checked here."""
    folder = tmp_path / "engine"
    folder.mkdir()
    (folder / "engine.plan").write_bytes(b"plan")
    write_manifest(folder, tiny_export)
    return folder


def write_manifest(folder: Path, onnx: Path, **changes: Any) -> None:
    plan = folder / "engine.plan"
    manifest = {
        "schema": 1,
        "target": {"flavour": "rtx", "compute_capability": [8, 6], "reason": "a test"},
        "tensorrt_version": "1.7.1.116",
        "profiles": [],
        "block_skip": {"path": "none", "nodes": 0, "plugin": None},
        "plan": {"bytes": plan.stat().st_size, "sha256": sha256_of_file(plan)},
        "onnx": {
            "sha256": sha256_of_file(onnx / "model.onnx"),
            "data_sha256": {"model.onnx.data": sha256_of_file(onnx / "model.onnx.data")},
        },
        **changes,
    }
    (folder / "manifest.json").write_text(json.dumps(manifest))


def test_a_matching_pairing_is_accepted(engine: Path, tiny_export: Path) -> None:
    assert check_manifest(engine, tiny_export, HERE)["tensorrt_version"] == "1.7.1.116"


@pytest.mark.parametrize(
    ("runtime", "what"),
    [
        (EngineRuntime("tensorrt", "1.7.1.116", (8, 6)), "flavour"),
        (EngineRuntime("rtx", "1.7.2.1", (8, 6)), "version"),
        (EngineRuntime("rtx", "1.7.1.116", (8, 9)), "GPU"),
    ],
)
def test_another_flavour_version_or_gpu_is_refused(
    engine: Path, runtime: EngineRuntime, what: str
) -> None:
    with pytest.raises(InputError, match=f"another.*{what}"):
        check_manifest(engine, runtime=runtime)


def test_a_plan_that_changed_is_refused(engine: Path) -> None:
    (engine / "engine.plan").write_bytes(b"nalp")
    with pytest.raises(InputError, match="plan hash"):
        check_manifest(engine)
    (engine / "engine.plan").write_bytes(b"truncated plan")
    with pytest.raises(InputError, match="plan size"):
        check_manifest(engine)


def test_the_same_graph_with_other_weights_is_refused(
    engine: Path, tmp_path: Path, export_writer: Callable[..., Path]
) -> None:
    other = export_writer(tmp_path / "other")
    data = other / "model.onnx.data"
    data.write_bytes(data.read_bytes()[::-1])
    with pytest.raises(InputError, match=r"hash of model\.onnx\.data"):
        check_manifest(engine, other)


def test_another_graph_is_refused(
    engine: Path, tmp_path: Path, export_writer: Callable[..., Path]
) -> None:
    other = export_writer(tmp_path / "other", profile="compat")
    with pytest.raises(InputError, match=r"hash of model\.onnx"):
        check_manifest(engine, other)


@pytest.mark.parametrize("name", ["manifest.json", "engine.plan"])
def test_a_missing_file_is_refused(engine: Path, name: str) -> None:
    (engine / name).unlink()
    with pytest.raises(InputError):
        check_manifest(engine)


@pytest.mark.parametrize("text", ["{", "[]", '{"schema": 2}', '{"schema": 1}'])
def test_a_manifest_of_another_kind_is_refused(engine: Path, text: str) -> None:
    (engine / "manifest.json").write_text(text)
    with pytest.raises(InputError):
        check_manifest(engine)
