"""What a tokenizer of somebody else may do: fail in any way, and take a while, but not for ever."""

from __future__ import annotations

import base64
import json
import threading
from collections.abc import Callable
from typing import Any

from pipeline.errors import InputError, is_panic
from pipeline.runtime.chat_template import require_text

# A text takes a tokenizer microseconds per character. One that needs more than this has been given
# a regular expression, or rules, that come to no end.
_ENCODE_S = 10.0
_CHARACTERS_PER_S = 20_000
# Unicode's own normal forms make 18 characters of one at most.
_MOST_GROWTH = 100


def as_value_error(error: BaseException) -> BaseException:
    """A failure of the tokenizers library while loading; anything else as it is."""
    foreign = isinstance(error, Exception) and not isinstance(error, MemoryError)
    return ValueError(str(error)) if foreign or is_panic(error) else error


def failing(error: BaseException, where: object) -> BaseException:
    """A failure of the tokenizers library at work, as an InputError; anything else as it is."""
    foreign = isinstance(error, Exception) and not isinstance(error, MemoryError | InputError)
    if foreign or is_panic(error):
        return InputError("The tokenizer fails on this text.", where=where, observed=error)
    return error


def limited_ids(encode: Callable[[], list[int]], text: str, where: object) -> list[int]:
    """Ids of a text, or the end of the wait for them; Ctrl-C is heard meanwhile.

    The library lets go of the interpreter in `encode_batch`, but cannot be stopped: a thread that
    came to no end ends with the process.
    """
    require_text(text)
    outcome: list[list[int] | BaseException] = []

    def run() -> None:
        try:
            outcome.append(encode())
        except BaseException as error:
            outcome.append(error)

    limit_s = _ENCODE_S + len(text) / _CHARACTERS_PER_S
    thread = threading.Thread(target=run, daemon=True, name="encode")
    thread.start()
    thread.join(limit_s)
    if not outcome:
        raise InputError(
            "The tokenizer comes to no end with this text.",
            where=where,
            observed=f"{len(text)} characters, {limit_s:.0f} s",
        )
    if isinstance(outcome[0], BaseException):
        raise failing(outcome[0], where) from outcome[0]
    return outcome[0]


def require_bounded(tokenizer: Any) -> None:
    """Raise ValueError for rules that multiply a text: a few of them fill any memory."""
    for name in ("normalizer", "decoder"):
        part = getattr(tokenizer, name)
        if part is None:
            continue
        growth = _growth(json.loads(part.__getstate__()))
        if growth > _MOST_GROWTH:
            raise ValueError(f"its {name} makes texts up to {growth} times as long")


def _growth(rule: dict[str, Any]) -> int:
    """How many characters a rule of tokenizer.json makes of one, at most."""
    kind, product = rule.get("type"), 1
    for step in rule.get("normalizers") or rule.get("decoders") or ():
        product *= _growth(step)
    if kind == "Replace":
        fixed = rule["pattern"].get("String")  # a regular expression may match nothing at all
        return -(-len(rule["content"]) // len(fixed)) or 1 if fixed else 1 + len(rule["content"])
    if kind == "Prepend":
        return 1 + len(rule["prepend"])
    if kind == "Precompiled":
        texts = base64.b64decode(rule["precompiled_charsmap"] or "").split(b"\0")
        return max(map(len, texts))
    return product
