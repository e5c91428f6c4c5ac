"""Latent attention in NumPy: the specification that every implementation is tested against.

    z      = codes * step + low, or numbers as they are
    key    = turned(mean + z up)                 where keys are rebuilt; else z
    mixed  = softmax(query key^T + mask) z_value

The query is scaled already. What is cached of the values is not mapped back here: `mixed` is, once
for each query instead of once for each cached token, and where it can be in the matrix behind it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Held:
    """One side of the cache.

    Attributes:
        held: numbers [B, groups, L, rank]; codes, int8 [B, groups, L, bytes], each 128 less than
            what it means.
        steps: of codes, step and low of every token and group, [B, groups, L, 2].
        paired: a byte holds the codes of two numbers, number i in its low half, and i + bytes in
            its high half.
    """

    held: np.ndarray
    steps: np.ndarray | None = None
    paired: bool = False

    def numbers(self) -> np.ndarray:
        """What it stands for, float64 [B, groups, L, rank]."""
        found = self.held.astype(np.float64)
        if self.steps is None:
            return found
        found += 128
        if self.paired:
            high = found // 16
            found = np.concatenate([found - 16 * high, high], axis=-1)
        steps = self.steps.astype(np.float64)
        return found * steps[..., :1] + steps[..., 1:]


@dataclass(frozen=True)
class Rebuilt:
    """How keys come out of latents.

    Attributes:
        up: [groups, heads of a group, rank, D].
        mean: [groups, heads of a group, 1, D].
        cos, sin: [at least L, D / 2]; number i of a key turns with number i + D / 2.
    """

    up: np.ndarray
    mean: np.ndarray
    cos: np.ndarray
    sin: np.ndarray

    def keys(self, latents: np.ndarray) -> np.ndarray:
        """Keys [B, kv heads, L, D] of latents [B, groups, L, rank]."""
        batch, _, length, _ = latents.shape
        keys = latents[:, :, None] @ self.up.astype(np.float64) + self.mean.astype(np.float64)
        first, second = np.split(keys.reshape(batch, -1, length, keys.shape[-1]), 2, axis=-1)
        cos, sin = (table[:length].astype(np.float64) for table in (self.cos, self.sin))
        turned = [first * cos - second * sin, second * cos + first * sin]
        return np.concatenate(turned, axis=-1)


def latent_attention(
    query: np.ndarray, mask: np.ndarray, keys: Held, values: Held, rebuilt: Rebuilt | None = None
) -> np.ndarray:
    """Compute the op in float64, whatever the types of the inputs.

    Args:
        query: scaled, [B, H, S, D]; as wide as the keys' latents where those are not rebuilt.
        mask: added to the scores, [B or 1, 1, S, L].
        keys: cached; groups that divide H.
        values: cached; likewise, and as many tokens.
        rebuilt: how keys come out of them; None takes them as they are.

    Returns:
        float64 [B, H, S, rank of the values].

    Raises:
        ValueError: shapes that do not fit.
    """
    key, value = keys.numbers(), values.numbers()
    if rebuilt is not None:
        key = rebuilt.keys(key)
    batch, heads, length, width = query.shape
    if heads % key.shape[1] or heads % value.shape[1] or width != key.shape[3]:
        raise ValueError(f"query {query.shape}, keys {key.shape}, values {value.shape} do not fit")
    by_group = query.astype(np.float64).reshape(batch, key.shape[1], -1, width)
    scores = (by_group @ key.swapaxes(2, 3)).reshape(batch, heads, length, -1) + mask
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    weights /= weights.sum(axis=-1, keepdims=True)
    mixed = weights.reshape(batch, value.shape[1], -1, weights.shape[-1]) @ value
    return mixed.reshape(batch, heads, length, -1)
