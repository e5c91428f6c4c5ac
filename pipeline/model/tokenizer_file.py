"""tokenizer.json decides how text is split, whatever class transformers loads it by."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_PARTS = ("normalizer", "pre_tokenizer", "decoder")


def following_tokenizer(
    location: Path | str, folder: Path | None, **keywords: Any
) -> PreTrainedTokenizerBase:
    """Load a tokenizer of transformers that splits text as its tokenizer.json does.

    Some classes build their own way of splitting text, such as every digit apart, though the file
    has another. What answers prompts reads the file alone, and so must what measures a model.

    Args:
        location: as transformers takes it.
        folder: may hold tokenizer.json; None where there is no folder.
        keywords: of `AutoTokenizer.from_pretrained`.

    Raises:
        Exception: it does not load, as transformers or the tokenizers library say it.
    """
    from transformers import AutoTokenizer

    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(location, **keywords)
    _follow_file(tokenizer, folder)
    return tokenizer


def _follow_file(tokenizer: Any, folder: Path | None) -> None:
    """Give a tokenizer back the file's parts; one without a tokenizers backend is left alone."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None or folder is None or not (folder / "tokenizer.json").is_file():
        return
    from tokenizers import Tokenizer

    own = Tokenizer.from_file(str(folder / "tokenizer.json"))
    for part in _PARTS:
        setattr(backend, part, getattr(own, part))
