"""Modules in few bits are the matrices that their codes stand for, whatever becomes of them."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, PreTrainedModel

from pipeline.checkpoint.dense import densify_, export_dense
from pipeline.checkpoint.folder import load_checkpoint, save_checkpoint
from pipeline.checkpoint.install import (
    dense_tensors,
    group_entries,
    group_tensors,
    install_,
)
from pipeline.checkpoint.modeling_quantized import (
    QuantizedEmbedding,
    QuantizedLinear,
    QuantizedWeight,
)
from pipeline.compress.embeddings import Embeddings
from pipeline.compress.factorize.factors import RTN, Factors, _rtn_factors
from pipeline.compress.factorize.whitened_svd import Spectrum
from pipeline.errors import InputError
from pipeline.quantize.formats import Format
from pipeline.quantize.groupwise import Blocks, quantize_blocks
from tests.support.families import tiny_model
from tests.support.tiny_decoder import byte_tokenizer

FORMATS = (
    "int2-b16-asym",
    "int3-b32-asym",
    "int3-row-sym",
    "int4-b32-asym",
    "int4-b64-sym",
    "int6-b16-sym",
    "int6-b32-asym",
    "int8-row-sym",
    "int8-b16-asym",
    "int4-b16-offset",
    "int2-b32-offset",
)
ROWS, COLUMNS = 12, 50  # the last block is not full
GENERATOR = torch.Generator().manual_seed(0)
WEIGHT = torch.randn(ROWS, COLUMNS, generator=GENERATOR)
IDS = torch.randint(3, 250, (2, 9), generator=GENERATOR)
KEY, DOWN = "model.layers.1.self_attn.k_proj", "model.layers.0.mlp.down_proj"
TABLE = "model.embed_tokens"


def codes_in(style: str, weight: torch.Tensor = WEIGHT) -> Blocks:
    form = Format.parse(style)
    width = form.width(weight.shape[1])
    return quantize_blocks(weight.numpy(), form.bits, width, zero=form.zero)


def filled(module: QuantizedLinear | QuantizedEmbedding, codes: Blocks) -> None:
    for name, tensor in codes.stored_tensors().items():
        setattr(module.stored, name, tensor)


def linear_in(style: str, bias: bool = True) -> tuple[QuantizedLinear, torch.Tensor]:
    """A layer, and the matrix that its codes stand for."""
    layer, codes = QuantizedLinear(COLUMNS, ROWS, style, bias=bias), codes_in(style)
    filled(layer, codes)
    if bias:
        assert layer.bias is not None
        with torch.no_grad():
            layer.bias.normal_(generator=GENERATOR)
    return layer, torch.from_numpy(codes.dequantized())


@pytest.mark.parametrize("style", FORMATS)
def test_a_linear_layer_is_the_matrix_that_its_codes_stand_for(style: str) -> None:
    layer, matrix = linear_in(style)
    x = torch.randn(3, COLUMNS, generator=GENERATOR)
    assert torch.equal(layer.weight, matrix)
    assert torch.equal(layer(x), torch.nn.functional.linear(x, matrix, layer.bias))


@pytest.mark.parametrize("style", FORMATS)
def test_an_embedding_looks_up_rows_of_the_matrix_that_its_codes_stand_for(style: str) -> None:
    table, codes = QuantizedEmbedding(ROWS, COLUMNS, style), codes_in(style)
    filled(table, codes)
    ids = torch.tensor([[0, 5, 5], [11, 1, 0]])
    assert torch.equal(table(ids), torch.from_numpy(codes.dequantized())[ids])
    assert torch.equal(table.weight, torch.from_numpy(codes.dequantized()))


@pytest.mark.parametrize("style", FORMATS)
def test_storing_and_reading_codes_back_loses_nothing(style: str) -> None:
    codes = codes_in(style)
    again = Blocks.from_stored(codes.stored_tensors(), Format.parse(style), COLUMNS)
    for name in ("codes", "scales", "zero_points"):
        np.testing.assert_array_equal(getattr(again, name), getattr(codes, name))
    assert (again.bits, again.columns) == (codes.bits, codes.columns)


@pytest.mark.parametrize("style", FORMATS)
def test_a_new_module_has_the_shapes_that_are_stored(style: str) -> None:
    empty = dict(QuantizedWeight(ROWS, COLUMNS, style, "meta").named_buffers())
    stored = codes_in(style).stored_tensors()
    assert {n: (t.shape, t.dtype) for n, t in empty.items()} == {
        n: (t.shape, t.dtype) for n, t in stored.items()
    }


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_a_cast_of_the_model_changes_no_code_and_the_type_of_what_comes_out(
    dtype: torch.dtype,
) -> None:
    layer, matrix = linear_in("int4-b16-asym")
    table = QuantizedEmbedding(ROWS, COLUMNS, "int4-b16-asym")
    filled(table, codes_in("int4-b16-asym"))
    before = copy.deepcopy(layer.stored.state_dict())
    layer.to(dtype)
    table.to(dtype)
    after = layer.stored.state_dict()
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert table(torch.tensor([1])).dtype == table.weight.dtype == layer.weight.dtype == dtype
    x = torch.randn(3, COLUMNS, generator=GENERATOR).to(dtype)
    expected = torch.nn.functional.linear(x, matrix.to(dtype), layer.bias)
    assert torch.equal(layer(x), expected)
    layer.float()
    assert torch.equal(layer.weight, matrix)


def few_bit_model(
    family: str = "smollm", table: str = "int4-b16-asym"
) -> tuple[PreTrainedModel, dict[str, dict]]:
    """A tiny model whose every kind of matrix is in few bits, and its entries."""
    model = tiny_model(family)
    entries = group_entries((KEY,), "dense", 16, None, "int3-b16-asym")
    key = model.get_submodule(KEY).weight.detach()
    tensors = dense_tensors((KEY,), [len(key)], codes_in("int3-b16-asym", key))
    down = model.get_submodule(DOWN).weight.detach()
    moment = torch.eye(down.shape[1], dtype=torch.float64)
    b, a = Spectrum.of(down, moment).factors(20)
    factors = Factors.stored_(b, a, down, moment, "skip")
    styles = ("int6-b16-sym", "int8-row-sym")
    rounded = _rtn_factors(factors, (Format.parse(styles[0]), Format.parse(styles[1])))
    entries |= group_entries((DOWN,), "skip", 20, *styles)
    assert rounded.down is not None
    assert rounded.up is not None
    stored = (rounded.down, rounded.up, rounded.factors.permutation)
    tensors |= group_tensors((DOWN,), [len(down)], *stored, torch.float16)
    install_(model, entries, tensors)
    names = (TABLE, "lm_head")
    entries |= Embeddings(model).quantize_(dict.fromkeys(names, table), IDS, RTN)[0]
    return model, entries


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("few-bits")
    model, entries = few_bit_model()
    save_checkpoint(model, byte_tokenizer(), entries, folder, torch.float16)
    return folder


@torch.no_grad()
def logits(model: PreTrainedModel) -> torch.Tensor:
    return model(IDS).logits


def test_a_checkpoint_loads_to_the_same_codes_and_logits(checkpoint: Path) -> None:
    model, _ = few_bit_model()
    loaded = load_checkpoint(checkpoint)
    stored = load_file(checkpoint / "model.safetensors")
    state = loaded.state_dict()
    assert state.keys() == stored.keys()
    assert all(torch.equal(state[name], tensor) for name, tensor in stored.items())
    assert loaded.dtype == torch.float16
    # What is not in few bits is rounded to float16 on disk.
    expected, found = logits(model), logits(load_checkpoint(checkpoint, dtype=torch.float32))
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-2 * float(expected.abs().max()))


def test_transformers_own_loading_gives_the_same_model(checkpoint: Path) -> None:
    own = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()
    assert torch.equal(logits(own), logits(load_checkpoint(checkpoint, dtype=torch.float32)))


def test_a_model_that_is_cast_after_loading_is_the_one_that_was_loaded_so(checkpoint: Path) -> None:
    # Not .float(), which transformers refuses for whatever is quantised.
    cast = load_checkpoint(checkpoint).to(torch.float32)
    assert torch.equal(logits(cast), logits(load_checkpoint(checkpoint, dtype=torch.float32)))


def test_a_model_in_few_bits_can_be_saved_by_transformers_and_loaded_again(
    checkpoint: Path, tmp_path: Path
) -> None:
    load_checkpoint(checkpoint).save_pretrained(tmp_path)
    first, again = (load_file(f / "model.safetensors") for f in (checkpoint, tmp_path))
    assert first.keys() == again.keys()
    assert all(torch.equal(again[name], tensor) for name, tensor in first.items())


def test_a_tied_embedding_and_head_share_one_set_of_codes(checkpoint: Path) -> None:
    stored = load_file(checkpoint / "model.safetensors")
    assert [n for n in stored if n.startswith(("lm_head", TABLE)) and n.endswith("codes")] == [
        f"{TABLE}.stored.codes"
    ]
    model = load_checkpoint(checkpoint)
    head, table = model.get_submodule("lm_head"), model.get_submodule(TABLE)
    assert isinstance(head, QuantizedLinear)
    assert head.matrix is table.stored
    assert torch.equal(head.weight, table.weight)
    copied = copy.deepcopy(model)
    assert copied.get_submodule("lm_head").matrix is copied.get_submodule(TABLE).stored


def test_the_dense_model_ties_what_was_tied_and_has_the_same_logits(
    checkpoint: Path, tmp_path: Path
) -> None:
    (tmp_path / "dense").mkdir()
    export_dense(checkpoint, tmp_path / "dense")
    stored = load_file(tmp_path / "dense" / "model.safetensors")
    assert "lm_head.weight" not in stored
    assert not any("codes" in name for name in stored)
    dense, info = AutoModelForCausalLM.from_pretrained(
        tmp_path / "dense", dtype=torch.float32, output_loading_info=True
    )
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert dense.lm_head.weight is dense.model.embed_tokens.weight
    few = logits(load_checkpoint(checkpoint, dtype=torch.float32))
    # Matrices of 4 bits with scales of float16 are rounded to float16 again: 11 bits.
    assert (logits(dense.eval()) - few).abs().max() < 2e-2 * few.abs().max()


def test_in_float32_the_dense_model_is_the_same_to_rounding(checkpoint: Path) -> None:
    few = load_checkpoint(checkpoint, dtype=torch.float32)
    expected = logits(few)
    torch.testing.assert_close(logits(densify_(few)), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("part", ["codes", "scales", "zero_points"])
@pytest.mark.parametrize("module", [KEY, TABLE])
def test_missing_codes_are_refused(
    part: str, module: str, checkpoint: Path, tmp_path: Path
) -> None:
    name = f"{module}.stored.{part}"
    altered(checkpoint, tmp_path, lambda tensors: tensors.pop(name))
    with pytest.raises(InputError, match="not those") as caught:
        load_checkpoint(tmp_path)
    assert name in caught.value.details["observed"]


@pytest.mark.parametrize("part", ["codes", "scales", "zero_points"])
def test_codes_of_another_shape_are_refused(part: str, checkpoint: Path, tmp_path: Path) -> None:
    name = f"{KEY}.stored.{part}"
    altered(checkpoint, tmp_path, lambda t: t.update({name: t[name][:-1].clone()}))
    with pytest.raises(InputError):
        load_checkpoint(tmp_path)


def test_codes_that_no_module_asks_for_are_refused(checkpoint: Path, tmp_path: Path) -> None:
    extra = {"lm_head.stored.codes": torch.zeros(2, 2, dtype=torch.uint8)}
    altered(checkpoint, tmp_path, lambda tensors: tensors.update(extra))
    with pytest.raises(InputError, match="not those"):
        load_checkpoint(tmp_path)


def altered(checkpoint: Path, folder: Path, change) -> None:
    for file in checkpoint.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
