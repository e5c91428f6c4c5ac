"""Tracing needs no matrix, and no matrix is taken for another."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from pipeline.checkpoint.skeleton import Skeleton
from pipeline.errors import InputError
from pipeline.export.request import ExportRequest
from pipeline.export.trace_decoder import trace_decoder
from tests.support.families import FAMILIES, save_family


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_family(tmp_path_factory.mktemp("plain"), "gemma3_text")


@pytest.mark.parametrize("family", FAMILIES)
def test_matrices_occupy_one_number_and_vectors_are_real(family: str, tmp_path: Path) -> None:
    folder = save_family(tmp_path, family)
    skeleton = Skeleton.load(folder, torch.float32)
    stored = load_file(folder / "model.safetensors")
    for name, parameter in skeleton.model.named_parameters():
        if parameter.ndim >= 2:
            assert parameter.untyped_storage().nbytes() == 4
            assert torch.equal(skeleton.matrices[name].read(), stored[name])
        else:
            assert torch.equal(parameter, stored[name])


def test_traced_weights_are_those_of_the_checkpoint(plain: Path) -> None:
    skeleton = Skeleton.load(plain, torch.float32)
    graph = trace_decoder(skeleton, ExportRequest("opset24", max_length=32)).graph.graph
    stored = load_file(plain / "model.safetensors")
    matrices = [name for name in graph.initializers if name in skeleton.matrices]
    assert len(matrices) == 2 * 7 + 2
    for name in matrices:
        values = torch.from_numpy(graph.initializers[name].const_value.numpy())
        assert torch.equal(values, stored[name])


def test_float16_is_cast_when_it_is_read(plain: Path) -> None:
    skeleton = Skeleton.load(plain, torch.float16)
    assert skeleton.model.dtype == torch.float16
    assert next(iter(skeleton.matrices.values())).read().dtype == torch.float16


@pytest.mark.parametrize("change", ["missing", "superfluous", "misshapen"])
def test_tensors_that_do_not_match_are_refused(plain: Path, tmp_path: Path, change: str) -> None:
    for file in plain.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    tensors = load_file(tmp_path / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    if change == "missing":
        del tensors[name]
    elif change == "superfluous":
        tensors["model.layers.0.mlp.more.weight"] = torch.zeros(2, 2)
    else:
        tensors[name] = tensors[name][1:].clone()
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match="not those"):
        Skeleton.load(tmp_path, torch.float32)
