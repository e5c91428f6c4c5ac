"""Tensors on their way through Ray's object store: arrays, which are read where they lie."""

from __future__ import annotations

import warnings

import numpy as np
import torch


def carry_tensors_as_arrays() -> None:
    """Let tensors go through the object store as arrays, which are not copied to be read."""
    from ray.util.serialization import register_serializer

    register_serializer(torch.Tensor, serializer=_array_of, deserializer=_tensor_of)


def _array_of(tensor: torch.Tensor) -> tuple[np.ndarray, str]:
    """An array of a tensor's bytes, and its type."""
    whole = tensor.detach().contiguous()
    name = str(whole.dtype).removeprefix("torch.")
    if whole.dtype == torch.bfloat16:
        whole = whole.view(torch.int16)
    return whole.numpy(), name


def _tensor_of(carried: tuple[np.ndarray, str]) -> torch.Tensor:
    array, name = carried
    with warnings.catch_warnings():
        # Tasks change no argument; torch cannot know.
        warnings.filterwarnings("ignore", message=".*not writable.*", category=UserWarning)
        return torch.from_numpy(array).view(getattr(torch, name))
