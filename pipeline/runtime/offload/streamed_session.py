"""A checkpoint larger than memory behind the Session interface: layers come from disk for a call.

A call costs a pass over the disk, whatever it reads, so every call computes the same number of
rows over a cache of the same length: a token's bits are then its own, and drafts change none.
"""

from __future__ import annotations

import hashlib
import time
import weakref
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from pipeline.errors import InputError, UsageError
from pipeline.export.contract import cache_names
from pipeline.runtime.offload.steady_attention import RowCache
from pipeline.runtime.offload.streamed_model import StreamedModel, Traffic
from pipeline.runtime.sessions.call_times import CallTimes
from pipeline.runtime.sessions.key_values import KeyValues
from pipeline.runtime.sessions.onnx_cpu_session import STEADY_TOKENS
from pipeline.runtime.sessions.slotted_session import SlottedSession

# Rows of a call: of an answer with its drafts, of a short prompt, and of parts of a longer one.
_ROWS = (STEADY_TOKENS, 64, 256)
# Tokens that a call counts as: those of one without drafts, in any steady session.
_COUNTED = 2
# Of what another token adds to a call: choosing it. Its row is computed in any case.
_ROW_COST = 0.01


class StreamedSession(SlottedSession):
    """PyTorch over a checkpoint of which a part stays in memory, and the rest is read each time.

    Args:
        folder: a checkpoint with plain matrices.
        memory_bytes: that weights, buffers, cache and `other_bytes` may take together.
        length: places of the cache.
        slots: rows of the cache to begin with.
        other_bytes: what else the budget is for, such as a draft.
        steady: compute as many rows in every call of an answer, so that drafts change no bit; else
            a token alone is computed alone, which is quicker where the disk is.

    Attributes:
        values: the cache, float32, as an export of the profile `cpu` has it.
        call_times: of calls.

    Raises:
        InputError: the checkpoint is broken, or cannot be offloaded; or its bits depend, here, on
            how many tokens are read at once.
        UsageError: the budget is too small.
    """

    row_cost: float | None = _ROW_COST

    def __init__(
        self,
        folder: Path,
        memory_bytes: int,
        length: int,
        slots: int = 1,
        other_bytes: int = 0,
        steady: bool = True,
    ) -> None:
        widths = _cache_widths(folder)
        row_bytes = 4 * length * sum(heads * width for heads, width in widths.values())
        self._streamed = StreamedModel(folder, memory_bytes, other_bytes + slots * row_bytes)
        self._end = weakref.finalize(self, self._streamed.close)
        self._folder, self.max_length = folder, length
        self.vocab_size = self._streamed.model.config.get_text_config().vocab_size
        self.values = KeyValues(slots, widths, length, np.dtype(np.float32))
        self.call_times = CallTimes()
        self._lengths = np.zeros(slots, np.int64)
        self._rows = None
        self._sizes = _ROWS if steady else (1, *_ROWS)
        self._caches: dict[int, RowCache] = {}
        self._cached = self.values.buffers
        found = self.traffic
        self.name = f"torch float32, {found.layers - found.resident} of {found.layers} layers read"
        if steady:
            self._require_steadiness()

    @property
    def traffic(self) -> Traffic:
        """What was read from disk, and what is held."""
        return self._streamed.traffic

    def close(self) -> None:
        """End the thread that reads; the session is of no use afterwards."""
        self._end()

    def sibling(self) -> StreamedSession:
        raise UsageError(
            "An offloaded model is opened once: its layers share one piece of memory.",
            change="use slots of the one session",
        )

    def forward(self, input_ids: np.ndarray, last_only: bool = False) -> np.ndarray:
        rows, _ = self._check_call(input_ids)
        if rows > self.slots:
            self._grow(rows)
        self._rows = rows
        return np.concatenate([self._read(row, input_ids[row], last_only) for row in range(rows)])

    def decode(self, slots: Sequence[int], tokens: Sequence[int]) -> np.ndarray:
        """Append one token to each of several slots, one after the other: float32 [slots, V]."""
        return self._decode_apart(slots, tokens)

    def _read(self, row: int, input_ids: np.ndarray, last_only: bool) -> np.ndarray:
        parts = []
        for start in range(0, len(input_ids), self._sizes[-1]):
            part = input_ids[start : start + self._sizes[-1]]
            shown = "reading the prompt" if len(part) > STEADY_TOKENS else None
            with self._streamed.one_pass(shown):
                began = time.perf_counter()
                parts.append(self._run(row, part, last_only))
            # A call takes as long as the disk does, whatever it reads.
            self.call_times.add(_COUNTED, time.perf_counter() - began)
        return parts[-1] if last_only else np.concatenate(parts, axis=1)

    def _run(self, row: int, ids: np.ndarray, last_only: bool) -> np.ndarray:
        """One call: logits, float32 [1, S, V] or [1, 1, V]; the row is longer by its tokens."""
        count, start = len(ids), int(self._lengths[row])
        rows = next(rows for rows in self._sizes if rows >= count)
        # What fills the call up repeats the last token, and nothing of it is kept.
        filled = np.append(ids, np.repeat(ids[-1:], rows - count))[None]
        positions = start + np.minimum(np.arange(rows), count - 1)[None]
        cache = self._cache_of(row)
        cache.place(start, count)
        kept = torch.full((self._sizes[0],), count - 1) if last_only else 0
        with torch.inference_mode():
            output = self._streamed.model(
                input_ids=torch.from_numpy(filled),
                position_ids=torch.from_numpy(positions),
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=kept,
            )
        logits = output.logits[:, : 1 if last_only else count]
        if not bool(torch.isfinite(logits.sum(dtype=torch.float64))):
            raise InputError(
                "The model's logits are no numbers.",
                where=self._folder,
                observed=f"NaN or infinity behind {start} tokens",
                change="compare with the model that was published, or run it without --memory",
            )
        self._lengths[row] = start + count
        found: np.ndarray = logits.numpy().copy()
        return found

    def _cache_of(self, row: int) -> RowCache:
        if self._cached is not self.values.buffers:  # there are more rows now
            self._caches, self._cached = {}, self.values.buffers
        if row not in self._caches:
            held = [buffer[row : row + 1] for buffer in self.values.buffers.values()]
            self._caches[row] = RowCache(list(zip(held[::2], held[1::2], strict=True)))
        return self._caches[row]

    def _require_steadiness(self) -> None:
        """Read the same tokens in several ways; raise InputError unless all bits are the same.

        By the first layer alone, with embedding and head: the others are multiplied like it.
        """
        count = min(_ROWS[0], self.max_length)
        ids = np.arange(count) * 7919 % self.vocab_size
        found = set()
        with self._streamed.first_layer_alone():
            for cuts in ([count], [1, 2, 3, 4], [6], [count - 1]):
                self._lengths[0] = 0
                parts = [part for part in np.split(ids, cuts) if len(part)]
                logits = np.concatenate([self._run(0, part, False)[0] for part in parts])
                held = [values[0, :, :count].tobytes() for values in self.values.buffers.values()]
                found.add(hashlib.sha256(b"".join([logits.tobytes(), *held])).digest())
        self._lengths[0] = 0
        for buffer in self.values.buffers.values():
            buffer[0, :, :count] = 0
        if len(found) > 1:
            raise InputError(
                "Here the bits of a token depend on what is read with it, so a draft would change "
                "answers.",
                where=self._folder,
                observed="other bits where it stands elsewhere in a call",
                change="run the model without --memory",
            )


def _cache_widths(folder: Path) -> dict[str, tuple[int, int]]:
    """(heads, width) of keys and values of every layer, by the names that an export has."""
    from pipeline.checkpoint.folder import read_architecture

    config = read_architecture(folder)[0].get_text_config()
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return dict.fromkeys(cache_names(config.num_hidden_layers), (heads, width))
