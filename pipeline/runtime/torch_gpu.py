"""Whether PyTorch can use a GPU here."""

from __future__ import annotations

from pipeline.errors import InputError


def require_torch_gpu(change: str) -> None:
    """Nothing where PyTorch sees a GPU.

    Args:
        change: what else the user can do.

    Raises:
        InputError: it sees none.
    """
    import torch

    if torch.cuda.is_available():
        return
    built = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "without CUDA"
    raise InputError(
        "PyTorch sees no NVIDIA GPU.",
        observed=f"torch {torch.__version__}, {built}; {torch.cuda.device_count()} devices",
        change=change,
    )
