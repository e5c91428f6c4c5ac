"""Seeded damage to files: bytes flipped, cut, lengths that lie; values of JSON that are others."""

from __future__ import annotations

import json
import random
import struct
from collections.abc import Callable
from functools import partial
from typing import Any

_ODD: tuple[Any, ...] = (
    None, True, False, 0, -1, 3.9, 10**9, 10**30, float("inf"), float("nan"), "", "12", "x" * 2000,
    "\u2028\x1b[31m", "../../x", [], {}, [None], [[1]], {"a": {}}, [1, "x", None],
)  # fmt: skip


def mutated(content: bytes, random_: random.Random, is_json: bool, header_bytes: int = 64) -> bytes:
    """The content with one thing wrong.

    Args:
        content: of a file that is right.
        random_: where the choice comes from.
        is_json: whether its values may be replaced.
        header_bytes: how much of it says what the rest is.
    """
    if is_json and random_.random() < 0.7:
        return _other_json(content, random_)
    kinds: tuple[Callable[[bytes, random.Random], bytes], ...] = (
        partial(_flipped, header_bytes=header_bytes), _cut, _longer, _emptied,
        partial(_lying, header_bytes=header_bytes),
    )  # fmt: skip
    return random_.choice(kinds)(content, random_)


def _flipped(content: bytes, random_: random.Random, header_bytes: int) -> bytes:
    changed = bytearray(content)
    for _ in range(random_.choice((1, 1, 4, 64))):
        end = random_.choice((header_bytes, len(changed)))
        changed[random_.randrange(min(end, len(changed)))] ^= random_.randrange(1, 256)
    return bytes(changed)


def _cut(content: bytes, random_: random.Random) -> bytes:
    return content[: random_.randrange(len(content))]


def _longer(content: bytes, random_: random.Random) -> bytes:
    return content + random_.randbytes(random_.choice((1, 8, 4096)))


def _emptied(content: bytes, random_: random.Random) -> bytes:
    return random_.choice((b"", b"\0" * len(content), b"[]", b"{", b"[" * 200_000, b"9" * 5_000))


def _lying(content: bytes, random_: random.Random, header_bytes: int) -> bytes:
    """A count or a length near the beginning that is another."""
    number = random_.choice((0, 1, 2**31, 2**32 - 1, 2**40, 2**63 - 1, 2**64 - 1))
    # Some formats have their fields at whole words; in others they come as they come.
    step = 4 if header_bytes <= 64 else 1
    start = random_.randrange(0, min(header_bytes, max(1, len(content) - 8)), step)
    return content[:start] + struct.pack("<Q", number) + content[start + 8 :]


def _other_json(content: bytes, random_: random.Random) -> bytes:
    """One value, anywhere in it, replaced, removed, or written twice."""
    value = json.loads(content)
    places = list(_places(value))
    holder, key = random_.choice(places)
    kind = random_.random()
    if kind < 0.15:
        del holder[key]
    elif kind < 0.25 and isinstance(holder, dict):
        holder[random_.choice(("", "x", "model.layers.9.q"))] = holder[key]
    elif kind < 0.35 and type(holder[key]) is int:
        holder[key] += random_.choice((-1, 1, 2**31, -(2**31)))
    else:
        holder[key] = random_.choice(_ODD)
    return json.dumps(value).encode()


def _places(value: Any) -> Any:
    """Every (holder, key) within a JSON value."""
    keys: Any = ()
    if isinstance(value, dict):
        keys = list(value)
    elif isinstance(value, list):
        keys = range(min(len(value), 20))
    for key in keys:
        yield value, key
        yield from _places(value[key])
