"""The standard stages: original, compressed in its two forms, ONNX Runtime, TensorRT.

Which they are does not depend on the task; what they are opened with does.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.errors import InputError
from pipeline.export.contract import FLOAT, FLOAT16, FLOAT32, INT4, INT4_OFFSET, INT8
from pipeline.export.record import ExportRecord, read_export_record
from pipeline.json_file import json_field, read_json_object
from pipeline.memory import return_free_memory
from pipeline.model.task import TASKS
from validate.artefacts import Artefacts

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Tolerance:
    """What a stage must keep to; None leaves a quantity free.

    Attributes:
        min_cosine: least cosine, over tokens or images, of its logits with its reference's.
        max_relative_error: largest error against its reference over the largest reference logit.
        max_kl_to_reference: largest mean KL(reference || stage), nats per token or image. The
            cosine alone is a blunt test: noise that leaves 0.9994 changes 1 % of SmolLM2's top-1
            choices.
        max_kl: largest mean KL(original || stage), nats per token or image.
        max_score_drop: by how much a score against labels, in [0, 1], may be below its
            reference's.
        max_greedy_gap: how sure, in parts of the largest logit, the stage or its reference may be
            of a token where their greedy answers part; beyond that it is no tie.
    """

    min_cosine: float | None = None
    max_relative_error: float | None = None
    max_kl_to_reference: float | None = None
    max_kl: float | None = None
    max_greedy_gap: float | None = None
    max_score_drop: float | None = None

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
        open: loads it, a session as its task has them; an exception of this makes the row
            'not run'.
        reference: name of an earlier stage that it should equal; None for the original.
        tolerance: how nearly.
        required: whether 'not run' counts as a failure.
        ready: is called before it is opened: waits for what is still being made; what it raises
            ends the ledger.
    """

    name: str
    open: Callable[[], Any]
    reference: str | None = None
    tolerance: Tolerance = Tolerance()
    required: bool = True
    ready: Callable[[], object] = lambda: None


@dataclass(frozen=True)
class Openers:
    """How a task's sessions are made of what there is.

    Attributes:
        model: of a PyTorch model, under a name.
        onnx: of the folder of an export, under a name.
        engine: of the folder of an engine, under a name; an InputError says why not, on a machine
            that cannot run it.
        full_cache: as `model`, of one whose cache is smaller: what is cached is what the latents
            stand for.
        in_pieces: as `model`, read token by token, or by 128s where there are more.
        rounded_cache: as `model`, with its cache rounded as the export in a folder rounds it.
        unoptimised: as `onnx`, of a graph whose nodes run as they are written; None where that is
            no stage of its own.
    """

    model: Callable[[PreTrainedModel, str], Any]
    onnx: Callable[[Path, str], Any]
    engine: Callable[[Path, str], Any]
    full_cache: Callable[[PreTrainedModel, str], Any] | None = None
    in_pieces: Callable[[PreTrainedModel, str], Any] | None = None
    rounded_cache: Callable[[PreTrainedModel, Path, str], Any] | None = None
    unoptimised: Callable[[Path, str], Any] | None = None


ORIGINAL = "original"
_DENSE_PRODUCT = "compressed, dense product"
SKIP_FORM = "compressed, skip form"
_ROUNDED = "compressed, rounded convolutions"
# Of a checkpoint whose KV cache is smaller: where numbers are rounded, what cutting alone costs;
# what all of it costs; that latents give the same, and in however many calls a text is read.
CACHE_CUT, CACHE_FULL = "cache, not rounded", "cache, full width"
CACHE_LATENT, _CACHE_IN_PIECES = "cache, latent", "cache, in pieces"

# Both forms are the same matrix, multiplied out in another order in float32.
_SAME_IN_FLOAT32 = Tolerance(
    min_cosine=0.99999, max_kl_to_reference=1e-5, max_greedy_gap=1e-3, max_score_drop=3e-3
)
_SAME_MATRIX = replace(_SAME_IN_FLOAT32, max_relative_error=1e-3)
# SmolLM2-135M exported in float16 has cosine 0.999994 and KL 1.1e-5 to its float32 original.
_SAME_IN_FLOAT16 = Tolerance(min_cosine=0.999, max_kl_to_reference=1e-3)
# Products that round their inputs to 8 bits, in the blocks of the weights: SmolLM2-135M in int8
# with blocks of 16 has worst cosine 0.994 and KL 5e-3 on 384 tokens of WikiText-2; wider blocks
# have up to three times its change in perplexity (docs/cpu.md).
_NEAR_IN_INTEGERS = Tolerance(min_cosine=0.95, max_kl_to_reference=5e-2)


# Convolutions of codes: all sums are of whole numbers, and exact in float32 (docs/int8.md).
_SAME_BITS = Tolerance(max_relative_error=0.0, max_score_drop=0.0)
# Integer kernels round ties by another multiplication, and numbers beside codes are summed in
# another order: some codes are one apart, which no score may notice.
_SAME_BUT_FOR_TIES = Tolerance(min_cosine=0.95, max_kl_to_reference=5e-2, max_score_drop=3e-3)
# What 8 bits of the cache may cost: SmolLM2-135M has KL 2e-3 (docs/cpu.md).
_ROUNDED_CACHE = Tolerance(min_cosine=0.95, max_kl_to_reference=2e-2)
# What few bits of latents may cost beside the same latents in float. How many there are is the
# plan's affair: beyond this the codes are not those of the latents.
_ROUNDED_LATENTS = Tolerance(max_kl_to_reference=0.25)
# Beside PyTorch with the same rounding: a number between two codes may go either way.
_SAME_IN_CODES = _SAME_IN_FLOAT16


def standard_stages(
    artefacts: Artefacts,
    openers: Openers,
    open_original: Callable[[], Any],
    max_kl: float | None = None,
    trust_remote_code: bool = False,
    ready: Callable[[], object] = lambda: None,
) -> list[Stage]:
    """The stages of the ledger, the original first.

    An export or engine should equal the checkpoint in its skip form, which is what it was made
    from, with the latents of its smaller cache if it has one; without a checkpoint it should equal
    the original. One whose cache holds codes should equal PyTorch that rounds likewise, which is a
    stage of its own and says what that costs. Of a quantised checkpoint both forms are those of the
    values that its codes stand for: `validate.rounding` says what they cost. One of rounded
    convolutions has one form, whose bits its export gives as it is written. Where a task asks for
    it, an export's graph is also run as it is written, without ONNX Runtime's rewriting.

    Args:
        artefacts: what there is.
        openers: what opens the others.
        open_original: loads the original.
        max_kl: most KL to the original that any later stage may have; None sets no limit, since
            compression is lossy by intent.
        trust_remote_code: let Python code that comes with the checkpoint run.
        ready: waits for an engine that is still being built.
    """
    stages, reference = [], ORIGINAL
    if artefacts.checkpoint is not None:
        stages = _checkpoint_stages(artefacts.checkpoint, openers, trust_remote_code)
        forms = [stage.name for stage in stages if stage.name != _CACHE_IN_PIECES]
        reference = forms[-1]
    for folder, label in _labelled(artefacts.onnx):
        stages += _onnx_stages(artefacts, openers, folder, label, reference, trust_remote_code)
    for folder, label in _labelled(artefacts.engines):
        name = f"tensorrt {label}"
        opener = functools.partial(openers.engine, folder, name)
        near = _SAME_BUT_FOR_TIES if reference == _ROUNDED else _SAME_IN_FLOAT16
        stages.append(Stage(name, opener, reference, near, required=False, ready=ready))
    stages = _beside(artefacts, openers, trust_remote_code) + stages
    limited = [
        replace(stage, tolerance=replace(stage.tolerance, max_kl=max_kl)) for stage in stages
    ]
    return [Stage(ORIGINAL, open_original), *limited]


def _beside(artefacts: Artefacts, openers: Openers, trust_remote_code: bool) -> list[Stage]:
    """Other checkpoints, of which nothing is demanded."""
    return [
        Stage(
            f"checkpoint {label}",
            functools.partial(
                _open_checkpoint, folder, openers, f"checkpoint {label}", trust_remote_code
            ),
            ORIGINAL,
        )
        for folder, label in _labelled(artefacts.beside)
    ]


def _checkpoint_stages(checkpoint: Path, openers: Openers, trust_remote_code: bool) -> list[Stage]:
    """The forms of a checkpoint, each equal to the one before it; exports equal the last."""
    if _rounded_convs(checkpoint):
        open_it = functools.partial(
            _open_checkpoint, checkpoint, openers, _ROUNDED, trust_remote_code
        )
        return [Stage(_ROUNDED, open_it, ORIGINAL)]
    forms = [
        (_DENSE_PRODUCT, ORIGINAL, Tolerance()),
        (SKIP_FORM, _DENSE_PRODUCT, _SAME_MATRIX),
    ]
    if caches := _cached(checkpoint):
        is_rounded = any(isinstance(own, dict) and own.get("bits") for own in caches.values())
        cut = [(CACHE_CUT, SKIP_FORM, Tolerance())] if is_rounded else []
        before, allowed = (CACHE_CUT, _ROUNDED_LATENTS) if is_rounded else (SKIP_FORM, Tolerance())
        forms += [
            *cut,
            (CACHE_FULL, before, allowed),
            (CACHE_LATENT, CACHE_FULL, _SAME_MATRIX),
            (_CACHE_IN_PIECES, CACHE_LATENT, _SAME_IN_CODES if is_rounded else _SAME_MATRIX),
        ]
    return [
        Stage(
            form,
            functools.partial(_open_checkpoint, checkpoint, openers, form, trust_remote_code),
            equal,
            tolerance,
        )
        for form, equal, tolerance in forms
    ]


def _onnx_stages(
    artefacts: Artefacts,
    openers: Openers,
    folder: Path,
    label: str,
    reference: str,
    trust_remote_code: bool,
) -> list[Stage]:
    """An export, behind what it should equal where that is not `reference`."""
    stages = []
    name, equal = f"onnxruntime {label}", reference
    record = export_record_if_readable(folder)
    if record is not None and record.cache_format != FLOAT:
        equal = f"cache {record.cache_format}, {label}"
        opener = functools.partial(
            _open_rounded, artefacts, openers, folder, equal, trust_remote_code
        )
        stages.append(Stage(equal, opener, reference, _ROUNDED_CACHE))
    if openers.unoptimised is not None:
        as_written = f"{name}, not optimised"
        opener = functools.partial(openers.unoptimised, folder, as_written)
        near = _onnx_tolerance(record)
        if reference == _ROUNDED:
            near = _SAME_BITS if _all_rounded(artefacts, record) else _SAME_BUT_FOR_TIES
        stages.append(Stage(as_written, opener, equal, near))
    opener = functools.partial(openers.onnx, folder, name)
    near = _SAME_BUT_FOR_TIES if reference == _ROUNDED else _onnx_tolerance(record)
    stages.append(Stage(name, opener, equal, near))
    return stages


def _rounded_convs(checkpoint: Path) -> dict[str, bool]:
    """Convolutions of a checkpoint and whether they are codes; none where that is not said."""
    from pipeline.checkpoint.folder import read_record

    path = checkpoint / "report.json"
    report = read_record(checkpoint, path.name)
    found = json_field(report, "convolutions", dict, path, default=None) or {}
    left_out = json_field(report, "left_out", dict, path, default=None) or {}
    return {name: bool(one.get("rounded")) for name, one in found.items()} | dict.fromkeys(
        left_out, False
    )


def _all_rounded(artefacts: Artefacts, record: ExportRecord | None) -> bool:
    """Whether an export holds no number but codes and biases, all of whose sums are exact."""
    assert artefacts.checkpoint is not None, "its stage is the reference"
    whole = all(_rounded_convs(artefacts.checkpoint).values())
    return whole and record is not None and record.dtype == FLOAT32


def _open_checkpoint(folder: Path, openers: Openers, form: str, trust_remote_code: bool) -> Any:
    """The compressed model in PyTorch, multiplied out or factored, in float32."""
    import torch

    from pipeline.checkpoint.dense import densify_
    from pipeline.checkpoint.folder import load_checkpoint
    from pipeline.checkpoint.modeling_cache import cache_maps

    model = load_checkpoint(folder, dtype=torch.float32, trust_remote_code=trust_remote_code)
    if form == _DENSE_PRODUCT:
        densify_(model)
        return_free_memory()  # of the factors
    for made in cache_maps(model).values():
        made.is_active = form in (CACHE_CUT, CACHE_FULL, CACHE_LATENT, _CACHE_IN_PIECES)
        if form == CACHE_CUT:
            made.bits = None
    if form == _CACHE_IN_PIECES and openers.in_pieces is not None:
        return openers.in_pieces(model, form)
    if form == CACHE_LATENT or openers.full_cache is None:
        return openers.model(model, form)
    return openers.full_cache(model, form)


def _open_rounded(
    artefacts: Artefacts, openers: Openers, folder: Path, name: str, trust_remote_code: bool
) -> Any:
    """What an export was made from, in float32, with its cache rounded as the export rounds it."""
    import torch

    from pipeline.checkpoint.folder import load_checkpoint
    from pipeline.model.load import load_model

    assert openers.rounded_cache is not None, "only decoders have a cache"
    how: dict[str, Any] = {"dtype": torch.float32, "trust_remote_code": trust_remote_code}
    if artefacts.checkpoint is not None:
        model = load_checkpoint(artefacts.checkpoint, **how)
    else:
        model = load_model(artefacts.original, **how).model
    return openers.rounded_cache(model, folder, name)


def _cached(folder: Path) -> dict[str, Any]:
    """The latents that a checkpoint caches; of one that is broken its stages will say so."""
    if not (folder / "config.json").is_file():
        return {}
    config = read_json_object(folder / "config.json")
    quantization = json_field(config, "quantization_config", dict, folder, default=None)
    found: dict[str, Any] = (quantization or {}).get("caches") or {}
    return found


def _labelled(paths: tuple[Path, ...]) -> list[tuple[Path, str]]:
    """Each folder with as much of the end of its path as tells it from the others."""
    parts = [path.resolve().parts for path in paths]
    return [(path, _told_apart(own, parts)) for path, own in zip(paths, parts, strict=True)]


def _told_apart(own: tuple[str, ...], all_of_them: list[tuple[str, ...]]) -> str:
    """The end of a path that no other has; the same folder twice has none, and is refused later."""
    for count in range(1, len(own)):
        if [other[-count:] for other in all_of_them].count(own[-count:]) == 1:
            return "/".join(own[-count:])
    return own[-1]


def _onnx_tolerance(record: ExportRecord | None) -> Tolerance:
    """What an export's dtype and products can keep to.

    Codes of a checkpoint are its own numbers, and cost nothing here. An export that itself rounds
    to 4 bits is lossy by intent, and only measured.
    """
    if record is None:
        return _SAME_IN_FLOAT32
    if record.dtype == FLOAT16:
        return _SAME_IN_FLOAT16
    if record.weights in (INT4, INT4_OFFSET) and not record.exact_weights:
        return Tolerance()
    if record.weights == INT8 or record.accuracy_level:
        return _NEAR_IN_INTEGERS
    codes = record.cache_format != FLOAT or record.coded
    return _SAME_IN_CODES if codes else _SAME_IN_FLOAT32


def export_record_if_readable(folder: Path) -> ExportRecord | None:
    """The export's record; None for a broken one, whose stage will say so when it is opened."""
    try:
        return read_export_record(folder, tasks=tuple(TASKS))
    except InputError:
        return None
