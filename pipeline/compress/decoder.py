"""What compressing needs of a decoder language model: text, streams layer by layer, embeddings."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from pipeline.calibrate.layer_stream import LayerStream
from pipeline.calibrate.measured_stream import MeasuredStream
from pipeline.calibrate.paired_stream import PairedStream
from pipeline.calibrate.precision import fast_products
from pipeline.calibrate.text import TokenBatch, load_tokens
from pipeline.compress.cache.cache_plan import CachePlan
from pipeline.compress.cache.compress_cache import (
    CacheText,
    cache_choices,
    checked_cache,
    compress_cache_,
)
from pipeline.compress.cache.prices import WINDOWS
from pipeline.compress.calibrated import Stream
from pipeline.compress.channel_scaling import scale_channels_
from pipeline.compress.embeddings import Embeddings
from pipeline.compress.factorize.factors import Rounding
from pipeline.compress.factorize.whitened_svd import truncation_losses
from pipeline.compress.layer_prices import WINDOWS as PRICED_WINDOWS
from pipeline.compress.layer_prices import PricedModel, layer_prices
from pipeline.compress.methods import Fit
from pipeline.compress.one_shot import OneShotStream
from pipeline.compress.plan.layer_costs import LayerCosts
from pipeline.compress.plan.plan import Curves, EmbeddingChoice, RankPlan
from pipeline.compress.plan.stack_costs import CostRequest
from pipeline.compress.request import CompressRequest
from pipeline.compress.rotation import rotate_
from pipeline.errors import InputError
from pipeline.model.load import LoadedModel, load_model
from pipeline.model.structure import Group, Layer, decoder_structure
from pipeline.progress import note, track
from pipeline.quantize.formats import Runtime
from pipeline.workers.workers import IN_PROCESS, Workers

_SEQUENCES_AT_ONCE = 8


def prepare(request: CompressRequest) -> _OpenedDecoder:
    """Load the decoder that a request names.

    Raises:
        PipelineError: a request that cannot be meant, or a model that cannot be compressed.
    """
    request.check()
    loaded = load_model(
        request.model,
        dtype=None,
        stream_weights=request.stream_weights,
        trust_remote_code=request.trust_remote_code,
        window_length=request.resolved_effort.window_length,
    )
    return _OpenedDecoder(request, loaded)


class _OpenedDecoder:
    """A decoder in memory (see `pipeline.compress.calibrated.Opened`).

    Args:
        request: what to do with it.
        loaded: the model; changed in place when it is compressed.
    """

    def __init__(self, request: CompressRequest, loaded: LoadedModel) -> None:
        self.request, self.loaded = request, loaded
        self.model, self.layers = loaded.model, decoder_structure(loaded.model)
        self.source, self.processor = loaded.source, loaded.tokenizer
        self.storage_dtype = loaded.storage_dtype
        self.recipe_fields: dict[str, Any] = {}
        self.report_fields: dict[str, Any] = {}

    def needed_bytes(self, dtype: torch.dtype) -> int:
        """Bytes on disk: the checkpoint, its finished layers beside it, and the costs."""
        numbers = sum(p.numel() for p in self.model.parameters())
        return disk_bytes(self.request, self.layers, numbers, dtype)

    def calibrate(
        self, folder: Path, settings: dict[str, Any], workers: Workers = IN_PROCESS
    ) -> CalibratedDecoder:
        """The decoder with its calibration text, which is read when it is first needed."""
        power, added = self.request.balance, 0
        if self.request.rotates:
            done = rotate_(self.model, self.layers, self.request.rotate, self.request.seed)
            self.recipe_fields["rotation"] = done.describe()
            added = done.added_parameters

        def read() -> TokenBatch:
            batch = self._read_tokens()
            if power:
                scale_channels_(self.model, self.layers, batch.tokens, power)
            return batch

        def costs(batch: TokenBatch) -> LayerCosts:
            return LayerCosts(folder, settings | {"text": batch.describe()["sha256"]})

        return CalibratedDecoder(self.model, self.layers, read, costs, added, workers)

    def _read_tokens(self) -> TokenBatch:
        """The windows that the request asks for."""
        request, effort = self.request, self.request.resolved_effort
        count = effort.windows_for(widest_group(self.layers).in_features)
        if request.calibration == "self":
            note(
                f"calibration: {count} windows of {effort.window_length} tokens, "
                "sampled from the model itself (--calibration takes a text file or wikitext2+c4)"
            )
        batch = load_tokens(
            request.calibration,
            self.processor,
            self.model,
            count=count,
            length=effort.window_length,
            seed=request.seed,
        )
        _require_tokens(batch, self.layers)
        return batch


class CalibratedDecoder:
    """A decoder and its calibration text (see `pipeline.compress.calibrated.Calibrated`).

    Args:
        model: in evaluation mode; changed in place.
        layers: its structure.
        read: gives the calibration text.
        open_costs: gives where costs are kept, of that text.
        added_parameters: that the model as it was given does not have.
        workers: who computes what is independent of all else.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        layers: list[Layer],
        read: Callable[[], TokenBatch],
        open_costs: Callable[[TokenBatch], LayerCosts],
        added_parameters: int = 0,
        workers: Workers = IN_PROCESS,
    ) -> None:
        self.model, self.layers, self.added_parameters = model, layers, added_parameters
        self.workers = workers
        self._embeddings = Embeddings(model)
        self.embeddings = self._embeddings.groups
        config = model.config.get_text_config()
        width = getattr(config, "head_dim", None)
        self.rotary_width = width or config.hidden_size // config.num_attention_heads
        self._read, self._open_costs = read, open_costs
        self._surveyed: int | None = None

    @classmethod
    def at_hand(
        cls,
        model: PreTrainedModel,
        layers: list[Layer],
        batch: TokenBatch,
        costs: LayerCosts | None = None,
        added_parameters: int = 0,
        workers: Workers = IN_PROCESS,
        surveyed: int | None = None,
    ) -> CalibratedDecoder:
        """A decoder whose text is read already; its costs, if it needs any, lie in a folder.

        They are measured on `surveyed` windows where that is given.
        """

        def kept(batch: TokenBatch) -> LayerCosts:
            assert costs is not None, "nothing should ask for costs"
            return costs

        found = cls(model, layers, lambda: batch, kept, added_parameters, workers)
        found._surveyed = surveyed
        return found

    @cached_property
    def batch(self) -> TokenBatch:
        """The calibration text."""
        return self._read()

    @cached_property
    def statistics(self) -> LayerCosts:
        return self._open_costs(self.batch)

    @property
    def curves(self) -> Curves:
        return self.statistics.curves

    def measure(self, request: CompressRequest) -> None:
        """Sweep the gradients back, if the method needs them and anything is to change."""
        needed = request.resolved_method.needs_costs and request.changes_weights
        if not needed or self._surveyed is not None:
            return
        count = request.resolved_effort.survey_windows
        windows = self.batch.spread(count)
        wanted = wanted_costs(request, self.layers, windows.numel())
        self.statistics.measure(self.model, self.layers, windows, wanted, self.workers)
        self._surveyed = count

    def price(self, request: CompressRequest, plan: RankPlan) -> bool:
        fit = request.resolved_method.fit
        changes = any(not group.is_unchanged for group in plan.groups)
        if not (request.resolved_effort.prices and fit.two_sided and changes):
            return False
        priced = PricedModel(
            self.model,
            self.layers,
            self.statistics,
            *self._texts(request, PRICED_WINDOWS),
            self.workers,
        )
        self.statistics.price_(layer_prices(priced, plan, fit, self.statistics.folder / "prices"))
        return True

    def output_tails(self) -> tuple[dict[str, np.ndarray], int]:
        stream = LayerStream(self.model, self.layers, self.batch.tokens)
        tails: dict[str, np.ndarray] = {}
        for index, layer in enumerate(track(self.layers, "truncation losses")):
            with fast_products(self.model):
                moments = stream.advance(index)
            for group in layer.groups:
                inputs = moments[group.name].mean()
                weights = {m: self.model.get_submodule(m).weight.detach() for m in group.members}
                tails |= {m: truncation_losses(w, inputs).numpy() for m, w in weights.items()}
        return tails, self.batch.tokens.numel()

    def embedding_choices(self, runtime: Runtime) -> list[list[EmbeddingChoice]]:
        """Every way to store the embedding and the LM head, measured once and kept."""
        return self.statistics.kept_choices(
            "tables", lambda: self._embeddings.choices(self.batch.tokens, runtime)
        )

    def quantize_embeddings_(
        self, formats: dict[str, str], rounding: Rounding
    ) -> dict[str, dict[str, Any]]:
        if not formats:
            return {}
        entries, _ = self._embeddings.quantize_(formats, self.batch.tokens, rounding)
        return entries

    def cache_choices(self, request: CompressRequest) -> list[list[CachePlan]]:
        costs, text = self.statistics, CacheText(*self._texts(request, WINDOWS))
        folder, settings = costs.folder / "cache", costs.settings | {"seed": request.seed}
        return cache_choices(self.model, self.layers, text, request, folder, settings)

    def require_cache(self, request: CompressRequest, planned: Any) -> None:
        checked_cache(self.model, self.layers, request, planned)

    def shrink_cache_(
        self, request: CompressRequest, planned: Any, folder: Path, settings: dict[str, Any]
    ) -> CachePlan:
        text = CacheText(*self._texts(request, WINDOWS))
        return compress_cache_(self.model, self.layers, text, request, planned, folder, settings)

    def _texts(self, request: CompressRequest, most: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The windows that the survey is made on, and at most so many others."""
        count = request.resolved_effort.survey_windows
        return self.batch.spread(count), self.batch.apart_from(count, most)

    def stream(self, fit: Fit) -> Stream:
        """Both models side by side, or the original alone where every layer is fitted once."""
        if fit.mix is not None:
            return PairedStream(
                self.model, self.layers, self.batch.tokens, _SEQUENCES_AT_ONCE, self.workers
            )
        # A survey that kept what it has seen of the inputs need not be repeated on its windows.
        first = self.layers[0]
        surveyed = self._surveyed or 0
        known = self.statistics if surveyed else None
        if known is None or known.inputs_of(first.name, first.groups[0].name) is None:
            known, surveyed = None, 0
        rest = self.batch.rest_of(surveyed)
        stream = None
        if len(rest):
            stream = MeasuredStream(self.model, self.layers, rest, self.workers, _SEQUENCES_AT_ONCE)
        return OneShotStream(self.layers, stream, known, self.batch.tokens.numel() - rest.numel())

    def describe(self) -> dict[str, Any]:
        return self.batch.describe()


def disk_bytes(
    request: CompressRequest, layers: list[Layer], parameters: int, dtype: torch.dtype
) -> int:
    """Bytes on disk: the checkpoint, its finished layers beside it, and the costs."""
    needed_bytes = 2 * parameters * dtype.itemsize
    if request.resolved_method.needs_costs:
        effort = request.resolved_effort
        tokens = effort.survey_windows * effort.window_length
        inputs = wanted_costs(request, layers, tokens).inputs
        needed_bytes += LayerCosts.disk_bytes(layers, tokens, inputs)
    return needed_bytes


def wanted_costs(request: CompressRequest, layers: list[Layer], tokens: int) -> CostRequest:
    """What a survey is to measure on so many tokens.

    It keeps moments of inputs for a fit that reads the same of the original model, where they are
    smaller than the text.
    """
    goes_on = request.resolved_method.fit.mix is None
    inputs = goes_on and tokens > widest_group(layers).in_features
    return replace(CostRequest.of(request), inputs=inputs)


def widest_group(layers: list[Layer]) -> Group:
    """The group that reads most numbers at once."""

    def width(group: Group) -> int:
        return group.in_features

    return max((group for layer in layers for group in layer.groups), key=width)


def _require_tokens(tokens: TokenBatch, layers: list[Layer]) -> None:
    """Refuse calibration text that cannot determine the second moments.

    Raises:
        InputError: fewer tokens than the widest input has entries; says how many are needed.
    """
    widest = widest_group(layers)
    count = tokens.tokens.numel()
    if count < widest.in_features:
        raise InputError(
            "The calibration text is too short for the widths of the model.",
            where=tokens.source,
            observed=f"{count} tokens; {widest.name} reads {widest.in_features} numbers at once, "
            "and as many tokens leave directions unseen that factors would then drop",
            expected=f"at least {widest.in_features} tokens, better {8 * widest.in_features}",
            change="raise --windows or --window-length",
        )


def facts(what: str, trust_remote_code: bool) -> dict[str, Any]:
    """Architecture of a decoder language model, and the groups of its first layer."""
    loaded = load_model(what, trust_remote_code=trust_remote_code)
    layers = decoder_structure(loaded.model)
    groups = layers[0].groups
    return {
        "source": loaded.source.kind,
        "architecture": type(loaded.model).__name__,
        "parameters": f"{sum(p.numel() for p in loaded.model.parameters()):,}",
        "published as": str(loaded.storage_dtype).removeprefix("torch."),
        "layers": len(layers),
        "groups of a layer": "\n".join(
            f"{', '.join(m.rsplit('.', 1)[-1] for m in group.members)}: "
            f"{sum(group.out_features)} x {group.in_features}"
            for group in groups
        ),
    }
