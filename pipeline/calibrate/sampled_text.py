"""Text that the model generates itself: calibration with no data, and no test split touched."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from transformers import (
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StoppingCriteria,
    StoppingCriteriaList,
)

from pipeline.progress import track

# The cache of all sequences sampled together is held at once.
_TOKENS_AT_ONCE = 32768


@torch.no_grad()
def generate_windows(
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
    if tokenizer.bos_token_id is not None:
        start = torch.cat([torch.full_like(start, tokenizer.bos_token_id), start], dim=1)
    start = start[:, :length]
    new_tokens = length - start.shape[1]
    if new_tokens == 0:
        return start
    batches = start.split(max(1, _TOKENS_AT_ONCE // length))
    steps = _Steps(new_tokens * len(batches))
    with torch.random.fork_rng(devices=[]), _no_advice(model):
        torch.manual_seed(seed)
        windows = [
            model.generate(
                batch,
                attention_mask=torch.ones_like(batch),
                do_sample=True,
                temperature=1.0,
                top_k=0,
                top_p=1.0,
                repetition_penalty=1.0,
                max_new_tokens=new_tokens,
                suppress_tokens=ids[~is_word].tolist() or None,
                pad_token_id=tokenizer.pad_token_id or 0,
                stopping_criteria=StoppingCriteriaList([steps]),
            )
            for batch in batches
        ]
    return torch.cat(windows)


class _Steps(StoppingCriteria):
    """Stops nothing; moves a progress display on by one token at each step."""

    def __init__(self, total: int) -> None:
        self.steps = track(range(total), "sampling text, token")

    def __call__(self, input_ids: torch.Tensor, *args: object, **kwargs: object) -> torch.Tensor:
        """Count a step; False for every row."""
        next(self.steps, None)
        return torch.zeros(len(input_ids), dtype=torch.bool)


@contextmanager
def _no_advice(model: PreTrainedModel) -> Iterator[None]:
    """Set the model's generation_config aside: it fills in whatever a call does not set."""
    advice = model.generation_config
    model.generation_config = GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = advice
