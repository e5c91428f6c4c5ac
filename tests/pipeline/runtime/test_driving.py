"""Images and videos through a driving network: what is told, what is drawn, what is refused."""

from __future__ import annotations

import importlib.util
import json
import sys
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pipeline.driving.sample import open_image
from pipeline.driving.video import VideoWriter, frames_of
from pipeline.errors import InputError, MissingPackageError, PipelineError, UsageError
from pipeline.runtime.driving import DRIVABLE_ID, LANE_ID, PerceiveRequest
from tests.support.tiny_driving import save_driving

needs_av = pytest.mark.skipif(
    importlib.util.find_spec("av") is None, reason="needs the extra `video` (av)"
)


@pytest.fixture(scope="module")
def net(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_driving(tmp_path_factory.mktemp("driving") / "net")


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("images")
    for number, size in enumerate(((40, 90, 3), (120, 70, 3))):
        pixels = np.random.default_rng(number).integers(0, 256, size, np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
    return folder


def look(net: Path, **settings: Any) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    lines: list[dict[str, Any]] = []
    return lines, PerceiveRequest(net, **settings).run(lines.append)


def test_what_is_told_is_what_is_written_and_drawn(net: Path, images: Path, tmp_path: Path) -> None:
    out = tmp_path / "seen"
    lines, summary = look(net, images=(images,), output=out)
    written = [json.loads(line) for line in (out / "perception.jsonl").read_text().splitlines()]
    assert written == lines
    assert [line["image"] for line in lines] == ["0.png", "1.png"]
    assert summary["images"] == 2
    for line in lines:
        source = open_image(images / line["image"])
        mask, drawn = np.asarray(Image.open(out / line["mask"])), open_image(out / line["drawn"])
        assert drawn.shape == source.shape == (line["height"], line["width"], 3)
        assert (mask == LANE_ID).mean() == pytest.approx(line["lane_share"], abs=1e-5)
        assert set(np.unique(mask)) <= {0, DRIVABLE_ID, LANE_ID}
        assert (mask > 0).any()
        assert set(line["ms"]) == {"decode", "network", "boxes", "lanes", "drawing"}
        assert all(ms > 0 for ms in line["ms"].values())
        for box in line["boxes"]:
            x1, y1, x2, y2 = box["box"]
            assert 0 <= x1 <= x2 <= line["width"]
            assert 0 <= y1 <= y2 <= line["height"]
            assert box["label"] == "vehicle"
    # It is ours: it may be replaced when that is asked for, and only then.
    with pytest.raises(UsageError, match="exists"):
        look(net, images=(images,), output=out)
    look(net, images=(images / "0.png",), output=out, overwrite=True)
    assert not (out / "drawn" / "1.jpg").exists()


def test_without_an_output_nothing_is_drawn(net: Path, images: Path) -> None:
    lines, _ = look(net, images=(images / "1.png",))
    assert "drawn" not in lines[0]
    assert lines[0]["ms"]["drawing"] == 0


def test_an_image_that_breaks_off_leaves_no_folder(net: Path, tmp_path: Path) -> None:
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n")
    with pytest.raises(InputError, match="cannot be read"):
        look(net, images=(tmp_path / "broken.png",), output=tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("settings", "error"),
    [
        ({}, UsageError),
        ({"images": ("same", "same"), "output": Path("out")}, UsageError),
        ({"images": ("same",), "video": Path("same")}, UsageError),
        ({"images": ("same",), "backend": "onnx"}, UsageError),
        ({"images": ("empty",)}, InputError),
        ({"images": ("missing",)}, InputError),
    ],
)
def test_what_cannot_be_meant_is_refused(
    net: Path, images: Path, tmp_path: Path, settings: dict[str, Any], error: type[PipelineError]
) -> None:
    (tmp_path / "empty").mkdir()
    places = {"same": images, "empty": tmp_path / "empty", "missing": tmp_path / "missing"}
    if "images" in settings:
        settings = settings | {"images": tuple(places[name] for name in settings["images"])}
    if "output" in settings:
        settings = settings | {"output": tmp_path / "out"}
    with pytest.raises(error):
        look(net, **settings)


def test_a_video_without_the_library_is_refused(
    net: Path, images: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(MissingPackageError, match="videos"):
        look(net, video=images / "0.png")


@needs_av
def test_a_video_is_looked_at_frame_by_frame_and_drawn(net: Path, tmp_path: Path) -> None:
    writer = VideoWriter(tmp_path / "in.mp4", Fraction(10), (48, 81))
    for number in range(4):
        writer.add(np.full((48, 81, 3), 60 * number, np.uint8))
    writer.close()
    lines, summary = look(net, video=tmp_path / "in.mp4", output=tmp_path / "out")
    assert [(line["frame"], line["s"]) for line in lines] == [(n, n / 10) for n in range(4)]
    assert summary["images"] == 4
    drawn = list(frames_of(tmp_path / "out" / "drawn.mp4"))
    assert [(frame.shape, rate) for frame, rate in drawn] == [((48, 80, 3), 10)] * 4


@needs_av
def test_a_file_that_is_no_video_is_refused(net: Path, tmp_path: Path) -> None:
    (tmp_path / "text.mp4").write_text("not a video")
    with pytest.raises(InputError, match="cannot be read"):
        look(net, video=tmp_path / "text.mp4", output=tmp_path / "out")
    assert not (tmp_path / "out").exists()
