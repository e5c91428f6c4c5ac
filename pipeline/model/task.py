"""What a model is for, by what its folder says: the one place where commands tell models apart."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, Literal

from pipeline.errors import InputError, PipelineError
from pipeline.json_file import json_field, read_json_object
from pipeline.lazy import imported

Task = Literal["text-generation", "image-classification", "driving-perception"]
_Stage = Literal[
    "compress",
    "estimate",
    "convolutions",
    "labels",
    "export",
    "prove",
    "engine",
    "ledger",
    "inspect",
    "look",
]
TEXT: Task = "text-generation"
IMAGES: Task = "image-classification"
DRIVING: Task = "driving-perception"
# Each says what its artefact is for, and under which keys; a checkpoint's is config.json.
_RECORDS = {"export.json": ("task",), "manifest.json": ("onnx", "task")}


@dataclass(frozen=True)
class _CardWords:
    """What a model card says of a task.

    Attributes:
        parameters: those of which a fraction is kept.
        linears: the same, in the card's table.
        calibration: the calibration inputs, a format of what recipe.json says of them.
    """

    parameters: str
    linears: str
    calibration: str


@dataclass(frozen=True)
class _TaskRow:
    """What is different about a task; every stage reads it here, and asks for no task by name.

    Attributes:
        kind: a model of this task, for messages.
        auto_class: what transformers calls the class that loads a model of it.
        class_word: what the names of its architectures hold.
        processor_class: what transformers calls the class that loads what makes its inputs.
        card: what a model card says.
        record_fields: what an export's record says of its graph, beside what it says of any.
        adapters: what each stage needs of the task, as `module:name`; imported when it is asked
            for, so that this table depends on no stage. Of `estimate`, and of `look`, which images
            and videos are for, a task may have none.
        verbs: the commands that take such a model.
        own_classes: a module of ours whose import makes transformers know the task's classes; None
            where they are transformers' own.
    """

    kind: str
    auto_class: str
    class_word: str
    processor_class: str
    card: _CardWords
    record_fields: dict[str, type]
    adapters: dict[_Stage, str]
    verbs: str = "compress, export, engine, validate, export-dense or inspect"
    own_classes: str | None = None


TASKS: dict[Task, _TaskRow] = {
    TEXT: _TaskRow(
        kind="a decoder language model",
        auto_class="AutoModelForCausalLM",
        class_word="ForCausalLM",
        processor_class="AutoTokenizer",
        card=_CardWords(
            "decoder parameters",
            "decoder linear parameters",
            "{windows} windows of {window_length} tokens from {source}, seed {seed}",
        ),
        record_fields={"max_length": int, "vocab_size": int, "num_layers": int},
        adapters={
            "compress": "pipeline.compress.decoder:prepare",
            "estimate": "pipeline.compress.estimate:estimated",
            "export": "pipeline.export.trace_decoder:trace_decoder",
            "prove": "pipeline.export.prove_decoder:DECODER",
            "engine": "pipeline.engine.profiles:decoder_limits",
            "ledger": "validate.decoder:DECODER",
            "inspect": "pipeline.compress.decoder:facts",
        },
    ),
    IMAGES: _TaskRow(
        kind="an image classifier",
        auto_class="AutoModelForImageClassification",
        class_word="ForImageClassification",
        processor_class="AutoImageProcessor",
        card=_CardWords(
            "encoder's linear parameters",
            "linear parameters of the encoder",
            "{images} images of {source}, seed {seed}; no labels were used",
        ),
        record_fields={"pixel_values": list, "classes": int},
        adapters={
            "compress": "pipeline.compress.classifier:prepare",
            "export": "pipeline.export.trace_classifier:trace_classifier",
            "prove": "pipeline.export.prove_images:CLASSIFIER",
            "engine": "pipeline.engine.profiles:image_limits",
            "ledger": "validate.classifier:CLASSIFIER",
            "inspect": "pipeline.compress.classifier:facts",
        },
    ),
    DRIVING: _TaskRow(
        kind="a driving perception network",
        auto_class="AutoModel",
        class_word="ForDrivingPerception",
        processor_class="AutoImageProcessor",
        card=_CardWords(
            "parameters of convolutions",
            "parameters of the convolutions",
            "{images} images of {source}, seed {seed}; no labels were used",
        ),
        record_fields={"pixel_values": list, "labels": list, "anchors": list},
        adapters={
            "compress": "pipeline.compress.driving:prepare",
            "convolutions": "pipeline.calibrate.driving_images:open_driving",
            "labels": "pipeline.calibrate.driving_labels:open_labelled",
            "export": "pipeline.export.trace_driving:trace_driving",
            "prove": "pipeline.export.prove_images:DRIVING_NETWORK",
            "engine": "pipeline.engine.profiles:image_limits",
            "ledger": "validate.driving:DRIVING_NETWORK",
            "inspect": "pipeline.compress.driving:facts",
            "look": "pipeline.runtime.driving:PerceiveRequest",
        },
        verbs="compress with --method int8, export, engine, validate, inspect, or run with --image "
        "or --video",
        own_classes="pipeline.driving.preprocess",
    ),
}


def adapter_of(task: Task, stage: _Stage) -> Any:
    """What a stage needs of a task, imported now."""
    return imported(TASKS[task].adapters[stage])


def looker_of(folder: Path) -> Any:
    """What looks at images with the model in a folder, imported now.

    Raises:
        InputError: its task has nothing that does.
    """
    found = task_of_folder(folder)
    if "look" not in TASKS[found].adapters:
        raise InputError(
            "This model cannot be run on images.",
            where=folder,
            observed=TASKS[found].kind,
            expected=" or ".join(row.kind for row in TASKS.values() if "look" in row.adapters),
        )
    return adapter_of(found, "look")


def know_own_classes() -> None:
    """Make transformers know the classes that we have written ourselves."""
    for row in TASKS.values():
        if row.own_classes is not None:
            import_module(row.own_classes)


def task_of_config(config: Any) -> Task:
    """The task of a config, object or dict, by the classes that it names.

    Raises:
        InputError: they are not named as a config names them.
    """
    fields = config if isinstance(config, dict) else config.to_dict()
    architectures = json_field(fields, "architectures", list, "config.json", default=None)
    auto_map = json_field(fields, "auto_map", dict, "config.json", default=None)
    named = [*(architectures or ()), *(auto_map or {})]
    words = {task: row.class_word for task, row in TASKS.items() if task != TEXT}
    found = (task for task, word in words.items() if any(word in str(name) for name in named))
    return next(found, TEXT)


def task_of_folder(folder: Path) -> Task:
    """The task of a model's folder, an export's or an engine's; text generation where none is said.

    Raises:
        InputError: the config or the record is broken.
    """
    for name, keys in _RECORDS.items():
        if (folder / name).is_file():
            found: Any = read_json_object(folder / name)
            for key in keys:
                found = found.get(key) if isinstance(found, dict) else None
            if isinstance(found, str) and found in TASKS:
                return found  # type: ignore[return-value]
    path = folder / "config.json"
    return task_of_config(read_json_object(path)) if path.is_file() else TEXT


def task_of_model(name: str) -> Task:
    """The task of a model named as the user named it; of a hub id, config.json alone is fetched.

    A model that cannot be found counts as text generation, whose loader says what is wrong.

    Raises:
        InputError: a folder whose config is broken.
    """
    from transformers import PretrainedConfig

    from pipeline.model.source import resolve_source

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


def require_decoder(folder: Path) -> None:
    """Refuse a checkpoint, an export or an engine of anything but a decoder language model.

    Raises:
        InputError: it is of another task.
    """
    # Every artefact made of a classifier carries the settings of its image processor; a decoder
    # that also sees has a tokenizer beside it.
    sees = (folder / "preprocessor_config.json").is_file()
    reads = (folder / "tokenizer_config.json").is_file()
    found = task_of_folder(folder)
    refuse_other_tasks(IMAGES if sees and not reads and found == TEXT else found, folder)


def refuse_other_tasks(found: Task, where: object, of: str = "") -> None:
    """Refuse a model of another task than text generation; `of` is said before what it is.

    Raises:
        InputError: it is one.
    """
    if found != TEXT:
        raise InputError(
            "This takes decoder language models.",
            where=where,
            observed=of + TASKS[found].kind,
            change=f"use {TASKS[found].verbs}",
        )
