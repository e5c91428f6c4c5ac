"""Text that the model generates itself: calibration with no data at hand and no test split touched."""

from __future__ import annotations

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase


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
    one of them alike. End-of-text is suppressed, so that every window is full.

    Returns:
        int64 [count, length].
    """
    generator = torch.Generator().manual_seed(seed)
    special = torch.tensor(sorted(tokenizer.all_special_ids), dtype=torch.int64)
    words = torch.arange(min(len(tokenizer), model.config.get_text_config().vocab_size))
    words = words[~torch.isin(words, special)]
    start = words[torch.randint(len(words), (count, 1), generator=generator)]
    if tokenizer.bos_token_id is not None:
        start = torch.cat([torch.full_like(start, tokenizer.bos_token_id), start], dim=1)
    start = start[:, :length]
    new_tokens = length - start.shape[1]
    if new_tokens == 0:
        return start
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return model.generate(
            start,
            attention_mask=torch.ones_like(start),
            do_sample=True,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            repetition_penalty=1.0,
            min_new_tokens=new_tokens,
            max_new_tokens=new_tokens,
            pad_token_id=tokenizer.pad_token_id or 0,
        )
