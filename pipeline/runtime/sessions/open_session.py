"""Which backend a folder is for, and the session over it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.errors import InputError, UsageError
from pipeline.export.contract import RECORD_FILE
from pipeline.model.task import require_decoder
from pipeline.progress import note
from pipeline.runtime.torch_gpu import require_torch_gpu

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from pipeline.runtime.sessions.session import Session

BACKENDS = ("auto", "torch", "onnx", "tensorrt")
DEVICES = ("cpu", "cuda")
# Attention over a static cache reads all of it at every step.
CUDA_CACHE_TOKENS = 2048


def open_session(
    folder: Path,
    backend: str = "auto",
    threads: int | None = None,
    device: str = "cpu",
    slots: int = 1,
) -> Session:
    """Open an exported ONNX folder, a checkpoint folder or an engine folder.

    Args:
        folder: has `export.json` (ONNX), `engine.plan` (TensorRT), or `config.json` and weights
            (PyTorch).
        backend: `auto`, `torch`, `onnx` or `tensorrt`.
        threads: threads of ONNX Runtime within one operator; None takes one to a physical core.
        device: where PyTorch computes; the other backends have one of their own.
        slots: rows of the cache to begin with, where the backend keeps several in one.

    Raises:
        InputError: the folder is of neither kind, or does not load; or there is no such device.
        UsageError: the folder is not of the kind that `backend` reads, or `device` is for another.
    """
    kind = folder_kind(folder)
    require_decoder(folder)
    if backend not in ("auto", kind):
        raise UsageError(
            f"The backend '{backend}' cannot read this folder.",
            where=folder,
            observed=f"a folder for the backend '{kind}'",
            change=f"pass --backend {kind}, or another folder",
        )
    if (kind, device) not in _OPENERS:
        raise UsageError(
            f"--device {device} is for a checkpoint, which PyTorch runs.",
            where=folder,
            observed=f"a folder for the backend '{kind}'",
            change="give the checkpoint it was made from, or leave --device out",
        )
    return _OPENERS[kind, device](folder, threads, slots)


def folder_kind(folder: Path) -> str:
    """`onnx`, `tensorrt` or `torch`.

    Raises:
        InputError: none of them.
    """
    if (folder / "engine.plan").is_file():
        return "tensorrt"
    if (folder / RECORD_FILE).is_file():
        return "onnx"
    if (folder / "config.json").is_file() and any(folder.glob("*.safetensors")):
        return "torch"
    below = [path.parent.name for path in folder.glob(f"*/{RECORD_FILE}")]
    below += [path.parent.name for path in folder.glob("*/config.json")]
    hint = f"give {folder / sorted(below)[0]}" if below else "give a folder skipcat wrote"
    raise InputError(
        "This folder is neither an ONNX export nor a checkpoint nor an engine.",
        where=folder,
        expected=f"{RECORD_FILE}, or config.json and *.safetensors, or engine.plan",
        change=hint,
    )


def _open_onnx(folder: Path, threads: int | None, slots: int) -> Session:
    """The session over an ONNX export."""
    from pipeline.export.record import read_export_record

    if read_export_record(folder).traits.contrib:
        from pipeline.runtime.sessions.onnx_cpu_session import CpuSession

        return CpuSession(folder, threads, slots=slots)
    from pipeline.runtime.sessions.onnx_session import OnnxSession

    return OnnxSession(folder, threads)


def _open_tensorrt(folder: Path, threads: int | None, slots: int) -> Session:
    """The session over an engine."""
    return open_engine_session(folder)


def open_engine_session(folder: Path, name: str | None = None) -> Session:
    """The session over a decoder's engine: with torch where it has CUDA, and without where not.

    Args:
        folder: what `skipcat engine` wrote.
        name: what the ledger calls this backend; None makes one.

    Raises:
        InputError: no GPU here, or the engine is not for it.
        MissingPackageError: the engine's TensorRT is not installed.
    """
    if _is_of_standard_tensorrt(folder) and not _torch_has_cuda():
        from pipeline.runtime.device.engine import open_engine
        from pipeline.runtime.device.session import DeviceSession

        return DeviceSession(open_engine(folder), name, note)
    from pipeline.runtime.sessions.tensorrt_session import TensorRTSession

    return TensorRTSession(folder, name=name)


def _is_of_standard_tensorrt(folder: Path) -> bool:
    """Whether the manifest says so; where there is none, what opens the engine says that."""
    from pipeline.engine.manifest import MANIFEST_FILE, read_manifest

    if not (folder / MANIFEST_FILE).is_file():
        return False
    return bool(read_manifest(folder)["target"].get("flavour") == "tensorrt")


def _torch_has_cuda() -> bool:
    """Whether torch is there and reaches a GPU; what set-up installs on a Jetson does not."""
    try:
        import torch
    except ImportError:
        return False
    return torch.cuda.is_available()


def _open_torch(folder: Path, threads: int | None, slots: int) -> Session:
    """The session over a checkpoint, in float32 since CPUs are slow at everything narrower."""
    import torch

    from pipeline.checkpoint.folder import load_checkpoint
    from pipeline.runtime.sessions.torch_session import TorchSession

    return TorchSession(load_checkpoint(folder, dtype=torch.float32), name="torch float32")


def _open_cuda(folder: Path, threads: int | None, slots: int) -> Session:
    """The session over a checkpoint on the GPU: half precision, our kernels, one graph a step.

    Raises:
        InputError: PyTorch sees no GPU, or the kernels cannot be compiled.
    """
    import torch

    from pipeline.checkpoint.modeling_cache import cache_maps
    from pipeline.kernels.op import prepare
    from pipeline.runtime.sessions.static_session import StaticSession
    from pipeline.runtime.sessions.torch_session import TorchSession

    require_torch_gpu("leave --device out to run on the CPU")
    model, replaced = load_narrow(folder)
    if replaced:
        prepare(torch.cuda.current_device())
    kind = f"block-skip kernels in {replaced} layers" if replaced else "no block-skip layers"
    name = f"torch cuda {str(model.dtype).removeprefix('torch.')}, {kind}"
    if cache_maps(model):
        note("the cache holds latents: steps run one by one, not as a CUDA graph")
        return TorchSession(model.to("cuda"), name)
    return StaticSession(model.to("cuda"), name, CUDA_CACHE_TOKENS)


def load_narrow(folder: Path, dtype: torch.dtype | None = None) -> tuple[PreTrainedModel, int]:
    """A checkpoint in half precision with its block-skip layers by the operator, and their number.

    Only weights are: the frequencies of the rotation turn with the position, and in half precision
    would be off by radians after a thousand tokens.

    Args:
        folder: of the checkpoint.
        dtype: of the weights; None leaves bfloat16, and makes float16 of all else.

    Raises:
        InputError: as `load_checkpoint`.
    """
    import torch

    from pipeline.checkpoint.folder import load_checkpoint
    from pipeline.checkpoint.modeling_quantized import QuantizedEmbedding, QuantizedLinear
    from pipeline.kernels.install import use_operator_

    model = load_checkpoint(folder)
    if dtype is None:
        dtype = torch.bfloat16 if model.dtype == torch.bfloat16 else torch.float16
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    for module in model.modules():
        if isinstance(module, QuantizedEmbedding | QuantizedLinear):
            module.dtype = dtype  # of what they make of their codes
    return model, use_operator_(model)


# By kind of folder and device.
_OPENERS: dict[tuple[str, str], Callable[[Path, int | None, int], Session]] = {
    ("onnx", "cpu"): _open_onnx,
    ("tensorrt", "cpu"): _open_tensorrt,
    ("torch", "cpu"): _open_torch,
    ("torch", "cuda"): _open_cuda,
}
