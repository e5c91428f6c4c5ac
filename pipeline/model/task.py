"""What a model is for, by what its folder says: the one place where verbs tell models apart."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

from pipeline.errors import InputError, PipelineError
from pipeline.model.source import resolve_source

Task = Literal["text-generation", "image-classification"]
TEXT: Task = "text-generation"
IMAGES: Task = "image-classification"
# What transformers calls the class that loads a model of a task.
AUTO_CLASSES: dict[Task, str] = {
    TEXT: "AutoModelForCausalLM",
    IMAGES: "AutoModelForImageClassification",
}
CLASS_WORD = "ForImageClassification"


def task_of_config(config: Any) -> Task:
    """The task of a config, object or dict, by the classes that it names."""
    fields = config if isinstance(config, dict) else config.to_dict()
    named = [*(fields.get("architectures") or ()), *(fields.get("auto_map") or {})]
    return IMAGES if any(CLASS_WORD in str(name) for name in named) else TEXT


def task_of_folder(folder: Path) -> Task:
    """The task of a Hugging Face folder; text generation where there is no config to ask."""
    path = folder / "config.json"
    if not path.is_file():
        return TEXT
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError("The config cannot be read.", where=path, observed=error) from error
    if not isinstance(fields, dict):
        raise InputError("The config is not a JSON object.", where=path)
    return task_of_config(fields)


def task_of_model(name: str) -> Task:
    """The task of a model named as the user named it; of a hub id, config.json alone is fetched.

    A model that cannot be found counts as text generation, whose loader says what is wrong.

    Raises:
        InputError: a folder whose config is broken.
    """
    from transformers import PretrainedConfig

    try:
        source = resolve_source(name)
    except PipelineError:
        return TEXT
    if source.kind == "gguf":
        return TEXT
    if source.kind == "folder":
        return task_of_folder(Path(source.location))
    try:
        fields, _ = PretrainedConfig.get_config_dict(source.location)
    except Exception:
        return TEXT
    return task_of_config(fields)


def refuse_images(folder: Path) -> None:
    """Refuse an image classifier where only decoders will do: a checkpoint, an export or an engine.

    Raises:
        InputError: it is one.
    """
    # Every artefact made of a classifier carries the settings of its image processor; a decoder
    # that also sees has a tokenizer beside it.
    sees = (folder / "preprocessor_config.json").is_file()
    reads = (folder / "tokenizer_config.json").is_file()
    if (sees and not reads) or task_of_folder(folder) == IMAGES:
        raise InputError(
            "This takes decoder language models.",
            where=folder,
            observed="an image classifier",
            change="use compress, export, engine, validate, export-dense or inspect",
        )
