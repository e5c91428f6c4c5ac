"""What other programs make of a KV cache, at full width: every number is rounded as it is cached.

Per token and head with a scale and an offset (vLLM, TensorRT-LLM, Hugging Face); q8_0 and q4_0 of
llama.cpp, with and without its Hadamard rotation; KIVI's keys by channel and values by token (Liu
et al., ICML 2024), without its window in full precision.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from scipy.linalg import hadamard
from transformers import DynamicCache, PreTrainedConfig

Rounding = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class CacheFormat:
    """A format of the cache.

    Attributes:
        key: rounds keys [B, heads, S, width], turned by their positions.
        value: rounds values likewise.
        bits: bits a cached number, of a head of 64, scales and offsets included.
    """

    key: Rounding
    value: Rounding
    bits: float

    def of(
        self, keys: torch.Tensor, values: torch.Tensor, layer: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """What is cached of keys and values, in every layer alike."""
        return self.key(keys), self.value(values)


def _asymmetric(states: torch.Tensor, bits: int, dim: int) -> torch.Tensor:
    """2^bits steps between the least and the largest along an axis, both in float16."""
    low = states.amin(dim, keepdim=True).half().float()
    step = ((states.amax(dim, keepdim=True) - low) / (2**bits - 1)).half().float()
    codes = ((states - low) / step.clamp_min(torch.finfo(torch.float16).tiny)).round()
    return codes.clamp(0, 2**bits - 1) * step + low


def _by_token(bits: int) -> Rounding:
    return lambda states: _asymmetric(states, bits, -1)


def _ggml(bits: int) -> Rounding:
    """q8_0 and q4_0: blocks of 32 along a head, a float16 scale; q4_0's is signed, to reach -8."""

    def round_(states: torch.Tensor) -> torch.Tensor:
        blocks = states.unflatten(-1, (-1, 32))
        if bits == 8:
            scale = blocks.abs().amax(-1, keepdim=True) / 127
            return (_over(blocks, scale).round() * scale.half().float()).flatten(-2)
        largest = blocks.gather(-1, blocks.abs().argmax(-1, keepdim=True))
        scale = largest / -8
        codes = (_over(blocks, scale) + 8.5).floor().clamp(0, 15) - 8
        return (codes * scale.half().float()).flatten(-2)

    return round_


def _over(blocks: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    return torch.where(scale == 0, 0.0, blocks / torch.where(scale == 0, 1.0, scale))


def _turned(rounding: Rounding) -> Rounding:
    """Rounded in the basis of a Hadamard matrix over the head."""

    def round_(states: torch.Tensor) -> torch.Tensor:
        width = states.shape[-1]
        turn = torch.tensor(hadamard(width), dtype=torch.float32) / width**0.5
        return rounding(states @ turn) @ turn.T

    return round_


def _kivi_keys(bits: int, group: int = 32) -> Rounding:
    """By channel, over groups of tokens; the last group may be short."""

    def round_(states: torch.Tensor) -> torch.Tensor:
        parts = states.split(group, dim=2)
        return torch.cat([_asymmetric(part, bits, 2) for part in parts], dim=2)

    return round_


FORMATS = {
    **{f"int{b} by token": CacheFormat(_by_token(b), _by_token(b), b + 0.5) for b in (8, 4, 3)},
    "int3 by token, Hadamard": CacheFormat(_turned(_by_token(3)), _turned(_by_token(3)), 3.5),
    "q8_0": CacheFormat(_ggml(8), _ggml(8), 8.5),
    "q4_0": CacheFormat(_ggml(4), _ggml(4), 4.5),
    "q4_0, Hadamard": CacheFormat(_turned(_ggml(4)), _turned(_ggml(4)), 4.5),
    "KIVI-4": CacheFormat(_kivi_keys(4), _by_token(4), 4.75),
    "KIVI-2": CacheFormat(_kivi_keys(2), _by_token(2), 2.75),
}


class ChangedCache(DynamicCache):
    """A cache that changes what it is given; so is what is read back, in the first call as well.

    Args:
        config: of the model.
        change: (new keys, new values, number of the layer) -> what is cached of them.
    """

    def __init__(
        self,
        config: PreTrainedConfig,
        change: Callable[[torch.Tensor, torch.Tensor, int], tuple[torch.Tensor, torch.Tensor]],
    ) -> None:
        super().__init__(config=config)
        self._change = change

    def update(
        self,
        key_states: torch.Tensor,
        value_states: torch.Tensor,
        layer_idx: int,
        *args: Any,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Cache what is kept of new keys and values; return all that is cached."""
        keys, values = self._change(key_states, value_states, layer_idx)
        return super().update(keys, values, layer_idx, *args, **kwargs)
