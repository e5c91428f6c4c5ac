"""An ONNX folder of the profile `cpu`: ONNX Runtime's own attention, several sequences at once.

Each sequence has a row of the cache. A node of attention writes a row's new tokens behind those
that the row's mask marks, in place, so rows may be of different lengths, and nothing needs zeros to
begin with. Rows side by side decode in one call; each is read in (prefilled) in calls of its own,
through a view of its part of the same memory. What is bound stays bound: a decode step binds a few
small inputs and runs.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.errors import InputError
from pipeline.export.contract import (
    ATTENTION_MASK,
    FIRST_LOGIT,
    FLOAT,
    GRAPH_FILE,
    INPUT_IDS,
    INT8,
    LOGITS,
    POSITION_IDS,
    present_name,
)
from pipeline.export.record import ExportRecord, read_export_record
from pipeline.runtime.sessions.call_times import CallTimes
from pipeline.runtime.sessions.graph_interface import (
    explained,
    require_decoder_graph,
    require_logits,
)
from pipeline.runtime.sessions.key_values import KeyValues
from pipeline.runtime.sessions.onnx_graph import Graph
from pipeline.runtime.sessions.onnx_session import share_buffer
from pipeline.runtime.sessions.slotted_session import SlottedSession

# A long prompt goes in by parts: activations stay small, and so does the arena that keeps them.
_PREFILL_TOKENS = 128
# Most tokens of a call whose bits a steady session promises to be those of any other such call.
# Attention works by tiles of some dozens of tokens, of which the last must not hold one alone.
STEADY_TOKENS = 17
# What one more token in a call of a few costs, as a share of a call of one: 0.14 to 0.29 for 4 and
# 8 bits by ONNX Runtime's products on two cores with AVX2; by our kernels 0.09 to 0.17 on two cores
# with AVX-512, and 0.15 to 0.23 on one (benchmarks/cpu/lookup.py).
_ROW_COST = 0.25
_CACHE_TYPES = {FLOAT: np.float32, INT8: np.int8}
# From which token of a call on the graph computes logits.
_ALL, _LAST = np.array([0], np.int64), np.array([-1], np.int64)


class CpuSession(SlottedSession):
    """ONNX Runtime on the CPU, with operators of its own.

    It is a `Session` of any number of rows of equal length, and a `SlotSession` of rows that come
    and go. The two do not mix: `reset` starts the one, `clear` a slot of the other.

    Args:
        folder: an export of the profile `cpu`.
        threads: threads within one operator; None takes one to a physical core.
        name: what the ledger calls this backend.
        slots: rows of the cache to begin with. Memory is used only as tokens come.
        graph: the same folder's, where another session has opened it; None opens it.
        steady: make a token's bits independent of how many are read with it. One token alone is
            summed in another order than each of several (1e-5), and two or more are all summed
            alike; so one has a second beside it, which is forgotten, and slots decode one by one.
            That holds for up to `STEADY_TOKENS`, and is tried. The cache then holds a token less.
        values: the cache of another session, to draft into; None makes one.

    Attributes:
        values: the cache.
        call_times: of the graph.

    Raises:
        InputError: files missing, not matching each other, or not loadable; `values` are of another
            layout than the graph's; or it cannot be steady here.
        MissingPackageError: onnxruntime is not installed.
    """

    row_cost: float | None = _ROW_COST

    def __init__(
        self,
        folder: Path,
        threads: int | None = None,
        name: str | None = None,
        slots: int = 1,
        graph: Graph | None = None,
        steady: bool = False,
        values: KeyValues | None = None,
    ) -> None:
        record = read_export_record(folder)
        self.vocab_size = record.vocab_size
        # The last place is for the token beside the last one.
        self.max_length = record.max_length - steady
        self._folder, self._graph = folder, graph or Graph.open(folder, record, threads)
        self._session = self._graph.session
        self.name = name or _name(record, self._graph.kernels)
        nodes = [*self._session.get_inputs(), *self._session.get_overridable_initializers()]
        self._inputs = {node.name: node for node in nodes}
        widths = require_decoder_graph(self._session, record, folder)
        dtype = np.dtype(_CACHE_TYPES[record.cache_format])
        own = KeyValues(slots, widths, record.max_length, dtype)
        self.values, self.call_times = self._fitting(own, values), CallTimes()
        self._lengths = np.zeros(self.values.slots, np.int64)
        self._bindings: dict[tuple[int, int], Any] = {}
        self._bound_buffers = self.values.buffers
        self._places, self._steady = record.max_length, steady
        self._rows = None
        if graph is None:
            self._rehearse()
        # One row of ONNX Runtime's product with 4 bits is summed in another order than several are.
        alike = record.weights in (FLOAT, INT8)
        self._sums_one_row_alike = alike or self._graph.kernels is True
        if steady and graph is None:
            self._require_steadiness()

    # --- Session ---

    def sibling(self) -> CpuSession:
        """A session over the same graph and weights, with empty rows of its own."""
        return CpuSession(
            self._folder,
            name=self.name,
            slots=self.slots,
            graph=self._graph,
            steady=self._steady,
        )

    def forward(self, input_ids: np.ndarray, last_only: bool = False) -> np.ndarray:
        rows, count = self._check_call(input_ids)
        if rows > self.slots:
            self._grow(rows)
        self._rows = rows
        if count == 1 and not self._steady:
            return self._run(0, input_ids, _LAST)
        parts = [self._read(row, input_ids[row], last_only) for row in range(rows)]
        return np.concatenate(parts)

    def repeat(self, rows: int) -> None:
        self._check_rows(1)
        if rows > self.slots:
            self._grow(rows)
        for buffer in self.values.buffers.values():
            buffer[1:rows, :, : self.length] = buffer[:1, :, : self.length]
        self._lengths[:rows] = self.length
        self._rows = rows

    # --- SlotSession ---

    def decode(self, slots: Sequence[int], tokens: Sequence[int]) -> np.ndarray:
        """Append one token to each of several slots, in one call, or one by one where steady.

        Rows between the wanted ones are computed with them: what is written into one lands behind
        its last token, where its next token will be written. With weights of 4 bits a slot alone
        has the row beside it computed with it, so that its logits are those it has with other
        requests in the batch.

        Returns:
            float32 [len(slots), V].

        Raises:
            InputError: ids outside the vocabulary, or a slot that is full.
        """
        if self._steady:
            return self._decode_apart(slots, tokens)
        first, last = self._decoded_rows(slots)
        ids = np.zeros((last + 1 - first, 1), np.int64)
        ids[np.array(slots) - first, 0] = tokens
        self._check_tokens(ids)
        for slot in slots:
            self._check_room(int(self._lengths[slot]), 1)
        lengths = self._lengths.copy()
        # A full row that only happens to lie between gives up its last token.
        self._lengths = np.minimum(self._lengths, self.max_length - 1)
        kept = self._lengths.copy()
        logits = self._run(first, ids, _LAST)
        kept[list(slots)] = lengths[list(slots)] + 1
        self._lengths = kept
        return logits[np.array(slots) - first, 0]

    def _decoded_rows(self, slots: Sequence[int]) -> tuple[int, int]:
        """First and last row of the call that decodes `slots`."""
        first, last = min(slots), max(slots)
        if first < last or self._sums_one_row_alike or self.slots == 1:
            return first, last
        beside = [row for row in (first - 1, first + 1) if 0 <= row < self.slots]
        shortest = min(beside, key=lambda row: self._lengths[row])
        return min(first, shortest), max(first, shortest)

    # --- the graph ---

    def _read(self, row: int, input_ids: np.ndarray, last_only: bool) -> np.ndarray:
        """Append [S] tokens to a row by parts: [1, S, V] or [1, 1, V].

        No part is of one token, whose sums would be taken in another order than those of several:
        bits should not depend on where a prompt was cut.
        """
        count = len(input_ids)
        if count == 1 and self._steady:
            return self._read_with_another(row, input_ids)
        starts = [min(start, max(0, count - 2)) for start in range(0, count, _PREFILL_TOKENS)]
        parts = []
        for start, end in pairwise([*starts, count]):
            parts.append(self._run(row, input_ids[None, start:end], _LAST if last_only else _ALL))
        return parts[-1] if last_only else np.concatenate(parts, axis=1)

    def _read_with_another(self, row: int, token: np.ndarray) -> np.ndarray:
        """Append one token, int64 [1], to a row: [1, 1, V], of a call of two."""
        logits = self._run(row, np.repeat(token, 2)[None], _ALL)[:, :1]
        self._lengths[row] -= 1
        return logits

    def _run(self, row: int, input_ids: np.ndarray, first: np.ndarray) -> np.ndarray:
        """One call for rows that lie side by side: logits [B, 1 or S, V]."""
        rows, count = input_ids.shape
        binding = self._bound(row, rows)
        ends = self._lengths[row : row + rows] + count
        mask = (np.arange(ends.max()) < ends[:, None]).astype(np.int64)
        feeds = {
            INPUT_IDS: np.ascontiguousarray(input_ids),
            ATTENTION_MASK: mask,
            POSITION_IDS: np.ascontiguousarray(ends[:, None] - count + np.arange(count)),
            FIRST_LOGIT: first,
        }
        for name in self._inputs.keys() & feeds:
            binding.bind_ortvalue_input(name, share_buffer(feeds[name]))
        wanted = count if first is _ALL or FIRST_LOGIT not in self._inputs else 1
        logits = np.empty((rows, wanted, self.vocab_size), np.float32)
        binding.bind_ortvalue_output(LOGITS, share_buffer(logits))
        started = time.perf_counter()
        with explained(self._folder / GRAPH_FILE):
            self._session.run_with_iobinding(binding)
        self.call_times.add(count, time.perf_counter() - started)
        if self._graph.weights is not None and count > 1:
            # Rows of the embedding, each with the pages around it.
            self._graph.weights.release_pages()
        self._lengths[row : row + rows] = ends
        return logits if first is _ALL else logits[:, -1:]

    def _rehearse(self) -> None:
        """One call of one token, so that a graph that cannot run is refused when it is opened.

        The mask is as wide as it will ever be: attention holds it against its table of angles.

        Raises:
            InputError: the graph fails, or its logits are not as wide as the record says.
        """
        feeds = {
            INPUT_IDS: np.zeros((1, 1), np.int64),
            ATTENTION_MASK: np.eye(1, self._places, dtype=np.int64),
            POSITION_IDS: np.zeros((1, 1), np.int64),
        }
        binding = self._bound(0, 1)
        for name in self._inputs.keys() & feeds:
            binding.bind_ortvalue_input(name, share_buffer(feeds[name]))
        binding.bind_output(LOGITS)
        with explained(self._folder / GRAPH_FILE):
            self._session.run_with_iobinding(binding)
            logits = binding.get_outputs()[-1].numpy()
        self._bindings.clear()
        require_logits(logits, (1, 1, self.vocab_size), self._folder / GRAPH_FILE)

    def _require_steadiness(self) -> None:
        """Read the same tokens in three ways; raise InputError unless all bits are the same."""
        count = min(STEADY_TOKENS + 1, self.max_length)
        ids = np.arange(count) * 7919 % self.vocab_size
        found = set()
        for size in (2, 3, STEADY_TOKENS):  # the last leaves a single token
            self._lengths[0] = 0
            parts = np.split(ids, range(size, count, size))
            logits = [self._read(0, part, last_only=False).ravel() for part in parts]
            held = [values[0, :, :count].tobytes() for values in self.values.buffers.values()]
            found.add(b"".join([*(rows.tobytes() for rows in logits), *held]))
        self._lengths[0] = 0
        if len(found) > 1:
            raise InputError(
                "Here the bits of a token depend on how many are read with it, so a draft would "
                "change answers.",
                where=self._folder / GRAPH_FILE,
                observed="other bits by two tokens a call than by several",
                change="leave --draft out",
            )

    def _bound(self, row: int, rows: int) -> Any:
        """A binding with the cache of these rows bound as past and as present."""
        if self._bound_buffers is not self.values.buffers:  # there are more rows now
            self._bindings, self._bound_buffers = {}, self.values.buffers
        if (row, rows) not in self._bindings:
            binding = self._session.io_binding()
            for name, buffer in self.values.buffers.items():
                value = share_buffer(buffer[row : row + rows])
                binding.bind_ortvalue_input(name, value)
                binding.bind_ortvalue_output(present_name(name), value)
            self._bindings[row, rows] = binding
        return self._bindings[row, rows]

    def _fitting(self, own: KeyValues, shared: KeyValues | None) -> KeyValues:
        """The cache to use; raise InputError where one that is shared is not as this graph's."""
        if shared is not None and shared.layout != own.layout:
            raise InputError(
                "These two exports cannot share a cache.",
                where=self._folder,
                observed=own.layout,
                expected=shared.layout,
                change="export both from the same model, with the same --max-length",
            )
        return shared or own


def _name(record: ExportRecord, kernels: bool | None) -> str:
    """What the ledger calls a session over an export."""
    rounded = f", cache {record.cache_format}" if record.cache_format != FLOAT else ""
    bodies = ", function bodies" if kernels is False else ""
    return f"onnxruntime cpu {record.weights}{rounded}{bodies}"
