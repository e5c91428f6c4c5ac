"""Images from a folder or a file of arrays, as the model's image processor makes them."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any
from zipfile import ZipFile

import numpy as np
import torch
from PIL import Image
from safetensors.numpy import load_file
from transformers import PreTrainedModel
from transformers.image_processing_base import ImageProcessingMixin

from pipeline.errors import InputError, first_line
from pipeline.memory import require_free_memory
from pipeline.model.load import Shape, input_shape
from pipeline.model.loading import explaining
from pipeline.provenance import public_name

_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".tif", ".tiff", ".ppm")
FORMATS = (
    "a folder of images (in sub-folders by class where they are labelled), an .npz or .safetensors "
    "with `images` or `pixel_values` and perhaps `labels`, or an .npy of images"
)
_PROCESSED_AT_ONCE = 64


@dataclass(frozen=True)
class ImageBatch:
    """Images as a model is given them.

    Attributes:
        pixels: float32 [N, C, H, W].
        labels: int64 [N]; None where there are none.
        source: where they came from.
    """

    pixels: torch.Tensor
    labels: torch.Tensor | None
    source: str

    def describe(self) -> dict[str, Any]:
        """What a recipe or a ledger says of them."""
        return {
            "source": public_name(self.source),
            "images": len(self.pixels),
            "shape": list(self.pixels.shape[1:]),
            "labelled": self.labels is not None,
            "sha256": hashlib.sha256(self.pixels.numpy().tobytes()).hexdigest(),
        }


@dataclass(frozen=True)
class _ImageSet:
    """Images that are there to be read.

    Attributes:
        count: how many.
        labels: int64 [N], or None.
        read: places, int64 [k], to float32 pixel values [k, C, H, W].
    """

    count: int
    labels: np.ndarray | None
    read: Callable[[np.ndarray], torch.Tensor]


def load_images(
    spec: str,
    model: PreTrainedModel,
    processor: ImageProcessingMixin,
    *,
    count: int | None = None,
    seed: int = 0,
) -> ImageBatch:
    """Read images and process them.

    Args:
        spec: FORMATS.
        model: that they are for; its config says of which shape they must be.
        processor: of the model.
        count: how many, drawn without replacement; None, or more than there are, for all.
        seed: of the draw.

    Raises:
        InputError: nothing there, or images or labels that do not fit; says which.
    """
    found = _open(spec, model, processor)
    places = np.arange(found.count)
    if count is not None and count < found.count:
        places = np.sort(np.random.default_rng(seed).permutation(found.count)[:count])
    labels = None if found.labels is None else torch.from_numpy(found.labels[places])
    return ImageBatch(found.read(places), labels, spec)


def _open(spec: str, model: PreTrainedModel, processor: ImageProcessingMixin) -> _ImageSet:
    path = Path(spec).expanduser()
    if not path.exists():
        raise InputError("There are no such images.", where=spec, expected=FORMATS)
    shape = input_shape(model.config, spec)
    if path.is_dir():
        return _folder(path, shape, model.config, processor)
    arrays = _arrays(path)
    labels = _checked_labels(arrays.get("labels"), model.config, path)
    for name, values in arrays.items():
        if name != "labels" and labels is not None and labels.shape != values.shape[:1]:
            raise InputError(
                "There are not as many labels as images.",
                where=path,
                observed=f"{len(labels)} labels, {name} {values.shape}",
            )
    if "pixel_values" in arrays:
        pixels = _checked_pixels(arrays["pixel_values"], shape, path)
        return _ImageSet(len(pixels), labels, lambda places: torch.from_numpy(pixels[places]))
    images = _channels_last(arrays["images"], shape[0], path)
    return _ImageSet(
        len(images), labels, lambda places: _process(iter(images[places]), shape, processor, path)
    )


def _folder(path: Path, shape: Shape, config: Any, processor: ImageProcessingMixin) -> _ImageSet:
    files = sorted(p for p in path.rglob("*") if p.suffix.lower() in _SUFFIXES)
    if not files:
        raise InputError("The folder holds no images.", where=path, expected=", ".join(_SUFFIXES))
    classes = [file.relative_to(path).parts[:-1] for file in files]
    labels = None
    if all(classes):
        known = _class_numbers(sorted({parts[0] for parts in classes}), config, path)
        numbers = np.array([known[parts[0]] for parts in classes], dtype=np.int64)
        labels = _checked_labels(numbers, config, path)

    def read(places: np.ndarray) -> torch.Tensor:
        opened = (_open_image(files[place], shape[0]) for place in places)
        return _process(opened, shape, processor, path)

    return _ImageSet(len(files), labels, read)


def _class_numbers(names: list[str], config: Any, path: Path) -> dict[str, int]:
    """Class numbers of sub-folders: by the model's own names of its classes, or as they are."""
    known = {str(name): int(number) for name, number in (config.label2id or {}).items()}
    unknown = [name for name in names if name not in known and not name.isdecimal()]
    if unknown:
        raise InputError(
            "Sub-folders are not classes of the model.",
            where=path,
            observed=", ".join(unknown[:4]),
            expected=f"numbers, or of {', '.join(list(known)[:4])}, ...",
        )
    return {name: known[name] if name in known else int(name) for name in names}


def _open_image(path: Path, channels: int) -> np.ndarray:
    """uint8 [H, W, C], converted to as many channels as the model has."""
    with explaining("An image cannot be read.", path), Image.open(path) as image:
        converted = np.asarray(image.convert("L" if channels == 1 else "RGB"))
    return converted.reshape(*converted.shape[:2], -1)


def _arrays(path: Path) -> dict[str, np.ndarray]:
    """Arrays of a file by name; never a pickle."""
    with explaining("The file of images is broken.", path):
        if path.suffix == ".npy":
            values = np.load(path, allow_pickle=False, mmap_mode="r")
            name = "images" if values.dtype == np.uint8 else "pixel_values"
            arrays = {name: values}
        elif path.suffix == ".npz":
            _require_room(path)
            with np.load(path, allow_pickle=False) as file:
                arrays = dict(file)
        elif path.suffix == ".safetensors":
            arrays = load_file(path)
        else:
            raise InputError(
                "This is no file of images.", where=path, observed=path.suffix, expected=FORMATS
            )
    if ("images" in arrays) == ("pixel_values" in arrays):
        raise InputError(
            "The file must hold either raw images or what the image processor made of them.",
            where=path,
            observed=", ".join(sorted(arrays)) or "no array",
            expected="`images` or `pixel_values`, and perhaps `labels`",
        )
    return {name: arrays[name] for name in ("images", "pixel_values", "labels") if name in arrays}


def _require_room(path: Path) -> None:
    """Raise ResourceError where a .npz unpacks to more than fits into the memory."""
    with ZipFile(path) as archive:
        unpacked_bytes = sum(entry.file_size for entry in archive.infolist())
    require_free_memory(
        unpacked_bytes,
        "The images do not fit into memory.",
        where=path,
        of="unpacked, ",
        change="give fewer images, or an .npy, which stays on the disk",
    )


def _channels_last(images: np.ndarray, channels: int, path: Path) -> np.ndarray:
    """uint8 [N, H, W, C] out of that, [N, C, H, W] or, in one channel, [N, H, W].

    Raises:
        InputError: another type or number of channels.
    """
    if images.dtype != np.uint8 or images.ndim not in (3, 4) or not len(images):
        raise InputError(
            "Raw images must be 8-bit arrays.",
            where=path,
            observed=f"{images.dtype} {images.shape}",
            expected="uint8 [N, H, W, C], [N, C, H, W] or [N, H, W]",
            change="scale them to 0..255, or store what the processor makes as `pixel_values`",
        )
    if images.ndim == 3:
        images = images[..., None]
    if images.shape[-1] != channels and images.shape[1] == channels:
        images = images.transpose(0, 2, 3, 1)
    if images.shape[-1] != channels:
        raise InputError(
            "The images have another number of channels than the model.",
            where=path,
            observed=str(images.shape),
            expected=f"{channels}",
            change="convert them",
        )
    return images


def _checked_pixels(pixels: np.ndarray, shape: Shape, path: Path) -> np.ndarray:
    floating = np.issubdtype(pixels.dtype, np.floating)
    if not floating or pixels.shape[1:] != shape or not len(pixels):
        raise InputError(
            "The pixel values are not what the model takes.",
            where=path,
            observed=f"{pixels.dtype} {pixels.shape}",
            expected=f"floating-point [N, {', '.join(map(str, shape))}]",
        )
    pixels = np.ascontiguousarray(pixels, dtype=np.float32)
    if not np.isfinite(pixels).all():
        raise InputError("The pixel values hold NaN or infinity.", where=path)
    return pixels


def _checked_labels(labels: np.ndarray | None, config: Any, path: Path) -> np.ndarray | None:
    if labels is None:
        return None
    whole = labels.ndim == 1 and np.issubdtype(labels.dtype, np.integer) and len(labels) > 0
    if not whole or labels.min() < 0 or labels.max() >= config.num_labels:
        observed = f"{labels.dtype} {labels.shape}"
        if whole:
            observed += f" from {labels.min()} to {labels.max()}"
        raise InputError(
            "The labels are not classes of the model.",
            where=path,
            observed=observed,
            expected=f"integers [N] from 0 to {config.num_labels - 1}",
        )
    return labels.astype(np.int64)


def _process(
    images: Iterator[np.ndarray], shape: Shape, processor: Any, path: Path
) -> torch.Tensor:
    """Pixel values of images uint8 [H, W, C], some at a time."""
    parts = iter(lambda: list(islice(images, _PROCESSED_AT_ONCE)), [])
    return torch.cat([_pixels_of(part, shape, processor, path) for part in parts])


def _pixels_of(images: list[np.ndarray], shape: Shape, processor: Any, path: Path) -> torch.Tensor:
    try:
        made = processor(images=images, input_data_format="channels_last", return_tensors="pt")
        pixels = made["pixel_values"].float()
    except (ValueError, TypeError, KeyError, IndexError, RuntimeError) as error:
        raise InputError(
            "The image processor does not take these images.",
            where=path,
            observed=first_line(error),
            expected=f"images of {shape[0]} channels",
        ) from error
    if tuple(pixels.shape[1:]) != shape:
        raise InputError(
            "The image processor makes other images than the model takes.",
            where=path,
            observed=str(tuple(pixels.shape[1:])),
            expected=str(shape),
            change="set size (and crop_size) in preprocessor_config.json to the model's image_size",
        )
    return pixels
