"""From images to a folder with a trained network: stages, scores after each, all resumable."""

from __future__ import annotations

import json
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from pipeline.artefact import discard, require_same_run, staged_folder, write_json
from pipeline.driving.data import SPLITS, draw_scenes, open_data, scene_domain
from pipeline.driving.evaluate import MapsOfBatch, image_scores
from pipeline.driving.load import load_driving
from pipeline.driving.network import QyolopConfig, QyolopForDrivingPerception
from pipeline.driving.preprocess import QyolopImageProcessor
from pipeline.driving.recipe import FIRST, SECOND, Stage, TrainRequest
from pipeline.driving.sample import DrivingSet, some_places
from pipeline.driving.scores import scores_of, standard_errors
from pipeline.driving.steps import train_stage_
from pipeline.errors import InputError
from pipeline.json_file import read_json_object
from pipeline.model.loading import explaining, silence_transformers
from pipeline.model.weight_files import weight_files
from pipeline.progress import note
from pipeline.provenance import provenance, public_name

RECORD_FILE = "training.json"
_SCHEMA = 1
_WORK = ".training"
_TOLD = ("ap50", "drivable_miou", "lane_iou")
_Sets = dict[str, dict[str, DrivingSet]]


def train_to_folder(
    request: TrainRequest, output: Path, *, overwrite: bool = False, resume: bool = False
) -> dict[str, Any]:
    """Train, and write config, weights, processor and what became of every stage.

    Args:
        request: stages, data, steps.
        output: the folder to write.
        overwrite: replace it if it is there.
        resume: continue an unfinished run of the same request; the learning rate may differ.

    Returns:
        training.json's content.

    Raises:
        PipelineError: bad data, training that diverged, or no room on the disk.
    """
    request.check()
    started = time.monotonic()
    silence_transformers()
    model = _first_model(request)
    height, width = model.config.image_size
    request = replace(request, size=(height, width), width=model.config.width)
    inputs = [part.partition(":")[0] for part in (request.data, request.second_data)]
    with staged_folder(
        output, overwrite=overwrite, keep=True, resume=resume,
        inputs=(*inputs, request.model or ""),
    ) as folder:  # fmt: skip
        work = folder / _WORK
        work.mkdir(exist_ok=True)
        _require_same_run(request, work / "run.json")
        sets = open_sets(request, work)
        stages = [_run_stage(model, stage, sets, request, work) for stage in request.stages]
        model.cpu().save_pretrained(folder)
        QyolopImageProcessor.for_size(request.size).save_pretrained(folder)
        record = {
            "schema": _SCHEMA,
            "settings": _public(request),
            "parameters": sum(p.numel() for p in model.parameters()),
            "data": {name: _described(of_split) for name, of_split in sets.items()},
            "stages": stages,
            "seconds": time.monotonic() - started,
            "provenance": provenance(),
        }
        write_json(folder / RECORD_FILE, record)
        discard(work)
    return record


def _first_model(request: TrainRequest) -> QyolopForDrivingPerception:
    """Random weights by the seed, or those of a folder.

    Raises:
        InputError: it is no such folder, or holds another network.
    """
    if request.model is None:
        torch.manual_seed(request.seed)
        return QyolopForDrivingPerception(QyolopConfig(request.size, request.width))
    return load_driving(str(request.model)).model


def open_sets(request: TrainRequest, work: Path) -> _Sets:
    """Both splits of every set that a stage reads or is scored on; what is left out is told.

    Args:
        request: stages and sets.
        work: scenes are drawn into it.

    Returns:
        Name of the set -> split -> its images.

    Raises:
        InputError: a set is broken, has too few images, or trains on what it scores.
    """
    specs = {FIRST: request.data}
    if any(SECOND in stage.sets for stage in request.stages):
        specs[SECOND] = request.second_data
    sets: _Sets = {}
    for name, spec in specs.items():
        sets[name] = {}
        for split in SPLITS:
            kept = _scenes_on_disk(spec, split, request, work / name)
            data = open_data(kept or spec, split, request.size)
            sets[name][split] = data
            for line in data.complaints.lines():
                note(f"{spec}, {split}: {line}")
        if not all(map(len, sets[name].values())):
            raise InputError(
                "There are too few images to train on and to score on.",
                where=spec,
                observed={split: len(data) for split, data in sets[name].items()},
            )
        shared = set(sets[name]["train"].names) & set(sets[name]["val"].names)
        if shared:
            raise InputError(
                "Images are trained on and scored on.",
                where=spec,
                observed=f"{len(shared)}, such as {min(shared)}",
                expected="other images in val than in train",
            )
    return sets


def _scenes_on_disk(spec: str, split: str, request: TrainRequest, folder: Path) -> str | None:
    """Scenes are drawn once, since a step takes less time than to draw what it reads."""
    if scene_domain(spec) is None:
        return None
    if not (folder / f"labels/det_20/det_{split}.json").exists():
        most = request.scored if split == "val" else None
        draw_scenes(spec, split, request.size, folder, most)
    return str(folder)


def _run_stage(
    model: QyolopForDrivingPerception,
    stage: Stage,
    sets: _Sets,
    request: TrainRequest,
    work: Path,
) -> dict[str, Any]:
    """Train and score a stage, or read what an earlier run made of it."""
    kept, record = work / stage.name, work / f"{stage.name}.json"
    if record.exists():
        with explaining("What the unfinished run left is damaged.", kept):
            done = QyolopForDrivingPerception.from_pretrained(kept, use_safetensors=True)
            model.load_state_dict(done.state_dict())
        return read_json_object(record)
    state = work / "state.safetensors"
    chosen = [sets[name]["train"] for name in stage.sets]
    progress = train_stage_(model, stage, chosen, request, state)
    scores = {
        name: _score_model(model, of_split["val"], request.scored)
        for name, of_split in sets.items()
    }
    for name, found in scores.items():
        told = ", ".join(f"{key} {_shown(found['scores'][key])}" for key in _TOLD)
        note(f"{stage.name}, {name} set, {found['images']} images: {told}")
    model.save_pretrained(kept)
    result = {
        "name": stage.name,
        "steps": progress.step,
        "learning_rates": progress.learning_rates,
        "losses": progress.losses,
        "scores": scores,
    }
    write_json(record, result)
    state.unlink(missing_ok=True)
    return result


def _score_model(model: QyolopForDrivingPerception, data: DrivingSet, count: int) -> dict[str, Any]:
    """Scores of a network in torch, with the standard errors of the chief ones.

    Args:
        model: in evaluation mode.
        data: labelled images.
        count: the most that are taken.
    """

    def network(pixels: torch.Tensor) -> MapsOfBatch:
        with torch.no_grad():
            return MapsOfBatch.of(model(pixel_values=pixels.to(model.device)))

    height, width = model.config.image_size
    processor = QyolopImageProcessor.for_size((height, width))
    images = image_scores(network, model.config, processor, data, some_places(data, count))
    return {
        "images": len(images),
        "scores": scores_of(images),
        "standard_errors": standard_errors(images, _TOLD),
    }


def _shown(score: float | None) -> str:
    return "not known" if score is None else f"{score:.3f}"


def _require_same_run(request: TrainRequest, record: Path) -> None:
    """Refuse to go on with a run that other settings began; the learning rate may change."""
    settings = _as_json(request)
    del settings["learning_rate"]
    if request.model is not None:
        settings["weights"] = [path.stat().st_size for path in weight_files(request.model)]
    require_same_run(settings, record)


def _public(request: TrainRequest) -> dict[str, Any]:
    named = ("data", "second_data", "model")
    return {k: public_name(v) if k in named and v else v for k, v in _as_json(request).items()}


def _as_json(request: TrainRequest) -> dict[str, Any]:
    values: dict[str, Any] = json.loads(json.dumps(asdict(request), default=str))
    return values


def _described(of_split: dict[str, DrivingSet]) -> dict[str, Any]:
    return {
        split: {"images": len(data), "left_out": data.complaints.lines()}
        for split, data in of_split.items()
    }
