"""The fewest tokens that a text can have, known from its length alone."""

from __future__ import annotations

import json
from typing import Any

# Pieces of a tokenizer that never leave out a character.
_KEEPING_NORMALIZERS = ("Lowercase", "NFD", "NFKD", "Prepend", "ByteLevel")
_COMPOSING_NORMALIZERS = ("NFC", "NFKC")
_KEEPING_SPLITTERS = ("ByteLevel", "Metaspace", "Digits", "Punctuation", "Split", "UnicodeScripts")
# Unicode's longest canonical decomposition: so many characters become one.
_COMPOSED = 4


class TokenBound:
    """A lower bound of the tokens of a text.

    It is the length over that of the longest token, for tokenizers in which every character comes
    into some token; for others it is 0.

    Args:
        backend: a `tokenizers.Tokenizer`; anything else has no bound.
    """

    def __init__(self, backend: Any) -> None:
        self._characters = _most_characters(backend) if hasattr(backend, "get_vocab") else None
        added = backend.get_added_tokens_decoder().values() if self._characters else ()
        # Such tokens take in all the blanks beside them.
        self._drops_blanks = any(token.lstrip or token.rstrip for token in added)

    def fewest_tokens(self, text: str) -> int:
        """So many tokens, at the least, are the ids of a text."""
        if self._characters is None:
            return 0
        length = sum(map(len, text.split())) if self._drops_blanks else len(text)
        return -(-length // self._characters)


def _most_characters(backend: Any) -> int | None:
    """Most characters of a text that one token stands for; None where there is no such number."""
    parts = [*_parts(backend.normalizer), *_parts(backend.pre_tokenizer)]
    vocabulary = backend.get_vocab(with_added_tokens=True)
    if not _keeps_everything(backend.model, parts, vocabulary):
        return None
    composed = _COMPOSED if any(p["type"] in _COMPOSING_NORMALIZERS for p in parts) else 1
    return composed * max(map(len, vocabulary), default=1)


def _keeps_everything(model: Any, parts: list[dict[str, Any]], vocabulary: dict[str, int]) -> bool:
    """Whether every character of a text is part of one of its tokens."""
    if type(model).__name__ != "BPE" or not all(map(_keeps, parts)):
        return False
    if any(part["type"] == "ByteLevel" for part in parts):
        from tokenizers.pre_tokenizers import ByteLevel

        return all(letter in vocabulary for letter in ByteLevel.alphabet())
    if model.byte_fallback:
        return all(f"<0x{byte:02X}>" in vocabulary for byte in range(256))
    return model.unk_token is not None and not model.fuse_unk


def _keeps(part: dict[str, Any]) -> bool:
    """Whether one normalizer or splitter leaves out nothing."""
    kind = part["type"]
    if kind == "Replace":
        old = part["pattern"].get("String")
        return old is not None and len(part["content"]) >= len(old)
    if kind in ("Split", "Punctuation"):
        return part["behavior"] != "Removed"
    known = _KEEPING_NORMALIZERS + _COMPOSING_NORMALIZERS + _KEEPING_SPLITTERS
    return kind in known


def _parts(component: Any) -> list[dict[str, Any]]:
    """The settings of a normalizer or splitter, one by one where it is a sequence."""
    if component is None:
        return []
    return _flat(json.loads(component.__getstate__()))


def _flat(settings: dict[str, Any]) -> list[dict[str, Any]]:
    if settings["type"] != "Sequence":
        return [settings]
    held = settings.get("normalizers", settings.get("pretokenizers", []))
    return [part for one in held for part in _flat(one)]
