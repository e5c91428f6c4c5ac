"""A model of several layers, in two types, and an export of it in few bits."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from pipeline.export.export import ExportRequest, export_folder
from tests.support.families import save_family, tiny_model

LAYERS, PLACES = 5, 120


@pytest.fixture(scope="package")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """In float32, with tied tables; `bfloat16` is the same in that type, `draft` its export."""
    root = tmp_path_factory.mktemp("offload")
    folder = save_family(root / "model", "llama", layers=LAYERS, tie_word_embeddings=True)
    shutil.copytree(folder, root / "bfloat16")
    narrow = tiny_model("llama", layers=LAYERS, tie_word_embeddings=True).to(torch.bfloat16)
    narrow.save_pretrained(root / "bfloat16")
    how = ExportRequest("cpu", "float32", PLACES, "int4")
    export_folder(folder, root / "draft", how)
    return folder
