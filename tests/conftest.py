"""Settings of every test: no hub, and a printed reason where a GPU or TensorRT is missing."""

from __future__ import annotations

import os

# Before anything imports huggingface_hub, which reads it once.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import importlib.util

import pytest

from pipeline import doctor


def missing_hardware() -> dict[str, str]:
    """For each marker whose requirement is not met here, the reason to skip."""
    reasons = {}
    gpus, why = doctor.find_gpus()
    if not gpus:
        reasons["gpu"] = f"needs an NVIDIA GPU: {why}"
    if importlib.util.find_spec("tensorrt") is None:
        reasons["trt"] = "needs TensorRT: no module named tensorrt"
    return reasons


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip tests that this machine cannot run, saying why."""
    for marker, reason in missing_hardware().items():
        for item in items:
            if marker in item.keywords:
                item.add_marker(pytest.mark.skip(reason=reason))
