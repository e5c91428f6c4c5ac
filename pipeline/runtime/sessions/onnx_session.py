"""An exported ONNX folder in ONNX Runtime on the CPU behind the Session interface.

Both profiles keep the cache in OrtValues, so that no key or value passes through numpy between two
calls. `opset24` binds one buffer as `past` and as `present`: TensorScatter then writes the new
slots in place and copies nothing. `compat` feeds each `present` back as the next `past`.
"""

from __future__ import annotations

import math
import mmap
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from pipeline.errors import InputError, MissingPackageError, first_line
from pipeline.export.contract import (
    ATTENTION_MASK,
    COMPAT,
    CPU_KERNEL_OPS,
    FIRST_ROUNDED_CACHE,
    FLOAT,
    GRAPH_FILE,
    INPUT_IDS,
    LOGITS,
    OPSET24,
    POSITION_IDS,
    PROFILES,
    WEIGHTS_FILE,
    dotted,
    present_name,
)
from pipeline.export.record import ExportRecord, read_export_record, require_weights
from pipeline.kernels.cpu_library import cpu_library
from pipeline.machine import product_threads
from pipeline.memory import require_free_memory
from pipeline.runtime.sessions.checks import CheckedSession
from pipeline.runtime.sessions.graph_interface import (
    LONGEST_REASON,
    explained,
    require_decoder_graph,
    require_logits,
)
from pipeline.runtime.sessions.signed_kernels import prefers_signed, signed_kernels

if TYPE_CHECKING:
    import onnxruntime

_FIRST_RUNTIME_THAT_BORROWS_FILES = (1, 32)
_BORROW_FILES = "session.use_external_initializer_file_buffers_directly"
# 512 rows of logits at most are held while a prompt is read: 100 MB for 49,152 words.
_PREFILL_TOKENS = 512
# Threads that wait spin so long, which is longer than between two operators, and then sleep: beside
# another program a spinning thread takes the time that the one it waits for needs.
SPIN_US = "100"
# How long read pages may pile up while a session packs them.
_INTERVAL_S = 0.01


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
        self._widths = require_decoder_graph(self._session, self.record, folder)
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
            self._start_cache(rows)
        # The graph computes the logits of all tokens, so a long prompt is fed by parts.
        for start in range(0, count, _PREFILL_TOKENS if last_only else count):
            part = input_ids[:, start : start + _PREFILL_TOKENS] if last_only else input_ids
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

    def _start_cache(self, rows: int) -> None:
        """Bind an empty cache for `rows` sequences, in the buffers of the last one if they fit.

        A static cache is zeroed, not only forgotten: the mask gives stale slots the weight 0, and
        0 times a NaN of an earlier sequence would still be NaN.
        """
        length = self.max_length if self.record.traits.static_cache else 0
        shapes = {name: (rows, heads, length, d) for name, (heads, d) in self._widths.items()}
        if any(
            name not in self._buffers or self._buffers[name].shape != shape
            for name, shape in shapes.items()
        ):
            types = {name: np.dtype(kind) for name, kind in self.record.cache_dtypes.items()}
            needed_bytes = sum(types[n].itemsize * math.prod(shape) for n, shape in shapes.items())
            require_free_memory(
                needed_bytes,  # all of it is read at every step
                "There is not enough memory for the cache of this export.",
                where=self._folder,
                change="export with a shorter --max-length",
            )
            self._buffers = {n: np.zeros(shape, types[n]) for n, shape in shapes.items()}
        else:
            for buffer in self._buffers.values():
                buffer.fill(0)
        self._cache = {name: share_buffer(buffer) for name, buffer in self._buffers.items()}


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


class Graph(NamedTuple):
    """A graph that ONNX Runtime has loaded.

    Attributes:
        session: runs it; several threads and several caches may use it.
        weights: what it borrows, and what must outlive it; None where it has mapped the file by
            itself.
        kernels: whether our kernels take the products of codes; None where there are none that
            they could take.
    """

    session: onnxruntime.InferenceSession
    weights: _MappedWeights | None
    kernels: bool | None = None

    @classmethod
    def open(
        cls, folder: Path, record: ExportRecord, threads: int | None, *, optimised: bool = True
    ) -> Graph:
        """Load `folder/model.onnx`, with every failure explained.

        Args:
            folder: of the export.
            record: what `export.json` says of it.
            threads: threads within one operator; None leaves the choice to ONNX Runtime.
            optimised: let ONNX Runtime rewrite the graph; without, nodes run as they are written.

        Raises:
            InputError: the installed ONNX Runtime is too old for the profile, or refuses the graph;
                or the weights are not those of the export.
            MissingPackageError: onnxruntime is not installed.
        """
        try:
            import onnxruntime
        except ImportError as error:
            raise MissingPackageError("onnxruntime", "cpu", "run an ONNX export") from error
        _require_runtime_version(onnxruntime.__version__, record)
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4  # what fails is raised, and told once
        # Products behind DequantizeLinear would otherwise have inputs rounded to 8 bits, unasked.
        options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
        # Given a number, it pins no thread to a core, where another program may be.
        options.intra_op_num_threads = threads or product_threads()
        options.add_session_config_entry("session.intra_op.spin_duration_us", SPIN_US)
        if not optimised:
            options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        path = folder / GRAPH_FILE
        kernels = _register_kernels(options, path) if record.accuracy_level is not None else None
        borrows = _borrows_files(onnxruntime.__version__)
        weights = _map_weights(folder / WEIGHTS_FILE) if borrows else None
        graph: str | bytes = str(path)
        if optimised and weights is not None and record.pixel_values and prefers_signed():
            graph = signed_kernels(path) or graph
        try:
            # Beside the loading, which takes longer, where the hash is not known yet.
            with ThreadPoolExecutor(1) as beside, _lend_weights(options, weights):
                checked = beside.submit(require_weights, folder, record)
                session = onnxruntime.InferenceSession(
                    graph, options, providers=["CPUExecutionProvider"]
                )
        except MemoryError:
            raise
        except Exception as error:  # ONNX Runtime's exceptions share no base class but this one
            raise InputError(
                "ONNX Runtime cannot load this graph.",
                where=path,
                observed=first_line(error)[:LONGEST_REASON],
                change="check that model.onnx.data lies beside it, or export again",
            ) from error
        checked.result()
        return cls(session, weights, kernels)


class _MappedWeights:
    """A file of external data, mapped; its memory must outlive the sessions over it.

    ONNX Runtime's kernels keep the matrices in a layout of their own, so what was read from the
    file is needed once. The pages are clean: releasing one costs nothing but reading it again.

    Args:
        path: a file that is not empty.

    Raises:
        OSError: it cannot be mapped.
    """

    def __init__(self, path: Path) -> None:
        self.name = path.name
        with path.open("rb") as file:
            self.pages = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)

    def release_pages(self) -> None:
        """Take the file's pages out of the process; they come again when they are read."""
        self.pages.madvise(mmap.MADV_DONTNEED)

    @contextmanager
    def releasing_pages(self) -> Iterator[None]:
        """Release pages again and again while the body reads the file, and at its end."""
        done = threading.Event()

        def watch() -> None:
            while not done.wait(_INTERVAL_S):
                self.release_pages()

        watcher = threading.Thread(target=watch, name="weights", daemon=True)
        watcher.start()
        try:
            yield
        finally:
            done.set()
            watcher.join()
            self.release_pages()


def _register_kernels(options: onnxruntime.SessionOptions, path: Path) -> bool | None:
    """Let our kernels take the products of codes, where this machine has them."""
    content = path.read_bytes()
    if not any(name.encode() in content for name in CPU_KERNEL_OPS):
        return None
    library = cpu_library()
    if library is not None:
        options.register_custom_ops_library(str(library))
    return library is not None


def _map_weights(path: Path) -> _MappedWeights | None:
    """The file mapped; None where there is none, or where the system cannot take pages back."""
    if not hasattr(mmap, "MADV_DONTNEED") or not path.is_file() or not path.stat().st_size:
        return None
    return _MappedWeights(path)


def _lend_weights(
    options: onnxruntime.SessionOptions, weights: _MappedWeights | None
) -> AbstractContextManager[None]:
    """Let a session use mapped weights as they are, and release their pages while it loads."""
    if weights is None:
        return nullcontext()
    pages = weights.pages
    options.add_external_initializers_from_files_in_memory([weights.name], [pages], [len(pages)])
    options.add_session_config_entry(_BORROW_FILES, "1")
    return weights.releasing_pages()


def _borrows_files(version: str) -> bool:
    """Whether this ONNX Runtime uses a file lent to it without copying it."""
    major, minor = (int(part) for part in version.split(".")[:2])
    return (major, minor) >= _FIRST_RUNTIME_THAT_BORROWS_FILES


def _require_runtime_version(version: str, record: ExportRecord) -> None:
    """Raise InputError when this ONNX Runtime lacks the operators of an export."""
    major, minor = (int(part) for part in version.split(".")[:2])
    if record.cache_format != FLOAT and (major, minor) < FIRST_ROUNDED_CACHE:
        raise InputError(
            "This ONNX Runtime's attention has no cache of few bits on the CPU.",
            observed=f"onnxruntime {version}",
            expected=f"onnxruntime {dotted(FIRST_ROUNDED_CACHE)} or newer",
            change="pip install -U onnxruntime, or export without --cache",
        )
    oldest = PROFILES[OPSET24].oldest_onnxruntime
    if record.profile == OPSET24 and (major, minor) < oldest:
        raise InputError(
            f"This ONNX Runtime has no TensorScatter, which the profile '{OPSET24}' needs.",
            observed=f"onnxruntime {version}",
            expected=f"onnxruntime {dotted(oldest)} or newer",
            change=f"pip install -U onnxruntime, or export with --profile {COMPAT}",
        )
