"""Tensors that an interrupted run finds again: written whole, and known by their hash."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

_DIGEST = "sha256"


def keep_tensors(
    path: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str] | None = None
) -> None:
    """Write tensors with their hash, aside and then renamed.

    Args:
        path: of the file, a .safetensors.
        tensors: by name; of any type.
        metadata: texts that are kept with them, and hashed with them.
    """
    told = metadata or {}
    aside = path.with_suffix(".writing")
    save_file(tensors, aside, {**told, _DIGEST: _digest(tensors, told)})
    aside.replace(path)


def kept_tensors(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]] | None:
    """Tensors and metadata as they were kept; None where the file is missing or another.

    Args:
        path: as `keep_tensors` was given it.
    """
    try:
        with safe_open(path, "pt") as file:
            told = dict(file.metadata() or {})
        tensors = load_file(path)
    except (OSError, SafetensorError):
        return None
    return (tensors, told) if told.pop(_DIGEST, None) == _digest(tensors, told) else None


def _digest(tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> str:
    digest = hashlib.sha256(json.dumps(metadata, sort_keys=True).encode())
    for name, tensor in sorted(tensors.items()):
        about: list[Any] = [name, str(tensor.dtype), list(tensor.shape)]
        digest.update(json.dumps(about).encode())
        # As bytes: NumPy knows no bfloat16, and a scalar has no last axis to view.
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()
