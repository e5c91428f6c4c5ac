"""A model of several layers to be read from disk, and an export that drafts for it: made once."""

from __future__ import annotations

import functools
import shutil
from pathlib import Path

import torch

from pipeline.export.contract import CPU, INT4
from pipeline.export.export import ExportRequest, export_folder
from tests.support.families import save_family, tiny_model
from tests.support.tiny_decoder import shared_folder

# Layers, and places of the cache.
DEPTH, PLACES = 5, 120
_DRAFT = "draft-of-layers"


@functools.cache
def shared_layers() -> Path:
    """In float32, tables tied; `bfloat16` beside it is the same in that type.

    None is to be written to.
    """

    def make(root: Path) -> None:
        folder = save_family(root / "model", "llama", layers=DEPTH, tie_word_embeddings=True)
        shutil.copytree(folder, root / "bfloat16")
        narrow = tiny_model("llama", layers=DEPTH, tie_word_embeddings=True).to(torch.bfloat16)
        narrow.save_pretrained(root / "bfloat16")
        export_folder(folder, root / _DRAFT, ExportRequest(CPU, "float32", PLACES, INT4))

    return shared_folder(_DRAFT, make).parent / "model"


def draft_of(model: Path) -> Path:
    """The export of `shared_layers` in 4 bits."""
    return model.parent / _DRAFT
