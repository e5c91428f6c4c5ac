"""A transformers model with its DynamicCache behind the Session interface."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import torch
from transformers import DynamicCache

from pipeline.calibrate.precision import quick_float32
from pipeline.checkpoint.modeling_cache import own_cache
from pipeline.runtime.sessions.checks import CheckedSession

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class TorchSession(CheckedSession):
    """PyTorch, on whatever device and in whatever dtype the model already has.

    Args:
        model: a causal language model; it is put into eval mode.
        name: what the ledger calls this backend.
        max_length: most tokens of prompt and answer; None takes the model's own limit.
        latent: keep the latents of a model whose cache is smaller; False keeps what they stand for.
        cache: makes an empty cache; None makes the model's own.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        name: str = "torch",
        max_length: int | None = None,
        latent: bool = True,
        cache: Callable[[], DynamicCache] | None = None,
    ) -> None:
        self.name = name
        own = partial(own_cache, model) if latent else partial(DynamicCache, config=model.config)
        self._make_cache: Callable[[], DynamicCache] = cache or own
        self.model = model.eval()
        text_config = model.config.get_text_config()
        self.vocab_size: int = text_config.vocab_size
        self.max_length: int = max_length or text_config.max_position_embeddings
        self.reset()

    def reset(self) -> None:
        super().reset()
        self._cache = self._make_cache()

    def rewind(self, length: int) -> None:
        if length == 0:
            self.reset()
        elif length < self._length:
            try:
                self._cache.crop(length - self._length)
                self._length = length
            except RuntimeError:  # a sliding window has dropped what would be needed again
                self.reset()

    def sibling(self) -> TorchSession:
        return TorchSession(self.model, self.name, self.max_length, cache=self._make_cache)

    def forward(self, input_ids: np.ndarray, last_only: bool = False) -> np.ndarray:
        rows, _ = self._check_call(input_ids)
        logits = self.logits(torch.from_numpy(input_ids).to(self.model.device), last_only)
        self._rows = rows
        return logits.float().cpu().numpy()

    def logits(self, input_ids: torch.Tensor, last_only: bool = False) -> torch.Tensor:
        """`forward` on the model's device: nothing is checked, copied away or waited for.

        Args:
            input_ids: int64 [B, S].
            last_only: only the last token's logits are wanted.

        Returns:
            [B, S, V], or [B, 1, V], in the model's dtype.
        """
        quick = quick_float32() if input_ids.numel() > 1 else nullcontext()
        with torch.inference_mode(), quick:
            output = self.model(
                input_ids=input_ids,
                past_key_values=self._cache,
                use_cache=True,
                logits_to_keep=1 if last_only else 0,
            )
        self._length += input_ids.shape[1]
        logits: torch.Tensor = output.logits
        return logits

    def repeat(self, rows: int) -> None:
        self._check_rows(1)
        self._cache.batch_repeat_interleave(rows)
        self._rows = rows
