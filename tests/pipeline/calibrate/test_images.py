"""Images from every kind of file, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.numpy import save_file

from pipeline.calibrate.images import ImageBatch, load_images
from pipeline.errors import InputError
from tests.support.classifiers import processor, tiny_classifier

RNG = np.random.default_rng(0)
COLOUR = RNG.integers(0, 256, (6, 16, 16, 3), dtype=np.uint8)
LABELS = np.array([1, 0, 1, 2, 9, 3])
# Images of the model's own size: the processor scales 0..255 to -1..1 and no more.
PIXELS = torch.from_numpy(COLOUR).permute(0, 3, 1, 2).float() / 127.5 - 1


def load(path: Path, **keywords: Any) -> ImageBatch:
    return load_images(str(path), tiny_classifier("vit"), processor(16), **keywords)


def test_arrays_of_either_order_and_files_of_every_kind_give_the_same_pixels(
    tmp_path: Path,
) -> None:
    np.savez(tmp_path / "last.npz", images=COLOUR)
    np.savez(tmp_path / "first.npz", images=COLOUR.transpose(0, 3, 1, 2))
    np.savez(tmp_path / "made.npz", pixel_values=PIXELS.numpy())
    np.save(tmp_path / "plain.npy", COLOUR)
    np.save(tmp_path / "made.npy", PIXELS.numpy())
    save_file({"images": COLOUR}, tmp_path / "raw.safetensors")
    folder = tmp_path / "folder"
    folder.mkdir()
    for place, image in enumerate(COLOUR):
        Image.fromarray(image).save(folder / f"{place}.png")
    for path in sorted(tmp_path.iterdir()):
        batch = load(path)
        assert batch.labels is None
        torch.testing.assert_close(batch.pixels, PIXELS, rtol=0, atol=2e-6, msg=path.name)


def test_sub_folders_are_classes_by_name_or_number(tmp_path: Path) -> None:
    for name, image in (("LABEL_4", COLOUR[0]), ("7", COLOUR[1])):
        (tmp_path / name).mkdir()
        Image.fromarray(image).save(tmp_path / name / "x.png")
    labels = load(tmp_path).labels
    assert labels is not None
    assert sorted(labels.tolist()) == [4, 7]


def test_a_draw_keeps_images_and_labels_together(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", images=COLOUR, labels=LABELS)
    batch = load(tmp_path / "a.npz", count=3, seed=1)
    assert len(batch.pixels) == 3
    assert batch.labels is not None
    for pixels, label in zip(batch.pixels, batch.labels, strict=True):
        (place,) = [i for i in range(6) if torch.allclose(PIXELS[i], pixels, atol=1e-5)]
        assert label == LABELS[place]


def test_grey_images_are_for_models_of_one_channel(tmp_path: Path) -> None:
    np.savez(tmp_path / "grey.npz", images=COLOUR[..., 0])
    model = tiny_classifier("vit", num_channels=1)
    batch = load_images(str(tmp_path / "grey.npz"), model, processor(16, channels=1))
    torch.testing.assert_close(batch.pixels[:, 0], PIXELS[:, 0], rtol=0, atol=2e-6)
    with pytest.raises(InputError, match="another number of channels"):
        load(tmp_path / "grey.npz")


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"images": COLOUR.astype(np.float32)}, "8-bit arrays"),
        ({"images": COLOUR[0, 0]}, "8-bit arrays"),
        ({"images": COLOUR[..., :2]}, "number of channels"),
        ({"pixel_values": PIXELS.numpy()[:, :, :8]}, "not what the model takes"),
        ({"pixel_values": COLOUR.transpose(0, 3, 1, 2)}, "not what the model takes"),
        ({"pixel_values": np.full((2, 3, 16, 16), np.nan, np.float32)}, "NaN"),
        ({"x": COLOUR}, "either raw images or"),
        ({"images": COLOUR, "pixel_values": PIXELS.numpy()}, "either raw images or"),
        ({"images": COLOUR, "labels": LABELS[:3]}, "not as many labels"),
        ({"images": COLOUR, "labels": LABELS + 1}, "not classes of the model"),
        ({"images": COLOUR, "labels": LABELS / 2}, "not classes of the model"),
    ],
)
def test_arrays_that_do_not_fit_are_refused(
    tmp_path: Path, arrays: dict[str, np.ndarray], message: str
) -> None:
    save_file(
        {name: np.ascontiguousarray(a) for name, a in arrays.items()}, tmp_path / "a.safetensors"
    )
    with pytest.raises(InputError, match=message):
        load(tmp_path / "a.safetensors")


def test_what_is_no_image_or_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such images"):
        load(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="holds no images"):
        load(tmp_path / "empty")
    (tmp_path / "a.txt").write_text("x")
    with pytest.raises(InputError, match="no file of images"):
        load(tmp_path / "a.txt")
    (tmp_path / "b.npz").write_bytes(b"PK\x03\x04 not a zip")
    with pytest.raises(InputError, match="broken"):
        load(tmp_path / "b.npz")
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "x.png").write_bytes(b"no png")
    with pytest.raises(InputError, match="cannot be read"):
        load(tmp_path / "c")


def test_a_pickle_in_an_array_file_is_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", images=np.array([{"a": 1}], dtype=object))
    with pytest.raises(InputError, match="broken"):
        load(tmp_path / "a.npz")


def test_folders_that_are_no_classes_are_refused(tmp_path: Path) -> None:
    (tmp_path / "zebra").mkdir()
    Image.fromarray(COLOUR[0]).save(tmp_path / "zebra" / "x.png")
    with pytest.raises(InputError, match="not classes") as caught:
        load(tmp_path)
    assert caught.value.details["observed"] == "zebra"


def test_a_processor_for_another_size_is_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", images=COLOUR)
    with pytest.raises(InputError, match="makes other images") as caught:
        load_images(str(tmp_path / "a.npz"), tiny_classifier("vit"), processor(24))
    assert "preprocessor_config.json" in caught.value.details["change"]
