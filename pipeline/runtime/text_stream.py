"""Text out of tokens as they come, up to a stop string.

No character that spans several tokens is broken; nothing of a stop string, and nothing behind it,
gets out.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
# A character has four bytes at most, and a token one at least: what is not whole after so many
# further tokens never will be.
_MOST_HELD = 3


class Decoder(Protocol):
    """The one method of a tokenizer that is needed here."""

    def decode(self, token_ids: list[int], *, skip_special_tokens: bool) -> str:
        """Text of the tokens."""
        ...


class _Detokenizer:
    """Turns a stream of ids into a stream of text.

    A token's text can depend on the token before it (leading blanks), so each piece is the
    difference between decoding a short window with and without the new tokens; a window that ends
    within a character is held back until the rest of the character has come, or cannot come.
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
        if not after.endswith(_REPLACEMENT) and len(after) > len(before):
            return self._move_on(after[len(before) :])
        if after.endswith(_REPLACEMENT) and (alone := self._alone()):
            return self._move_on(alone)
        if len(self._ids) - self._emitted <= _MOST_HELD:
            return ""
        given_up = self._give_up_one()
        return given_up + (self._move_on(alone) if (alone := self._alone()) else "")

    def _move_on(self, text: str) -> str:
        """All tokens have been shown; the last of them are the window."""
        self._window, self._emitted = self._emitted, len(self._ids)
        return text

    def _alone(self) -> str:
        """Text of the held tokens without those before them; empty where it is not whole.

        Where bytes are tokens, a decoder shows all bytes of a run as broken if one of them is.
        """
        text = self._decode(self._ids[self._emitted :])
        return "" if text.endswith(_REPLACEMENT) else text

    def _give_up_one(self) -> str:
        """Show the oldest held token as it is: its character is broken."""
        before = self._decode(self._ids[self._window : self._emitted])
        self._emitted += 1
        after = self._decode(self._ids[self._window : self._emitted])
        self._window = max(self._window, self._emitted - _MOST_HELD)
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


class _StopStrings:
    """Passes text on until a stop string comes, holding back what may be the start of one.

    Attributes:
        found: the stop string that ended the text; None so far.
    """

    def __init__(self, stops: Sequence[str] = ()) -> None:
        self._stops = [stop for stop in stops if stop]
        self._held = ""
        self.found: str | None = None

    def push(self, text: str) -> str:
        """Take a piece of text; return what certainly belongs before any stop string.

        Where several stop strings occur, the one that begins first ends the text, and of those
        that begin together the longest.
        """
        if self.found is not None:
            return ""
        self._held += text
        places = [(self._held.find(stop), -len(stop), stop) for stop in self._stops]
        begun = min((place for place in places if place[0] >= 0), default=None)
        waiting = self._first_possible_start()
        if begun is not None and begun[0] <= waiting:
            passed, self.found, self._held = self._held[: begun[0]], begun[2], ""
            return passed
        passed, self._held = self._held[:waiting], self._held[waiting:]
        return passed

    def finish(self) -> str:
        """Return what was held back: no more text comes, so it began no stop string."""
        held, self._held = self._held, ""
        places = [(held.find(stop), -len(stop), stop) for stop in self._stops]
        begun = min((place for place in places if place[0] >= 0), default=None)
        if begun is None or self.found is not None:
            return held
        self.found = begun[2]
        return held[: begun[0]]

    def _first_possible_start(self) -> int:
        """Where the earliest unfinished stop string could begin; the text's length if nowhere."""
        longest = max(map(len, self._stops), default=0)
        for start in range(max(0, len(self._held) - longest + 1), len(self._held)):
            rest = self._held[start:]
            if any(len(rest) < len(stop) and stop.startswith(rest) for stop in self._stops):
                return start
        return len(self._held)


class TextStream:
    """The text of an answer's tokens, up to the first stop string.

    Args:
        decoder: turns ids into text.
        stops: strings that end it; empty ones are ignored.
    """

    def __init__(self, decoder: Decoder, stops: Sequence[str] = ()) -> None:
        self._detokenizer, self._stops = _Detokenizer(decoder), _StopStrings(stops)

    @property
    def has_stopped(self) -> bool:
        """Whether a stop string has come."""
        return self._stops.found is not None

    def push(self, token: int) -> str:
        """Take one id; return the text that has become certain, which may be empty."""
        return self._stops.push(self._detokenizer.push(token))

    def finish(self) -> str:
        """Return what was held back: no more tokens come."""
        return self._stops.push(self._detokenizer.finish()) + self._stops.finish()
