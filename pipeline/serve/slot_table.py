"""What each slot's cache holds, and which free slot suits a prompt best."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import count

from pipeline.runtime.prefix_cache import common_length


class SlotTable:
    """Tokens of every slot, and which slots are free.

    Args:
        slots: how many there are; all begin free and empty.
    """

    def __init__(self, slots: int) -> None:
        self.tokens: list[list[int]] = [[] for _ in range(slots)]
        self._clock = count(1)
        # Slot -> when it was freed.
        self._free = dict.fromkeys(range(slots), 0)

    @property
    def free(self) -> int:
        """Number of free slots."""
        return len(self._free)

    def take(self, prompt_ids: Sequence[int], reuse: bool = True) -> tuple[int, int]:
        """Occupy the free slot that shares the longest beginning with a prompt.

        Of equal ones it is the one that has been free longest, whose tokens are the least likely
        to be wanted again. The last token of a prompt is never shared: its logits are wanted.

        Args:
            prompt_ids: at least one token.
            reuse: whether to look at what the slots hold.

        Returns:
            The slot, and how many of its first tokens the prompt begins with.

        Raises:
            LookupError: no slot is free.
        """
        if not self._free:
            raise LookupError("no slot is free")
        shared = {
            slot: common_length(self.tokens[slot], prompt_ids[:-1]) if reuse else 0
            for slot in self._free
        }
        slot = min(self._free, key=lambda slot: (-shared[slot], self._free[slot], slot))
        del self._free[slot]
        return slot, shared[slot]

    def release(self, slot: int) -> None:
        """Free a slot; what it holds may be of use to a later prompt."""
        self._free[slot] = next(self._clock)


def kept_tokens(shared: int, length: int, chunk: int) -> int:
    """How many of the tokens that a slot shares with a prompt are not read again.

    All, but where a single token would be left to read of a chunk of several: one alone is summed
    in another order, and the same prompt should give the same answer twice.
    """
    end = min(length, (shared // chunk + 1) * chunk)
    return shared - 1 if end - shared == 1 and shared % chunk else shared
