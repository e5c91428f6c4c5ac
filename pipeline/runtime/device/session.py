"""An engine of standard TensorRT behind the Session interface, without torch.

A step of one token over a static cache has the same shapes and addresses every time: it is captured
in a CUDA graph at its second run, and from then on launched by one call and awaited by another.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path

import numpy as np

from pipeline.errors import PipelineError
from pipeline.export.contract import LOGITS
from pipeline.runtime.device.bound_context import BoundContext
from pipeline.runtime.device.cache import GrowingCache, StaticCache
from pipeline.runtime.device.driver import DeviceMemory, Graph, HostMemory
from pipeline.runtime.device.engine import OpenEngine, open_engine
from pipeline.runtime.device.token_inputs import TokenInputs
from pipeline.runtime.sessions.checks import CheckedSession
from pipeline.runtime.sessions.engine_calls import require_rows, split_call

# The logits of all tokens of a call are computed: those of a long prompt would fill a small board.
_MOST_LOGITS_BYTES = 64 << 20
_LEAST_CHUNK = 64


def block_tokens(max_prefill: int, row_bytes: int) -> int:
    """Most tokens of a prompt that a call reads, whose logits take `row_bytes` each."""
    return min(max_prefill, max(_LEAST_CHUNK, _MOST_LOGITS_BYTES // row_bytes))


class DeviceSession(CheckedSession):
    """A decoder's engine on the GPU of this machine.

    Args:
        engine: opened; sessions of one take turns.
        name: what reports call this backend; None makes one out of the version.
        say: gets what the user should know, once.

    Attributes:
        manifest: of the engine folder.
        is_captured: whether the step runs as a CUDA graph by now.
    """

    def __init__(
        self, engine: OpenEngine, name: str | None = None, say: Callable[[str], None] | None = None
    ) -> None:
        self._opened, self._say = engine, say or (lambda message: None)
        self.manifest = engine.manifest
        self.name = name or f"tensorrt {engine.library.__version__}"
        self.vocab_size: int = self.manifest["onnx"]["vocab_size"]
        self.max_length: int = self.manifest["onnx"]["max_length"]
        self._dtype = engine.dtype(LOGITS)
        self._row_bytes = self.vocab_size * self._dtype.itemsize
        self._chunk = block_tokens(self.manifest["limits"]["max_prefill"], self._row_bytes)
        self._contexts = [BoundContext(engine, index) for index in range(len(engine.profiles))]
        self._made_for: int | None = None
        self._graph: Graph | None = None
        self._capturable = engine.has_static_cache
        if not self._capturable:
            self._say(
                "this engine's cache grows with every token, so that no CUDA graph can be used: "
                "decoding is bound by launches"
            )
        self.reset()

    @classmethod
    def open(
        cls, folder: Path, plugin: Path | None = None, say: Callable[[str], None] | None = None
    ) -> DeviceSession:
        """A session over an engine folder; raises what `open_engine` does."""
        return cls(open_engine(folder, plugin=plugin), say=say)

    @property
    def is_captured(self) -> bool:
        return self._graph is not None

    def rewind(self, length: int) -> None:
        """Forget all but the first `length` tokens."""
        if length == 0:
            self.reset()
        elif length < self._length:
            self._opened.driver.make_current()
            self._cache.rewind(self._length, length)
            self._length = length

    def sibling(self) -> DeviceSession:
        """A session over the same engine, with contexts and a cache of its own."""
        return DeviceSession(self._opened, self.name)

    def forward(self, input_ids: np.ndarray, last_only: bool = False) -> np.ndarray:
        """As every session's.

        Raises:
            InputError: ids, rows or a length that do not fit.
            PipelineError: TensorRT or CUDA failed.
        """
        rows, count = self._check_call(input_ids)
        self._opened.driver.make_current()
        if self._rows is None:
            self._start(rows)
        self._rows = rows
        pieces: list[np.ndarray] = []
        for start, stop in split_call(count, self._chunk):
            block = input_ids[:, start:stop]
            logits = self._step(block) if stop - start == 1 else self._read(block, last_only)
            self._cache.advance()
            self._length += stop - start
            pieces = [logits] if last_only else [*pieces, logits]
        return pieces[0] if len(pieces) == 1 else np.concatenate(pieces, axis=1)

    def _check_rows(self, rows: int) -> None:
        """Raise InputError for more rows than the engine was built for, too."""
        super()._check_rows(rows)
        require_rows(rows, self.manifest["limits"]["max_batch"], self.name)

    def _start(self, rows: int) -> None:
        """Have an empty cache, and everything else that belongs to so many rows."""
        if self._made_for == rows:
            self._cache.clear()
            return
        driver, self._made_for = self._opened.driver, None
        self._graph, self._steps = None, 0
        self._cache: StaticCache | GrowingCache
        if self._opened.has_static_cache:
            self._cache, padded = StaticCache(self._opened, rows), self.max_length
        else:
            self._cache, padded = GrowingCache(self._opened, rows), None
        self._step_inputs = TokenInputs(self._opened, rows, 1, padded)
        self._block_inputs = TokenInputs(self._opened, rows, self._chunk, padded)
        self._step_logits = DeviceMemory(driver, rows * self._row_bytes)
        self._block_logits = DeviceMemory(driver, rows * self._chunk * self._row_bytes)
        self._answer = HostMemory(driver, rows * self._row_bytes)
        if self._step_inputs.are_on_host:
            self._give_up_capture("TensorRT reads some of its inputs on the CPU")
        self._made_for = rows

    def _step(self, input_ids: np.ndarray) -> np.ndarray:
        """One token: float32 [rows, 1, V]."""
        self._step_inputs.fill(input_ids, self._length)
        if self._graph is not None:
            self._graph.launch(self._opened.stream)
        else:
            self._run_step()
        self._opened.stream.wait()
        return self._numbers(self._answer.content, 1)

    def _run_step(self) -> None:
        """Give a step to the stream: its second run is captured, behind one that prepared it."""
        context = self._contexts[0]
        self._step_inputs.bind(context, 1, self._length)
        self._cache.bind(context, self._length)
        context.set_address(LOGITS, self._step_logits.address)
        if self._capturable and self._steps:
            self._capture()
        if self._graph is not None:
            self._graph.launch(self._opened.stream)
        else:
            self._enqueue_step()
            self._steps += 1

    def _enqueue_step(self) -> None:
        """What a step is: inputs there, the engine, logits back."""
        self._step_inputs.upload()
        self._contexts[0].enqueue()
        self._opened.stream.copy_out(
            self._answer.address, self._step_logits.address, self._step_logits.size_bytes
        )

    def _capture(self) -> None:
        """Record the step as a graph; where that fails, say so and go on without one."""
        stream = self._opened.stream
        stream.begin_capture()
        try:
            self._enqueue_step()
            self._graph = stream.end_capture()
        except PipelineError as error:
            with contextlib.suppress(PipelineError):
                stream.end_capture()  # a stream that is still recording would do nothing else
            self._give_up_capture(error.details.get("observed", error.what))

    def _give_up_capture(self, reason: str) -> None:
        self._capturable = False
        self._say(f"decoding runs without a CUDA graph, which is slower: {reason}")

    def _read(self, input_ids: np.ndarray, last_only: bool) -> np.ndarray:
        """Several tokens: float32 [rows, S, V], or [rows, 1, V] of the last alone."""
        rows, count = input_ids.shape
        context, stream = self._contexts[-1], self._opened.stream
        self._block_inputs.fill(input_ids, self._length)
        self._block_inputs.bind(context, count, self._length)
        self._cache.bind(context, self._length)
        context.set_address(LOGITS, self._block_logits.address)
        self._block_inputs.upload()
        context.enqueue()
        wanted = 1 if last_only else count
        target = (
            self._answer.content
            if last_only
            else np.empty(rows * wanted * self._row_bytes, np.uint8)
        )
        for row in range(rows):
            first = (row + 1) * count - wanted
            stream.copy_out(
                target.ctypes.data + row * wanted * self._row_bytes,
                self._block_logits.address + first * self._row_bytes,
                wanted * self._row_bytes,
            )
        stream.wait()
        return self._numbers(target, wanted)

    def _numbers(self, content: np.ndarray, count: int) -> np.ndarray:
        """Bytes as float32 [rows, count, V], in memory of their own."""
        logits = content.view(self._dtype).reshape(-1, count, self.vocab_size)
        return np.array(logits, dtype=np.float32)
