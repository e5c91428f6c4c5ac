"""What compressing needs of a driving network: it, and images to calibrate on; facts of it."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
from torch import nn

from pipeline.compress.convolutions import OpenedNetwork
from pipeline.compress.request import CompressRequest
from pipeline.driving.data import open_data, scene_domain
from pipeline.driving.load import LoadedDriving, load_driving
from pipeline.driving.sample import images_at, open_image
from pipeline.errors import InputError, UsageError
from pipeline.model.source import resolve_source
from pipeline.model.task import DRIVING, TASKS

_IMAGES, _BATCH = 64, 8
_CALIBRATION = "a folder of images, an image, or scenes:DOMAIN:COUNT"


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


def open_network(request: CompressRequest) -> OpenedNetwork:
    """Load the driving network that a request names, and say how its images are read.

    Raises:
        PipelineError: no such network, or nothing to calibrate on.
    """
    if request.calibration == "self":
        raise UsageError(
            "A driving network is calibrated on images.",
            where="--calibration",
            observed="self",
            expected=_CALIBRATION,
        )
    loaded = load_driving(request.model)

    def read(spec: str, count: int | None, seed: int) -> tuple[list[torch.Tensor], dict[str, Any]]:
        return _batches(loaded, spec, count or _IMAGES, seed)

    source = resolve_source(request.model)
    return OpenedNetwork(loaded.model, loaded.processor, source, DRIVING, read)


def _batches(
    loaded: LoadedDriving, spec: str, count: int, seed: int
) -> tuple[list[torch.Tensor], dict[str, Any]]:
    """Pixel values of images, and what recipe.json says of them; labels are not looked at."""
    height, width = loaded.model.config.image_size
    if scene_domain(spec) is not None:
        data = open_data(spec, "train", (height, width))
        images = [data.read(place).image for place in _some(len(data), count, seed)]
    else:
        files = images_at([Path(spec).expanduser()])
        images = [open_image(files[place]) for place in _some(len(files), count, seed)]
    pixels = loaded.processor(images)["pixel_values"]
    described = {
        "source": spec if scene_domain(spec) is not None else Path(spec).name,
        "images": len(images),
        "sha256": hashlib.sha256(pixels.numpy().tobytes()).hexdigest(),
    }
    return list(pixels.split(_BATCH)), described


def _some(available: int, count: int, seed: int) -> list[int]:
    """Places of so many, drawn without replacement, in order."""
    if count >= available:
        return list(range(available))
    return sorted(np.random.default_rng(seed).permutation(available)[:count].tolist())


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
