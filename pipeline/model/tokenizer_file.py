"""tokenizer.json decides how text is split, whatever class transformers loads it by."""

from __future__ import annotations

from pathlib import Path
from typing import Any

_PARTS = ("normalizer", "pre_tokenizer", "decoder")


def follow_file(tokenizer: Any, folder: Path | None) -> None:
    """Give a tokenizer of transformers back what its class put in the place of the file's own.

    Some classes build their own way of splitting text, such as every digit apart, though the file
    has another. What answers prompts reads the file alone, and so must what measures a model.

    Args:
        tokenizer: changed in place; one without a tokenizers backend is left alone.
        folder: may hold tokenizer.json.

    Raises:
        Exception: the file is broken, as the tokenizers library says it.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None or folder is None or not (folder / "tokenizer.json").is_file():
        return
    from tokenizers import Tokenizer

    own = Tokenizer.from_file(str(folder / "tokenizer.json"))
    for part in _PARTS:
        setattr(backend, part, getattr(own, part))
