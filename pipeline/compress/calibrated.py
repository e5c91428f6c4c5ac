"""What compressing asks of a model and its calibration inputs, whichever task they are of.

`pipeline.compress.decoder` and `pipeline.compress.classifier` are the two that there are.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.image_processing_base import ImageProcessingMixin

from pipeline.compress.cache.cache_plan import CachePlan
from pipeline.compress.factorize.factors import Rounding
from pipeline.compress.methods import Fit
from pipeline.compress.plan.layer_costs import GroupStatistics
from pipeline.compress.plan.plan import EmbeddingChoice, Measured, RankPlan
from pipeline.compress.request import CompressRequest
from pipeline.model.source import Source
from pipeline.model.structure import Layer
from pipeline.quantize.formats import Runtime
from pipeline.workers.workers import IN_PROCESS, Workers


class Stream(Protocol):
    """The calibration inputs on their way through the layers, first layer first."""

    def enter(self, index: int, *, measure: bool = True) -> None:
        """Go on to layer `index`, which is the original's; `measure` if its inputs are wanted."""
        ...

    def measure(self, index: int, group: str) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Moments of what a group of the layer will read: see `InputMoments`."""
        ...

    def leave(self, index: int) -> None:
        """Go behind layer `index`, which is compressed by now."""
        ...


class Calibrated(Measured, Protocol):
    """A model and its calibration inputs; each thing is measured when it is first asked for.

    Attributes:
        model: in evaluation mode; compressed in place.
        layers: its structure.
        embeddings: names of the modules that share an embedding's or an LM head's matrix, the owner
            first; none where there are no such matrices to quantise.
        rotary_width: numbers a position of the angles that a graph holds; 0 for none.
        added_parameters: that the model as it was given does not have.
        workers: who computes what is independent of all else.
    """

    model: PreTrainedModel
    workers: Workers
    embeddings: tuple[tuple[str, ...], ...]
    rotary_width: int
    added_parameters: int

    @property
    def statistics(self) -> GroupStatistics:
        """Costs and geometry of every group."""
        ...

    def measure(self, request: CompressRequest) -> None:
        """Measure what the request's method needs to know, unless that was done.

        Raises:
            InputError: activations or gradients that are not finite.
        """
        ...

    def price(self, request: CompressRequest, plan: RankPlan) -> bool:
        """Price the costs by what a plan made with them costs, where the request's effort does.

        Returns:
            Whether that was done: costs are then those of a measured run.
        """
        ...

    def embedding_choices(self, runtime: Runtime) -> list[list[EmbeddingChoice]]:
        """For each of `embeddings` every way to store it, with its bytes and its cost."""
        ...

    def quantize_embeddings_(
        self, formats: dict[str, str], rounding: Rounding
    ) -> dict[str, dict[str, Any]]:
        """Quantise embeddings by name, in place; returns their `modules` entries."""
        ...

    def cache_choices(self, request: CompressRequest) -> list[list[CachePlan]]:
        """Every way to cache the keys and the values of each layer, and what it should cost.

        Of one side each, or of one layer.

        Raises:
            UsageError: a model that has no KV cache.
        """
        ...

    def require_cache(self, request: CompressRequest, planned: Any) -> None:
        """Refuse a smaller cache that the model cannot have, before anything is measured.

        Args:
            request: what the cache may take.
            planned: the section `caches` of the user's plan; None to search one.

        Raises:
            UsageError, InputError: a model without such a cache, or a plan of another.
        """
        ...

    def shrink_cache_(
        self, request: CompressRequest, planned: Any, folder: Path, settings: dict[str, Any]
    ) -> CachePlan:
        """Give the compressed model a smaller cache, in place (see `compress_cache_`).

        Raises:
            UsageError: a model that has none.
        """
        ...

    def stream(self, fit: Fit) -> Stream:
        """A new way through the layers, with moments of the kind that the fit wants."""
        ...

    def describe(self) -> dict[str, Any]:
        """What recipe.json says of the calibration inputs, their sha256 among it."""
        ...


class Opened(Protocol):
    """A model that was loaded and looked at, before any calibration.

    Attributes:
        model: in evaluation mode.
        layers: its structure.
        source: where it came from.
        processor: what makes its inputs; saved with it.
        storage_dtype: the type its weights were published in.
        recipe_fields: what recipe.json says of it beside what it says of any model.
        report_fields: of report.json, likewise.
    """

    model: PreTrainedModel
    layers: list[Layer]
    source: Source
    processor: PreTrainedTokenizerBase | ImageProcessingMixin
    storage_dtype: torch.dtype
    recipe_fields: dict[str, Any]
    report_fields: dict[str, Any]

    def needed_bytes(self, dtype: torch.dtype) -> int:
        """Bytes on disk that a run needs."""
        ...

    def calibrate(
        self, folder: Path, settings: dict[str, Any], workers: Workers = IN_PROCESS
    ) -> Calibrated:
        """With its calibration inputs; measurements, which depend on settings, lie in a folder."""
        ...
