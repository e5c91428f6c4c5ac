"""A tiny model compressed hard, and a text that it can learn."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from pipeline.compress.request import CompressRequest
from pipeline.compress.run import compress_to_folder
from pipeline.recover.request import RecoverRequest
from tests.support.families import save_family

PHRASES = ("the whale swims", "a low rank", "every token", "hello, world", "up and down")


def save_small(folder: Path, family: str = "llama", dtype: str = "float32") -> Path:
    """Write `original` and `small`, the same with 40% of its decoder parameters; return `small`."""
    source = save_family(folder / "original", family)
    request = CompressRequest(
        str(source), keep_params=0.4, windows=8, window_length=32, dtype=dtype
    )
    compress_to_folder(request, folder / "small")
    return folder / "small"


def write_train_text(path: Path, phrases: int = 1000) -> str:
    """Write phrases in a random order; return the path."""
    chosen = np.random.default_rng(0).integers(len(PHRASES), size=phrases)
    path.write_text(" ".join(PHRASES[index] for index in chosen), encoding="utf-8")
    return str(path)


def tiny_request(small: Path, text: str, **changes: object) -> RecoverRequest:
    """A recovery of some seconds, with a learning rate for few steps."""
    settings: dict[str, object] = {
        "steps": 20,
        "lora_rank": 4,
        "learning_rate": 1e-2,
        "window_length": 32,
    }
    return RecoverRequest(small, text, **(settings | changes))  # type: ignore[arg-type]
