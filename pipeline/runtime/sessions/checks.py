"""What every session checks before it computes: shape, dtype, vocabulary and room in the cache."""

from __future__ import annotations

import numpy as np

from pipeline.errors import InputError


class CheckedSession:
    """What sessions of rows of equal length share: attributes as of a `Session`, and the checks."""

    name: str
    vocab_size: int
    max_length: int
    row_cost: float | None = None
    max_rows: int | None = None

    def reset(self) -> None:
        self._length = 0
        # Of the call that filled the cache; None for an empty one.
        self._rows: int | None = None

    @property
    def length(self) -> int:
        return self._length

    def _check_call(self, input_ids: np.ndarray) -> tuple[int, int]:
        """Rows and tokens of a call, int64 [B, S], once it is known to be fit for the cache.

        Raises:
            InputError: ids outside the vocabulary, another batch size than before, or more tokens
                than `max_length`.
        """
        self._check_tokens(input_ids)
        rows, count = input_ids.shape
        self._check_rows(rows)
        self._check_room(self.length, count)
        return rows, count

    def _check_tokens(self, input_ids: np.ndarray) -> None:
        """Raise InputError unless `input_ids` is int64 [B, S], not empty, and in the vocabulary."""
        if input_ids.ndim != 2 or input_ids.dtype != np.int64 or input_ids.size == 0:
            raise InputError(
                "A session takes a block of token ids.",
                where=self.name,
                observed=f"{input_ids.dtype} {list(input_ids.shape)}",
                expected="int64 [B, S], at least one token",
            )
        lowest, highest = int(input_ids.min()), int(input_ids.max())
        if lowest < 0 or highest >= self.vocab_size:
            raise InputError(
                "A token id lies outside the vocabulary.",
                where=self.name,
                observed=f"ids from {lowest} to {highest}",
                expected=f"0 to {self.vocab_size - 1}",
                change="use the tokenizer that belongs to this model",
            )

    def _check_rows(self, rows: int) -> None:
        """Raise InputError where a later call has other rows than the one that filled the cache."""
        if self._rows is not None and rows != self._rows:
            raise InputError(
                "The batch size changed while the cache was in use.",
                where=self.name,
                observed=f"{rows} rows",
                expected=f"{self._rows} rows",
                change="call reset() first",
            )

    def _check_room(self, used: int, new: int) -> None:
        """Raise InputError unless `new` tokens fit behind the `used` ones of the cache."""
        if used + new > self.max_length:
            raise InputError(
                "Too many tokens for the cache.",
                where=self.name,
                observed=f"{used} in the cache and {new} new ones",
                expected=f"at most {self.max_length} together",
                change="use a shorter prompt, or export with a longer --max-length",
            )
