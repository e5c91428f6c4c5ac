"""What TensorRT says while it works: to stderr, its errors and what it says of layers kept."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

from pipeline.engine.int8_layers import LAYERS

if TYPE_CHECKING:
    import tensorrt as trt


def make_logger(library: Any, errors: list[str], layers: list[str] | None = None) -> trt.ILogger:
    """A logger that prints INFO and above on stderr.

    Args:
        library: the imported module.
        errors: is given the errors.
        layers: is given what is said of the layers of a finished engine.
    """

    class Log(library.ILogger):
        def __init__(self) -> None:
            super().__init__()

        def log(self, severity: Any, message: str) -> None:
            if layers is not None and message.startswith(LAYERS):
                layers.append(message)
            if severity > library.ILogger.INFO:
                return
            print(f"[{severity.name}] {message}", file=sys.stderr, flush=True)
            if severity <= library.ILogger.ERROR:
                errors.append(message)

    return Log()
