from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from pipeline.bench.shape_traffic import _PRECISIONS, traffic_of_shape
from pipeline.bench.shapes import _SHAPES, Shape

GGUF_MIB = {
    # As published with the figures of llama.cpp; Qwen2.5's file holds the head twice.
    ("smollm2-135m", "q4_k_m"): 101, ("llama-3.2-1b", "q4_k_m"): 771,
    ("gemma3-1b", "q4_k_m"): 769, ("smollm2-360m", "q8_0"): 369, ("qwen3-0.6b", "q8_0"): 610,
}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "gigabytes"), [("qwen3-0.6b", 0.54), ("qwen3-1.7b", 1.35), ("qwen3-8b", 4.83)]
)
def test_bytes_of_an_int4_model_are_those_of_the_survey(name: str, gigabytes: float) -> None:
    # Linears of 4.125 bits and a float16 head, worked out by hand before this was written.
    read = traffic_of_shape(_SHAPES[name], "int4").weight_bytes()
    assert read / 1e9 == pytest.approx(gigabytes, rel=0.01)


def test_float16_bytes_are_two_for_every_parameter_but_the_embedding() -> None:
    shape = _SHAPES["qwen3-8b"]
    parameters = 8_190_735_360 - (shape.vocab - 1) * shape.hidden
    assert traffic_of_shape(shape, "float16").weight_bytes() == 2 * parameters


@pytest.mark.parametrize(("name", "dtype"), GGUF_MIB)
def test_files_of_llama_cpp_are_as_large_as_published(name: str, dtype: str) -> None:
    stored = traffic_of_shape(_SHAPES[name], dtype).stored_bytes
    # The file has a tokenizer, too.
    assert stored / 2**20 == pytest.approx(GGUF_MIB[name, dtype], rel=0.025)


@pytest.mark.parametrize("kept", [1.0, 0.7])
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "gemma3_text"])
def test_sizes_alone_give_the_numbers_of_the_model(family: str, kept: float) -> None:
    for tied in (True, False):
        shape = Shape(family, 64, 96, 6, 4, 2, 16, 128, tied, 256, 8, 3)
        model = shape.empty_model(kept)
        numbers = sum(parameter.numel() for parameter in model.parameters())
        orders = [b for name, b in model.named_buffers() if name.endswith(".permutation")]
        traffic = traffic_of_shape(shape, "float32", kept)
        counted = [t.elements for t in traffic.tensors if not t.floating]
        assert counted == [order.numel() for order in orders]
        assert sum(t.elements for t in traffic.tensors if t.floating) == numbers
        products = [m for m in model.modules() if isinstance(m, torch.nn.Linear)]
        assert kept < 1 or traffic.products == len(products)


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "gemma3_text"])
def test_norms_are_counted_as_the_model_has_them(family: str) -> None:
    shape = Shape(family, 64, 96, 3, 4, 2, 16, 128, True, 256)
    found = [m for m in shape.empty_model().modules() if "Norm" in type(m).__name__]
    assert traffic_of_shape(shape, "float16").norms == len(found)


def test_layers_with_a_window_read_no_more_than_it() -> None:
    shape = _SHAPES["gemma3-1b"]
    layers = traffic_of_shape(shape, "float16").cache[::2]
    assert [layer.window for layer in layers[:6]] == [512] * 5 + [None]
    config = shape.config()
    assert [layer.window is not None for layer in layers] == [
        kind == "sliding_attention" for kind in config.layer_types
    ]
    assert config.sliding_window == 512


def test_every_type_of_weights_is_smaller_than_the_one_before() -> None:
    shape = _SHAPES["llama-3.2-1b"]
    order = ("float32", "float16", "q8_0", "q4_k_m", "q4f16")
    sizes = [traffic_of_shape(shape, dtype).stored_bytes for dtype in order]
    assert sizes == sorted(sizes, reverse=True)
    assert set(order) < _PRECISIONS.keys()


def test_a_device_is_predicted_without_torch() -> None:
    program = (
        "import sys\n"
        "sys.modules['torch'] = sys.modules['transformers'] = sys.modules['scipy'] = None\n"
        "from pipeline.bench.devices import find_devices\n"
        "from pipeline.bench.predict import predict\n"
        "from pipeline.bench.targets import BenchTarget\n"
        "targets = BenchTarget.of_shape('qwen3-0.6b', 'int4', [1.0])\n"
        "print(len(predict(targets, find_devices('orin-nano-8gb@all'), 128)['rows']))\n"
    )
    command = [sys.executable, "-c", program]
    answer = subprocess.run(command, capture_output=True, text=True, check=True)
    assert answer.stdout == "12\n"
