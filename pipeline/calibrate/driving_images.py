"""A driving network, and images that it is calibrated and trained on; no labels are looked at."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pipeline.calibrate.network import OpenedNetwork
from pipeline.driving.bdd import is_bdd
from pipeline.driving.data import open_data, scene_domain
from pipeline.driving.load import LoadedDriving, load_driving
from pipeline.driving.sample import images_at, open_image
from pipeline.errors import UsageError
from pipeline.model.source import resolve_source
from pipeline.model.task import DRIVING

_BATCH = 8


def open_driving(name: str) -> OpenedNetwork:
    """Load a driving network, and say how its images are read.

    Raises:
        PipelineError: no such network.
    """
    loaded = load_driving(name)

    def read(spec: str, count: int, seed: int) -> tuple[list[torch.Tensor], dict[str, Any]]:
        return _batches(loaded, spec, count, seed)

    return OpenedNetwork(loaded.model, loaded.processor, resolve_source(name), DRIVING, read)


def _batches(
    loaded: LoadedDriving, spec: str, count: int, seed: int
) -> tuple[list[torch.Tensor], dict[str, Any]]:
    """Pixel values of images, and what recipe.json says of them; labels are not looked at."""
    if spec == "self":
        raise UsageError(
            "A driving network is calibrated on images.",
            observed=spec,
            expected="a folder of images, an image, or a set as `skipcat train` takes it",
        )
    height, width = loaded.model.config.image_size
    labelled = scene_domain(spec) is not None or _is_labelled(spec)
    if labelled:
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


def _is_labelled(spec: str) -> bool:
    """Whether a folder is a set with labels, of which the images to train on are taken."""
    name, _, ids = spec.partition(":")
    folder = Path(name).expanduser()
    return folder.is_dir() and (bool(ids) or is_bdd(folder))


def _some(available: int, count: int, seed: int) -> list[int]:
    """Places of so many, drawn without replacement, in order."""
    if count >= available:
        return list(range(available))
    return sorted(np.random.default_rng(seed).permutation(available)[:count].tolist())
