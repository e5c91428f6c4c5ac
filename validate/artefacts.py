"""What there is to validate: the folders of a build, and the model that they were made from."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.errors import InputError
from pipeline.export.contract import RECORD_FILE
from pipeline.json_file import json_field, read_json_object

_FOLDERS_ABOVE = 3


@dataclass(frozen=True)
class Artefacts:
    """What there is to validate.

    Attributes:
        original: alias, hub id, folder or GGUF file of the model before compression.
        checkpoint: the compressed checkpoint; None if the model was not compressed.
        beside: other checkpoints, each measured in a row of its own.
        onnx: exported ONNX folders.
        engines: TensorRT engine folders.
    """

    original: str
    checkpoint: Path | None = None
    onnx: tuple[Path, ...] = ()
    engines: tuple[Path, ...] = ()
    beside: tuple[Path, ...] = ()

    @property
    def inputs(self) -> tuple[object, ...]:
        """All that is read, as it was named."""
        checkpoints = (self.checkpoint or "", *self.beside)
        return (self.original, *checkpoints, *self.onnx, *self.engines)

    @classmethod
    def find(cls, build: Path, coming: Iterable[Path] = ()) -> Artefacts:
        """What lies in a build folder: checkpoint/, onnx*/ and engine*/.

        Args:
            build: the folder.
            coming: engines that are still being built there.

        Raises:
            InputError: no checkpoint there, or it does not name its original.
        """
        checkpoint = build / "checkpoint"
        if not (checkpoint / "config.json").is_file():
            raise InputError(
                "This is not a build folder.",
                where=build,
                expected="checkpoint/, and beside it onnx*/ and engine*/",
                change="give the folder of `skipcat build`, or pass --original, --checkpoint, "
                "--onnx",
            )
        return cls(
            original=_original_of_build(build) or original_of(checkpoint),
            checkpoint=checkpoint,
            onnx=_folders(build, "onnx*", RECORD_FILE),
            engines=tuple(sorted({*_folders(build, "engine*", "manifest.json"), *coming})),
        )


def _folders(build: Path, pattern: str, record: str) -> tuple[Path, ...]:
    """Folders of `build` that match, in order of name.

    Raises:
        InputError: a folder matches, but lacks its record; passing over it would hide a stage.
    """
    found = tuple(sorted(path for path in build.glob(pattern) if path.is_dir()))
    for path in found:
        if not (path / record).is_file():
            raise InputError(
                "An artefact of this build is not complete.",
                where=path,
                expected=record,
                change="make it again, or delete the folder",
            )
    return found


def _original_of_build(build: Path) -> str | None:
    """The original as build.json names it, a path included; None where that says nothing."""
    if not (build / "build.json").is_file():
        return None
    record = read_json_object(build / "build.json")
    request = json_field(record, "request", dict, build / "build.json", default=None) or {}
    compress = json_field(request, "compress", dict, build / "build.json", default=None) or {}
    return json_field(compress, "model", str, build / "build.json", default=None)


def original_of(checkpoint: Path) -> str:
    """The model that a checkpoint was made from, as its recipe.json names it.

    Raises:
        InputError: the recipe is missing or names none, or one of another machine or content.
    """
    from pipeline.checkpoint.folder import read_record

    recipe = read_record(checkpoint, "recipe.json")
    name = recipe.get("model")
    if not name:
        raise InputError(
            "The checkpoint does not say what it was made from.",
            where=checkpoint / "recipe.json",
            expected="the name of the original under the key 'model'",
            change="pass --original",
        )
    return _local_original(checkpoint, recipe) if recipe.get("model_is_local") else str(name)


def _local_original(checkpoint: Path, recipe: dict[str, Any]) -> str:
    """The local model of a recipe, which holds its last name alone: where it was, or near by.

    Raises:
        InputError: none of that name and content is here or in a folder above the checkpoint.
    """
    from pipeline.model.fingerprint import model_hashes
    from pipeline.model.origins import known_origin

    name = Path(recipe["model"]).name
    noted = known_origin(json_field(recipe, "model_files", dict, checkpoint / "recipe.json"))
    near = [folder / name for folder in (Path(), *checkpoint.resolve().parents[:_FOLDERS_ABOVE])]
    for path in (*([noted] if noted else ()), *near):
        if path.exists() and path.resolve() != checkpoint.resolve():
            with contextlib.suppress(InputError):
                if model_hashes(str(path)) == recipe.get("model_files"):
                    return str(path)
    raise InputError(
        "The checkpoint was made from a local model, which is not here.",
        where=checkpoint / "recipe.json",
        observed=f"none called '{name}' with the same files, here or above the checkpoint",
        change="pass --original with its path",
    )
