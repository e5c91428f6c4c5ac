from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from pipeline.bench import child, shapes
from pipeline.bench.bandwidth import _last_level_cache_bytes
from pipeline.bench.measure import MeasuringChild, _choose_device, _cpu_name, _require_memory
from pipeline.bench.shapes import Shape
from pipeline.bench.targets import BenchTarget
from pipeline.bench.traffic import CacheTensor, StoredTensor, Traffic
from pipeline.errors import InputError, ResourceError, UsageError
from tests.support.tiny_decoder import shared_export


def target_of(library: str, bytes_stored: int = 8) -> BenchTarget:
    weights = (StoredTensor("w", (bytes_stored,), 8, floating=False),)
    traffic = Traffic(weights, (CacheTensor(1, 16),), 2048, "a test")
    return BenchTarget(library, library, {"folder": "/nowhere"}, traffic)


def test_a_shape_is_opened_with_random_weights_of_the_type_that_was_asked(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tiny = Shape("llama", 64, 96, 2, 4, 2, 16, 128, True, 256)
    monkeypatch.setitem(shapes._SHAPES, "tiny", tiny)
    for kept in (1.0, 0.6):
        (target,) = BenchTarget.of_shape("tiny", "bfloat16", [kept])
        generate, ready = child._open_target(target.request("cpu", 1))
        assert ready["session"] == "torch bfloat16"
        assert ready["float_bytes"] == {"weights": 2, "cache": 2}
        turn = generate({"prompt_tokens": 8, "context": 16, "new_tokens": 4})
        assert turn["prefill_s"] > 0
        assert len(turn["token_s"]) == 4
        held = sum(tensor.elements for tensor in target.traffic.tensors if tensor.floating)
        session = child._open_shape(target.request("cpu", 1))
        assert held == sum(p.numel() for p in session.model.parameters())  # type: ignore[attr-defined]


def test_what_a_child_refuses_reaches_the_parent_as_the_same_error(tmp_path: Path) -> None:
    request = target_of("onnx").request("cpu", 1) | {"folder": str(tmp_path)}
    with (
        MeasuringChild("broken", request) as process,
        pytest.raises(InputError, match="neither an ONNX export"),
    ):
        process.wait_until_open()


def test_a_killed_child_is_explained() -> None:
    target = BenchTarget.of_folder(shared_export("compat"))
    with MeasuringChild("victim", target.request("cpu", 1)) as process:
        process.wait_until_open()
        os.kill(process._process.pid, signal.SIGKILL)
        with pytest.raises(ResourceError, match="killed"):
            process.ask(prompt_tokens=1, context=1, new_tokens=1)


def test_models_beyond_the_free_memory_are_refused_with_both_sizes() -> None:
    with pytest.raises(ResourceError) as refused:
        _require_memory([target_of("torch", 10**15)], 1, 0)
    assert "needs 1000000.0 GB" in str(refused.value)
    _require_memory([target_of("torch")], 1, 0)


def test_a_model_on_a_device_that_its_library_does_not_use_is_refused() -> None:
    with pytest.raises(UsageError, match="engine runs on a GPU"):
        _choose_device([target_of("onnx"), target_of("tensorrt")], "cpu")
    with pytest.raises(UsageError, match="ONNX Runtime runs on the CPU"):
        _choose_device([target_of("onnx")], "cuda")
    with pytest.raises(UsageError, match="ONNX Runtime runs on the CPU"):
        _choose_device([target_of("onnx"), target_of("tensorrt")], "auto")
    assert _choose_device([target_of("onnx"), target_of("torch")], "auto") == "cpu"


def test_the_largest_cache_is_read_as_linux_writes_it(tmp_path: Path) -> None:
    assert _last_level_cache_bytes(tmp_path) == 0
    for index, size in enumerate(("48K", "2048K", "32M")):
        folder = tmp_path / "cpu0" / "cache" / f"index{index}"
        folder.mkdir(parents=True)
        (folder / "size").write_text(f"{size}\n")
    assert _last_level_cache_bytes(tmp_path) == 32 << 20


def test_a_machine_without_cpuinfo_has_a_processor_without_a_name(tmp_path: Path) -> None:
    assert _cpu_name(tmp_path / "none") == "unknown"
    (tmp_path / "cpuinfo").write_text("processor : 0\nmodel name\t: A Processor\n")
    assert _cpu_name(tmp_path / "cpuinfo") == "A Processor"
