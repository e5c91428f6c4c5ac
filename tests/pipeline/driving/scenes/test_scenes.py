"""Scenes: the same for a seed, labels that are exact, and a folder that one loader reads."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from pipeline.driving.data import _write_scenes, open_data
from pipeline.driving.scenes.camera import Camera
from pipeline.driving.scenes.domain import DOMAINS
from pipeline.driving.scenes.road import Road, paint_road
from pipeline.driving.scenes.scene import draw_scene

SIZE = (64, 96)


def test_a_seed_gives_one_scene_and_another_another() -> None:
    first, again, other = (draw_scene(seed, DOMAINS["wide"], SIZE) for seed in (3, 3, 4))
    np.testing.assert_array_equal(first.image, again.image)
    np.testing.assert_array_equal(first.lane, again.lane)
    assert first.objects == again.objects
    assert (first.image != other.image).any()
    dense = draw_scene(3, DOMAINS["dense"], SIZE)
    assert (first.image != dense.image).any()


@pytest.mark.parametrize("domain", DOMAINS)
def test_every_kind_of_label_is_there_and_inside_the_picture(domain: str) -> None:
    scenes = [draw_scene(seed, DOMAINS[domain], SIZE) for seed in range(12)]
    assert all(scene.drivable.any() for scene in scenes)
    assert sum(bool(scene.lane.any()) for scene in scenes) >= 10
    boxes = [box for scene in scenes for _, box in scene.objects]
    assert len(boxes) >= 10
    for x1, y1, x2, y2 in boxes:
        assert 0 <= x1 < x2 <= 96
        assert 0 <= y1 < y2 <= 64


def test_the_camera_sees_a_point_of_the_road_where_it_says_it_lies() -> None:
    camera = Camera((120, 160), 130.0, 1.4, 50.0, 0.03)
    x, z = camera.ground()
    rows, columns = np.nonzero(np.isfinite(z))
    points = np.stack((x[rows, columns], np.zeros(len(rows)), z[rows, columns]), axis=1)
    expected = np.stack((columns + 0.5, rows + 0.5), axis=1)
    np.testing.assert_allclose(camera.project(points), expected, atol=2e-2)


def test_oncoming_lanes_are_road_and_not_drivable() -> None:
    domain = DOMAINS["wide"]
    road = next(
        r for r in (Road.drawn(domain, np.random.default_rng(s)) for s in range(50))
        if not r.lanes[0][2]
    )  # fmt: skip
    camera = Camera((120, 160), 130.0, 1.4, 50.0, 0.0)
    ground = camera.ground()
    painted = paint_road(road, camera, ground, domain, 1, np.random.default_rng(0))
    across = ground[0] - road.axis(ground[1])
    assert not painted.drivable[painted.there & (across < -0.01)].any()
    inside = painted.there & (across > 0.01) & (across < road.edges[1] - 0.01)
    assert painted.drivable[inside].all()


def test_written_scenes_are_read_back_as_they_were_drawn(tmp_path: Path) -> None:
    scenes = [(f"s{seed}", draw_scene(seed, DOMAINS["dense"], SIZE)) for seed in range(3)]
    _write_scenes(tmp_path, "val", scenes)
    data = open_data(str(tmp_path), "val", SIZE)
    assert [name for name, _ in scenes] == [Path(name).stem for name in data.names]
    for place, (_, scene) in enumerate(scenes):
        read, drawn = data.read(place), scene.sample()
        np.testing.assert_array_equal(read.boxes, drawn.boxes)
        np.testing.assert_array_equal(read.drivable, drawn.drivable)
        np.testing.assert_array_equal(read.lane, drawn.lane)
        assert np.abs(read.image.astype(int) - drawn.image).mean() < 12  # JPEG


def test_scenes_to_validate_on_are_none_that_are_trained_on() -> None:
    train, val = (open_data("scenes:wide:4", split, SIZE) for split in ("train", "val"))
    assert not set(train.names) & set(val.names)
    assert len(train) == len(val) == 4
