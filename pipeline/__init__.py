"""Compress a Hugging Face model, export it to ONNX, build a TensorRT engine, prove each step.

import pipeline

pipeline.compress("smollm2-135m", "small", keep_params=0.8)
pipeline.export("small", "small-onnx", profile="cpu")
print(pipeline.LanguageModel.open("small-onnx").generate("Once upon a time").text)

Nothing heavy is imported until a name is used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pipeline.checkpoint.folder import load_checkpoint as load
    from pipeline.face import build_engine, compress, export, substitute, validate
    from pipeline.runtime.language_model import LanguageModel

__all__ = [
    "LanguageModel",
    "build_engine",
    "compress",
    "export",
    "load",
    "substitute",
    "validate",
]
__version__ = "0.1.0"

_HOMES = {
    "LanguageModel": "pipeline.runtime.language_model:LanguageModel",
    "build_engine": "pipeline.face:build_engine",
    "compress": "pipeline.compress",  # packages that can be called, see pipeline/lazy.py
    "export": "pipeline.export",
    "load": "pipeline.checkpoint.folder:load_checkpoint",
    "substitute": "pipeline.substitute",
    "validate": "pipeline.face:validate",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, _, attribute = _HOMES[name].partition(":")
    home = importlib.import_module(module)
    return getattr(home, attribute) if attribute else home


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
