"""The decode step of an engine over a static cache, with torch: all of it in memory of its own.

Ids, positions and a mask that is padded to the cache's length have the same shapes and places in
every step, so that the second one is captured in a CUDA graph, and the others are its replays.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline.export.contract import ATTENTION_MASK, INPUT_IDS, POSITION_IDS
from pipeline.progress import note

if TYPE_CHECKING:
    import torch

_ALIGNED = 32  # int64 in 256 bytes, to which TensorRT wants its addresses aligned


class EngineStep:
    """One token of each row.

    Args:
        torch: whose tensors the engine works on.
        stream: everything runs on.
        rows: sequences.
        max_length: of the cache, and of the mask.
        vocab_size: width of the logits.
        dtype: of the logits, a type of torch.
        on_host: inputs that TensorRT reads from the CPU's memory, since they decide shapes; a graph
            would not see them change.
        execute: gives the engine's call to the stream; InputError or ResourceError when it cannot.
    """

    def __init__(
        self, torch: Any, stream: Any, rows: int, max_length: int, vocab_size: int, dtype: Any,
        on_host: frozenset[str], execute: Callable[[], None],
    ) -> None:  # fmt: skip
        self._torch, self._stream, self._execute = torch, stream, execute
        self.shapes = {INPUT_IDS: (rows, 1), POSITION_IDS: (rows, 1)}
        self.shapes |= {ATTENTION_MASK: (rows, max_length)}
        starts, size = {}, 0
        for name, shape in self.shapes.items():
            starts[name] = size
            size += -(-shape[0] * shape[1] // _ALIGNED) * _ALIGNED
        # Side by side, so that one copy brings them all.
        self._host = torch.zeros(size, dtype=torch.int64, pin_memory=True)
        self._device = torch.zeros(size, dtype=torch.int64, device="cuda")
        numbers = self._host.numpy()
        self._views: dict[str, np.ndarray] = {
            name: numbers[starts[name] : starts[name] + shape[0] * shape[1]].reshape(shape)
            for name, shape in self.shapes.items()
        }
        self.addresses: Mapping[str, int] = {
            name: (self._host if name in on_host else self._device).data_ptr() + 8 * start
            for name, start in starts.items()
        }
        logits = (rows, 1, vocab_size)
        self.logits: torch.Tensor = torch.zeros(logits, dtype=dtype, device="cuda")
        wide = dtype == torch.float32
        self._wide = self.logits if wide else torch.zeros_like(self.logits, dtype=torch.float32)
        self._told = torch.zeros(logits, dtype=torch.float32, pin_memory=True)
        self._seen, self._runs = 0, 0
        self._graph: Any = None
        self._capturable = not on_host

    @property
    def is_captured(self) -> bool:
        """Whether steps are replays of a graph by now."""
        return self._graph is not None

    def run(self, input_ids: np.ndarray, length: int) -> np.ndarray:
        """int64 [rows, 1] behind `length` tokens in the cache: float32 [rows, 1, V], of its own."""
        self._views[INPUT_IDS][:] = input_ids
        self._views[POSITION_IDS][:] = length
        mask = self._views[ATTENTION_MASK]
        mask[:, min(self._seen, length) : length + 1] = 1
        mask[:, length + 1 : self._seen] = 0  # of tokens that were taken back
        self._seen = length + 1
        with self._torch.cuda.stream(self._stream):
            self._device.copy_(self._host, non_blocking=True)
            self._launch()
            self._told.copy_(self._wide, non_blocking=True)
        self._stream.synchronize()
        answer: np.ndarray = self._told.numpy().copy()
        return answer

    def _launch(self) -> None:
        """Replay the graph, or run what it is captured from, which the first run prepares."""
        if self._capturable and self._runs == 1:
            self._capture()
        self._runs += 1
        if self._graph is not None:
            self._graph.replay()
        else:
            self._enqueue()

    def _enqueue(self) -> None:
        self._execute()
        if self._wide is not self.logits:
            self._wide.copy_(self.logits, non_blocking=True)

    def _capture(self) -> None:
        """Record the step; where that fails, say so and go on without."""
        graph = self._torch.cuda.CUDAGraph()
        try:
            # Other threads may use the GPU meanwhile.
            recording = {"stream": self._stream, "capture_error_mode": "thread_local"}
            with self._torch.cuda.graph(graph, **recording):
                self._enqueue()
        except RuntimeError as error:
            self._capturable = False
            why = str(error).strip().splitlines()[0]
            note(f"decoding runs without a CUDA graph, which is slower: {why}")
        else:
            self._graph = graph
