"""The interface every backend offers: feed tokens, get logits, keep the cache inside."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

import numpy as np


class Session(Protocol):
    """A model with its KV cache, on some backend.

    Attributes:
        name: what the ledger calls this backend.
        vocab_size: width of the logits.
        max_length: most tokens the cache holds, prompt and answer together.
    """

    name: str
    vocab_size: int
    max_length: int

    def reset(self) -> None:
        """Forget the cache."""

    def forward(self, input_ids: np.ndarray, last_only: bool = False) -> np.ndarray:
        """Append tokens to the cache and return their logits.

        Args:
            input_ids: int64 [B, S]; every row as long as the others, no padding.
            last_only: only the last token's logits are wanted, as when a prompt is read.

        Returns:
            float32 [B, S, V], or [B, 1, V], whatever the backend computes in.

        Raises:
            pipeline.errors.InputError: more tokens than `max_length` allows.
        """
        ...


@runtime_checkable
class RewindingSession(Session, Protocol):
    """A session that can take tokens back, so that a later prompt may go on from an earlier one."""

    @property
    def length(self) -> int:
        """Tokens in the cache."""
        ...

    def rewind(self, length: int) -> None:
        """Forget all but the first `length` tokens, or all of them where that cannot be done.

        More than there are is no error. `length` tells how many are left.
        """
        ...


@runtime_checkable
class BlockSession(RewindingSession, Protocol):
    """A session that reads several tokens in one call for less than their calls would cost.

    Attributes:
        row_cost: what one more token in a call costs, as a share of a call of one token.
    """

    row_cost: float


@runtime_checkable
class RepeatingSession(Session, Protocol):
    """A session that can go on from one sequence in several ways, without reading it again."""

    def repeat(self, rows: int) -> None:
        """Make the one sequence in the cache into `rows` equal ones, for later calls to continue.

        Raises:
            pipeline.errors.InputError: the cache holds several sequences.
        """
        ...
