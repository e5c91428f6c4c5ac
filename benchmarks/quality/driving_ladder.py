r"""What rounding costs a driving network, rung by rung, and what training under rounding wins back.

    python -m benchmarks.quality.driving_ladder NET --data SCENES --work DIR

Float; rounded after training by three observers; boxes and scores under one scale, as a warning;
trained under rounding; and the float network trained the same further steps, without which a gain
of rounding is only training. At 8, 6 and 4 bits of kernels and activations, each on the same
images and by the commands of `skipcat`. Every row is in the JSON as soon as it is measured; a run
with the same settings goes on behind the last one, inside a training, too.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from rich.table import Table

from benchmarks import RESULTS
from benchmarks.command import run
from pipeline.artefact import require_same_run, write_json
from pipeline.bench.measure import describe_machine, load_average
from pipeline.checkpoint.folder import load_checkpoint
from pipeline.compress.request import CompressRequest
from pipeline.compress.run import compress_to_folder
from pipeline.driving.data import open_data
from pipeline.driving.evaluate import MapsOfBatch, image_scores
from pipeline.driving.load import load_driving
from pipeline.driving.network import BOX_FIELDS
from pipeline.driving.preprocess import QyolopImageProcessor
from pipeline.driving.recipe import STAGES, TrainRequest
from pipeline.driving.sample import DrivingSet, some_places
from pipeline.driving.scores import ImageScore, scores_of
from pipeline.driving.train import train_to_folder
from pipeline.errors import UsageError
from pipeline.json_file import read_json_object
from pipeline.progress import note, result_console
from pipeline.provenance import provenance, public_name
from pipeline.recover.recover import recover_to_folder
from pipeline.recover.request import RecoverRequest

_RESULT = RESULTS / "driving_ladder.json"
_TASKS = ("ap50", "drivable_miou", "lane_iou")
_BITS = (8, 6, 4)
_DRAWS = 100
_FLOAT, _LONGER = "float", "float, further steps"
_PTQ = {
    "PTQ min-max per tensor": "int{}-min-max",
    "PTQ min-max per channel": "int{}-min-max-channel",
    "PTQ histogram MSE per channel": "int{}",
}
_BEST_PTQ, _WARNING = list(_PTQ)[-1], "PTQ, boxes and scores under one scale"
_DISTILLED, _LABELLED = "QAT distilled", "QAT labels and distillation"
_Maps = Callable[[MapsOfBatch], MapsOfBatch]


@dataclass(frozen=True)
class _Settings:
    """What the rows are measured with.

    Attributes:
        net: the float network's folder.
        data: as `skipcat train --data` takes it; its training part calibrates and trains, and its
            validation part is scored.
        runtime: whose codes activations have.
        steps: of each training.
        batch_size: images in a step.
        learning_rate: the highest, of every training.
        images: scored.
        calibration: images that ranges are taken from.
        seed: of order and augmentation.
    """

    net: str
    data: str
    runtime: str
    steps: int
    batch_size: int
    learning_rate: float
    images: int
    calibration: int
    seed: int

    def public(self) -> dict[str, Any]:
        """As the JSON has it: nothing of this machine."""
        return asdict(self) | {"net": public_name(self.net), "data": public_name(self.data)}


@dataclass(frozen=True)
class _Scored:
    """What is scored, and what every row is compared with.

    Attributes:
        data: the validation part.
        places: of the images in it.
        processor: of the float network.
    """

    data: DrivingSet
    places: list[int]
    processor: QyolopImageProcessor

    def images(self, model: Any, change: _Maps = lambda maps: maps) -> list[ImageScore]:
        """Scores of every image.

        Args:
            model: in evaluation mode.
            change: what becomes of its maps.
        """

        def network(pixels: torch.Tensor) -> MapsOfBatch:
            with torch.no_grad():
                return change(MapsOfBatch.of(model(pixel_values=pixels)))

        return image_scores(network, model.config, self.processor, self.data, self.places)


def _under_one_scale(maps: MapsOfBatch, size: Sequence[int], bits: int = 8) -> MapsOfBatch:
    """Scores as they are where they share a symmetric grid with boxes in pixels.

    Boxes reach to the end of the image, so a step is its longer side over the largest code: more
    than any score. What is left of them is put back as logits.

    Args:
        maps: of a batch.
        size: height and width of the network's input.
        bits: of a code.
    """
    step = max(size) / (2 ** (bits - 1) - 1)
    boxes = []
    for raw in maps.boxes:
        fields = raw.reshape(len(raw), 3, -1, *raw.shape[2:]).astype(np.float64)
        scores = 1 / (1 + np.exp(-fields[:, :, BOX_FIELDS - 1 :]))
        rounded = np.clip(np.round(scores / step) * step, 1e-30, 1 - 1e-9)
        fields[:, :, BOX_FIELDS - 1 :] = np.log(rounded / (1 - rounded))
        boxes.append(fields.reshape(raw.shape).astype(np.float32))
    return MapsOfBatch(tuple(boxes), maps.drivable, maps.lane)


def _drawn_scores(images: Sequence[ImageScore]) -> dict[str, list[float | None]]:
    """Scores of sets drawn anew with replacement, the same draws in every row: the bootstrap."""
    generator = np.random.default_rng(0)
    draws = [generator.integers(len(images), size=len(images)) for _ in range(_DRAWS)]
    found = [scores_of([images[place] for place in draw]) for draw in draws]
    return {name: [one[name] for one in found] for name in _TASKS}


def _spread(values: Sequence[float | None], less: Sequence[float | None] | None = None) -> Any:
    """Standard error by the draws, of a score or of how far it is from another's."""
    others = less or [0.0] * len(values)
    pairs = zip(values, others, strict=True)
    known = [a - b for a, b in pairs if a is not None and b is not None]
    return float(np.std(known, ddof=1)) if len(known) > 1 else None


class _Ladder:
    """The rows of a run, measured or read.

    Args:
        settings: of the run.
        work: checkpoints, trainings and rows are kept there.
    """

    def __init__(self, settings: _Settings, work: Path) -> None:
        self.settings, self.work = settings, work
        loaded = load_driving(settings.net)
        self.size = tuple(loaded.model.config.image_size)
        data = open_data(settings.data, "val", (self.size[0], self.size[1]))
        self.scored = _Scored(data, some_places(data, settings.images), loaded.processor)

    def row(self, name: str, bits: int | None) -> dict[str, Any]:
        """A row, measured now unless it was before."""
        kept = self.work / "rows" / f"{name}-{bits}.json".replace(" ", "-").replace(",", "")
        if kept.exists():
            return read_json_object(kept)
        started, before = time.monotonic(), load_average()
        model = self._model(name, bits)
        change: _Maps = lambda maps: maps  # noqa: E731 - one of two
        if name == _WARNING:
            change = lambda maps: _under_one_scale(maps, self.size)  # noqa: E731
        images = self.scored.images(model.eval(), change)
        found = {
            "name": name,
            "bits": bits,
            "images": len(images),
            "scores": scores_of(images),
            "draws": _drawn_scores(images),
            "seconds": round(time.monotonic() - started, 1),
            "load_average": [before, load_average()],
        }
        kept.parent.mkdir(parents=True, exist_ok=True)
        write_json(kept, found)
        return found

    def _model(self, name: str, bits: int | None) -> Any:
        """The network of a row in PyTorch."""
        if name == _FLOAT:
            return load_driving(self.settings.net).model
        if name == _LONGER:
            return load_driving(str(self._longer())).model
        if name in (_DISTILLED, _LABELLED):
            return load_checkpoint(self._recovered(name, bits or 8))
        return load_checkpoint(self._rounded(_PTQ.get(name, _PTQ[_BEST_PTQ]).format(bits)))

    def _rounded(self, method: str) -> Path:
        output = self.work / method
        if not output.exists():
            request = CompressRequest(
                self.settings.net, method=method, runtime=self.settings.runtime,
                calibration=self.settings.data, windows=self.settings.calibration,
                seed=self.settings.seed,
            )  # fmt: skip
            request.check()
            compress_to_folder(request, output, resume=True)
        return output

    def _recovered(self, name: str, bits: int) -> Path:
        s, labelled = self.settings, name == _LABELLED
        output = self.work / f"qat-int{bits}-{'labels' if labelled else 'distilled'}"
        if not output.exists():
            request = RecoverRequest(
                self._rounded(f"int{bits}"), "" if labelled else s.data, s.steps, teacher=s.net,
                data=s.data if labelled else None, learning_rate=s.learning_rate,
                batch_size=s.batch_size, seed=s.seed,
            )  # fmt: skip
            recover_to_folder(request, output, resume=True)
        return output

    def _longer(self) -> Path:
        """The float network, trained as many steps of the stage that labels are read from."""
        output, s = self.work / "longer", self.settings
        if not output.exists():
            stage = next(stage for stage in STAGES if stage.name == "finetune")
            request = TrainRequest(
                stage.name, s.data, model=Path(s.net), steps=s.steps, batch_size=s.batch_size,
                learning_rate=s.learning_rate / stage.rate, scored=1, seed=s.seed,
            )  # fmt: skip
            train_to_folder(request, output, resume=True)
        return output


def _rungs(bits: Sequence[int]) -> list[tuple[str, int | None]]:
    """Names of rows and their bits, in order; those that others are compared with come first."""
    rows: list[tuple[str, int | None]] = [(_FLOAT, None), (_LONGER, None)]
    for width in bits:
        rows += [(name, width) for name in _PTQ]
        rows += [(_WARNING, width)] if width == max(_BITS) else []
        rows += [(_DISTILLED, width), (_LABELLED, width)]
    return rows


def _published(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows with standard errors, and beside the best PTQ of their bits what training wins back.

    `won_back` is the part of what PTQ loses against the float network of the same further steps.
    """
    found = []
    by_name = {(row["name"], row["bits"]): row for row in rows}
    first, longer = by_name[(_FLOAT, None)], by_name.get((_LONGER, None))
    for row in rows:
        errors = {task: _spread(row["draws"][task]) for task in _TASKS}
        apart = {task: _spread(row["draws"][task], first["draws"][task]) for task in _TASKS}
        made = {k: v for k, v in row.items() if k != "draws"} | {
            "standard_errors": errors,
            "standard_errors_of_difference_to_float": apart,
        }
        best = by_name.get((_BEST_PTQ, row["bits"]))
        if row["name"] in (_DISTILLED, _LABELLED) and best and longer:
            made["won_back"] = {
                task: _won_back(*(r["scores"][task] for r in (row, best, longer)))
                for task in _TASKS
            }
        found.append(made)
    return found


def _won_back(trained: float | None, rounded: float | None, longer: float | None) -> float | None:
    """None where nothing is lost, or a score is not known."""
    if trained is None or rounded is None or longer is None or longer <= rounded:
        return None
    return (trained - rounded) / (longer - rounded)


@click.command()
@click.argument("net", type=click.Path(exists=True, file_okay=False))
@click.option("--data", required=True, help="Labelled images, as `skipcat train --data` has them.")
@click.option("--work", type=click.Path(path_type=Path), required=True, help="Kept, and gone on.")
@click.option(
    "--bits",
    type=click.Choice([str(width) for width in _BITS]),
    multiple=True,
    help="Of kernels and activations, once for each; by default 8, 6 and 4.",
)
@click.option("--runtime", type=click.Choice(["tensorrt", "cpu"]), default="tensorrt")
@click.option("--steps", type=click.IntRange(1), default=200, show_default=True)
@click.option("--batch-size", type=click.IntRange(1), default=8, show_default=True)
@click.option("--learning-rate", type=float, default=2e-4, show_default=True)
@click.option("--images", type=click.IntRange(1), default=160, show_default=True, help="Scored.")
@click.option("--calibration", type=click.IntRange(1), default=64, show_default=True)
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--json", "result", type=click.Path(path_type=Path), default=_RESULT)
def command(net: str, bits: tuple[str, ...], work: Path, result: Path, **settings: Any) -> None:
    """Measure every rung that is not measured yet; write the JSON after each."""
    asked = _Settings(net, **settings)
    work.mkdir(parents=True, exist_ok=True)
    require_same_run(json.loads(json.dumps(asdict(asked))), work / "settings.json")
    widths = [width for width in _BITS if not bits or str(width) in bits]
    ladder, rows = _Ladder(asked, work), []
    if not len(ladder.scored.places):
        raise UsageError("There is nothing to score.", where="--data", observed=asked.data)
    for name, width in _rungs(widths):
        rows.append(ladder.row(name, width))
        scores = rows[-1]["scores"]
        told = ", ".join(f"{task} {scores[task] or 0:.3f}" for task in _TASKS)
        note(f"{name}{f', {width} bits' if width else ''}: {told}, {rows[-1]['seconds']} s")
        write_json(
            result,
            {
                "schema": 1,
                "settings": asked.public(),
                "rows": _published(rows),
                "machine": describe_machine(),
                "provenance": provenance(),
            },
        )
    _show(_published(rows))


def _show(rows: Sequence[dict[str, Any]]) -> None:
    view = Table(title=f"{rows[0]['images']} held-out images, with standard errors")
    for heading in ("row", "bits", "AP50", "drivable mIoU", "lane IoU", "won back", "s"):
        view.add_column(heading, justify="left" if heading == "row" else "right")
    for row in rows:
        cells = [
            "-" if row["scores"][t] is None
            else f"{row['scores'][t]:.3f} ± {row['standard_errors'][t] or 0:.3f}"
            for t in _TASKS
        ]  # fmt: skip
        won = row.get("won_back")
        back = "" if won is None else " / ".join(
            "-" if won[t] is None else f"{won[t]:.0%}" for t in _TASKS
        )  # fmt: skip
        view.add_row(row["name"], str(row["bits"] or ""), *cells, back, f"{row['seconds']:.0f}")
    result_console().print(view)


if __name__ == "__main__":
    sys.exit(run(command))
