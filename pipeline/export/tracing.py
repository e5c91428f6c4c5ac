"""How linear layers are traced: as single nodes that name their weight and compute nothing with it.

The exporter would transpose and fold the weights it sees, and here it sees stand-ins (see
`pipeline.checkpoint.skeleton`). `pipeline.export.passes.lay_out` turns the nodes into their final
form.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from unittest.mock import patch

import torch
from torch import nn

from pipeline.checkpoint.modeling_skipcat import FactoredLinear
from pipeline.export.block_skip import DOMAIN, INDEXED, VERSION

TRACE_DOMAIN = "skipcat.trace"
LINEAR = "Linear"


@contextmanager
def traced_as_nodes() -> Iterator[None]:
    """Inside, every linear layer is traced as one node, a factored one in skip form as its op.

    Weights enter as torch holds them: W [m, n]; `down` [r, n - r] and `up` [m, r].
    """
    with (
        patch.object(nn.Linear, "forward", _linear),
        patch.object(FactoredLinear, "forward", _factored),
    ):
        yield


def _linear(self: nn.Linear, x: torch.Tensor) -> torch.Tensor:
    y = _node(f"{TRACE_DOMAIN}::{LINEAR}", (x, self.weight), self.out_features)
    return y if self.bias is None else y + self.bias


def _factored(self: FactoredLinear, x: torch.Tensor) -> torch.Tensor:
    owner = self.owner
    if self.form != "skip":
        return self.up(owner.down(x))
    inputs = (x, owner.down.weight, self.up.weight, owner.permutation)
    y = _node(f"{DOMAIN}::{INDEXED}", inputs, self.out_features)
    return y if self.up.bias is None else y + self.up.bias


def _node(name: str, inputs: tuple[torch.Tensor, ...], width: int) -> torch.Tensor:
    x = inputs[0]
    return torch.onnx.ops.symbolic(
        name, inputs, dtype=x.dtype, shape=(*x.shape[:-1], width), version=VERSION
    )
