"""Keys and values while a graph is traced, and the windows that attention sees of them."""

from __future__ import annotations

from collections.abc import Callable

import torch

from pipeline.export.cache_write import cache_write
from pipeline.export.contract import CPU, Profile
from pipeline.export.latent_attention import HeldSide
from pipeline.export.latents import GraphLatents

# ONNX Runtime's own attention takes heads whose width is a multiple of this.
_HEAD_WIDTH = 8
# Rows of a mask that are looked at before it is taken for a window: so many at the beginning, so
# many spread over the rest, and those around the first that leaves something out.
_LOOKED_AT = 64


def padded_width(key_width: int, value_width: int) -> int:
    """Width of the heads that ONNX Runtime's own attention takes for keys and values so wide."""
    return -(-max(key_width, value_width) // _HEAD_WIDTH) * _HEAD_WIDTH


def _window_of(mask_function: Callable[..., torch.Tensor], length: int) -> int:
    """Keys that a query sees, its own among them; 0 where it sees all up to its own.

    Args:
        mask_function: as above.
        length: tokens within which that is to hold.

    Raises:
        NotImplementedError: some query sees other keys.
    """
    slots, last = torch.arange(length), length - 1

    def seen_by(queries: torch.Tensor) -> torch.Tensor:
        seen = mask_function(0, 0, queries[None, None, :, None], slots[None, None, None, :])
        return torch.as_tensor(seen).broadcast_to(1, 1, len(queries), length)[0, 0]

    window = int(seen_by(slots[last:]).sum())
    some = torch.cat(
        [
            slots[:_LOOKED_AT],
            torch.linspace(0, last, _LOOKED_AT).long(),
            torch.arange(window - 1, window + 2).clamp(0, last),
        ]
    )
    behind = some[:, None] - slots
    if not bool((seen_by(some) == ((behind >= 0) & (behind < window))).all()):
        raise NotImplementedError(
            f"attention that is neither causal nor in a causal window, in the profile '{CPU}'"
        )
    return window if window < length else 0


class GraphCache:
    """Keys and values of all layers during tracing, with transformers' interface.

    They are inputs and outputs of the graph. The tokens of this call are written behind those of
    earlier calls, at slots last + 1 - S ... last, where `last` is the last slot that the attention
    mask marks in any row. So a mask as long as the tokens so far (ONNX Runtime, onnxruntime-genai)
    and one padded with zeros to the cache's length (CUDA graphs) mean the same, and padded rows
    keep their columns.

    With ONNX Runtime's own attention the node itself writes the cache: `update` only notes which
    layer comes next. There every row counts its own tokens: those that its mask marks.

    Args:
        profile: static (TensorScatter, CacheWrite) or growing (Concat).
        past: key and value of layer 0, of layer 1, ...: [B, KVH, past or max length, D] each.
        slots: int64 [B, S], where the new tokens go; unused where the attention node knows.
        lengths: int32 [B], the tokens of each row with this call's, less one; and int32 [], those
            of the longest row. Only for ONNX Runtime's own attention.
        latents: what is cached instead of keys and values, and how it is attended to; None where
            no layer has any.
        scales: of keys and values of every layer, [kv heads * width] each, where the cache holds
            codes; None of floats. Only for ONNX Runtime's own attention.
        steps: of latents in codes, (layer, side) -> [B, groups, past or max length, 2]; 0 is of
            keys. In the order of the graph's inputs.
        windows: of the masks that a call makes, in order; filled by a call in which tensors have
            values. Only for ONNX Runtime's own attention.
    """

    is_compileable = False
    maps_keys = True  # by `latents`, and not before it is given them

    def __init__(
        self,
        profile: Profile,
        past: list[torch.Tensor],
        slots: torch.Tensor,
        lengths: tuple[torch.Tensor, torch.Tensor] | None = None,
        windows: list[int] | None = None,
        latents: GraphLatents | None = None,
        scales: list[tuple[torch.Tensor, torch.Tensor]] | None = None,
        steps: dict[tuple[int, int], torch.Tensor] | None = None,
    ) -> None:
        self.profile, self.latents, self.scales = profile, latents, scales
        self.keys, self.values = list(past[0::2]), list(past[1::2])
        self.steps = steps or {}
        self.slots, self.lengths = slots, lengths
        self._windows: list[int] = [] if windows is None else windows
        self._stand_ins: list[tuple[torch.Tensor, int]] = []
        self.layer = 0
        self.updated = self.attended = 0
        self.new: tuple[torch.Tensor, torch.Tensor] | None = None

    def stand_in_for(
        self, mask_function: Callable[..., torch.Tensor], dtype: torch.dtype
    ) -> torch.Tensor:
        """A tensor to give to attention as its mask, by which the mask's window is known.

        Raises:
            NotImplementedError: the mask is no window.
        """
        number = len(self._stand_ins)
        if not torch.compiler.is_exporting():  # there tensors have no values to look at
            self._windows[number:] = [_window_of(mask_function, self.keys[0].shape[2])]
        self._stand_ins.append((torch.zeros(1, 1, 1, 1, dtype=dtype), self._windows[number]))
        return self._stand_ins[-1][0]

    def window_of(self, mask: torch.Tensor | None) -> int:
        """Keys that a query sees by this stand-in of a mask; 0 for all before it.

        Raises:
            NotImplementedError: the model has made another mask out of it, or has one of its own.
        """
        for stand_in, window in self._stand_ins:
            if mask is stand_in:
                return window
        raise NotImplementedError(f"attention with a mask of its own, in the profile '{CPU}'")

    def update(
        self,
        key: torch.Tensor,
        value: torch.Tensor,
        layer_idx: int,
        *args: object,
        **kwargs: object,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Add new keys and values [B, KVH, S, D]; return all of the layer's.

        With ONNX Runtime's own attention, and where latents are cached, return the new ones alone.
        """
        self.layer, self.new = layer_idx, (key, value)
        self.updated += 1
        if self.profile.contrib:
            return key, value
        if self.latents is not None and layer_idx in self.latents:
            for number, new in enumerate(self.latents.of_new(layer_idx, (key, value))):
                held = self.values if number else self.keys
                held[layer_idx] = self._extend(held[layer_idx], new.held)
                if new.steps is not None:
                    place = layer_idx, number
                    self.steps[place] = self._extend(self.steps[place], new.steps)
            return key, value
        self.keys[layer_idx] = self._extend(self.keys[layer_idx], key)
        self.values[layer_idx] = self._extend(self.values[layer_idx], value)
        return self.keys[layer_idx], self.values[layer_idx]

    def latents_of(
        self, key: torch.Tensor, value: torch.Tensor
    ) -> tuple[GraphLatents, HeldSide, HeldSide] | None:
        """The cache of the layer that has just been given these, and what knows to attend to it.

        None where it holds keys and values.

        Raises:
            NotImplementedError: as `require_own`.
        """
        if self.latents is None or self.layer not in self.latents:
            return None
        self.require_own(key, value)
        keys, values = (
            HeldSide(held[self.layer], self.steps.get((self.layer, number)), form)
            for number, (held, form) in enumerate(
                zip((self.keys, self.values), self.latents.forms_of(self.layer), strict=True)
            )
        )
        return self.latents, keys, values

    def require_own(self, key: torch.Tensor, value: torch.Tensor) -> None:
        """Raise NotImplementedError unless `update` has just returned these, and once alone.

        ONNX Runtime's own attention writes what it attends to, and latents are attended to as they
        are cached; a layer that attends to a part of its cache, or twice, would get something else
        than it means to.
        """
        new, self.new = self.new, None
        if new is None or key is not new[0] or value is not new[1]:
            raise NotImplementedError(
                f"keys or values that change behind the cache, in the profile '{self.profile.name}'"
            )

    def _extend(self, past: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
        if not self.profile.static_cache:
            return torch.cat([past, new], dim=2)
        if self.profile.plugin_writes:
            return cache_write(past, new, self.slots[:, 0])
        return torch.onnx.ops.symbolic(
            "TensorScatter",
            (past, new, self.slots[:, 0]),
            {"axis": -2},
            dtype=past.dtype,
            shape=past.shape,
            version=24,
        )

    def require_attention(self) -> None:
        """Raise NotImplementedError when some layer attended in a way of its own."""
        if self.attended < self.updated:
            raise NotImplementedError("attention that does not go through transformers' interface")

    @property
    def present(self) -> list[torch.Tensor]:
        """Key and value of layer 0, of layer 1, ... after all updates, and the steps of codes."""
        return [*(t for pair in zip(self.keys, self.values, strict=True) for t in pair),
                *self.steps.values()]  # fmt: skip

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
