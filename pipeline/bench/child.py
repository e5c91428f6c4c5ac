"""One model, or the memory, in a process of its own: requests and answers in lines of JSON.

The first line says what to open. Each further one asks for one measurement.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline.child_process import answers_on_stdout
from pipeline.errors import PipelineError, explain
from pipeline.memory import peak_bytes

if TYPE_CHECKING:
    from pipeline.runtime.sessions.session import Session

_Request = dict[str, Any]
_Answer = dict[str, Any]
_SEED = 0


def main() -> None:
    """Answer on what was stdout; whatever libraries print goes to stderr."""
    tell = answers_on_stdout()
    try:
        measure, ready = _open_target(json.loads(sys.stdin.readline()))
        tell(ready)
        for line in sys.stdin:
            tell(measure(json.loads(line)))
    except Exception as failure:
        error = explain(failure)
        if error is None or error.exit_status == PipelineError.exit_status:
            raise
        details = {"what": error.what, "status": error.exit_status, "details": error.details}
        tell({"error": details})


def _open_target(target: _Request) -> tuple[Callable[[_Request], _Answer], _Answer]:
    """What answers the requests, and what to say of it first.

    Args:
        target: `kind` is `memory`, `folder` or `shape`; `device` is `cpu` or `cuda`; `threads`. Or
            `kind` is `answers`, and the rest as of `Answering`.
    """
    if target["kind"] == "memory":
        return _open_memory(target)
    if target["kind"] == "answers":
        from pipeline.bench.answering import Answering

        answering = Answering(target)
        return answering.answer, answering.ready
    if target["device"] == "cpu" and target["library"] == "torch":
        import torch

        torch.set_num_threads(target["threads"])
    meter = _DeviceMeter() if target["device"] == "cuda" else None
    session = _open_shape(target) if target["kind"] == "shape" else _open_folder(target)
    ready = {
        "session": session.name,
        "float_bytes": _float_bytes(session, target["library"]),
        # PyTorch on the GPU attends over all slots of a static cache.
        "cache_tokens": session.max_length if meter and target["library"] == "torch" else None,
    }
    return lambda request: _generate(session, request, meter), ready


def _open_memory(target: _Request) -> tuple[Callable[[_Request], _Answer], _Answer]:
    """The buffers whose reading gives the bandwidth."""
    from pipeline.bench.bandwidth import DeviceMemory, HostMemory

    on_gpu = target["device"] == "cuda"
    memory = DeviceMemory() if on_gpu else HostMemory(target["threads"])
    ready = {"method": memory.name, "buffer_bytes": memory.buffer_bytes}
    return lambda request: {"bytes_per_s": memory.read()}, ready


def _open_folder(target: _Request) -> Session:
    """The session that `skipcat run` would open."""
    from pipeline.runtime.sessions.open_session import open_session

    on_gpu = target["device"] == "cuda" and target["library"] == "torch"
    device = "cuda" if on_gpu else "cpu"
    return open_session(Path(target["folder"]), threads=target["threads"], device=device)


def _open_shape(target: _Request) -> Session:
    """An architecture with random weights in PyTorch."""
    import torch

    from pipeline.bench.shapes import fill_randomly_, find_shape
    from pipeline.runtime.sessions.torch_session import TorchSession

    model = find_shape(target["shape"]).empty_model(target["kept"])
    fill_randomly_(model, getattr(torch, target["dtype"]))
    if target["device"] == "cuda":
        return _open_on_gpu(model, target["dtype"])
    return TorchSession(model, name=f"torch {target['dtype']}")


def _open_on_gpu(model: Any, dtype: str) -> Session:
    """The session over a model on the GPU: our kernels, one graph a step, as for a checkpoint."""
    import torch

    from pipeline.kernels.install import use_operator_
    from pipeline.kernels.op import prepare
    from pipeline.runtime.sessions.open_session import CUDA_CACHE_TOKENS
    from pipeline.runtime.sessions.static_session import StaticSession

    if use_operator_(model):
        prepare(torch.cuda.current_device())
    return StaticSession(model.to("cuda"), f"torch cuda {dtype}", CUDA_CACHE_TOKENS)


def _float_bytes(session: Session, library: str) -> dict[str, int | None]:
    """Width in which a session holds floating-point numbers; None is that of the file."""
    if library == "torch":
        held = next(getattr(session, "model").parameters()).element_size()  # noqa: B009
        return {"weights": held, "cache": held}
    # ONNX Runtime's CPU kernels have no float16 product: weights are widened once, at loading.
    return {"weights": 4 if library == "onnx" else None, "cache": None}


def _generate(session: Session, request: _Request, meter: _DeviceMeter | None = None) -> _Answer:
    """Read a prompt, fill the cache up to the context, and feed token after token.

    The tokens are random, the same ones for every model of that vocabulary.

    Args:
        session: starts anew.
        request: `prompt_tokens`, `context` and `new_tokens`.
        meter: of the GPU, if the session uses one.

    Returns:
        Seconds of the prompt and of each token; peak memory so far, bytes.
    """
    generator = np.random.default_rng(_SEED)
    context, new_tokens = request["context"], request["new_tokens"]
    ids = generator.integers(0, session.vocab_size, (1, context + new_tokens), np.int64)
    prompt = request["prompt_tokens"]
    session.reset()
    started = time.perf_counter()
    session.forward(ids[:, :prompt], last_only=True)
    prefill_s = time.perf_counter() - started
    if context > prompt:
        session.forward(ids[:, prompt:context], last_only=True)
    token_s = []
    for place in range(context, context + new_tokens):
        started = time.perf_counter()
        session.forward(ids[:, place : place + 1], last_only=True)
        token_s.append(time.perf_counter() - started)
    device_bytes = meter.peak_bytes() if meter else None
    peaks = {"peak_bytes": peak_bytes(), "peak_device_bytes": device_bytes}
    return {"prefill_s": prefill_s, "token_s": token_s} | peaks


class _DeviceMeter:
    """The GPU's memory that this process takes, from when the meter is made.

    TensorRT allocates past PyTorch, and the system tells only what is free for all: the first
    reading counts all that was taken meanwhile, so nobody else may load until then.
    """

    def __init__(self) -> None:
        import torch

        self._free_before = torch.cuda.mem_get_info()[0]
        self._taken_bytes = 0

    def peak_bytes(self) -> int:
        """Taken at the first reading, or held by PyTorch at any time, whichever is more."""
        import torch

        if not self._taken_bytes:
            self._taken_bytes = self._free_before - torch.cuda.mem_get_info()[0]
        return max(self._taken_bytes, torch.cuda.max_memory_reserved())


if __name__ == "__main__":
    main()
