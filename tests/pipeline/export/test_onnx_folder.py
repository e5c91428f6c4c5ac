from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from pipeline.errors import InputError
from pipeline.export.onnx_folder import read_onnx_folder


def test_an_export_is_read_with_its_inputs_and_block_skip_nodes(tiny_export: Path) -> None:
    folder = read_onnx_folder(tiny_export)
    assert folder.block_skip_nodes == 2
    assert folder.inputs["input_ids"] == (None, None)
    assert folder.inputs["past_key_values.0.key"] == (None, 2, 16, 64)
    assert [path.name for path in folder.data_files] == ["model.onnx.data"]


def test_a_float32_export_is_refused_with_the_flag_that_helps(
    tmp_path: Path, export_writer: Callable[..., Path]
) -> None:
    folder = read_onnx_folder(export_writer(tmp_path / "float32", dtype="float32"))
    with pytest.raises(InputError, match="float16") as caught:
        folder.require_float16()
    assert "--dtype float16" in caught.value.details["change"]


def test_a_graph_that_changed_after_its_export_is_refused(
    tmp_path: Path, export_writer: Callable[..., Path]
) -> None:
    folder = export_writer(tmp_path / "changed", onnx_sha256="0" * 64)
    with pytest.raises(InputError, match="does not belong"):
        read_onnx_folder(folder)


@pytest.mark.parametrize("name", ["model.onnx", "model.onnx.data", "export.json"])
def test_a_missing_file_is_named(
    tmp_path: Path, export_writer: Callable[..., Path], name: str
) -> None:
    folder = export_writer(tmp_path / "incomplete")
    (folder / name).unlink()
    with pytest.raises(InputError, match=f"{name} (is|are) missing"):
        read_onnx_folder(folder)


def test_another_number_of_block_skip_nodes_than_promised_is_refused(
    tmp_path: Path, export_writer: Callable[..., Path]
) -> None:
    folder = export_writer(tmp_path / "miscounted", block_skip_nodes=3)
    with pytest.raises(InputError, match="block_skip_nodes"):
        read_onnx_folder(folder)


def test_a_file_that_is_not_onnx_is_refused(
    tmp_path: Path, export_writer: Callable[..., Path]
) -> None:
    import hashlib

    folder = export_writer(tmp_path / "broken")
    (folder / "model.onnx").write_bytes(b"\xff" * 100)
    record = json.loads((folder / "export.json").read_text())
    record["onnx_sha256"] = hashlib.sha256(b"\xff" * 100).hexdigest()
    (folder / "export.json").write_text(json.dumps(record))
    with pytest.raises(InputError, match="not ONNX"):
        read_onnx_folder(folder)


def test_the_cpu_profile_is_refused_before_its_dtype_is_looked_at(
    tmp_path: Path, export_writer: Callable[..., Path]
) -> None:
    folder = read_onnx_folder(export_writer(tmp_path / "cpu", profile="cpu", dtype="float32"))
    with pytest.raises(InputError, match="own operators") as caught:
        folder.require_float16()
    assert "without --profile cpu" in caught.value.details["change"]
