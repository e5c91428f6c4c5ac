"""Convolutions in 8 bits as ONNX: the same bits as PyTorch, and integer kernels where they run."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

from pipeline.errors import InputError
from pipeline.export.int8_nodes import int8_as_nodes, require_int8_runtime
from pipeline.int8.runtimes import _INT8_RUNTIMES
from tests.support.convolutions import SmallNet, images, small_net
from tests.support.rounded_exports import export_rounded, rounded_network


@pytest.fixture(scope="module", params=sorted(_INT8_RUNTIMES))
def exports(request: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, SmallNet, Path]:
    model = rounded_network(request.param)
    return request.param, model, export_rounded(model, tmp_path_factory.mktemp("int8") / "m.onnx")


def ran(path: Path, x: torch.Tensor, optimised: bool) -> tuple[list[np.ndarray], Counter[str]]:
    """Outputs, and the operators that ran."""
    options, level = onnxruntime.SessionOptions(), onnxruntime.GraphOptimizationLevel
    options.graph_optimization_level = level.ORT_ENABLE_ALL if optimised else level.ORT_DISABLE_ALL
    options.optimized_model_filepath = str(path.with_suffix(".run.onnx"))
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    outputs = session.run(None, {"x": x.numpy()})
    nodes = onnx.load(options.optimized_model_filepath).graph.node
    return outputs, Counter(node.op_type for node in nodes)


def test_pytorch_and_the_graph_give_the_same_bits(exports: tuple[str, SmallNet, Path]) -> None:
    _, model, path = exports
    x = images(1, seed=5, batch_size=3)[0]
    with torch.no_grad():
        ours = model(x)
    for own, other in zip(ours, ran(path, x, optimised=False)[0], strict=True):
        np.testing.assert_array_equal(own.numpy(), other)


def test_kernels_are_stored_as_bytes_and_biases_as_numbers(
    exports: tuple[str, SmallNet, Path],
) -> None:
    runtime, model, path = exports
    graph = onnx.load(path).graph
    stored = {t.name: onnx.numpy_helper.to_array(t) for t in graph.initializer}
    kind = np.uint8 if runtime == "cpu" else np.int8
    kernels = {n: t for n, t in stored.items() if n.endswith("kernel_codes")}
    assert len(kernels) == 9
    assert {t.dtype.type for t in kernels.values()} == {kind}
    own = model.get_buffer("merge.0.codes").numpy().astype(int)
    written = kernels["merge.0.kernel_codes"].astype(int)
    np.testing.assert_array_equal(written - own, 128 if runtime == "cpu" else 0)
    assert not [t for t in stored.values() if t.dtype == np.int32]
    assert not [t for t in stored.values() if t.dtype == np.float32 and t.ndim == 4]


def test_onnx_runtime_computes_in_integers_what_was_rounded_for_it(
    exports: tuple[str, SmallNet, Path],
) -> None:
    runtime, model, path = exports
    x = images(1, seed=6)[0]
    outputs, kinds = ran(path, x, optimised=True)
    with torch.no_grad():
        ours = model(x)
    if runtime == "tensorrt":
        assert kinds["QLinearConv"] == 0
        for own, other in zip(ours, outputs, strict=True):
            np.testing.assert_array_equal(own.numpy(), other)
        return
    # All but the two heads, whose outputs stay float, and `plain`, which is summed as a number.
    assert kinds["QLinearConv"] == 6
    assert kinds["QLinearConcat"] == 2
    for own, other in zip(ours, outputs, strict=True):
        # Its integer kernels round ties by another multiplication: some codes are one apart.
        error = float(np.square(own.numpy() - other).mean())
        assert error < 1e-3 * float(own.square().mean())


def test_a_network_for_another_runtime_is_refused(exports: tuple[str, SmallNet, Path]) -> None:
    runtime, model, path = exports
    other = "cpu" if runtime == "tensorrt" else "tensorrt"
    require_int8_runtime(model, runtime, path)
    with pytest.raises(InputError, match=f"not rounded for {other}"):
        require_int8_runtime(model, other, path)
    require_int8_runtime(small_net(), other, path)


def test_fewer_bits_are_for_pytorch_alone() -> None:
    with pytest.raises(InputError, match="fewer bits of activations"):
        require_int8_runtime(rounded_network("tensorrt", 4), "tensorrt", "folder")


def test_the_model_is_as_it_was_behind_an_export() -> None:
    model = rounded_network("cpu")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(RuntimeError, match="on purpose"), int8_as_nodes(model):
        raise RuntimeError("on purpose")
    assert all(torch.equal(before[name], t) for name, t in model.state_dict().items())
    assert {name for name, _ in model.named_buffers()} <= before.keys()
    model(images(1)[0])
