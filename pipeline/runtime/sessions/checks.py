"""What every session checks before it computes: shape, dtype, vocabulary and room in the cache."""

from __future__ import annotations

import numpy as np

from pipeline.errors import InputError


def require_tokens(input_ids: np.ndarray, vocab_size: int, where: str) -> None:
    """Check that `input_ids` is int64 [B, S], not empty, and inside the vocabulary.

    Raises:
        InputError: it is not.
    """
    if input_ids.ndim != 2 or input_ids.dtype != np.int64 or input_ids.size == 0:
        raise InputError(
            "A session takes a block of token ids.",
            where=where,
            observed=f"{input_ids.dtype} {list(input_ids.shape)}",
            expected="int64 [B, S], at least one token",
        )
    lowest, highest = int(input_ids.min()), int(input_ids.max())
    if lowest < 0 or highest >= vocab_size:
        raise InputError(
            "A token id lies outside the vocabulary.",
            where=where,
            observed=f"ids from {lowest} to {highest}",
            expected=f"0 to {vocab_size - 1}",
            change="use the tokenizer that belongs to this model",
        )


def require_room(used: int, new: int, max_length: int, where: str) -> None:
    """Check that `new` tokens fit behind the `used` ones of a cache of `max_length`.

    Raises:
        InputError: they do not.
    """
    if used + new > max_length:
        raise InputError(
            "Too many tokens for the cache.",
            where=where,
            observed=f"{used} in the cache and {new} new ones",
            expected=f"at most {max_length} together",
            change="use a shorter prompt, or export with a longer --max-length",
        )


def require_batch(rows: int, cached_rows: int | None, where: str) -> None:
    """Check that a later call has as many rows as the call that filled the cache.

    Raises:
        InputError: it has not.
    """
    if cached_rows is not None and rows != cached_rows:
        raise InputError(
            "The batch size changed while the cache was in use.",
            where=where,
            observed=f"{rows} rows",
            expected=f"{cached_rows} rows",
            change="call reset() first",
        )
