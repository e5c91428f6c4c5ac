"""An exported ONNX folder in ONNX Runtime on the CPU behind the Session interface.

Both profiles keep the cache in OrtValues, so that no key or value passes through numpy between two
calls. `opset24` binds one buffer as `past` and as `present`: TensorScatter then writes the new
slots in place and copies nothing; the buffer is as long as the text needs (`growing_slots`).
`compat` feeds each `present` back as the next `past`.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.export.contract import (
    ATTENTION_MASK,
    GRAPH_FILE,
    INPUT_IDS,
    LOGITS,
    POSITION_IDS,
    present_name,
)
from pipeline.export.record import read_export_record
from pipeline.memory import require_free_memory
from pipeline.runtime.sessions.checks import CheckedSession
from pipeline.runtime.sessions.graph_interface import (
    explained,
    require_decoder_graph,
    require_logits,
)
from pipeline.runtime.sessions.growing_slots import slots_for
from pipeline.runtime.sessions.onnx_graph import Graph

# 512 rows of logits at most are held while a prompt is read: 100 MB for 49,152 words.
_PREFILL_TOKENS = 512


class OnnxSession(CheckedSession):
    """ONNX Runtime, CPU execution provider.

    Args:
        folder: holds `export.json`, `model.onnx` and `model.onnx.data`.
        threads: threads within one operator; None takes one to a physical core.
        name: what the ledger calls this backend; None makes one out of profile and dtype.
        graph: the same folder's, where another session has opened it; None opens it.

    Raises:
        InputError: files missing, not matching each other, or not loadable by the installed
            ONNX Runtime.
        MissingPackageError: onnxruntime is not installed.
    """

    def __init__(
        self,
        folder: Path,
        threads: int | None = None,
        name: str | None = None,
        graph: Graph | None = None,
    ) -> None:
        self.record = read_export_record(folder)
        self.name = name or f"onnxruntime {self.record.profile} {self.record.dtype}"
        self.vocab_size = self.record.vocab_size
        self.max_length = self.record.max_length
        self._folder, self._graph = folder, graph or Graph.open(folder, self.record, threads)
        self._session = self._graph.session
        self._widths = require_decoder_graph(
            self._session, self.record, folder, grows=self._graph.grows
        )
        self._buffers: dict[str, np.ndarray] = {}
        self._cache: dict[str, Any] = {}
        self.reset()
        if graph is None:
            self.forward(np.zeros((1, 1), np.int64))  # a graph that cannot run is refused now
            self.reset()

    def rewind(self, length: int) -> None:
        """Forget all but the first `length` tokens.

        A static cache keeps what stands behind them: every slot is written before a mask shows it.
        """
        if length == 0:
            self.reset()
        elif length < self._length:
            self._length = length
            if not self.record.traits.static_cache:
                self._cache = {
                    name: share_buffer(np.ascontiguousarray(value.numpy()[:, :, :length]))
                    for name, value in self._cache.items()
                }

    def sibling(self) -> OnnxSession:
        """A session over the same graph and weights, with an empty cache of its own."""
        return OnnxSession(self._folder, name=self.name, graph=self._graph)

    def forward(self, input_ids: np.ndarray, last_only: bool = False) -> np.ndarray:
        rows, count = self._check_call(input_ids)
        if self._rows is None:
            self._start_cache(rows, count)
        # The graph computes the logits of all tokens, so a long prompt is fed by parts.
        for start in range(0, count, _PREFILL_TOKENS if last_only else count):
            part = input_ids[:, start : start + _PREFILL_TOKENS] if last_only else input_ids
            self._make_room(self._length + part.shape[1])
            logits = self._run(part)
            self._length += part.shape[1]
        self._rows = rows
        return (logits[:, -1:] if last_only else logits).astype(np.float32, copy=False)

    def _run(self, input_ids: np.ndarray) -> np.ndarray:
        """One call of the graph: logits [B, S, V] in the graph's dtype; moves the cache on."""
        binding = self._session.io_binding()
        for name, values in token_feeds(input_ids, self._length).items():
            binding.bind_cpu_input(name, values)
        binding.bind_output(LOGITS)
        for past_name, value in self._cache.items():
            binding.bind_ortvalue_input(past_name, value)
            if self.record.traits.static_cache:
                binding.bind_ortvalue_output(present_name(past_name), value)
            else:
                binding.bind_output(present_name(past_name))
        with explained(self._folder / GRAPH_FILE):
            self._session.run_with_iobinding(binding)
            logits, *present = binding.get_outputs()
            found: np.ndarray = logits.numpy()
        require_logits(found, (*input_ids.shape, self.vocab_size), self._folder / GRAPH_FILE)
        if not self.record.traits.static_cache:
            self._cache = dict(zip(self._cache, present, strict=True))
        return found

    def _start_cache(self, rows: int, tokens: int) -> None:
        """Bind an empty cache for `rows` sequences, in the buffers of the last one if they fit.

        A static cache is zeroed, not only forgotten: the mask gives stale slots the weight 0, and
        0 times a NaN of an earlier sequence would still be NaN.
        """
        wanted = self._shapes(rows, self._slots_for(tokens))
        if {name: buffer.shape for name, buffer in self._buffers.items()} != wanted:
            self._buffers = self._empty(wanted)
        else:
            for buffer in self._buffers.values():
                buffer.fill(0)
        self._bind()

    def _make_room(self, tokens: int) -> None:
        """Give a cache that grows the slots of so many tokens; what it holds stays."""
        slots = self._slots_for(tokens)
        if not self._graph.grows or slots <= next(iter(self._buffers.values())).shape[2]:
            return
        old = self._buffers
        self._buffers = self._empty(self._shapes(len(next(iter(old.values()))), slots))
        for name, buffer in old.items():
            self._buffers[name][:, :, : self._length] = buffer[:, :, : self._length]
        self._bind()

    def _bind(self) -> None:
        self._cache = {name: share_buffer(buffer) for name, buffer in self._buffers.items()}

    def _slots_for(self, tokens: int) -> int:
        """Slots of a static cache that is to hold so many tokens; else none: it comes with them."""
        if self._graph.grows:
            return slots_for(tokens, self.max_length)
        return self.max_length if self.record.traits.static_cache else 0

    def _shapes(self, rows: int, slots: int) -> dict[str, tuple[int, int, int, int]]:
        return {name: (rows, heads, slots, d) for name, (heads, d) in self._widths.items()}

    def _empty(self, shapes: dict[str, tuple[int, int, int, int]]) -> dict[str, np.ndarray]:
        """Zeros of these shapes.

        Raises:
            ResourceError: there is no memory for them.
        """
        types = {name: np.dtype(kind) for name, kind in self.record.cache_dtypes.items()}
        require_free_memory(
            sum(types[name].itemsize * math.prod(shape) for name, shape in shapes.items()),
            "There is not enough memory for the cache of this export.",
            where=self._folder,
            change="export with a shorter --max-length",
        )
        return {name: np.zeros(shape, types[name]) for name, shape in shapes.items()}


def token_feeds(input_ids: np.ndarray, past_length: int) -> dict[str, np.ndarray]:
    """The graph's integer inputs for tokens that follow `past_length` cached ones.

    Args:
        input_ids: int64 [B, S].
        past_length: tokens already in the cache.

    Returns:
        `input_ids` [B, S], `attention_mask` [B, past_length + S] of ones, `position_ids` [B, S].
    """
    rows, count = input_ids.shape
    total = past_length + count
    positions = np.arange(past_length, total, dtype=np.int64)
    return {
        INPUT_IDS: np.ascontiguousarray(input_ids),
        ATTENTION_MASK: np.ones((rows, total), np.int64),
        POSITION_IDS: np.ascontiguousarray(np.broadcast_to(positions, (rows, count))),
    }


def share_buffer(buffer: np.ndarray) -> Any:
    """An OrtValue over the memory of `buffer`, which must outlive it."""
    import onnxruntime

    return onnxruntime.OrtValue.ortvalue_from_numpy(buffer)
