"""How far the outputs of a network are from those of another: what is measured, and trained on."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils import _pytree as pytree

_LEAST_VARIANCE = 1e-12


def _output_tensors(outputs: Any) -> list[torch.Tensor]:
    """The tensors in what a network gives: a tensor, tuple, dict or output of transformers."""
    leaves = pytree.tree_leaves(outputs if not hasattr(outputs, "to_tuple") else dict(outputs))
    return [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]


def output_error(outputs: Any, targets: Any) -> torch.Tensor:
    """Squared error in parts of the targets' variance, summed over the tensors; a pure function.

    Dividing by the variance lets maps of boxes and of masks count alike, whatever their units.

    Args:
        outputs: of one network, with gradients or without.
        targets: of another for the same inputs, of the same shapes.

    Returns:
        Float [].
    """
    errors = [
        (found.float() - wanted.float()).square().mean()
        / wanted.float().var().clamp_min(_LEAST_VARIANCE)
        for found, wanted in zip(_output_tensors(outputs), _output_tensors(targets), strict=True)
    ]
    return torch.stack(errors).sum()
