"""The standard stages: original, compressed in its two forms, ONNX Runtime, TensorRT."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pipeline.errors import InputError, UsageError
from pipeline.export.contract import FLOAT16, INT4, INT4_OFFSET, INT8, RECORD_FILE
from pipeline.export.record import ExportRecord, read_export_record
from pipeline.model.task import IMAGES, TEXT
from pipeline.runtime.sessions.session import Session


@dataclass(frozen=True)
class Tolerance:
    """What a stage must keep to; None leaves a quantity free.

    Attributes:
        min_cosine: least cosine, over the tokens, of its logits with those of its reference.
        max_relative_error: largest error against its reference over the largest reference logit.
        max_kl_to_reference: largest mean KL(reference || stage), nats per token. The cosine alone
            is a blunt test: noise that leaves 0.9994 changes 1 % of SmolLM2's top-1 choices.
        max_kl: largest mean KL(original || stage), nats per token.
    """

    min_cosine: float | None = None
    max_relative_error: float | None = None
    max_kl_to_reference: float | None = None
    max_kl: float | None = None

    @property
    def is_free(self) -> bool:
        """Whether nothing is demanded."""
        return self == Tolerance()

    @property
    def needs_reference(self) -> bool:
        """Whether it can be judged only against the reference stage."""
        demands = (self.min_cosine, self.max_relative_error, self.max_kl_to_reference)
        return any(demand is not None for demand in demands)


@dataclass(frozen=True)
class Stage:
    """A way to run the model.

    Attributes:
        name: unique within the ledger.
        open: loads it, a Session or, of an image classifier, an ImageSession; an exception of this
            makes the row 'not run'.
        reference: name of an earlier stage that it should equal; None for the original.
        tolerance: how nearly.
        required: whether 'not run' counts as a failure.
    """

    name: str
    open: Callable[[], Any]
    reference: str | None = None
    tolerance: Tolerance = Tolerance()
    required: bool = True


ORIGINAL = "original"
DENSE_PRODUCT = "compressed, dense product"
SKIP_FORM = "compressed, skip form"

# Both forms are the same matrix, multiplied out in another order in float32.
SAME_MATRIX = Tolerance(min_cosine=0.99999, max_relative_error=1e-3, max_kl_to_reference=1e-5)
SAME_IN_FLOAT32 = Tolerance(min_cosine=0.99999, max_kl_to_reference=1e-5)
# SmolLM2-135M exported in float16 has cosine 0.999994 and KL 1.1e-5 to its float32 original.
SAME_IN_FLOAT16 = Tolerance(min_cosine=0.999, max_kl_to_reference=1e-3)
# Products that round their inputs to 8 bits, in the blocks of the weights: SmolLM2-135M in int8
# with blocks of 16 has worst cosine 0.994 and KL 5e-3 on 384 tokens of WikiText-2; wider blocks
# have up to three times its change in perplexity (docs/cpu.md).
NEAR_IN_INTEGERS = Tolerance(min_cosine=0.95, max_kl_to_reference=5e-2)


@dataclass(frozen=True)
class Artefacts:
    """What there is to validate.

    Attributes:
        original: alias, hub id, folder or GGUF file of the model before compression.
        checkpoint: the compressed checkpoint; None if the model was not compressed.
        onnx: exported ONNX folders.
        engines: TensorRT engine folders.
    """

    original: str
    checkpoint: Path | None = None
    onnx: tuple[Path, ...] = ()
    engines: tuple[Path, ...] = ()


def find_artefacts(build: Path) -> Artefacts:
    """What lies in a build folder: checkpoint/, onnx*/ and engine*/.

    Raises:
        InputError: no checkpoint there, or it does not name its original.
    """
    checkpoint = build / "checkpoint"
    if not (checkpoint / "config.json").is_file():
        raise InputError(
            "This is not a build folder.",
            where=build,
            expected="checkpoint/, and beside it onnx*/ and engine*/",
            change="give the folder of `skipcat build`, or pass --original, --checkpoint, --onnx",
        )
    return Artefacts(
        original=original_of(checkpoint),
        checkpoint=checkpoint,
        onnx=folders(build, "onnx*", RECORD_FILE),
        engines=folders(build, "engine*", "manifest.json"),
    )


def folders(build: Path, pattern: str, record: str) -> tuple[Path, ...]:
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


def original_of(checkpoint: Path) -> str:
    """The model that a checkpoint was made from, as its recipe.json names it.

    Raises:
        InputError: the recipe is missing or names none.
    """
    from pipeline.checkpoint.folder import read_recipe

    name = read_recipe(checkpoint).get("model")
    if not name:
        raise InputError(
            "The checkpoint does not say what it was made from.",
            where=checkpoint / "recipe.json",
            expected="the name of the original under the key 'model'",
            change="pass --original",
        )
    return str(name)


def standard_stages(
    artefacts: Artefacts, open_original: Callable[[], Session], max_kl: float | None = None
) -> list[Stage]:
    """The stages of the ledger, the original first.

    An export or engine should equal the checkpoint in its skip form, which is what it was made
    from; without a checkpoint it should equal the original. Of a checkpoint in few bits both forms
    are those of the values that its codes stand for: `validate.rounding` says what they cost.

    Args:
        artefacts: what there is.
        open_original: loads the original.
        max_kl: most KL to the original that any later stage may have; None sets no limit, since
            compression is lossy by intent.
    """
    stages = []
    reference = ORIGINAL
    if artefacts.checkpoint is not None:
        open_dense = functools.partial(open_checkpoint, artefacts.checkpoint, dense=True)
        open_skip = functools.partial(open_checkpoint, artefacts.checkpoint, dense=False)
        stages.append(Stage(DENSE_PRODUCT, open_dense, ORIGINAL))
        stages.append(Stage(SKIP_FORM, open_skip, DENSE_PRODUCT, SAME_MATRIX))
        reference = SKIP_FORM
    for folder, label in labelled(artefacts.onnx):
        stages.append(onnx_stage(folder, f"onnxruntime {label}", reference))
    for folder, label in labelled(artefacts.engines):
        name = f"tensorrt {label}"
        opener = functools.partial(open_engine, folder, name)
        stages.append(Stage(name, opener, reference, SAME_IN_FLOAT16, required=False))
    limited = [
        replace(stage, tolerance=replace(stage.tolerance, max_kl=max_kl)) for stage in stages
    ]
    return [Stage(ORIGINAL, open_original), *limited]


def labelled(paths: tuple[Path, ...]) -> list[tuple[Path, str]]:
    """Each folder with its name, or with its whole path where two have the same name."""
    names = [path.resolve().name for path in paths]
    return [
        (path, name if names.count(name) == 1 else str(path))
        for path, name in zip(paths, names, strict=True)
    ]


def onnx_stage(folder: Path, name: str, reference: str) -> Stage:
    """ONNX Runtime on an export, held to what its dtype can keep."""
    tolerance = onnx_tolerance(export_record_if_readable(folder))
    return Stage(name, functools.partial(open_onnx, folder, name), reference, tolerance)


def onnx_tolerance(record: ExportRecord | None) -> Tolerance:
    """What an export's dtype and products can keep to.

    Codes of a checkpoint are its own numbers, and cost nothing here. An export that itself rounds
    to 4 bits is lossy by intent, and only measured.
    """
    if record is None:
        return SAME_IN_FLOAT32
    if record.dtype == FLOAT16:
        return SAME_IN_FLOAT16
    if record.weights in (INT4, INT4_OFFSET) and not record.exact_weights:
        return Tolerance()
    if record.weights == INT8 or record.accuracy_level:
        return NEAR_IN_INTEGERS
    return SAME_IN_FLOAT32


def export_record_if_readable(folder: Path) -> ExportRecord | None:
    """The export's record; None for a broken one, whose stage will say so when it is opened."""
    try:
        return read_export_record(folder, tasks=(TEXT, IMAGES))
    except InputError:
        return None


def require_room_for(artefacts: Artefacts, tokens: int) -> None:
    """Raise UsageError when an export's cache is shorter than the longest input.

    It is checked before anything runs, since the stages before the short one take minutes.
    """
    for folder in artefacts.onnx:
        record = export_record_if_readable(folder)
        if record is not None and record.max_length < tokens:
            raise UsageError(
                "The inputs are longer than an export's cache.",
                where=folder,
                observed=f"{tokens} tokens",
                expected=f"at most {record.max_length}",
                change="pass a smaller --window-length or --max-new-tokens",
            )


def open_checkpoint(folder: Path, *, dense: bool) -> Session:
    """The compressed model in PyTorch, factored or multiplied out, in float32."""
    import torch

    from pipeline.checkpoint.dense import densify_
    from pipeline.checkpoint.folder import load_checkpoint
    from pipeline.runtime.sessions.torch_session import TorchSession

    model = load_checkpoint(folder, dtype=torch.float32)
    if dense:
        densify_(model)
    return TorchSession(model, DENSE_PRODUCT if dense else SKIP_FORM)


def open_onnx(folder: Path, name: str) -> Session:
    """An export in ONNX Runtime."""
    if read_export_record(folder).traits.contrib:
        from pipeline.runtime.sessions.onnx_cpu_session import CpuSession

        return CpuSession(folder, name=name)
    from pipeline.runtime.sessions.onnx_session import OnnxSession

    return OnnxSession(folder, name=name)


def open_engine(folder: Path, name: str) -> Session:
    """An engine in TensorRT; an InputError says why not, on a machine that cannot run it."""
    from pipeline.runtime.sessions.tensorrt_session import TensorRTSession

    return TensorRTSession(folder, name=name)
