"""A graph that ONNX Runtime loads on the CPU: its weights mapped, its kernels ours where they are.

Several sessions, each with a cache of its own, may run one graph.
"""

from __future__ import annotations

import mmap
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from pipeline.errors import InputError, MissingPackageError, first_line
from pipeline.export.contract import (
    COMPAT,
    CPU_KERNEL_OPS,
    FIRST_ROUNDED_CACHE,
    FLOAT,
    GRAPH_FILE,
    OPSET24,
    PROFILES,
    WEIGHTS_FILE,
    dotted,
)
from pipeline.export.record import ExportRecord, require_weights
from pipeline.kernels.cpu_library import cpu_library
from pipeline.machine import product_threads
from pipeline.runtime.sessions.graph_interface import LONGEST_REASON
from pipeline.runtime.sessions.growing_slots import growing_slots
from pipeline.runtime.sessions.signed_kernels import prefers_signed, signed_kernels

if TYPE_CHECKING:
    import onnxruntime

_FIRST_RUNTIME_THAT_BORROWS_FILES = (1, 32)
_BORROW_FILES = "session.use_external_initializer_file_buffers_directly"
# Threads that wait spin so long, which is longer than between two operators, and then sleep: beside
# another program a spinning thread takes the time that the one it waits for needs.
SPIN_US = "100"
# How long read pages may pile up while a session packs them.
_INTERVAL_S = 0.01


class Graph(NamedTuple):
    """A graph that ONNX Runtime has loaded.

    Attributes:
        session: runs it; several threads and several caches may use it.
        weights: what it borrows, and what must outlive it; None where it has mapped the file by
            itself.
        kernels: whether our kernels take the products of codes; None where there are none that
            they could take.
        grows: whether its cache of fixed length may be shorter than the export's.
    """

    session: onnxruntime.InferenceSession
    weights: _MappedWeights | None
    kernels: bool | None = None
    grows: bool = False

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
        graph = _rewritten(path, record) if optimised and weights is not None else None
        try:
            # Beside the loading, which takes longer, where the hash is not known yet.
            with ThreadPoolExecutor(1) as beside, _lend_weights(options, weights):
                checked = beside.submit(require_weights, folder, record)
                session = onnxruntime.InferenceSession(
                    graph or str(path), options, providers=["CPUExecutionProvider"]
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
        grows = graph is not None and record.traits.static_cache
        return cls(session, weights, kernels, grows)


def _rewritten(path: Path, record: ExportRecord) -> bytes | None:
    """The graph in a form that this runtime is quicker with; None where that is the file's.

    None of a damaged file, too: what is wrong with it, ONNX Runtime says.
    """
    if record.pixel_values:
        return _undamaged(lambda: signed_kernels(path)) if prefers_signed() else None
    if record.profile == OPSET24:
        return _undamaged(lambda: growing_slots(path, record.max_length))
    return None


def _undamaged(rewrite: Callable[[], bytes | None]) -> bytes | None:
    from google.protobuf.message import DecodeError
    from onnx.checker import ValidationError

    try:
        return rewrite()
    except (OSError, ValueError, DecodeError, ValidationError):
        return None


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
