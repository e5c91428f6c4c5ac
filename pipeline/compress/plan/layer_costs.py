"""What every group of matrices is worth: the KL that truncating and rounding it should cost.

For a decoder it is measured layer by layer and kept on disk; for a model that is run as a whole, in
memory. A fit asks for the same statistics: in what geometry errors count.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from transformers import PreTrainedModel

from pipeline.calibrate.fisher import BackwardSweep
from pipeline.calibrate.moments import DrawnMoments, SeenGroup
from pipeline.compress.factorize.whitened_svd import truncation_losses
from pipeline.compress.finished_layers import FinishedLayers, keep_values, kept_values
from pipeline.compress.plan.plan import Curves, EmbeddingChoice, Members
from pipeline.compress.plan.quantization_costs import QuantizationCosts, StackCost
from pipeline.compress.plan.rank_search import stacks_of
from pipeline.compress.plan.stack_costs import (
    CostRequest,
    CostsOfStack,
    OutputStatistics,
    cost_bytes,
    stack_costs,
)
from pipeline.model.structure import Group, Layer
from pipeline.progress import track
from pipeline.workers.workers import IN_PROCESS, InOrder, Result, Workers

# Through a layer and back; of a large vocabulary the logits of so many are held.
_TOKENS_AT_ONCE = 1024
_JOIN = "+"


class GroupStatistics(Protocol):
    """Statistics of the linears of a model, by the names of linears that read the same input.

    Attributes:
        curves: expected KL to the original, nats, of every stack at every rank from 0 to full.
        quantization: what rounding is expected to add to it; empty where no formats were asked for.
    """

    curves: Curves
    quantization: QuantizationCosts

    def of(self, members: Members) -> OutputStatistics:
        """What errors of linears that read the same input are worth."""
        ...


class LayerCosts:
    """Costs and statistics of a decoder, in a folder, measured as far as they are missing.

    Args:
        folder: where they are kept; an interrupted measurement continues there.
        settings: everything they depend on; compared when a measurement is taken up again.

    Attributes:
        folder: as it was given.
        settings: as they were given.
        curves: expected KL, nats per token, of every stack at every rank from 0 to full.
        quantization: what rounding is expected to add to it; empty where no formats were asked for.

    Raises:
        InputError: the folder holds a measurement with other settings.
    """

    def __init__(self, folder: Path, settings: dict[str, Any]) -> None:
        self.folder, self.settings = folder, settings
        self.finished = FinishedLayers(folder / "layers", settings)
        self.curves: Curves = {}
        self.quantization: QuantizationCosts = {}
        self._layer_of: dict[str, str] = {}
        self._source_of: dict[str, str] = {}

    @staticmethod
    def disk_bytes(layers: list[Layer], tokens: int, inputs: bool) -> int:
        """Bytes on disk that costs from so many tokens take, but for the curves.

        Args:
            layers: of the decoder.
            tokens: of the text.
            inputs: see `CostRequest`.
        """
        groups = [group for layer in layers for group in layer.groups]
        of_inputs = 8 if inputs else 4
        moments = sum(
            of_inputs * g.in_features**2 + 2 * sum(h * h for h in g.out_features) for g in groups
        )
        return moments + 2 * len(layers) * tokens * layers[0].groups[0].in_features

    def measure(
        self,
        model: PreTrainedModel,
        layers: list[Layer],
        tokens: torch.Tensor,
        wanted: CostRequest,
        workers: Workers = IN_PROCESS,
    ) -> None:
        """Sweep the model forward and back, but for the layers that are finished.

        Args:
            model: a decoder in evaluation mode; it is not changed.
            layers: its structure.
            tokens: int64 [N, T].
            wanted: which costs.
            workers: who computes them, while the sweep goes on.
        """
        missing = [i for i, layer in enumerate(layers) if layer.name not in self.finished]
        if missing:
            self._sweep(model, layers, tokens, wanted, missing, workers)
        for layer in layers:
            self._layer_of |= {m: layer.name for group in layer.groups for m in group.members}
            self._source_of |= {m: group.name for group in layer.groups for m in group.members}
            tensors, _ = self.finished.load(layer.name)
            for name, curve in tensors.items():
                if name.startswith("curve."):
                    members = tuple(name.removeprefix("curve.").split(_JOIN))
                    self.curves[members] = curve.numpy()
            self.quantization |= _kept_costs(tensors)

    def price_(self, prices: Mapping[str, float]) -> None:
        """Multiply what errors in each layer are expected to cost by what `layer_prices` found."""
        price_of = {member: prices[layer] for member, layer in self._layer_of.items()}
        self.curves = {stack: curve * price_of[stack[0]] for stack, curve in self.curves.items()}
        self.quantization = {
            stack: cost.times(price_of[stack[0]]) for stack, cost in self.quantization.items()
        }

    def _sweep(
        self,
        model: PreTrainedModel,
        layers: list[Layer],
        tokens: torch.Tensor,
        wanted: CostRequest,
        missing: list[int],
        workers: Workers,
    ) -> None:
        """Measure the missing layers, the last one first."""
        rows = max(1, _TOKENS_AT_ONCE // tokens.shape[1])
        sweep = BackwardSweep(
            model,
            layers,
            tokens,
            self.folder / "sweep",
            seed=wanted.seed,
            batch_size=rows,
            workers=workers,
        )

        def finish(key: _Measured, costs: list[CostsOfStack]) -> None:
            if key.index in missing:
                found = _curves_and_noise(dict(zip(key.costs, costs, strict=True)))
                kept = {name: tensor.get() for name, tensor in key.kept.items()}
                self.finished.add(layers[key.index].name, kept | found, [])
            sweep.forget(key.index)

        waiting = InOrder(workers, finish)
        for index in track(
            range(sweep.forward(missing[-1]), missing[0] - 1, -1), "sensitivity, backward"
        ):
            here = _Measured(index)
            groups = {group.name: group for group in layers[index].groups}
            for name, seen in sweep.seen(index):
                if index in missing:
                    here.add(groups[name], seen, wanted)
                    here.costs |= _submitted(workers, model, groups[name], seen, wanted)
            waiting.add(here, list(here.costs.values()))
        waiting.finish()
        sweep.remove()

    def kept_choices(
        self, name: str, measure: Callable[[], list[list[EmbeddingChoice]]]
    ) -> list[list[EmbeddingChoice]]:
        """What `measure` returns, kept in the folder so that it is measured once."""
        path = self.folder / f"{name}.json"
        kept = kept_values(path)
        if kept is not None:
            return [[EmbeddingChoice(**choice) for choice in choices] for choices in kept]
        found = measure()
        keep_values(path, [[asdict(choice) for choice in choices] for choices in found])
        return found

    def inputs_of(self, layer: str, group: str) -> torch.Tensor | None:
        """S of a group's input over the text that was measured on, float32; None if not kept."""
        tensors, _ = self.finished.load(layer)
        return tensors.get(f"inputs.{group}")

    def of(self, members: Members) -> OutputStatistics:
        tensors, _ = self.finished.load(self._layer_of[members[0]])
        return OutputStatistics(
            tensors[f"weighted.{self._source_of[members[0]]}"],
            tuple(tensors[f"sensitivity.{member}"] for member in members),
        )


@dataclass
class _Measured:
    """A layer whose costs are being computed.

    Attributes:
        index: of the layer.
        costs: of its stacks, in their order.
        kept: its statistics, by the names that they are kept by.
    """

    index: int
    costs: dict[Members, Result[CostsOfStack]] = field(default_factory=dict)
    kept: dict[str, Result[torch.Tensor]] = field(default_factory=dict)

    def add(self, group: Group, seen: SeenGroup, wanted: CostRequest) -> None:
        """What is kept of a group's moments: sensitivities, and those of its inputs."""
        outputs = zip(group.members, seen.outputs, strict=True)
        self.kept |= {f"sensitivity.{member}": output for member, output in outputs}
        self.kept[f"weighted.{group.name}"] = seen.weighted
        if wanted.inputs:
            self.kept[f"inputs.{group.name}"] = seen.inputs


def _submitted(
    workers: Workers, model: PreTrainedModel, group: Group, seen: SeenGroup, wanted: CostRequest
) -> dict[Members, Result[CostsOfStack]]:
    """Let the costs of a group's stacks be computed, those of the largest first."""
    weights = {m: workers.share(model.get_submodule(m).weight.detach()) for m in group.members}
    outputs = dict(zip(group.members, seen.outputs, strict=True))
    heights = group.heights
    return {
        stack: workers.submit(
            f"costs of {', '.join(stack)}",
            stack_costs,
            stack,
            wanted,
            seen.inputs,
            seen.weighted,
            *(weights[member] for member in stack),
            *(outputs[member] for member in stack),
            needed_bytes=cost_bytes(group.in_features, [heights[m] for m in stack], wanted),
        )
        for stack in sorted(
            stacks_of(group, cat=wanted.cat), key=lambda s: -sum(heights[m] for m in s)
        )
    }


def _curves_and_noise(costs: dict[Members, CostsOfStack]) -> dict[str, torch.Tensor]:
    """What is kept of the costs of a layer's stacks."""
    kept: dict[str, torch.Tensor] = {}
    for stack, (curve, cost) in costs.items():
        name = _JOIN.join(stack)
        kept[f"curve.{name}"] = curve
        if cost is not None:
            kept |= {f"noise.{f}.{name}": torch.from_numpy(a) for f, a in vars(cost).items()}
    return kept


def _kept_costs(tensors: dict[str, torch.Tensor]) -> QuantizationCosts:
    """What rounding costs the stacks of a layer, out of the tensors that are kept of it."""
    parts: dict[Members, dict[str, np.ndarray]] = {}
    for name, tensor in tensors.items():
        kind, _, rest = name.partition(".")
        if kind == "noise":
            field, _, members = rest.partition(".")
            parts.setdefault(tuple(members.split(_JOIN)), {})[field] = tensor.numpy()
    return {members: StackCost(**fields) for members, fields in parts.items()}


class WholeModelCosts:
    """Costs and statistics of a model that was run as a whole, in memory.

    Args:
        model: that was measured; not changed.
        layers: its structure.
        moments: group -> what `pipeline.calibrate.whole_model.measure_whole` found.
        draws: labels drawn, over all images.

    Attributes:
        curves: expected KL, nats an image; empty until `measure`.
        quantization: what rounding is expected to add to it.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        layers: list[Layer],
        moments: dict[str, DrawnMoments],
        draws: int,
    ) -> None:
        self.model, self.moments, self.draws = model, moments, draws
        self.groups = {m: g for layer in layers for g in layer.groups for m in g.members}
        self.curves: Curves = {}
        self.quantization: QuantizationCosts = {}

    def measure(self, wanted: CostRequest, workers: Workers = IN_PROCESS) -> None:
        """Compute the costs from moments that hold gradients.

        Raises:
            InputError: moments that cannot be used; names the linears.
        """
        waiting = InOrder(workers, self._keep)
        for group in dict.fromkeys(self.groups.values()):
            submitted = _submitted(workers, self.model, group, self._seen(group, workers), wanted)
            waiting.add(list(submitted), list(submitted.values()))
        waiting.finish()

    def _seen(self, group: Group, workers: Workers) -> SeenGroup:
        statistics = self.of(group.members)
        return SeenGroup(
            workers.share(self.moment(group.members)),
            workers.share(statistics.weighted),
            tuple(map(workers.share, statistics.outputs)),
        )

    def _keep(self, stacks: list[Members], costs: list[CostsOfStack]) -> None:
        for stack, (curve, cost) in zip(stacks, costs, strict=True):
            self.curves[stack] = curve.numpy()
            if cost is not None:
                self.quantization[stack] = cost

    def moment(self, members: Members) -> torch.Tensor:
        """S = E[x x^T] of what the members read in the original model, float64 [n, n]."""
        return self._of(members).inputs.mean()

    def of(self, members: Members) -> OutputStatistics:
        found = self._of(members)
        outputs = tuple(found.outputs[member] / self.draws for member in members)
        return OutputStatistics(found.weighted, outputs)

    def output_tails(self) -> dict[str, np.ndarray]:
        """Linear -> E |(W - W_r) x|^2 at each rank r, float64 [min(m, n) + 1]."""
        weights = {m: self.model.get_submodule(m).weight.detach() for m in self.groups}
        return {m: truncation_losses(w, self.moment((m,))).numpy() for m, w in weights.items()}

    def _of(self, members: Members) -> DrawnMoments:
        return self.moments[self.groups[members[0]].name]
