from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import PreTrainedModel

from pipeline.bench.targets import traffic_of_folder
from pipeline.bench.traffic import CacheTensor, StoredTensor
from pipeline.checkpoint.folder import save_checkpoint
from pipeline.checkpoint.install import dense_tensors, group_entries, group_tensors, install_
from pipeline.compress.factorize.factors import Factors, rtn
from pipeline.errors import InputError
from pipeline.quantize.formats import Format
from pipeline.runtime.sessions.torch_session import TorchSession
from tests.support.families import save_family, tiny_model
from tests.support.tiny_decoder import MAX_LENGTH, byte_tokenizer, shared_export, tiny_llama


def parameter_bytes(model: PreTrainedModel) -> int:
    return sum(parameter.nbytes for parameter in model.parameters())


def test_every_weight_of_a_tied_checkpoint_is_read_once(tmp_path: Path) -> None:
    model = tiny_llama()
    model.save_pretrained(tmp_path)
    traffic = traffic_of_folder(tmp_path)
    assert traffic.weight_bytes() == traffic.stored_bytes == parameter_bytes(model)
    assert traffic.products == 2 * 7 + 1


def test_of_an_embedding_that_is_not_the_head_only_a_row_is_read(tmp_path: Path) -> None:
    model = tiny_model("qwen3")
    save_family(tmp_path, "qwen3")
    table = model.get_input_embeddings().weight
    traffic = traffic_of_folder(tmp_path)
    assert traffic.stored_bytes == parameter_bytes(model)
    assert traffic.weight_bytes() == parameter_bytes(model) - table.nbytes + table[0].nbytes


def test_a_session_in_float32_reads_twice_the_bytes_of_a_bfloat16_file(tmp_path: Path) -> None:
    tiny_llama().to(torch.bfloat16).save_pretrained(tmp_path)
    traffic = traffic_of_folder(tmp_path)
    assert traffic.weight_bytes(4) == 2 * traffic.weight_bytes()
    assert traffic.cache_bytes(10, 4) == 2 * traffic.cache_bytes(10)


def test_factors_and_permutations_of_a_compressed_checkpoint_are_counted(tmp_path: Path) -> None:
    model = tiny_llama()
    members, rank = ("model.layers.0.mlp.gate_proj", "model.layers.0.mlp.up_proj"), 8
    entries = group_entries(members, "skip", rank)
    up, down = torch.randn(128, rank), torch.randn(rank, 32 - rank)
    factors = Factors("skip", rank, up, down, torch.randperm(32), 0.0)
    parts = (factors.down, factors.up, factors.permutation)
    install_(model, entries, group_tensors(members, [64, 64], *parts, torch.float32))
    save_checkpoint(model, byte_tokenizer(), entries, tmp_path, torch.float16)
    stored = sum(tensor.nbytes for tensor in load_file(tmp_path / "model.safetensors").values())
    traffic = traffic_of_folder(tmp_path)
    assert traffic.stored_bytes == stored
    assert traffic.weight_bytes(4) == 2 * stored - 32 * 4  # the permutation stays in int32
    assert traffic.products == 2 * 7 + 1 + 1


def test_matrices_in_few_bits_are_stored_as_codes_and_read_in_the_type_of_the_session(
    tmp_path: Path,
) -> None:
    model = tiny_llama()
    members = ("model.layers.0.mlp.gate_proj",)
    entries = group_entries(members, "dense", 32, None, "int4-b32-asym")
    codes = rtn(model.get_submodule(members[0]).weight.detach(), Format.parse("int4-b32-asym"))
    install_(model, entries, dense_tensors(members, [64], codes))
    save_checkpoint(model, byte_tokenizer(), entries, tmp_path, torch.float16)
    stored = sum(tensor.nbytes for tensor in load_file(tmp_path / "model.safetensors").values())
    traffic = traffic_of_folder(tmp_path)
    assert traffic.stored_bytes == stored
    assert traffic.weight_bytes(4) == 2 * parameter_bytes(tiny_llama().half())


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma3_text"])
@pytest.mark.parametrize("context", [5, 20])
def test_the_cache_is_as_large_as_the_one_that_a_session_fills(
    family: str, context: int, tmp_path: Path
) -> None:
    save_family(tmp_path, family)
    session = TorchSession(tiny_model(family))
    session.forward(np.zeros((1, context), np.int64))
    held = sum(layer.keys.nbytes + layer.values.nbytes for layer in session._cache.layers)
    traffic = traffic_of_folder(tmp_path)
    # A sliding layer stores one token less than its window, and sees the new one besides.
    assert 0 <= traffic.cache_bytes(context) - held <= traffic.cache_bytes(1)


@pytest.mark.parametrize("profile", ["opset24", "compat"])
def test_the_matrices_of_an_export_are_those_of_the_checkpoint(profile: str) -> None:
    exported = traffic_of_folder(shared_export(profile))
    checkpoint = traffic_of_folder(shared_export(profile).parent / "model")
    matrices = [
        sum(tensor.elements for tensor in traffic.tensors if tensor.product)
        for traffic in (exported, checkpoint)
    ]
    assert matrices[0] == matrices[1]
    assert exported.weight_bytes() == pytest.approx(checkpoint.weight_bytes(), rel=0.1)
    assert exported.products == checkpoint.products
    assert exported.max_length == MAX_LENGTH


@pytest.mark.parametrize(("profile", "passes"), [("opset24", 1), ("compat", 3)])
def test_norms_of_an_export_are_counted_though_equal_gains_are_stored_once(
    profile: str, passes: int
) -> None:
    exported = traffic_of_folder(shared_export(profile))
    checkpoint = traffic_of_folder(shared_export(profile).parent / "model")
    assert exported.norms == checkpoint.norms == 2 * 2 + 1
    assert (exported.cache_passes, checkpoint.cache_passes) == (passes, 1)
    assert (checkpoint.attention_width, exported.attention_width) == (64, 32)


def test_codes_of_a_rounded_export_are_counted_in_their_own_width() -> None:
    exported = traffic_of_folder(shared_export("cpu"))
    checkpoint = traffic_of_folder(shared_export("cpu").parent / "model")
    codes = sum(tensor.elements for tensor in exported.tensors if tensor.product)
    matrices = sum(tensor.elements for tensor in checkpoint.tensors if tensor.product)
    # The head's rows of 32 numbers are filled up to its blocks of 64.
    assert codes == matrices + 272 * 32
    assert exported.weight_bytes() < 0.6 * checkpoint.weight_bytes()
    assert exported.weight_bytes(4) == exported.weight_bytes()  # no scale is widened


def test_a_static_cache_is_read_to_its_end_and_a_growing_one_as_far_as_it_is_filled() -> None:
    per_token = 2 * 2 * 2 * 16 * 4  # layers, keys and values, heads, width, bytes
    static, growing = (traffic_of_folder(shared_export(name)) for name in ("opset24", "compat"))
    assert static.cache_bytes(10) == static.cache_bytes(20) == MAX_LENGTH * per_token
    assert growing.cache_bytes(10) == 10 * per_token


def test_of_a_table_of_positions_one_row_is_read() -> None:
    table = StoredTensor("cos", (2048, 32), 32, looked_up=True)
    assert (table.elements, table.elements_per_token) == (2048 * 32, 32)


def test_a_window_bounds_the_tokens_that_are_read() -> None:
    assert CacheTensor(1, 16, window=8).tokens_read(20) == 8
    assert CacheTensor(1, 16, window=8).tokens_read(5) == 5


def write_engine(folder: Path, digest: str) -> Path:
    folder.mkdir()
    (folder / "engine.plan").write_bytes(bytes(5000))
    ends = {end: [1, 2, MAX_LENGTH, 16] for end in ("min", "opt", "max")}
    names = [f"past_key_values.{i}.{kind}" for i in range(2) for kind in ("key", "value")]
    manifest = {
        "schema": 1,
        "target": {},
        "tensorrt_version": "10.15",
        "profiles": [{"name": "decode", "shapes": dict.fromkeys(names, ends)}],
        "block_skip": {},
        "plan": {"bytes": 5000},
        "onnx": {"sha256": digest, "profile": "opset24", "dtype": "float32"},
        "limits": {"max_length": MAX_LENGTH},
    }
    (folder / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    return folder


def test_an_engine_reads_what_the_export_beside_it_reads(tmp_path: Path) -> None:
    export = shutil.copytree(shared_export("opset24"), tmp_path / "onnx")
    digest = json.loads((export / "export.json").read_text())["onnx_sha256"]
    exported = traffic_of_folder(export)
    engine = traffic_of_folder(write_engine(tmp_path / "engine", digest))
    assert engine.weight_bytes() == exported.weight_bytes()
    assert engine.cache_bytes(7) == exported.cache_bytes(7)
    assert engine.counted_from == "onnx/model.onnx"


def test_an_engine_alone_is_counted_by_its_plan_and_says_so(tmp_path: Path) -> None:
    engine = traffic_of_folder(write_engine(tmp_path / "engine", "other"))
    assert engine.weight_bytes() == 5000
    assert "all of it" in engine.counted_from
    assert engine.cache_bytes(7) == MAX_LENGTH * 2 * 2 * 2 * 16 * 4


def test_an_engine_with_a_broken_manifest_is_refused(tmp_path: Path) -> None:
    folder = write_engine(tmp_path / "engine", "other")
    record = json.loads((folder / "manifest.json").read_text())
    record["limits"] = {}
    (folder / "manifest.json").write_text(json.dumps(record), encoding="utf-8")
    with pytest.raises(InputError, match="broken"):
        traffic_of_folder(folder)


def test_an_export_with_truncated_weights_is_refused(tmp_path: Path) -> None:
    folder = shutil.copytree(shared_export("compat"), tmp_path / "copy")
    data = folder / "model.onnx.data"
    data.write_bytes(data.read_bytes()[:1000])
    with pytest.raises(InputError, match="truncated"):
        traffic_of_folder(folder)


def test_a_truncated_checkpoint_and_an_empty_folder_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError):
        traffic_of_folder(tmp_path)
    tiny_llama().save_pretrained(tmp_path)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])
    with pytest.raises(InputError, match="truncated"):
        traffic_of_folder(tmp_path)
