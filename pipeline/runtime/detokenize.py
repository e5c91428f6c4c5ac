"""Text out of tokens as they come, without breaking a character that spans several tokens."""

from __future__ import annotations

from typing import Protocol

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


class Decoder(Protocol):
    """The one method of a tokenizer that is needed here."""

    def decode(self, token_ids: list[int], *, skip_special_tokens: bool) -> str:
        """Text of the tokens."""
        ...


class Detokenizer:
    """Turns a stream of ids into a stream of text.

    A token's text can depend on the token before it (leading blanks), so each piece is the
    difference between decoding a short window with and without the new tokens; a window that ends
    within a character is held back until the rest of the character has come.
    """

    def __init__(self, tokenizer: Decoder) -> None:
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        self._window = 0
        self._emitted = 0

    def push(self, token: int) -> str:
        """Take one id; return the text that has become certain, which may be empty."""
        self._ids.append(token)
        before, after = self._texts()
        if after.endswith(REPLACEMENT) or len(after) <= len(before):
            return ""
        self._window = self._emitted
        self._emitted = len(self._ids)
        return after[len(before) :]

    def finish(self) -> str:
        """Return what is still held back, broken characters included."""
        before, after = self._texts()
        self._window = self._emitted = len(self._ids)
        return after[len(before) :]

    def _texts(self) -> tuple[str, str]:
        """Text of the window up to what was emitted, and of the whole window."""
        return (
            self._decode(self._ids[self._window : self._emitted]),
            self._decode(self._ids[self._window :]),
        )

    def _decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=True)
