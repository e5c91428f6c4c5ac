"""Images and videos through a driving network: what it sees, drawn and told, with each step's time.

One reader, one decoder of maps and one hand that draws for every runtime.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from pipeline.artefact import staged_folder, write_json, write_text
from pipeline.driving.letterbox import Letterbox
from pipeline.driving.perceive import Perception
from pipeline.driving.polylines import lane_polylines
from pipeline.driving.sample import images_at, open_image
from pipeline.driving.video import VideoWriter, frames_of
from pipeline.errors import UsageError
from pipeline.provenance import provenance, public_name
from pipeline.runtime.sessions.driving_sessions import (
    DrivingSession,
    EngineDriving,
    OnnxDriving,
    TorchDriving,
)
from pipeline.runtime.sessions.open_session import folder_kind
from pipeline.runtime.torch_gpu import require_torch_gpu

# Of a mask that is written; as `FOLDER:drivable=1,lane=2` reads them.
DRIVABLE_ID, LANE_ID = 1, 2
_DRIVABLE, _LANE, _BOX = (40, 190, 80), (230, 40, 40), (255, 210, 0)
_COVER = 0.45  # of the image by a mask
_TEXT_ABOVE = 12  # pixels
_RECORD, _LINES, _VIDEO = "perception.json", "perception.jsonl", "drawn.mp4"
_LEAST_SCORE = 0.25
_STEPS = ("decode", "network", "boxes", "lanes", "drawing")


def _drawn_over(image: np.ndarray, seen: Perception, labels: Sequence[str]) -> np.ndarray:
    """The image with masks and boxes over it.

    Args:
        image: uint8 [H, W, 3].
        seen: in its pixels.
        labels: names of classes.

    Returns:
        uint8 [H, W, 3].
    """
    mixed = image.astype(np.float32)
    for mask, colour in ((seen.drivable & ~seen.lane, _DRIVABLE), (seen.lane, _LANE)):
        mixed[mask] = (1 - _COVER) * mixed[mask] + _COVER * np.array(colour, np.float32)
    picture = Image.fromarray(mixed.astype(np.uint8))
    pen = ImageDraw.Draw(picture)
    for box, score, number in zip(seen.boxes, seen.scores, seen.classes, strict=True):
        x1, y1, x2, y2 = (float(side) for side in box)
        pen.rectangle((x1, y1, max(x1, x2 - 1), max(y1, y2 - 1)), outline=_BOX)
        pen.text((x1, max(0.0, y1 - _TEXT_ABOVE)), f"{labels[number]} {score:.2f}", fill=_BOX)
    return np.asarray(picture)


def _mask_ids(seen: Perception) -> np.ndarray:
    """uint8 [H, W]: LANE_ID where a lane line is, else DRIVABLE_ID in the drivable area, else 0."""
    ids = np.where(seen.drivable, DRIVABLE_ID, 0)
    return np.where(seen.lane, LANE_ID, ids).astype(np.uint8)


@dataclass(frozen=True)
class PerceiveRequest:
    """What to look at, and with what.

    Attributes:
        folder: a driving network's, an export's or an engine's.
        images: files, and folders of them.
        video: a file.
        output: the folder to write what is drawn to; None draws nothing.
        backend: `auto`, `torch`, `onnx` or `tensorrt`.
        threads: of ONNX Runtime within one operator; None leaves the choice to it.
        device: where PyTorch computes.
        overwrite: replace `output` if it is there.
    """

    folder: Path
    images: tuple[Path, ...] = ()
    video: Path | None = None
    output: Path | None = None
    backend: str = "auto"
    threads: int | None = None
    device: str = "cpu"
    overwrite: bool = False

    def run(self, tell: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
        """Look at images or at a video.

        Args:
            tell: is given what was seen in each image, as JSON has it, as it comes.

        Returns:
            A summary: the backend, images, and the mean milliseconds of each step.

        Raises:
            InputError: the folder, an image or the video is broken, or of another kind.
            MissingPackageError: the backend, or for a video PyAV, is not installed.
            UsageError: nothing, or both images and a video, or two images of one name.
        """
        files = images_at(self.images)
        _require_one(self, files)
        session = _open(self)
        if self.output is None:
            return _look(session, self, files, None, tell)
        inputs = (self.folder, *self.images, self.video or "")
        with staged_folder(self.output, overwrite=self.overwrite, inputs=inputs) as staging:
            lines: list[dict[str, Any]] = []

            def both(line: dict[str, Any]) -> None:
                lines.append(line)
                tell(line)

            summary = _look(session, self, files, staging, both)
            write_text(staging / _LINES, "".join(json.dumps(line) + "\n" for line in lines))
            made_by = {"model": public_name(self.folder), **summary, "provenance": provenance()}
            write_json(staging / _RECORD, {"schema": 1} | made_by)
        return summary


@dataclass
class _Clock:
    """Milliseconds that each step took, of one image."""

    ms: dict[str, float] = field(default_factory=lambda: dict.fromkeys(_STEPS, 0.0))

    @contextmanager
    def step(self, name: str) -> Iterator[None]:
        """Inside, time is the step's."""
        begun = time.perf_counter()
        yield
        self.ms[name] += 1000 * (time.perf_counter() - begun)


def _require_one(request: PerceiveRequest, files: list[Path]) -> None:
    """Raise UsageError unless there is one kind of thing to look at, and each by its own name."""
    if bool(files) == (request.video is not None):
        raise UsageError(
            "There is nothing to look at." if not files else "Images or a video, not both at once.",
            change="pass --image, or --video",
        )
    stems = [file.stem for file in files]
    twice = sorted({stem for stem in stems if stems.count(stem) > 1})
    if twice and request.output is not None:
        raise UsageError(
            "Two images would be written under one name.",
            where="--image",
            observed=", ".join(twice[:3]),
            change="look at one folder after the other, each with an output of its own",
        )


def _open(request: PerceiveRequest) -> DrivingSession:
    """The session for the folder, after one call that is nobody's."""
    kind = folder_kind(request.folder)
    if request.backend not in ("auto", kind):
        raise UsageError(
            f"The backend '{request.backend}' cannot read this folder.",
            where=request.folder,
            observed=f"a folder for the backend '{kind}'",
            change=f"pass --backend {kind}, or another folder",
        )
    if request.device != "cpu" and kind != "torch":
        raise UsageError(
            f"--device {request.device} is for a network that PyTorch runs.",
            where=request.folder,
            observed=f"a folder for the backend '{kind}'",
        )
    openers: dict[str, Callable[[], DrivingSession]] = {
        "onnx": lambda: OnnxDriving(request.folder, "onnxruntime", request.threads),
        "tensorrt": lambda: EngineDriving(request.folder, "tensorrt"),
        "torch": lambda: _open_torch(request.folder, request.device),
    }
    session = openers[kind]()
    session.maps(np.zeros((1, 3, *session.traits.size), np.float32))
    return session


def _open_torch(folder: Path, device: str) -> TorchDriving:
    """The network in PyTorch; InputError where there is no such device."""
    import torch

    from pipeline.checkpoint.folder import load_checkpoint, read_record
    from pipeline.driving.load import load_driving

    if device == "cuda":
        require_torch_gpu("leave --device out to run on the CPU")
    if "quantization_config" in read_record(folder, "config.json"):
        model: torch.nn.Module = load_checkpoint(folder, dtype=torch.float32)
    else:
        model = load_driving(str(folder)).model
    return TorchDriving(model.to(device), f"torch {device}")


def _look(
    session: DrivingSession,
    request: PerceiveRequest,
    files: list[Path],
    staging: Path | None,
    tell: Callable[[dict[str, Any]], None],
) -> dict[str, Any]:
    """Look at everything; what is drawn lies in `staging` afterwards."""
    times: list[dict[str, float]] = []
    seen_by = _look_at_video if request.video is not None else _look_at_images
    for line in seen_by(session, request, files, staging):
        times.append(line["ms"])
        tell(line)
    mean = {step: round(sum(t[step] for t in times) / len(times), 3) for step in _STEPS}
    return {"backend": session.name, "images": len(times), "mean_ms": mean}


def _look_at_images(
    session: DrivingSession, request: PerceiveRequest, files: list[Path], staging: Path | None
) -> Iterator[dict[str, Any]]:
    """A line for each image; pictures and masks are written beside one another."""
    for folder in ("drawn", "masks") if staging is not None else ():
        (staging / folder).mkdir()  # type: ignore[operator]
    for file in files:
        clock = _Clock()
        with clock.step("decode"):
            pixels = open_image(file)
        seen = _seen(session, pixels, clock)
        with clock.step("lanes"):
            line = {"image": file.name, **_facts(seen, session.traits.labels)}
        if staging is not None:
            with clock.step("drawing"):
                picture = _drawn_over(pixels, seen, session.traits.labels)
                Image.fromarray(picture).save(staging / "drawn" / f"{file.stem}.jpg", quality=90)
                Image.fromarray(_mask_ids(seen)).save(staging / "masks" / f"{file.stem}.png")
            line |= {"drawn": f"drawn/{file.stem}.jpg", "mask": f"masks/{file.stem}.png"}
        yield line | {"ms": _rounded(clock)}


def _look_at_video(
    session: DrivingSession, request: PerceiveRequest, files: list[Path], staging: Path | None
) -> Iterator[dict[str, Any]]:
    """A line for each frame; one video is written."""
    assert request.video is not None
    frames, writer, number = frames_of(request.video), None, 0
    try:
        while True:
            clock = _Clock()
            with clock.step("decode"):
                found = next(frames, None)
            if found is None:
                return
            pixels, rate = found
            seen = _seen(session, pixels, clock)
            line = {"frame": number, "s": round(float(number / rate), 3)}
            with clock.step("lanes"):
                line |= _facts(seen, session.traits.labels)
            if staging is not None:
                with clock.step("drawing"):
                    size = (pixels.shape[0], pixels.shape[1])
                    writer = writer or VideoWriter(staging / _VIDEO, rate, size)
                    writer.add(_drawn_over(pixels, seen, session.traits.labels))
            yield line | {"ms": _rounded(clock)}
            number += 1
    finally:
        if writer is not None:
            writer.close()


def _seen(session: DrivingSession, pixels: np.ndarray, clock: _Clock) -> Perception:
    """What is seen in an image, uint8 [H, W, 3]."""
    traits = session.traits
    with clock.step("decode"):
        placed = Letterbox.of((pixels.shape[0], pixels.shape[1]), traits.size)
        laid = placed.image(pixels).transpose(2, 0, 1)[None]
        given = np.ascontiguousarray(laid, np.float32) / np.float32(255)
    with clock.step("network"):
        maps = session.maps(given)
    with clock.step("boxes"):
        return maps.seen(0, traits.anchors, placed, _LEAST_SCORE)


def _facts(seen: Perception, labels: tuple[str, ...]) -> dict[str, Any]:
    """What was seen, as JSON has it; boxes and the points of lane lines in pixels of the image."""
    height, width = seen.drivable.shape
    boxes = [
        {
            "label": labels[number],
            "score": round(float(score), 4),
            "box": [round(float(side), 2) for side in box],
        }
        for box, score, number in zip(seen.boxes, seen.scores, seen.classes, strict=True)
    ]
    return {
        "width": width,
        "height": height,
        "boxes": boxes,
        "drivable_share": round(float(seen.drivable.mean()), 5),
        "lane_share": round(float(seen.lane.mean()), 5),
        "lanes": [np.round(line, 1).astype(float).tolist() for line in lane_polylines(seen.lane)],
    }


def _rounded(clock: _Clock) -> dict[str, float]:
    return {step: round(ms, 3) for step, ms in clock.ms.items()}
