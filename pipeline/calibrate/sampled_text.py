"""Text that a model writes: tokens drawn from its own distribution, many windows side by side."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch.nn import functional as F
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase
from transformers.cache_utils import DynamicLayer

from pipeline.progress import track

# The cache of all sequences sampled together is held at once.
_TOKENS_AT_ONCE = 20480
# Words whose chances are summed before any of them is looked at.
_WORDS_AT_ONCE = 256


@torch.no_grad()
def sampled_windows(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    count: int,
    length: int,
    seed: int,
) -> torch.Tensor:
    """Sample windows at temperature 1, each from a random first token after the model's BOS.

    The random first token spreads the windows over topics; without it a chat model begins every
    one of them alike. Special tokens, and ids that the tokenizer does not know, are never sampled,
    so that every window is full and all text.

    Returns:
        int64 [count, length].
    """
    generator = torch.Generator().manual_seed(seed)
    special = torch.tensor(sorted(tokenizer.all_special_ids), dtype=torch.int64)
    ids = torch.arange(model.config.get_text_config().vocab_size)
    is_word = (ids < len(tokenizer)) & ~torch.isin(ids, special)
    words = ids[is_word]
    start = words[torch.randint(len(words), (count, 1), generator=generator)]
    if tokenizer.bos_token_id is not None and tokenizer.bos_token_id < len(ids):
        start = torch.cat([torch.full_like(start, tokenizer.bos_token_id), start], dim=1)
    start = start[:, :length]
    if start.shape[1] == length:
        return start
    batches = start.tensor_split(min(count, -(-count * length // _TOKENS_AT_ONCE)))
    steps = track(range((length - start.shape[1]) * len(batches)), "sampling text, token")
    never = ids[~is_word]
    windows = [_continued(model, batch, length, never, generator, steps) for batch in batches]
    return torch.cat(windows)


def _continued(
    model: PreTrainedModel,
    windows: torch.Tensor,
    length: int,
    excluded: torch.Tensor,
    generator: torch.Generator,
    steps: Iterator[int],
) -> torch.Tensor:
    """Sequences int64 [B, S] sampled on to `length` tokens, one for each of `steps`.

    Whatever the model advises for its answers, such as a temperature, is not text of its own.

    Args:
        model: in evaluation mode.
        windows: the beginnings.
        length: above S.
        excluded: int64 [E], the words that are never drawn.
        generator: draws.
        steps: moved on by one at each token.
    """
    cache = DynamicCache(config=model.config)
    cache.layers = [
        _ReservedLayer(length) if type(layer) is DynamicLayer else layer for layer in cache.layers
    ]
    new, vocabulary = windows, model.config.get_text_config().vocab_size
    while windows.shape[1] < length:
        output = model(input_ids=new, past_key_values=cache, use_cache=True, logits_to_keep=1)
        logits = output.logits[:, -1, :vocabulary].float().index_fill_(1, excluded, -torch.inf)
        new = _drawn(logits.softmax(dim=-1), generator)
        windows = torch.cat([windows, new], dim=1)
        next(steps, None)
    return windows


def _drawn(chances: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """A word of each row, drawn with the chances that the row holds.

    One number for a row and one look into a block: one for each word takes longer than the head.

    Args:
        chances: float [B, V]; those of a row have any sum above 0.
        generator: draws.

    Returns:
        int64 [B, 1].
    """
    missing = -chances.shape[-1] % _WORDS_AT_ONCE
    padded = F.pad(chances, (0, missing)) if missing else chances
    blocks = padded.unflatten(-1, (-1, _WORDS_AT_ONCE))
    share = torch.rand(len(chances), 1, dtype=torch.float64, generator=generator)
    block, share = _place(blocks.sum(dim=-1).double(), share)
    word, _ = _place(blocks[torch.arange(len(blocks)), block[:, 0]].double(), share)
    return block * _WORDS_AT_ONCE + word


def _place(chances: torch.Tensor, share: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Where a share of all chances is reached, and which share of the one there that takes.

    Args:
        chances: float64 [B, N].
        share: float64 [B, 1], in [0, 1).

    Returns:
        int64 [B, 1], never of one without a chance; float64 [B, 1], in [0, 1).
    """
    sums = chances.cumsum(dim=-1)
    total = sums[:, -1:]
    level = torch.minimum(share * total, torch.nextafter(total, torch.zeros_like(total)))
    # Of what is no number the last: the layers' inputs are looked at later, and named.
    place = torch.searchsorted(sums, level, right=True).clamp_max(sums.shape[-1] - 1)
    own = chances.gather(1, place)
    left = (level - (sums.gather(1, place) - own)) / own
    return place, left.clamp(0, 1 - torch.finfo(torch.float64).eps)


class _ReservedLayer(DynamicLayer):
    """Keys and values of one layer, in memory for as many tokens as there will be.

    transformers' own grows by copying all that is there at every token.
    """

    def __init__(self, length: int) -> None:
        super().__init__()
        self._length = length
        self._room: list[torch.Tensor] = []

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append keys and values [B, heads, S, width]; return all of them, [B, heads, T, width]."""
        new = (key_states, value_states)
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self._room = [s.new_empty(*s.shape[:2], self._length, s.shape[3]) for s in new]
        start = self.get_seq_length()
        end = start + key_states.shape[2]
        for room, states in zip(self._room, new, strict=True):
            room[:, :, start:end] = states
        self.keys, self.values = (room[:, :, :end] for room in self._room)
        return self.keys, self.values
