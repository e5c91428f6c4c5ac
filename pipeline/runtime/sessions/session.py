"""What every backend offers: feed tokens, get logits, keep the cache inside."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np


class Session(Protocol):
    """A model with its KV cache, on some backend.

    Attributes:
        name: what the ledger calls this backend.
        vocab_size: width of the logits.
        max_length: most tokens the cache holds, prompt and answer together.
        row_cost: what one more token in a call costs, as a share of a call of one token; None where
            several in one call are not known to save anything.
        max_rows: most sequences of one call; None where any number will do.
    """

    name: str
    vocab_size: int
    max_length: int
    row_cost: float | None
    max_rows: int | None

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

    @property
    def length(self) -> int:
        """Tokens in the cache."""
        ...

    def rewind(self, length: int) -> None:
        """Forget all but the first `length` tokens, or all of them where that cannot be done.

        More than there are is no error. `length` tells how many are left.
        """

    def sibling(self) -> Session:
        """A session over the same weights, with an empty cache of its own.

        Raises:
            pipeline.errors.UsageError: this backend holds one sequence alone.
        """
        ...


@runtime_checkable
class RepeatingSession(Session, Protocol):
    """A session that can go on from one sequence in several ways, without reading it again."""

    def repeat(self, rows: int) -> None:
        """Make the one sequence in the cache into `rows` equal ones, for later calls to continue.

        Raises:
            pipeline.errors.InputError: the cache holds several sequences.
        """
        ...


@runtime_checkable
class SlotSession(Protocol):
    """A model that answers several sequences at once, each in a slot of its own.

    Attributes:
        name: what reports call this backend.
        vocab_size: width of the logits.
        max_length: most tokens a slot holds, prompt and answer together.
        row_cost: as of a `Session`, for `read_block`.
    """

    name: str
    vocab_size: int
    max_length: int
    row_cost: float | None

    @property
    def slots(self) -> int:
        """Number of slots."""
        ...

    def prefill(self, slot: int, input_ids: np.ndarray) -> np.ndarray:
        """Append int64 [S] to a slot; return float32 [V], the logits of the last token.

        Raises:
            pipeline.errors.InputError: ids outside the vocabulary, or more than `max_length`.
        """
        ...

    def read_block(self, slot: int, input_ids: np.ndarray) -> np.ndarray:
        """Append int64 [S] to a slot; return float32 [S, V], the logits of every token.

        Raises:
            pipeline.errors.InputError: ids outside the vocabulary, or more than `max_length`.
        """
        ...

    def decode(self, slots: Sequence[int], tokens: Sequence[int]) -> np.ndarray:
        """Append one token to each of several different slots; return float32 [len(slots), V].

        When it raises, each of the slots either holds its token or is as it was before.

        Raises:
            pipeline.errors.InputError: ids outside the vocabulary, or a slot that is full.
        """
        ...

    def slot_length(self, slot: int) -> int:
        """Tokens in a slot."""
        ...

    def rewind_slot(self, slot: int, length: int) -> None:
        """Forget all but the first `length` tokens of a slot, or all where that cannot be done.

        `slot_length` tells how many are left.
        """
        ...

    def clear(self, slot: int) -> None:
        """Forget what is in a slot, and whatever a failed call left there."""
        ...


@dataclass(frozen=True)
class Block:
    """What is to be read into a slot.

    Attributes:
        slot: which.
        ids: int64 [S], at least one token.
        last_only: only the last token's logits are wanted, as when a prompt is read.
        parents: the place in `ids` of the token that each stands behind, -1 for the first: the
            first branch comes first. None where they stand one behind another.
    """

    slot: int
    ids: np.ndarray
    last_only: bool = False
    parents: tuple[int, ...] | None = None


@runtime_checkable
class BlockSession(SlotSession, Protocol):
    """A session of which one call costs about the same for one answer and for many."""

    def read_blocks(self, blocks: Sequence[Block]) -> list[np.ndarray]:
        """Append each block to its slot, all of them in one pass over the weights.

        A block's logits and what it leaves in its slot are, bit for bit, those of the block alone.
        A token has the logits that it has behind those before it alone, and of tokens that branch
        the first branch is left in the slot. When it raises, no slot counts as longer than it was.

        Args:
            blocks: at least one, of different slots.

        Returns:
            Of each, float32 [S, V], or [1, V].

        Raises:
            pipeline.errors.InputError: ids outside the vocabulary, or more than `max_length`.
        """
        ...

    def keep_path(self, slot: int, path: Sequence[int]) -> None:
        """Of the block that was last read into a slot keep the first token and some behind it.

        Args:
            slot: which; nothing else has been done with it since.
            path: their places in the block, one behind another.
        """
