"""A checkpoint's tokenizer splits text as its model's did, byte for byte the same files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer
from transformers import AutoTokenizer

from pipeline.checkpoint.dense import export_dense
from pipeline.compress.request import CompressRequest
from pipeline.compress.run import compress_to_folder
from pipeline.model.load import load_model
from pipeline.runtime.tokenizer import load_tokenizer, load_whole_tokenizer
from tests.support.families import save_family

AWKWARD = [
    "a 120  b\n\nIt's",
    "1234567",
    "  x",
    "Grüße 世界 🙂\u200d",
    "\t\r\n \n",
    "</s>12<s>",
    "ﬁ①",
]
DIGITS_IN_THREES = {
    "type": "Sequence",
    "pretokenizers": [
        {
            "type": "Split",
            "pattern": {"Regex": r"\p{N}{1,3}| ?\p{L}+|\s+|[^\s\p{L}\p{N}]+"},
            "behavior": "Isolated",
            "invert": False,
        },
        {
            "type": "ByteLevel",
            "add_prefix_space": False,
            "trim_offsets": True,
            "use_regex": False,
        },
    ],
}


def write_tokenizer(folder: Path, tokenizer_class: str, pre_tokenizer: Any) -> None:
    """Another class, and another way of splitting, over the same bytes; with two merges."""
    path = folder / "tokenizer.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    content["model"]["merges"] = [["1", "2"], ["12", "0"]]
    content["model"]["vocab"] |= {"12": 258, "120": 259}
    content["pre_tokenizer"] = pre_tokenizer or content["pre_tokenizer"]
    path.write_text(json.dumps(content, indent=1), encoding="utf-8")
    path = folder / "tokenizer_config.json"
    settings = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps(settings | {"tokenizer_class": tokenizer_class}, indent=3))


@pytest.mark.parametrize("pre_tokenizer", [None, DIGITS_IN_THREES], ids=["plain", "threes"])
@pytest.mark.parametrize("tokenizer_class", ["Qwen2Tokenizer", "LlamaTokenizer", "GPT2Tokenizer"])
def test_a_compressed_folder_splits_text_as_its_model_did(
    tokenizer_class: str, pre_tokenizer: Any, tmp_path: Path
) -> None:
    model, small, dense = tmp_path / "model", tmp_path / "small", tmp_path / "dense"
    save_family(model, "llama", layers=1)
    write_tokenizer(model, tokenizer_class, pre_tokenizer)
    request = CompressRequest(
        str(model), method="skipcat", calibration="self", windows=4, window_length=32
    )
    compress_to_folder(request, small)
    dense.mkdir()
    export_dense(small, dense)
    for folder in (small, dense):
        for name in ("tokenizer.json", "tokenizer_config.json"):
            assert (folder / name).read_bytes() == (model / name).read_bytes()
    file = Tokenizer.from_file(str(model / "tokenizer.json"))
    measured = load_model(str(model)).tokenizer
    theirs = [AutoTokenizer.from_pretrained(str(folder)) for folder in (model, small)]
    for text in AWKWARD:
        expected = file.encode(text, add_special_tokens=False).ids
        assert load_tokenizer(small).encode(text, add_special_tokens=False) == expected
        assert load_whole_tokenizer(small).encode(text, add_special_tokens=False) == expected
        assert measured.encode(text, add_special_tokens=False) == expected
        assert theirs[0].encode(text) == theirs[1].encode(text)
