"""A graph of rounded convolutions is proven by a twin that is rounded, to the bit."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from pipeline.checkpoint.modeling_cache import SmallCacheConfig
from pipeline.checkpoint.modeling_quantized import Codes, Int8Conv
from pipeline.driving.network import QyolopConfig, QyolopForDrivingPerception
from pipeline.errors import InputError
from pipeline.export import int8_nodes
from pipeline.export.export import prove_model
from pipeline.export.request import ExportRequest
from pipeline.export.rounded_twin import round_twin_, rounded_entries_of
from pipeline.int8.convert import WeightRounding, int8_entries
from pipeline.int8.grids import ActivationGrid
from pipeline.int8.runtimes import int8_runtime
from pipeline.int8.structure import ConvStructure

PROFILES = {"tensorrt": "opset24", "cpu": "cpu"}


def rounded_config(runtime: str, bits: int = 8, size: tuple[int, int] = (32, 32)) -> QyolopConfig:
    """As a checkpoint has it; a twin needs no scales."""
    config, row = QyolopConfig(size, 2), int8_runtime(runtime)
    config.architectures = ["QyolopForDrivingPerception"]
    model = QyolopForDrivingPerception(config).eval()
    structure = ConvStructure.of(model, torch.zeros(1, 3, *size))
    grid = ActivationGrid(row.codes(), 1.0)
    grids = {site.reads: grid for site in structure.convs.values()}
    config.quantization_config = SmallCacheConfig(
        int8_entries(structure, grids, row, WeightRounding(bits))
    )
    return config


@pytest.mark.parametrize(
    ("runtime", "bits"), [("tensorrt", 4), pytest.param("cpu", 8, marks=pytest.mark.slow)]
)
def test_the_graph_of_a_rounded_twin_gives_its_bits(runtime: str, bits: int) -> None:
    wanted = ExportRequest(PROFILES[runtime], "float32")
    proof = prove_model(rounded_config(runtime, bits), wanted)
    assert (proof["relative_error"], proof["tolerance"]) == (0.0, 0.0)


@pytest.mark.slow
def test_a_graph_that_rounds_otherwise_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    own = int8_nodes._rounded

    def wider(self: Any, x: torch.Tensor) -> torch.Tensor:
        return 1.03125 * own(self, x / 1.03125)

    monkeypatch.setattr(int8_nodes, "_rounded", wider)
    config = rounded_config("tensorrt", size=(32, 64))
    with pytest.raises(InputError, match="not compute what the model computes"):
        prove_model(config, ExportRequest("opset24", "float32"))


def test_a_twin_is_rounded_where_the_model_is_and_its_kernels_are_small() -> None:
    config = rounded_config("cpu")
    entries = rounded_entries_of(config)
    twin = QyolopForDrivingPerception(QyolopConfig((32, 32), 2)).eval()
    before = {name: dict(entry) for name, entry in entries.items()}
    round_twin_(twin, entries, lambda model: model(torch.rand(2, 3, 32, 32)))
    assert entries == before
    convs = [module for module in twin.modules() if isinstance(module, Int8Conv)]
    assert len(convs) == sum(entry["form"] == "conv" for entry in entries.values())
    assert max(int(conv.kernel.abs().max()) for conv in convs) <= Codes(8).high // 15
    assert rounded_entries_of(QyolopConfig()) == {}
