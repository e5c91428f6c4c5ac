"""Block-skip linear layer in NumPy: the specification that every implementation is tested against.

    y = (x1 + x2 a) b (+ bias),  [x1 x2] = x[..., index]

Shapes: x [..., n], a [n - r, r], b [r, m], index [n], bias [m], y [..., m].
"""

from __future__ import annotations

import numpy as np


def block_skip_linear(
    x: np.ndarray,
    a: np.ndarray,
    b: np.ndarray,
    index: np.ndarray | None = None,
    bias: np.ndarray | None = None,
) -> np.ndarray:
    """Compute the layer in float64, whatever the types of the inputs.

    Args:
        x: inputs, [..., n].
        a: A' transposed, [n - r, r].
        b: B' transposed, [r, m].
        index: permutation of the inputs, pivots first; None when x is in that order already.
        bias: [m].

    Returns:
        float64 [..., m].

    Raises:
        ValueError: shapes that do not fit.
    """
    rank, rest = b.shape[0], a.shape[0]
    if a.shape != (rest, rank) or x.shape[-1] != rank + rest:
        raise ValueError(f"x {x.shape}, a {a.shape} and b {b.shape} do not fit")
    if index is not None:
        if index.shape != (rank + rest,):
            raise ValueError(f"index {index.shape} does not fit x {x.shape}")
        x = np.take(x, index, axis=-1)
    x = x.astype(np.float64)
    z = x[..., :rank] + x[..., rank:] @ a.astype(np.float64)
    y = z @ b.astype(np.float64)
    return y if bias is None else y + bias.astype(np.float64)
