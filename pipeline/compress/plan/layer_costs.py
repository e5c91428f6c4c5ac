"""What every group of matrices is worth: the KL that truncating and rounding it should cost.

For a decoder it is measured layer by layer and kept on disk; for a model that is run as a whole, in
memory. A fit asks for the same statistics: in what geometry errors count.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from transformers import PreTrainedModel

from pipeline.calibrate.fisher import BackwardSweep
from pipeline.calibrate.hooks import not_finite
from pipeline.calibrate.moments import DrawnMoments, GroupMoments, balanced
from pipeline.compress.factorize.factors import Form
from pipeline.compress.factorize.whitened_svd import is_zero, regular, shrunk, truncation_losses
from pipeline.compress.finished_layers import FinishedLayers, keep_values, kept_values
from pipeline.compress.plan.plan import Curves, EmbeddingChoice, Members
from pipeline.compress.plan.quantization_costs import QuantizationCosts, StackCost
from pipeline.compress.plan.rank_search import stacks_of
from pipeline.compress.request import CompressRequest
from pipeline.model.structure import Group, Layer
from pipeline.progress import track
from pipeline.quantize.formats import Format

# Of the sensitivities, which are estimated from few tokens.
_SENSITIVITY_SHRINKAGE = 0.1
_NEXT_TO_NOTHING = 1e-12
# Through a layer and back; of a large vocabulary the logits of so many are held.
_TOKENS_AT_ONCE = 1024
_JOIN = "+"


@dataclass(frozen=True)
class CostRequest:
    """Which costs are wanted.

    Attributes:
        cat: of stacks of several members, too.
        formats: low-bit formats whose cost is wanted.
        form: of the factors that will be rounded.
        seed: of what is drawn from the model's own distribution.
    """

    cat: bool = True
    formats: tuple[Format, ...] = ()
    form: Form = "skip"
    seed: int = 0

    @classmethod
    def of(cls, request: CompressRequest) -> CostRequest:
        """What a request's method and budget are decided by."""
        method = request.resolved_method
        form: Form = "skip" if method.skip else "low_rank"
        return cls(method.cat, request.formats, form, request.seed)


class GroupStatistics(Protocol):
    """Statistics of the linears of a model, by the names of linears that read the same input.

    Attributes:
        curves: expected KL to the original, nats, of every stack at every rank from 0 to full.
        quantization: what rounding is expected to add to it; empty where no formats were asked for.
    """

    curves: Curves
    quantization: QuantizationCosts

    def sensitivities(self, members: Members) -> list[torch.Tensor]:
        """Shrunk G = E[g g^T] of each member's output, float64 [m_i, m_i], of full rank."""
        ...

    def geometry(self, members: Members, moment: torch.Tensor) -> torch.Tensor:
        """What errors of the members are measured in, from S of their input; float64 [n, n]."""
        ...


def _group_costs(
    model: PreTrainedModel,
    group: Group,
    geometry: torch.Tensor,
    sensitivities: Mapping[str, torch.Tensor],
    wanted: CostRequest,
) -> dict[Members, tuple[torch.Tensor, StackCost | None]]:
    """Of every stack of a group: what truncation costs at each rank, and what rounding costs."""
    weight = {m: model.get_submodule(m).weight.detach() for m in group.members}
    costs: dict[Members, tuple[torch.Tensor, StackCost | None]] = {}
    for stack in stacks_of(group, cat=wanted.cat):
        stacked, parts = torch.cat([weight[m] for m in stack]), [sensitivities[m] for m in stack]
        if is_zero(geometry) or all(map(is_zero, parts)) or not stacked.any():
            costs[stack] = _no_costs(stacked, wanted)
            continue
        parts = _counting(parts)
        curve = truncation_losses(stacked, geometry, parts) / 2
        rounding = None
        if wanted.formats:
            rounding = StackCost.measure(stacked, geometry, parts, wanted.formats, wanted.form)
        costs[stack] = curve, rounding
    return costs


def _no_costs(stacked: torch.Tensor, wanted: CostRequest) -> tuple[torch.Tensor, StackCost | None]:
    """Of a stack that is zero or is given nothing, or whose outputs reach no logit."""
    curve = torch.zeros(min(stacked.shape) + 1, dtype=torch.float64)
    count = len(wanted.formats)
    none = (np.zeros((1, count)) for _ in range(2))
    free = StackCost(np.zeros(count), np.array([1]), *none)
    return curve, free if wanted.formats else None


def _counting(parts: list[torch.Tensor]) -> list[torch.Tensor]:
    """Sensitivities of a stack, those of members without effect next to nothing, but regular."""
    largest = max(float(part.diagonal().mean()) for part in parts)
    share = largest * _NEXT_TO_NOTHING if largest else 1.0
    return [share * regular(part) if is_zero(part) else part for part in parts]


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
    def disk_bytes(layers: list[Layer], tokens: int) -> int:
        """Bytes on disk that costs from so many tokens take, but for the curves."""
        groups = [group for layer in layers for group in layer.groups]
        moments = sum(4 * g.in_features**2 + 2 * sum(h * h for h in g.out_features) for g in groups)
        return moments + 2 * len(layers) * tokens * layers[0].groups[0].in_features

    def measure(
        self, model: PreTrainedModel, layers: list[Layer], tokens: torch.Tensor, wanted: CostRequest
    ) -> None:
        """Sweep the model forward and back, but for the layers that are finished.

        Args:
            model: a decoder in evaluation mode; it is not changed.
            layers: its structure.
            tokens: int64 [N, T].
            wanted: which costs.
        """
        missing = [i for i, layer in enumerate(layers) if layer.name not in self.finished]
        if missing:
            rows = max(1, _TOKENS_AT_ONCE // tokens.shape[1])
            sweep = BackwardSweep(
                model, layers, tokens, self.folder / "sweep", seed=wanted.seed, batch_size=rows
            )
            back = range(sweep.forward(missing[-1]), missing[0] - 1, -1)
            for index in track(back, "sensitivity, backward"):
                moments = sweep.backward(index)
                if index in missing:
                    tensors = _layer_tensors(model, layers[index], moments, wanted)
                    self.finished.add(layers[index].name, tensors, [])
            sweep.remove()
        for layer in layers:
            self._layer_of |= {m: layer.name for group in layer.groups for m in group.members}
            self._source_of |= {m: group.name for group in layer.groups for m in group.members}
            tensors, _ = self.finished.load(layer.name)
            for name, curve in tensors.items():
                if name.startswith("curve."):
                    members = tuple(name.removeprefix("curve.").split(_JOIN))
                    self.curves[members] = curve.numpy()
            self.quantization |= _kept_costs(tensors)

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

    def sensitivities(self, members: Members) -> list[torch.Tensor]:
        tensors = self._tensors(members)
        found = [tensors[f"sensitivity.{m}"] for m in members]
        return _counting([shrunk(moment, _SENSITIVITY_SHRINKAGE) for moment in found])

    def geometry(self, members: Members, moment: torch.Tensor) -> torch.Tensor:
        weighted = self._tensors(members)[f"weighted.{self._source_of[members[0]]}"]
        return regular(balanced(moment, weighted))

    def _tensors(self, members: Members) -> dict[str, torch.Tensor]:
        tensors, _ = self.finished.load(self._layer_of[members[0]])
        return tensors


def _layer_tensors(
    model: PreTrainedModel, layer: Layer, moments: dict[str, GroupMoments], wanted: CostRequest
) -> dict[str, torch.Tensor]:
    """What is kept of a layer: sensitivities, weighted moments, and the costs of each stack."""
    kept: dict[str, torch.Tensor] = {}
    for group in layer.groups:
        found = moments[group.name]
        # In bfloat16, which halves the disk they take; it rounds away less than the shrinkage.
        kept |= {f"sensitivity.{m}": g.mean().bfloat16() for m, g in found.outputs.items()}
        kept[f"weighted.{group.name}"] = found.weighted.mean().float()
        geometry = balanced(found.inputs.mean(), found.weighted.mean())
        blocks = {m: shrunk(g.mean(), _SENSITIVITY_SHRINKAGE) for m, g in found.outputs.items()}
        for stack, (curve, cost) in _group_costs(model, group, geometry, blocks, wanted).items():
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

    def measure(self, wanted: CostRequest) -> None:
        """Compute the costs from moments that hold gradients.

        Raises:
            InputError: moments that cannot be used; names the linears.
        """
        for group in dict.fromkeys(self.groups.values()):
            moments = self._of(group.members)
            geometry = balanced(self.moment(group.members), moments.weighted)
            blocks = {
                member: shrunk(moments.outputs[member] / self.draws, _SENSITIVITY_SHRINKAGE)
                for member in group.members
            }
            try:
                costs = _group_costs(self.model, group, geometry, blocks, wanted)
            except ValueError as error:
                raise not_finite(", ".join(group.members), error) from error
            self.curves |= {stack: curve.numpy() for stack, (curve, _) in costs.items()}
            self.quantization |= {s: cost for s, (_, cost) in costs.items() if cost is not None}

    def moment(self, members: Members) -> torch.Tensor:
        """S = E[x x^T] of what the members read in the original model, float64 [n, n]."""
        return self._of(members).inputs.mean()

    def sensitivities(self, members: Members) -> list[torch.Tensor]:
        outputs, scale = self._of(members).outputs, 1 / self.draws
        return _counting([shrunk(outputs[m] * scale, _SENSITIVITY_SHRINKAGE) for m in members])

    def geometry(self, members: Members, moment: torch.Tensor) -> torch.Tensor:
        return regular(balanced(moment, self._of(members).weighted))

    def output_tails(self) -> dict[str, np.ndarray]:
        """Linear -> E |(W - W_r) x|^2 at each rank r, float64 [min(m, n) + 1]."""
        weights = {m: self.model.get_submodule(m).weight.detach() for m in self.groups}
        return {m: truncation_losses(w, self.moment((m,))).numpy() for m, w in weights.items()}

    def _of(self, members: Members) -> DrawnMoments:
        return self.moments[self.groups[members[0]].name]
