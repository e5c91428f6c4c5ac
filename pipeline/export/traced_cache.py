"""KV caches whose tensors are inputs and outputs of the graph, with transformers' cache interface.

Slots: the tokens of this call are written behind those of earlier calls, at slots
last + 1 - S ... last, where `last` is the last slot that the attention mask marks in any row. So a
mask as long as the tokens so far (ONNX Runtime, onnxruntime-genai) and one padded with zeros to
the cache's length (CUDA graphs) mean the same, and padded rows keep their columns.

With ONNX Runtime's own attention the node itself writes the cache: `update` only notes which layer
comes next. There every row counts its own tokens: those that its mask marks.
"""

from __future__ import annotations

import torch

from pipeline.export.contract import Profile


class GraphCache:
    """Keys and values of all layers during tracing.

    Args:
        profile: static (TensorScatter) or growing (Concat).
        past: key and value of layer 0, of layer 1, ...: [B, KVH, past or max length, D] each.
        slots: int64 [B, S], where the new tokens go; unused where the attention node knows.
        lengths: int32 [B], the tokens of each row with this call's, less one; and int32 [], those
            of the longest row. Only for ONNX Runtime's own attention.
    """

    is_compileable = False

    def __init__(
        self,
        profile: Profile,
        past: list[torch.Tensor],
        slots: torch.Tensor,
        lengths: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> None:
        self.profile = profile
        self.keys, self.values = list(past[0::2]), list(past[1::2])
        self.slots, self.lengths = slots, lengths
        self.layer = 0

    def update(
        self,
        key: torch.Tensor,
        value: torch.Tensor,
        layer_idx: int,
        *args: object,
        **kwargs: object,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Add new keys and values [B, KVH, S, D]; return all of the layer's.

        With ONNX Runtime's own attention, return the new ones alone.
        """
        self.layer = layer_idx
        if self.profile.contrib:
            return key, value
        self.keys[layer_idx] = self._extend(self.keys[layer_idx], key)
        self.values[layer_idx] = self._extend(self.values[layer_idx], value)
        return self.keys[layer_idx], self.values[layer_idx]

    def _extend(self, past: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
        if not self.profile.static_cache:
            return torch.cat([past, new], dim=2)
        return torch.onnx.ops.symbolic(
            "TensorScatter",
            (past, new, self.slots[:, 0]),
            {"axis": -2},
            dtype=past.dtype,
            shape=past.shape,
            version=24,
        )

    @property
    def present(self) -> list[torch.Tensor]:
        """Key and value of layer 0, of layer 1, ... after all updates."""
        return [t for pair in zip(self.keys, self.values, strict=True) for t in pair]

    @property
    def is_sliding(self) -> list[bool]:
        """No layer drops old tokens: sliding windows are a matter of the mask alone."""
        return [False] * len(self.keys)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens in the cache before this call (static: its length)."""
        return self.keys[layer_idx].shape[2]

    def get_query_offset(self, layer_idx: int = 0) -> int:
        """Unused: the mask is made from `slots`."""
        return 0

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        """Number of keys that attention will see, and the slot of the first."""
        past = self.keys[layer_idx].shape[2]
        if self.profile.contrib:
            return query_length, 0
        return (past if self.profile.static_cache else past + query_length), 0
