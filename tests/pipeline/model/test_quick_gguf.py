"""GGUF files read quickly are read as gguf's own reader reads them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from transformers import modeling_gguf_pytorch_utils

from pipeline.model.quick_gguf import _QuickReader, quick_gguf
from tests.support.families import tiny_model
from tests.support.gguf_files import write_llama_gguf

LISTS: dict[str, list[Any]] = {
    "words": ["one", "", "d\u00e9j\u00e0 vu", "\u4e2d"], "single": ["alone"],
    "whole": [-3, 0, 7], "broken": [0.5, -1.25], "flags": [True, False],
}  # fmt: skip


def written(path: Path, order: gguf.GGUFEndian = gguf.GGUFEndian.LITTLE) -> Path:
    writer = gguf.GGUFWriter(path, "llama", endianess=order)
    writer.add_uint32("llama.number", 17)
    for name, values in LISTS.items():
        writer.add_array(f"llama.{name}", values)
    writer.add_string("llama.last", "text behind the lists")
    writer.add_tensor("t", np.arange(6, dtype=np.float32).reshape(2, 3))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("order", list(gguf.GGUFEndian))
def test_every_field_and_tensor_is_what_ggufs_own_reader_finds(
    tmp_path: Path, order: gguf.GGUFEndian
) -> None:
    path = written(tmp_path / "a.gguf", order)
    own, quick = gguf.GGUFReader(path), _QuickReader(path)
    assert list(own.fields) == list(quick.fields)
    for name, expected in own.fields.items():
        found = quick.fields[name]
        assert (found.offset, found.data, found.types) == expected[:1] + expected[3:]
        assert found.contents() == expected.contents()
        assert [bytes(part) for part in found.parts] == [bytes(part) for part in expected.parts]
    assert quick.data_offset == own.data_offset
    np.testing.assert_array_equal(quick.tensors[0].data, own.tensors[0].data)


def test_transformers_reads_a_tokenizer_by_it_as_without(tmp_path: Path) -> None:
    path = str(write_llama_gguf(tmp_path / "a.gguf", tiny_model("llama", head_dim=16)))
    expected = modeling_gguf_pytorch_utils.load_gguf_checkpoint(path)
    with quick_gguf():
        assert gguf.GGUFReader is _QuickReader
        assert modeling_gguf_pytorch_utils.load_gguf_checkpoint(path) == expected
    assert gguf.GGUFReader is not _QuickReader
    assert len(expected["tokenizer"]["tokens"]) > 200


def test_names_of_tensors_are_those_of_the_whole_model_at_one_table(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, made = tiny_model("llama"), []
    processor = modeling_gguf_pytorch_utils.TensorProcessor(config=model.config.to_dict())
    expected = modeling_gguf_pytorch_utils.get_gguf_hf_weights_map(model, processor)

    def counted(*arguments: Any) -> gguf.TensorNameMap:
        made.append(arguments)
        return gguf.TensorNameMap(*arguments)

    monkeypatch.setattr("pipeline.model.quick_gguf.get_tensor_name_map", counted)
    with quick_gguf():
        assert modeling_gguf_pytorch_utils.get_gguf_hf_weights_map(model, processor) == expected
    assert len(made) == 1
