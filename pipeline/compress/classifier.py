"""What compressing needs of an image classifier: images, and the model run as a whole."""

from __future__ import annotations

import math
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pipeline.calibrate.images import FORMATS, ImageBatch, load_images
from pipeline.calibrate.whole_model import DRAWS, PairedModel, measure_whole
from pipeline.compress.cache.cache_plan import CachePlan
from pipeline.compress.calibrated import Stream
from pipeline.compress.factorize.factors import Rounding
from pipeline.compress.methods import Fit
from pipeline.compress.plan.layer_costs import WholeModelCosts
from pipeline.compress.plan.plan import Curves, EmbeddingChoice, RankPlan
from pipeline.compress.plan.stack_costs import CostRequest
from pipeline.compress.request import CompressRequest
from pipeline.errors import InputError, UsageError
from pipeline.model.classifier_structure import ImageStructure
from pipeline.model.load import LoadedClassifier, load_classifier
from pipeline.model.task import IMAGES
from pipeline.progress import note
from pipeline.quantize.formats import Runtime
from pipeline.workers.workers import IN_PROCESS, Workers

# However many patches an image has, so few images say too little about the model's own output.
_LEAST_IMAGES = 256
# Inputs of a linear that go through the model at once, in as many images as have them.
_ROWS_AT_ONCE = 4096


def prepare(request: CompressRequest) -> _OpenedClassifier:
    """Load the image classifier that a request names; its `windows` are images.

    Raises:
        PipelineError: a request that cannot be meant, or a model that cannot be compressed.
    """
    request.check()
    if request.calibration == "self":
        raise UsageError(
            "An image classifier is calibrated on images.",
            where="--calibration",
            observed="self",
            expected=FORMATS,
        )
    for flag, given in (
        ("--window-length", request.window_length is not None),
        ("--stream-weights", request.stream_weights),
        ("--cache-bytes, --keep-cache, --context", request.shrinks_cache),
        ("--table", request.table is not None),
        ("--balance", request.balance > 0),
        ("--rotate", request.rotates),
        ("--learn-rounding", request.learn_rounding),
    ):
        if given:
            raise UsageError("This option is for language models.", where=flag)
    loaded = load_classifier(request.model, trust_remote_code=request.trust_remote_code)
    return _OpenedClassifier(request, loaded)


class _OpenedClassifier:
    """An image classifier in memory (see `pipeline.compress.calibrated.Opened`).

    Args:
        request: what to do with it.
        loaded: the model; changed in place when it is compressed.
    """

    def __init__(self, request: CompressRequest, loaded: LoadedClassifier) -> None:
        self.request, self.loaded, self.model = request, loaded, loaded.model
        self.structure = ImageStructure.of(loaded.model, loaded.input_shape)
        self.layers = self.structure.layers
        self.source, self.processor = loaded.source, loaded.processor
        self.storage_dtype = loaded.storage_dtype
        self.recipe_fields: dict[str, Any] = {"task": IMAGES}
        self.report_fields: dict[str, Any] = {"left_out": self.structure.left_out}
        note(f"found: {self._summary()}")
        for name, reason in self.structure.left_out.items():
            note(f"stays as it is: {name}: {reason}")

    def _summary(self) -> str:
        """One line for the user: what the model is."""
        groups = [group for layer in self.layers for group in layer.groups]
        linears = sum(len(group.members) for group in groups)
        return (
            f"{type(self.model).__name__}, an image classifier of {self.model.config.num_labels} "
            f"classes on {'x'.join(map(str, self.loaded.input_shape))} pixels; {linears} linear "
            f"layers in {len(groups)} groups that share an input; all else stays as it is"
        )

    def needed_bytes(self, dtype: torch.dtype) -> int:
        """Bytes on disk: the checkpoint, and its finished layers beside it."""
        return 2 * sum(p.numel() for p in self.model.parameters()) * dtype.itemsize

    def calibrate(
        self, folder: Path, settings: dict[str, Any], workers: Workers = IN_PROCESS
    ) -> _CalibratedClassifier:
        """The classifier with its calibration images; nothing of it is kept on disk."""
        images = load_images(
            self.request.calibration,
            self.model,
            self.processor,
            count=self._image_count(),
            seed=self.request.seed,
        )
        note(f"calibration: {len(images.pixels)} images of {images.source}")
        _require_images(images, self.structure)
        return _CalibratedClassifier(self, images, workers)

    def _image_count(self) -> int:
        """Images to read: as asked for, or as many as have the patches of the effort's tokens."""
        if self.request.windows is not None:
            return self.request.windows
        effort = self.request.resolved_effort
        patches = max(self.structure.rows.values())
        return max(math.ceil(effort.windows * effort.window_length / patches), _LEAST_IMAGES)


class _CalibratedClassifier:
    """A classifier and its calibration images (see `pipeline.compress.calibrated.Calibrated`).

    Args:
        opened: the model; changed in place.
        images: that it is calibrated on.
        workers: who computes what is independent of all else.
    """

    embeddings: tuple[tuple[str, ...], ...] = ()
    rotary_width = 0
    added_parameters = 0

    def __init__(self, opened: _OpenedClassifier, images: ImageBatch, workers: Workers) -> None:
        self.workers = workers
        self.model, self.layers, self.images = opened.model, opened.layers, images
        self.request = opened.request
        self._batch_size = max(1, _ROWS_AT_ONCE // max(opened.structure.rows.values()))

    @cached_property
    def statistics(self) -> WholeModelCosts:
        """Moments, and costs where the request's method needs gradients."""
        request = self.request
        gradients = request.resolved_method.needs_costs and request.changes_weights
        moments = measure_whole(
            self.model,
            self.layers,
            self.images.pixels,
            gradients=gradients,
            seed=request.seed,
            batch_size=self._batch_size,
        )
        draws = DRAWS * len(self.images.pixels)
        costs = WholeModelCosts(self.model, self.layers, moments, draws)
        if gradients:
            costs.measure(CostRequest.of(request), self.workers)
        return costs

    @property
    def curves(self) -> Curves:
        return self.statistics.curves

    def price(self, request: CompressRequest, plan: RankPlan) -> bool:
        """Nothing is: there is no measured cost that those of its layers would be held against."""
        return False

    def measure(self, request: CompressRequest) -> None:
        """Run the images, while the model is still the original."""
        assert self.statistics is not None

    def output_tails(self) -> tuple[dict[str, np.ndarray], int]:
        inputs = min(moments.inputs.tokens for moments in self.statistics.moments.values())
        return self.statistics.output_tails(), inputs

    def embedding_choices(self, runtime: Runtime) -> list[list[EmbeddingChoice]]:
        """None: a classifier has neither an embedding nor an LM head."""
        return []

    def quantize_embeddings_(
        self, formats: dict[str, str], rounding: Rounding
    ) -> dict[str, dict[str, Any]]:
        """Nothing to quantise."""
        return {}

    def cache_choices(self, request: CompressRequest) -> list[list[CachePlan]]:
        raise AssertionError("no request for a classifier has a context")

    def require_cache(self, request: CompressRequest, planned: Any) -> None:
        raise UsageError("An image classifier has no KV cache.", where=request.plan)

    def shrink_cache_(
        self, request: CompressRequest, planned: Any, folder: Path, settings: dict[str, Any]
    ) -> CachePlan:
        raise AssertionError("`require_cache` lets none come here")

    def stream(self, fit: Fit) -> Stream:
        """Both models side by side, or the moments of the original where all is fitted once."""
        if fit.mix is None:
            return _OneShot(self.statistics)
        return PairedModel(self.model, self.layers, self.images.pixels, self._batch_size)

    def describe(self) -> dict[str, Any]:
        return self.images.describe()


class _OneShot:
    """Moments of the original model, which are all known."""

    def __init__(self, statistics: WholeModelCosts) -> None:
        self.statistics = statistics

    def enter(self, index: int, *, measure: bool = True) -> None:
        """Nothing to carry."""

    def measure(self, index: int, group: str) -> tuple[torch.Tensor, None]:
        return self.statistics.moment((group,)), None

    def leave(self, index: int) -> None:
        """Nothing to carry."""


def _require_images(images: ImageBatch, structure: ImageStructure) -> None:
    """Raise InputError for images that cannot determine the second moments."""
    needed = {
        group.name: math.ceil(group.in_features / structure.rows[group.name])
        for layer in structure.layers
        for group in layer.groups
    }
    widest = max(needed, key=lambda name: needed[name])
    if len(images.pixels) < needed[widest]:
        raise InputError(
            "There are too few images for the widths of the model.",
            where=images.source,
            observed=f"{len(images.pixels)} images; {widest} would see fewer inputs than it is "
            "wide, which leaves directions unseen that factors would then drop",
            expected=f"at least {needed[widest]}, better {8 * needed[widest]}",
            change="raise --windows, or give more images",
        )


def facts(what: str, trust_remote_code: bool) -> dict[str, Any]:
    """Architecture of an image classifier, and the groups of all its layers."""
    loaded = load_classifier(what, trust_remote_code=trust_remote_code)
    structure = ImageStructure.of(loaded.model, loaded.input_shape)
    return {
        "task": IMAGES,
        "source": loaded.source.kind,
        "architecture": type(loaded.model).__name__,
        "image processor": type(loaded.processor).__name__,
        "pixel values": "x".join(map(str, loaded.input_shape)),
        "classes": loaded.model.config.num_labels,
        "parameters": f"{sum(p.numel() for p in loaded.model.parameters()):,}",
        "published as": str(loaded.storage_dtype).removeprefix("torch."),
        "layers": len(structure.layers),
        "groups": "\n".join(
            f"{', '.join(m.removeprefix(layer.name + '.') for m in group.members)} of "
            f"{layer.name}: {sum(group.out_features)} x {group.in_features}, "
            f"{structure.rows[group.name]} an image"
            for layer in structure.layers
            for group in layer.groups
        ),
    } | ({"left as they are": structure.left_out} if structure.left_out else {})
