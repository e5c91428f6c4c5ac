"""Unsigned kernels as signed ones: the same numbers, and the same bits of every product."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import numpy_helper

from pipeline.runtime.sessions import signed_kernels as module
from pipeline.runtime.sessions.signed_kernels import prefers_signed, signed_kernels
from tests.support.convolutions import images
from tests.support.rounded_exports import export_rounded, rounded_network

_LEVELS = onnxruntime.GraphOptimizationLevel


@pytest.fixture(scope="module")
def unsigned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An export whose kernels are uint8 counted from 128."""
    return export_rounded(rounded_network("cpu"), tmp_path_factory.mktemp("cpu") / "m.onnx")


def outputs(graph: str | bytes, level: onnxruntime.GraphOptimizationLevel) -> list[np.ndarray]:
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level, options.log_severity_level = level, 3
    session = onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
    found: list[np.ndarray] = session.run(None, {"x": images(1, seed=7, batch_size=2)[0].numpy()})
    return found


def kernels(graph: bytes) -> dict[str, np.ndarray]:
    stored = onnx.load_model_from_string(graph).graph.initializer
    arrays = {tensor.name: numpy_helper.to_array(tensor) for tensor in stored}
    return {name: array for name, array in arrays.items() if array.ndim == 4}


def test_every_kernel_is_the_same_numbers_in_signed_bytes(unsigned: Path) -> None:
    graph = signed_kernels(unsigned)
    assert graph is not None
    before, after = kernels(unsigned.read_bytes()), kernels(graph)
    assert len(after) == len(before) == 9
    for name, codes in before.items():
        found = after[f"{name}.signed"]
        assert found.dtype == np.int8
        np.testing.assert_array_equal(found.astype(int), codes.astype(int) - 128)


@pytest.mark.parametrize(
    "level",
    [
        pytest.param(_LEVELS.ORT_DISABLE_ALL, id="as written"),
        pytest.param(
            _LEVELS.ORT_ENABLE_ALL,
            id="in integer kernels",
            marks=pytest.mark.skipif(not prefers_signed(), reason="needs a processor with VNNI"),
        ),
    ],
)
def test_both_graphs_give_the_same_bits(
    level: onnxruntime.GraphOptimizationLevel, unsigned: Path
) -> None:
    graph = signed_kernels(unsigned)
    assert graph is not None
    for own, other in zip(outputs(str(unsigned), level), outputs(graph, level), strict=True):
        np.testing.assert_array_equal(own, other)


@pytest.mark.parametrize("kind", ["float", "signed already"])
def test_a_graph_without_unsigned_kernels_stays_as_it_is(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    if kind == "float":
        node = onnx.helper.make_node("Relu", ["x"], ["y"])
        ends = [onnx.helper.make_tensor_value_info(name, 1, [2]) for name in "xy"]
        graph = onnx.helper.make_graph([node], "g", ends[:1], ends[1:])
        onnx.save(onnx.helper.make_model(graph), path)
    else:
        export_rounded(rounded_network("tensorrt"), path)
    assert signed_kernels(path) is None


@pytest.mark.parametrize(
    ("flags", "expected"),
    [(("avx2", "avx512f"), False), (("avx2", "avx512_vnni"), True), (("avx2", "avx_vnni"), True)],
)
def test_signed_kernels_are_for_processors_that_add_in_32_bits(
    flags: tuple[str, ...], expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "cpu_flags", lambda: flags)
    assert prefers_signed() is expected
