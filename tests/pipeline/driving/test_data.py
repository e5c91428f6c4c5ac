"""Loaders: both forms of BDD100K, plain folders, and everything that can be wrong with them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline.driving.data import open_data
from pipeline.driving.frames import _flatten, labels_of, read_frame
from pipeline.driving.sample import Complaints, open_image
from pipeline.errors import InputError, UsageError

SIZE = (64, 96)
BOX = {"x1": 10, "y1": 20, "x2": 29, "y2": 39}
SQUARE = [[10, 30], [50, 30], [50, 60], [10, 60]]


def write_image(path: Path, size: tuple[int, int] = SIZE, mode: str = "RGB") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, (size[1], size[0])).save(path)


def write(path: Path, value: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))


def labels_2018() -> dict:
    area = {"category": "area/drivable", "poly2d": [[*p, "L"] for p in SQUARE]}
    line = {"category": "lane/single white", "poly2d": [[5, 0, "L"], [5, 63, "L"]]}
    walk = {"category": "lane/crosswalk", "poly2d": [[60, 0, "L"], [60, 63, "L"]]}
    stop = {
        "category": "lane/single white",
        "attributes": {"laneDirection": "vertical"},
        "poly2d": [[70, 0, "L"], [70, 63, "L"]],
    }
    objects = [{"category": "car", "box2d": BOX}, area, line, walk, stop]
    return {"name": "a", "frames": [{"timestamp": 1, "objects": objects}]}


def labels_scalabel() -> dict:
    area = {
        "category": "direct",
        "poly2d": [{"vertices": SQUARE, "types": "LLLL", "closed": True}],
    }
    line = {
        "category": "single white",
        "poly2d": [{"vertices": [[5, 0], [5, 63]], "types": "LL", "closed": False}],
    }
    return {"name": "a.jpg", "labels": [{"category": "car", "box2d": BOX}, area, line]}


def test_both_forms_of_a_label_say_the_same() -> None:
    frames = [
        read_frame(labels_of(frame), "a", Complaints())
        for frame in (labels_2018(), labels_scalabel())
    ]
    for frame in frames:
        np.testing.assert_array_equal(frame.boxes, [[10, 20, 30, 40]])  # the last pixel is inside
        assert frame.kinds == {"boxes", "drivable", "lane"}
        mask = frame.drivable_mask(SIZE)
        assert mask[45, 30]
        assert not mask[20, 30]
        lane = frame.lane_mask((64, 1280))
        assert lane[:, 5].all()
        assert not lane[:, 40:].any()  # neither crosswalk nor stop line
        assert 7 <= lane.sum() / 64 <= 9  # 8 pixels in an image of 1280


def test_a_curve_of_four_controls_passes_through_its_middle() -> None:
    control = [[0, 0], [0, 8], [8, 8], [8, 0]]
    path = _flatten(control, "LCCL", closed=False)
    assert path[0] == (0, 0)
    assert path[-1] == (8, 0)
    # At t = 1/2 a cubic Bezier curve is (p0 + 3 p1 + 3 p2 + p3) / 8.
    assert (4.0, 6.0) in [(round(x, 9), round(y, 9)) for x, y in path]
    closed = _flatten(control, "LLCC", closed=True)
    assert closed[-1] == (0, 0)


@pytest.mark.parametrize(
    ("points", "types"),
    [([[0, 0], [1, 1], [2, 0]], "LL"), ([[0, 0], [1, 1], [2, 0]], "LLX"),
     ([[0, 0], [1, 1]], "LL"), ([[0, 0], [1, 1], [2, 2]], "LCL"),
     ([[0, 0], [1, 1], [2, 2]], "CLL"), ([[0, 0], [1, float("nan")], [2, 2]], "LLL")],
)  # fmt: skip
def test_a_broken_path_is_refused(points: list, types: str) -> None:
    with pytest.raises(ValueError, match=r"points|curve|number"):
        _flatten(points, types, closed=True)


def test_what_cannot_be_used_is_counted_and_named() -> None:
    boxes = [
        {"x1": 30, "y1": 0, "x2": 10, "y2": 5},
        {"x1": 0.1, "y1": 0.1, "x2": 0.5, "y2": 0.6},
        {"x1": float("nan"), "y1": 0, "x2": 9, "y2": 9},
        {"x1": 1},
    ]
    labels = [{"category": "car", "box2d": box} for box in boxes]
    labels += [{"category": "pedestrian", "box2d": BOX}, {"category": "ufo", "box2d": BOX}]
    labels += [{"category": "area/drivable", "poly2d": [[0, 0, "L"], [1, 1, "C"], [2, 2, "L"]]}]
    labels += [
        {"category": "car", "box2d": BOX, "attributes": {"crowd": True}},
        {"category": "sky"},
    ]
    complaints = Complaints()
    frame = read_frame(labels, "a", complaints)
    assert len(frame.boxes) == 0
    assert len(frame.ignored) == 1
    assert sum(complaints.counts.values()) == 8
    told = "\n".join(complaints.lines())
    for word in ("ufo", "unknown", "pedestrian", "between 0 and 1", "before their beginning",
                 "no numbers", "four numbers", "broken, area/drivable", "without box"):  # fmt: skip
        assert word in told


def test_a_folder_of_2018_is_read_and_odd_files_are_named(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_image(tmp_path / f"images/100k/train/{name}.jpg")
    write(tmp_path / "labels/100k/train/a.json", labels_2018())
    write(tmp_path / "labels/100k/train/c.json", {**labels_2018(), "name": "c"})
    data = open_data(str(tmp_path), "train", SIZE)
    assert list(data.names) == ["a.jpg"]
    told = "\n".join(data.complaints.lines())
    assert "images without labels: 1 (b.jpg)" in told
    assert "labels without image: 1 (c)" in told
    sample = data.read(0)
    assert sample.boxes is not None
    assert sample.drivable is not None
    assert sample.lane is not None


def test_masks_and_scalabel_are_read_and_a_missing_kind_is_unknown(tmp_path: Path) -> None:
    write_image(tmp_path / "images/100k/val/a.jpg")
    write_image(tmp_path / "images/100k/val/b.jpg")
    frames = [{"name": "a.jpg", "labels": [{"category": "car", "box2d": BOX}]}]
    write(tmp_path / "labels/det_20/det_val.json", [*frames, {"name": "b.jpg", "labels": None}])
    codes = np.full(SIZE, 255, np.uint8)
    # Single white, kerb, crosswalk, and a white line across the road.
    codes[:, 5], codes[:, 10], codes[:, 15], codes[:, 20] = 6, 4, 0, 6 + 32
    lane = tmp_path / "labels/lane/masks/val/a.png"
    lane.parent.mkdir(parents=True)
    Image.fromarray(codes).save(lane)
    data = open_data(str(tmp_path), "val", SIZE)
    first, second = data.read(0), data.read(1)
    assert first.drivable is None
    assert first.lane is not None
    assert np.flatnonzero(first.lane.any(axis=0)).tolist() == [5]
    assert second.boxes is not None  # listed: there are none
    assert len(second.boxes) == 0
    assert second.lane is None


@pytest.mark.parametrize(("size", "mode"), [((32, 96), "L"), (SIZE, "RGB")])
def test_a_mask_that_does_not_fit_is_refused(
    tmp_path: Path, size: tuple[int, int], mode: str
) -> None:
    write_image(tmp_path / "images/100k/val/a.jpg")
    write_image(tmp_path / "labels/drivable/masks/val/a.png", size, mode)
    with pytest.raises(InputError, match="does not fit"):
        open_data(str(tmp_path), "val", SIZE).read(0)


def test_a_plain_folder_of_class_ids_gives_boxes_of_components(tmp_path: Path) -> None:
    write_image(tmp_path / "val/images/a.png")
    codes = np.zeros(SIZE, np.uint8)
    codes[40:], codes[10:30, 5:25], codes[10:12, 60:62] = 3, 8, 8
    (tmp_path / "val/labels").mkdir()
    Image.fromarray(codes).save(tmp_path / "val/labels/a.png")
    sample = open_data(f"{tmp_path}:drivable=3,vehicle=8", "val", SIZE).read(0)
    np.testing.assert_array_equal(sample.boxes, [[5, 10, 25, 30]])
    np.testing.assert_array_equal(sample.ignored, [[60, 10, 62, 12]])
    np.testing.assert_array_equal(sample.drivable, codes == 3)
    assert sample.lane is None


@pytest.mark.parametrize(
    ("spec", "error"),
    [("nowhere", InputError), ("scenes:wide:x", UsageError), ("scenes:moon:3", UsageError),
     ("{}:road=3", UsageError), ("{}:drivable=900", UsageError), ("{}", InputError),
     ("{}:drivable=3", InputError)],
)  # fmt: skip
def test_a_set_that_is_not_there_or_not_told_is_refused(
    tmp_path: Path, spec: str, error: type[Exception]
) -> None:
    with pytest.raises(error):
        open_data(spec.format(tmp_path), "train", SIZE)


def test_images_of_every_mode_are_read_and_broken_ones_refused(tmp_path: Path) -> None:
    for mode in ("L", "RGBA", "CMYK", "I;16", "P", "1"):
        path = tmp_path / f"{mode.replace(';', '')}.tif"
        Image.new(mode, (7, 5)).save(path)
        assert open_image(path).shape == (5, 7, 3)
    deep = np.full((4, 4), 30000, np.uint16)
    Image.fromarray(deep).save(tmp_path / "deep.png")
    assert open_image(tmp_path / "deep.png").max() < 130  # 16 bits are scaled, not cut
    whole = tmp_path / "whole.jpg"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 40, 3), np.uint8)).save(whole)
    (tmp_path / "cut.jpg").write_bytes(whole.read_bytes()[:400])
    with pytest.raises(InputError, match="cannot be read"):
        open_image(tmp_path / "cut.jpg")


def test_the_turn_in_a_photographs_exif_is_taken(tmp_path: Path) -> None:
    image = Image.new("RGB", (8, 4))
    exif = image.getexif()
    exif[0x0112] = 6  # on its side
    image.save(tmp_path / "turned.jpg", exif=exif)
    assert open_image(tmp_path / "turned.jpg").shape == (8, 4, 3)
