"""What compressing says of a driving network: methods for linears are refused; its facts."""

from __future__ import annotations

from typing import Any, NoReturn

from torch import nn

from pipeline.compress.request import CompressRequest
from pipeline.driving.load import load_driving
from pipeline.errors import InputError
from pipeline.model.task import DRIVING, TASKS


def prepare(request: CompressRequest) -> NoReturn:
    """Refuse: what is factored and rounded are linear layers, and the network has none.

    Raises:
        InputError: always.
    """
    raise InputError(
        "A driving network has convolutions alone, and compress makes linear layers smaller.",
        where=request.model,
        observed=TASKS[DRIVING].kind,
        expected="a language model or an image classifier",
        change="pass --method int8, which rounds its convolutions",
    )


def facts(what: str, trust_remote_code: bool) -> dict[str, Any]:
    """Architecture of a driving network, and what it finds in images of what size."""
    loaded = load_driving(what)
    config = loaded.model.config
    height, width = config.image_size
    convolutions = [m for m in loaded.model.modules() if isinstance(m, nn.Conv2d)]
    pointwise = sum(m.kernel_size == (1, 1) for m in convolutions)
    return {
        "task": DRIVING,
        "source": loaded.kind,
        "architecture": type(loaded.model).__name__,
        "image processor": type(loaded.processor).__name__,
        "pixel values": f"{config.num_channels}x{height}x{width}",
        "finds": f"boxes of {', '.join(config.id2label.values())}; drivable area, lane lines",
        "parameters": f"{sum(p.numel() for p in loaded.model.parameters()):,}",
        "convolutions": f"{len(convolutions)}, of which {pointwise} are 1x1",
    }
